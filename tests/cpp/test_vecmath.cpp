// exp, tanh and the activations over the whole range of fp32, on every tier, against double, with the bounds of
// docs/numerics.md. With PBM_PRINT_ERRORS in the environment the measured maxima are printed as rows of its table.
#include <algorithm>
#include <vector>

#include "elements.h"
#include "probe.h"

namespace pbm::test {
namespace {

double exact_exp(double x) { return std::exp(x); }
double exact_exp2(double x) { return std::exp2(x); }
double exact_exp2_bf16(double x) { return std::exp2(x); }
double exact_tanh(double x) { return std::tanh(x); }
double exact_tail(double t) { return 0.5 * std::erfc(t * std::sqrt(0.5)); }
double exact_relu(double x) { return x > 0 ? x : 0; }
double exact_gelu(double x) { return 0.5 * x * std::erfc(-x * std::sqrt(0.5)); }
double exact_gelu_tanh(double x) { return x / (1 + std::exp(-2 * std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x))); }
double exact_silu(double x) { return x / (1 + std::exp(-x)); }
double exact_relu6(double x) { return std::fmin(std::fmax(x, 0), 6); }
double exact_hardswish(double x) { return x * std::fmin(std::fmax(x + 3, 0), 6) / 6; }
double exact_leaky_relu(double x) { return x < 0 ? x * 0.1f : x; }

// |y - exact| <= relative·|exact| + of_x·|x| + the spacing of subnormals, for low <= x <= high. The relative bounds of the
// activations end where e^(large) rounds its exponent: there y is small, and bounded relative to x.
struct Bound {
  const char* name;
  double (*exact)(double);
  double relative, of_x, low, high;
  Activation activation;  // none: not through activate()
};

constexpr Bound kBounds[] = {
    {"exp", exact_exp, 2e-7, 0, -INFINITY, INFINITY, Activation::none},
    {"exp2", exact_exp2, 2e-7, 0, -INFINITY, 127, Activation::none},
    {"exp2 before bf16", exact_exp2_bf16, 3e-6, 0, -INFINITY, 127, Activation::none},
    {"tanh", exact_tanh, 2.4e-7, 0, -INFINITY, INFINITY, Activation::none},
    {"normal tail", exact_tail, 5e-7, 0, 0, 2.5, Activation::none},
    {"relu", exact_relu, 0, 0, -INFINITY, INFINITY, Activation::relu},
    {"gelu", exact_gelu, 1e-6, 0, -3, INFINITY, Activation::gelu_erf},
    {"gelu", exact_gelu, 0, 3e-7, -INFINITY, INFINITY, Activation::gelu_erf},
    {"gelu_tanh", exact_gelu_tanh, 1.5e-6, 0, -3, INFINITY, Activation::gelu_tanh},
    {"gelu_tanh", exact_gelu_tanh, 0, 2e-7, -INFINITY, INFINITY, Activation::gelu_tanh},
    {"silu", exact_silu, 5e-7, 0, -88, INFINITY, Activation::silu},
    {"silu", exact_silu, 0, 2e-7, -INFINITY, INFINITY, Activation::silu},
    {"relu6", exact_relu6, 0, 0, -INFINITY, INFINITY, Activation::relu6},
    {"hardswish", exact_hardswish, 0, 2e-7, -3e38, 3e38, Activation::hardswish},
    {"leaky_relu", exact_leaky_relu, 1e-7, 0, -INFINITY, INFINITY, Activation::leaky_relu},
};

void evaluate(Isa isa, const Bound& f, const std::vector<float>& x, std::vector<float>& y) {
  const Probe& probe = probe_of(isa);
  const int64_t n = static_cast<int64_t>(x.size());
  if (f.activation != Activation::none) return probe.activate(f.activation, x.data(), y.data(), n);
  const auto function = f.exact == exact_tail        ? probe.normal_tail
                        : f.exact == exact_tanh      ? probe.tanh
                        : f.exact == exact_exp2      ? probe.exp2
                        : f.exact == exact_exp2_bf16 ? probe.exp2_bf16
                                                     : probe.exp;
  function(x.data(), y.data(), n);
}

void test_bound(Isa isa, const Bound& f, const std::vector<float>& x) {
  std::vector<float> y(x.size());
  evaluate(isa, f, x, y);
  double worst = 0, worst_at = 0;
  for (size_t i = 0; i < x.size(); i++) {
    if (!(x[i] >= f.low && x[i] <= f.high) || std::isinf(x[i])) continue;
    const double exact = f.exact(x[i]);
    if (std::fabs(exact) > 0x1.ffffffp127) {  // rounds to infinity
      CHECK(y[i] == INFINITY, "%s: %s(%.9g) is %.9g, expected infinity", isa_name(isa), f.name, x[i], y[i]);
      continue;
    }
    const double error = std::fabs(y[i] - exact), scale = f.relative > 0 ? std::fabs(exact) : std::fabs(x[i]);
    if (scale > 0x1p-100 && error / scale > worst) worst = error / scale, worst_at = x[i];
    CHECK(error <= f.relative * std::fabs(exact) + f.of_x * std::fabs(x[i]) + 0x1p-148,
          "%s: %s(%.9g) is %.9g, expected %.9g, off by %.2g of it", isa_name(isa), f.name, x[i], y[i], exact,
          error / std::fabs(exact));
  }
  if (std::getenv("PBM_PRINT_ERRORS"))
    std::printf("| %s | %s | %s | [%g, %g] | %.2g at %.4g | %.2g |\n", f.name, isa_name(isa),
                f.relative > 0 ? "of y" : "of x", f.low, f.high, worst, worst_at, f.relative > 0 ? f.relative : f.of_x);
}

// What a relative bound does not say: below 2.5 units in the last place of the exact result, subnormal ones included, and
// never outside [−1, 1].
void test_tanh(Isa isa, const std::vector<float>& x) {
  const Probe& probe = probe_of(isa);
  std::vector<float> y(x.size());
  probe.tanh(x.data(), y.data(), static_cast<int64_t>(x.size()));
  double worst = 0, worst_at = 0;
  for (size_t i = 0; i < x.size(); i++) {
    if (!std::isfinite(x[i])) continue;
    const double exact = std::tanh(static_cast<double>(x[i]));
    const int exponent = exact == 0 ? -126 : std::ilogb(exact);
    const double ulps = std::fabs(y[i] - exact) / std::ldexp(1, (exponent < -126 ? -126 : exponent) - 23);
    if (ulps > worst) worst = ulps, worst_at = x[i];
    CHECK(ulps < 2.5 && std::fabs(y[i]) <= 1, "%s: tanh(%.9g) is %.9g, expected %.9g, off by %.3g ulp", isa_name(isa),
          x[i], y[i], exact, ulps);
  }
  if (std::getenv("PBM_PRINT_ERRORS"))
    std::printf("| tanh | %s | ulp | %.3g at %.9g |\n", isa_name(isa), worst, worst_at);
  const float given[16] = {NAN, -NAN, INFINITY, -INFINITY, 0.f, -0.f, 0x1p-149f, -0x1p-149f};
  float got[16];
  probe.tanh(given, got, 16);
  CHECK(std::isnan(got[0]) && std::isnan(got[1]), "%s: tanh of NaN is %g, %g", isa_name(isa), got[0], got[1]);
  CHECK(got[2] == 1 && got[3] == -1, "%s: tanh of infinities is %g, %g", isa_name(isa), got[2], got[3]);
  for (int i = 4; i < 8; i++)
    CHECK(bits_of(got[i]) == bits_of(given[i]), "%s: tanh(%g) is %g", isa_name(isa), given[i], got[i]);
}

// Of normal numbers: within an ulp of the result, or 1e-7.
void test_log2(Isa isa, const std::vector<float>& x) {
  std::vector<float> y(x.size());
  probe_of(isa).log2(x.data(), y.data(), static_cast<int64_t>(x.size()));
  for (size_t i = 0; i < x.size(); i++) {
    if (std::isnan(x[i])) CHECK(std::isnan(y[i]), "%s: log2 of NaN is %g", isa_name(isa), y[i]);
    if (!(x[i] >= 0x1p-126f) || std::isinf(x[i])) continue;
    const double exact = std::log2(static_cast<double>(x[i]));
    CHECK(std::fabs(y[i] - exact) <= std::fmax(std::fabs(exact) * 0x1p-23, 1e-7),
          "%s: log2(%.9g) is %.9g, expected %.9g", isa_name(isa), x[i], y[i], exact);
  }
}

// tanh within 4 ulp, and sech² with a relative bound that does not end where 1 − tanh² would be 0.
void test_tanh_sech2(Isa isa, const std::vector<float>& x) {
  std::vector<float> t(x.size()), s(x.size());
  probe_of(isa).tanh_sech2(x.data(), t.data(), s.data(), static_cast<int64_t>(x.size()));
  for (size_t i = 0; i < x.size(); i++) {
    if (std::isnan(x[i])) {
      CHECK(std::isnan(t[i]) && std::isnan(s[i]), "%s: of NaN: %g, %g", isa_name(isa), t[i], s[i]);
      continue;
    }
    const double exact = std::tanh(static_cast<double>(x[i])), inverse = 1 / std::cosh(static_cast<double>(x[i]));
    const double ulp = exact == 0 ? 0x1p-149 : std::ldexp(1, std::max(std::ilogb(exact), -126) - 23);
    CHECK(std::fabs(t[i] - exact) < 4 * ulp, "%s: tanh(%.9g) is %.9g, expected %.9g", isa_name(isa), x[i], t[i], exact);
    const double bound = std::fabs(x[i]) <= 43 ? 6e-7 * inverse * inverse : 2e-37;
    CHECK(std::fabs(s[i] - inverse * inverse) <= bound, "%s: sech2(%.9g) is %.9g, expected %.9g", isa_name(isa), x[i],
          s[i], inverse * inverse);
  }
}

// Denominators of the whole range that is promised, numerators that leave the quotient below 1.
void test_quotient(Isa isa, uint64_t seed) {
  Rng rng(seed);
  std::vector<float> x(4096), y(4096), inverse(4096), sum(4096);
  for (size_t i = 0; i < x.size(); i++) {
    y[i] = std::ldexp(1.5f + rng.value() / 2, static_cast<int>(rng.between(-100, 99)));
    x[i] = y[i] * rng.value();
  }
  probe_of(isa).quotient(x.data(), y.data(), inverse.data(), sum.data(), static_cast<int64_t>(x.size()));
  for (size_t i = 0; i < x.size(); i++) {
    const double exact = 1 / static_cast<double>(y[i]), total = 1 + x[i] * exact;
    CHECK(std::fabs(inverse[i] - exact) <= 0x1p-22 * exact, "%s: 1/%.9g is %.9g", isa_name(isa), y[i], inverse[i]);
    CHECK(std::fabs(sum[i] - total) <= 0x1p-22, "%s: 1 + %.9g/%.9g is %.9g", isa_name(isa), x[i], y[i], sum[i]);
  }
}

// A NaN stays; infinities go where torch's functions send them (gelu and its kin of -infinity are -inf·0: NaN).
void test_nonfinite(Isa isa) {
  const Probe& probe = probe_of(isa);
  float x[16] = {NAN, -NAN, INFINITY, -INFINITY}, y[16];
  probe.exp(x, y, 16);
  CHECK(std::isnan(y[0]) && std::isnan(y[1]) && y[2] == INFINITY && y[3] == 0, "%s: exp of NaN, infinity: %g %g %g %g",
        isa_name(isa), y[0], y[1], y[2], y[3]);
  for (Activation a : {Activation::relu, Activation::gelu_erf, Activation::gelu_tanh, Activation::silu}) {
    probe.activate(a, x, y, 16);
    CHECK(std::isnan(y[0]) && std::isnan(y[1]), "%s: activation %d of NaN is %g", isa_name(isa), static_cast<int>(a),
          y[0]);
    CHECK(a == Activation::gelu_erf ? !std::isfinite(y[2]) : y[2] == INFINITY, "%s: activation %d of infinity is %g",
          isa_name(isa), static_cast<int>(a), y[2]);
    CHECK(a == Activation::relu ? y[3] == 0 : std::isnan(y[3]), "%s: activation %d of -infinity is %g", isa_name(isa),
          static_cast<int>(a), y[3]);
  }
}

// Evenly over all bit patterns, and densely where the functions bend.
std::vector<float> arguments(const Options& options) {
  Rng rng(options.seed);
  std::vector<float> x;
  const uint64_t step = 0x100000000u / (static_cast<uint64_t>(options.iterations) * 1000);
  for (uint64_t u = rng.bits() % step; u < 0x100000000u; u += step) x.push_back(float_of(static_cast<uint32_t>(u)));
  for (int i = 0; i < options.iterations * 500; i++) {
    x.push_back(rng.value() * 110.f);
    x.push_back(rng.value() * 4.f);
  }
  while (x.size() % 16) x.push_back(0);
  return x;
}

}  // namespace

void test_vecmath(const Options& options) {
  const std::vector<float> x = arguments(options);
  for (Isa isa : tiers()) {
    for (const Bound& f : kBounds) test_bound(isa, f, x);
    test_tanh(isa, x);
    test_log2(isa, x);
    test_tanh_sech2(isa, x);
    test_quotient(isa, options.seed);
    test_nonfinite(isa);
  }
}

}  // namespace pbm::test
