// Rows to integers: against a plain reading of the rule, and every tier against scalar to the bit.
#include <cfloat>

#include "cpu/kernels/tiers.h"
#include "elements.h"

namespace pbm::test {
namespace {

struct Quantised {
  Exact q, scale, zero_point;
};

Quantised run(Isa isa, QuantizeRows r, int64_t rows, bool zero_points) {
  const int64_t digits = r.kind == QuantKind::digits ? 3 : 1;
  Quantised out{Exact((rows * digits - 1) * r.q_row + r.q_padded), Exact(rows * 4), Exact(rows * 4)};
  r.q = out.q.data();
  r.scale = out.scale.as<float>();
  r.zero_point = zero_points ? out.zero_point.as<int32_t>() : nullptr;
  kernels_of(isa).quantize_rows(r, 0, rows / 2);  // ranges, as threads take them
  kernels_of(isa).quantize_rows(r, rows / 2, rows);
  return out;
}

bool nan_row(const QuantizeRows& r, int64_t i) {
  for (int64_t p = 0; p < r.k; p++)
    if (!std::isfinite(get(r.dtype, r.x, i * r.row + p))) return true;
  return false;
}

// What |x - scale·(q - zero)| may reach. round(x·(1/scale)) is within half a step and the rounding of the product; at
// the ends of an asymmetric range the zero point's own rounding adds half a step, and 1/scale its ulps.
double tolerance(QuantKind kind, double scale) {
  if (kind == QuantKind::digits) return scale * 0.5001;
  return scale * (kind == QuantKind::asymmetric ? 1.001 : 0.501);
}

void check_row(Isa isa, const QuantizeRows& r, const Quantised& out, int64_t i) {
  const bool digits = r.kind == QuantKind::digits;
  const float scale = out.scale.as<float>()[i];
  const int32_t zero = r.kind == QuantKind::symmetric_s8 ? 0 : out.zero_point.as<int32_t>()[i];
  const uint8_t* q = out.q.as<uint8_t>() + i * (digits ? 3 : 1) * r.q_row;
  if (nan_row(r, i)) {
    CHECK(std::isnan(scale), "%s: a row with NaN or infinity has scale %g", isa_name(isa), scale);
    return;
  }
  double amax = 0;
  for (int64_t p = 0; p < r.k; p++) amax = std::fmax(amax, std::fabs(get(r.dtype, r.x, i * r.row + p)));
  if (amax == 0) CHECK(scale == 1.f || digits, "%s: a row of zeros has scale %g", isa_name(isa), scale);
  if (r.kind == QuantKind::symmetric_u8) CHECK(zero == 128, "%s: zero point %d, expected 128", isa_name(isa), zero);
  if (r.kind == QuantKind::asymmetric) CHECK(zero >= 0 && zero <= 255, "%s: zero point %d", isa_name(isa), zero);
  for (int64_t p = 0; p < r.k; p++) {
    const double x = get(r.dtype, r.x, i * r.row + p);
    double back;
    if (digits) {
      const int32_t v = ((q[p] - 128) * 256 + q[r.q_row + p]) * 256 + q[2 * r.q_row + p];
      back = static_cast<double>(v) * scale;
    } else {
      back = (r.kind == QuantKind::symmetric_s8 ? static_cast<int8_t>(q[p]) : q[p] - zero) * static_cast<double>(scale);
    }
    CHECK(std::fabs(back - x) <= tolerance(r.kind, scale), "%s: kind %d, %s: %.9g became %.9g with scale %.9g",
          isa_name(isa), static_cast<int>(r.kind), name(r.dtype), x, back, scale);
    if (digits && amax >= 0x1p-100)
      CHECK(std::fabs(back - x) <= amax * 0x1p-23, "%s: %.9g became %.9g, off by more than 2^-23 of %.9g",
            isa_name(isa), x, back, amax);
  }
  for (int64_t d = 0; d < (digits ? 3 : 1); d++)
    for (int64_t p = r.k; p < r.q_padded; p++)
      CHECK(q[d * r.q_row + p] == 0, "%s: padding byte %lld is %d", isa_name(isa), (long long)p, q[d * r.q_row + p]);
}

// Rows that random numbers do not reach. All-ones mantissas lie half a unit of the digits below a power of two.
void make_special(Rng& rng, DType t, void* x, int64_t at, int64_t k) {
  if (k == 0) return;
  const auto at_random = [&](float v) { put(t, x, at + rng.below(k), v); };
  const float largest = t == DType::f32 ? FLT_MAX : t == DType::bf16 ? 3.3e38f : 65504.f;
  switch (rng.below(12)) {
    case 0:
      for (int64_t p = 0; p < k; p++) put(t, x, at + p, 0.f);
      break;
    case 1: at_random(NAN); break;
    case 2: at_random(INFINITY); break;
    case 3: at_random(-INFINITY); break;
    case 4:
      at_random(largest);
      at_random(-largest);
      break;
    case 5:
      for (int64_t p = 0; p < k; p++) put(t, x, at + p, rng.value() * 0x1p-126f);
      break;  // subnormal
    case 6:
      for (int64_t p = 0; p < k; p++) put(t, x, at + p, rng.value() * 0x1p-118f);
      break;  // scale near 2^-126
    case 7:
      for (int64_t p = 0; p < k; p++) put(t, x, at + p, std::fabs(rng.value()));
      break;
    case 8:
      for (int64_t p = 0; p < k; p++) put(t, x, at + p, -std::fabs(rng.value()));
      break;
    case 9:
      for (int64_t p = 0; p < k; p++) put(t, x, at + p, rng.chance(2) ? 0x1.fffffep0f : -0x1.fffffep0f);
      break;
    case 10: at_random(rng.value() * 10000.f); break;
    default:
      for (int64_t p = 0; p < k; p++) put(t, x, at + p, float_of(static_cast<uint32_t>(rng.bits()) & 0xbf7fffff));
      break;
  }
}

}  // namespace

void test_quantize(const Options& options) {
  Rng rng(options.seed);
  constexpr DType kTypes[] = {DType::f32, DType::bf16, DType::f16};
  for (int n = 0; n < options.iterations * 4; n++) {
    QuantizeRows r{};
    const int64_t rows = rng.between(1, 5);
    r.k = rng.chance(30) ? 0 : rng.between(1, rng.chance(3) ? 600 : 70);
    r.kind = static_cast<QuantKind>(rng.below(4));
    r.dtype = rng.of(kTypes);
    r.row = r.k + rng.below(3);
    r.q_padded = r.k + (rng.chance(2) ? rng.below(70) : 0);
    r.q_row = r.q_padded + rng.below(3);
    const Exact x = random_elements(rng, r.dtype, (rows - 1) * r.row + r.k);
    for (int64_t i = 0; i < rows; i++)
      if (rng.chance(2)) make_special(rng, r.dtype, x.data(), i * r.row, r.k);
    r.x = x.data();
    const bool zero_points = r.kind != QuantKind::symmetric_s8 || rng.chance(2);
    const Quantised expected = run(Isa::scalar, r, rows, zero_points);
    for (int64_t i = 0; i < rows; i++) check_row(Isa::scalar, r, expected, i);
    for (Isa isa : tiers()) {
      const Quantised got = run(isa, r, rows, zero_points);
      CHECK(std::memcmp(got.q.data(), expected.q.data(), expected.q.bytes()) == 0 &&
                std::memcmp(got.zero_point.data(), expected.zero_point.data(), rows * 4) == 0,
            "%s: integers differ from scalar's: kind %d, %s, k %lld", isa_name(isa), static_cast<int>(r.kind),
            name(r.dtype), (long long)r.k);
      CHECK(std::memcmp(got.scale.data(), expected.scale.data(), rows * 4) == 0, "%s: scales differ from scalar's",
            isa_name(isa));
    }
  }
}

}  // namespace pbm::test
