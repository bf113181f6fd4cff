// Attention forward and backward on every tier: random sizes, strides, dtypes and options with exact-size operands, so that
// the sanitizers see what is read or written beyond them, against the formulas in double.
#include <cmath>
#include <vector>

#include "cpu/kernels/tiers.h"
#include "elements.h"

namespace pbm::test {
namespace {

// A (batch, head, row, column) operand, either order of head and row in memory, rows with a gap.
struct Operand {
  AttentionOperand view;
  Exact memory;
  double at(int64_t b, int64_t h, int64_t i, int64_t d) const {
    return get(view.dtype, view.data, b * view.batch + h * view.head + i * view.row + d);
  }
};

Operand operand(Rng* rng, DType dtype, int64_t batch, int64_t heads, int64_t rows, int64_t d) {
  const int64_t gap = rng->below(4), wide = d + gap;
  const bool rows_first = rng->chance(2);
  Operand o;
  o.view = {nullptr, dtype, heads * rows * wide, rows_first ? wide : rows * wide, rows_first ? heads * wide : wide};
  // The last row ends where the memory does.
  const int64_t count = batch * heads * rows > 0 ? batch * heads * rows * wide - gap : 0;
  o.memory = Exact(count * size_of(dtype), size_of(dtype));
  for (int64_t i = 0; i < count; i++) put(dtype, o.memory.data(), i, 2 * rng->value());
  o.view.data = o.memory.data();
  return o;
}

struct Case {
  Attention a{};
  AttentionGradients g{};
  Operand q, k, v, out, d_out, d_q, d_k, d_v;
  Exact lse, max, inverse_sum, d_lse, mask, slopes;
};

Case random_case(Rng* rng) {
  Case c;
  Attention& a = c.a;
  const DType dtype = rng->of({DType::f32, DType::bf16, DType::f16});
  a.flavour = dtype == DType::bf16 || rng->chance(4) ? Flavour::bf16 : Flavour::f32;
  a.batch = rng->between(1, 2);
  a.kv_heads = rng->between(1, 2);
  a.heads = a.kv_heads * rng->between(1, 3);
  a.queries = rng->of({int64_t{1}, rng->between(2, 40), rng->between(120, 140)});
  a.keys = rng->of({int64_t{1}, rng->between(2, 70), rng->between(90, 200)});
  a.d = rng->of({rng->between(1, 9), int64_t{16}, rng->between(30, 70)});
  a.dv = rng->chance(2) ? a.d : rng->between(1, 50);
  c.q = operand(rng, dtype, a.batch, a.heads, a.queries, a.d);
  c.k = operand(rng, dtype, a.batch, a.kv_heads, a.keys, a.d);
  c.v = operand(rng, dtype, a.batch, a.kv_heads, a.keys, a.dv);
  c.out = operand(rng, dtype, a.batch, a.heads, a.queries, a.dv);
  c.d_out = operand(rng, dtype, a.batch, a.heads, a.queries, a.dv);
  c.d_q = operand(rng, dtype, a.batch, a.heads, a.queries, a.d);
  c.d_k = operand(rng, dtype, a.batch, a.kv_heads, a.keys, a.d);
  c.d_v = operand(rng, dtype, a.batch, a.kv_heads, a.keys, a.dv);
  const int64_t rows = a.batch * a.heads * a.queries;
  for (Exact* e : {&c.lse, &c.max, &c.inverse_sum, &c.d_lse}) *e = Exact(rows * 4);
  for (int64_t i = 0; i < rows; i++) c.d_lse.as<float>()[i] = rng->value();
  a.row_head = a.queries;
  a.row_batch = a.heads * a.queries;
  a.scale = rng->chance(5) ? -0.2f : static_cast<float>(1 / std::sqrt(static_cast<double>(a.d)));
  a.softcap = rng->chance(4) ? 2.f : 0.f;
  a.left = rng->chance(3) ? rng->below(30) : -1;
  a.right = rng->chance(2) ? rng->below(3) : -1;
  a.bottom_right = rng->chance(2);
  if (rng->chance(3)) {
    const bool boolean = rng->chance(2), per_row = rng->chance(2), per_head = rng->chance(2);
    const int64_t mask_rows = (per_head ? a.heads : 1) * (per_row ? a.queries : 1);
    c.mask = Exact(mask_rows * a.keys * (boolean ? 1 : 4));
    for (int64_t i = 0; i < mask_rows * a.keys; i++) {
      if (boolean) {
        c.mask.data()[i] = !rng->chance(4);
      } else {
        c.mask.as<float>()[i] = rng->chance(8) ? -INFINITY : rng->value();
      }
    }
    a.mask = {boolean ? MaskKind::boolean : MaskKind::additive,  c.mask.data(),       DType::f32, 0,
              per_head ? (per_row ? a.queries : 1) * a.keys : 0, per_row ? a.keys : 0};
  }
  if (rng->chance(4)) {
    c.slopes = Exact(a.heads * 4);
    for (int64_t h = 0; h < a.heads; h++) c.slopes.as<float>()[h] = 0.1f * static_cast<float>(h + 1);
    a.slopes = c.slopes.as<float>();
  }
  a.q = c.q.view;
  a.k = c.k.view;
  a.v = c.v.view;
  a.out = c.out.view;
  a.lse = c.lse.as<float>();
  a.max = c.max.as<float>();
  a.inverse_sum = c.inverse_sum.as<float>();
  c.g = {c.out.view, c.d_out.view, a.max, a.inverse_sum, c.d_lse.as<float>(), c.d_q.view, c.d_k.view, c.d_v.view};
  return c;
}

// One query's probabilities, and the derivatives of its scores by the products q·k.
struct Row {
  std::vector<double> p, slope;
  double lse = -INFINITY;
};

Row row_of(const Case& c, int64_t b, int64_t h, int64_t i) {
  const Attention& a = c.a;
  const int64_t kv = h / (a.heads / a.kv_heads), at = i + (a.bottom_right ? a.keys - a.queries : 0);
  Row r;
  double sum = 0, max = -INFINITY;
  for (int64_t j = 0; j < a.keys; j++) {
    double s = 0, slope = a.scale;
    for (int64_t d = 0; d < a.d; d++) s += c.q.at(b, h, i, d) * c.k.at(b, kv, j, d);
    s *= a.scale;
    if (a.softcap > 0) {
      const double t = std::tanh(s / a.softcap);
      s = a.softcap * t;
      slope *= 1 - t * t;
    }
    const int64_t m = h * a.mask.head + i * a.mask.row + j;
    if (a.mask.kind == MaskKind::boolean && !c.mask.data()[m]) s = -INFINITY;
    if (a.mask.kind == MaskKind::additive) s += c.mask.as<float>()[m];
    if (a.slopes) s -= a.slopes[h] * std::fabs(static_cast<double>(at - j));
    if ((a.left >= 0 && j < at - a.left) || (a.right >= 0 && j > at + a.right)) s = -INFINITY;
    r.p.push_back(s);
    r.slope.push_back(slope);
    max = std::max(max, s);
  }
  for (double& p : r.p) sum += p = max == -INFINITY ? 0 : std::exp(p - max);
  if (sum > 0) r.lse = max + std::log(sum);
  for (double& p : r.p) p = sum > 0 ? p / sum : 0;
  return r;
}

// What is compared: the largest difference, in units of the largest value.
struct Worst {
  double difference = 0, largest = 1e-3;
  void see(double got, double expected) {
    const double off = std::fabs(got - expected);
    difference = std::max(difference, std::isnan(off) ? INFINITY : off);
    largest = std::max(largest, std::fabs(expected));
  }
  double relative() const { return difference / largest; }
};

void compare(const Case& c, const char* tier, int iteration) {
  const Attention& a = c.a;
  Worst out, lse, d_q, d_k, d_v;
  std::vector<double> exact_k(a.batch * a.kv_heads * a.keys * a.d), exact_v(a.batch * a.kv_heads * a.keys * a.dv);
  for (int64_t b = 0; b < a.batch; b++)
    for (int64_t h = 0; h < a.heads; h++)
      for (int64_t i = 0; i < a.queries; i++) {
        const int64_t kv = h / (a.heads / a.kv_heads), at = b * a.row_batch + h * a.row_head + i;
        const Row r = row_of(c, b, h, i);
        if (r.lse == -INFINITY) {
          CHECK(a.lse[at] == -INFINITY, "%s %d: lse of a row that sees nothing: %g", tier, iteration, a.lse[at]);
        } else {
          lse.see(a.lse[at], r.lse);
        }
        std::vector<double> o(a.dv), dp(a.keys), dq(a.d);
        double delta = -c.d_lse.as<float>()[at];
        for (int64_t j = 0; j < a.keys; j++)
          for (int64_t d = 0; d < a.dv; d++) {
            o[d] += r.p[j] * c.v.at(b, kv, j, d);
            dp[j] += c.d_out.at(b, h, i, d) * c.v.at(b, kv, j, d);
            exact_v[((b * a.kv_heads + kv) * a.keys + j) * a.dv + d] += r.p[j] * c.d_out.at(b, h, i, d);
          }
        for (int64_t j = 0; j < a.keys; j++) delta += r.p[j] * dp[j];
        for (int64_t j = 0; j < a.keys; j++) {
          const double ds = r.p[j] * (dp[j] - delta) * r.slope[j];
          for (int64_t d = 0; d < a.d; d++) {
            dq[d] += ds * c.k.at(b, kv, j, d);
            exact_k[((b * a.kv_heads + kv) * a.keys + j) * a.d + d] += ds * c.q.at(b, h, i, d);
          }
        }
        for (int64_t d = 0; d < a.dv; d++) out.see(c.out.at(b, h, i, d), o[d]);
        for (int64_t d = 0; d < a.d; d++) d_q.see(c.d_q.at(b, h, i, d), dq[d]);
      }
  for (int64_t b = 0; b < a.batch; b++)
    for (int64_t h = 0; h < a.kv_heads; h++)
      for (int64_t j = 0; j < a.keys; j++) {
        for (int64_t d = 0; d < a.d; d++)
          d_k.see(c.d_k.at(b, h, j, d), exact_k[((b * a.kv_heads + h) * a.keys + j) * a.d + d]);
        for (int64_t d = 0; d < a.dv; d++)
          d_v.see(c.d_v.at(b, h, j, d), exact_v[((b * a.kv_heads + h) * a.keys + j) * a.dv + d]);
      }
  // Operands rounded to bf16 are off by 2⁻⁹; scores of up to about 8 then by 0.03.
  const bool bf16 = a.flavour == Flavour::bf16, half = c.out.view.dtype != DType::f32;
  const double tolerance = bf16 ? 0.06 : half ? 4e-3 : 2e-5;
  const struct {
    const char* name;
    const Worst& worst;
  } results[] = {{"out", out}, {"lse", lse}, {"d_q", d_q}, {"d_k", d_k}, {"d_v", d_v}};
  for (const auto& [name, worst] : results)
    CHECK(worst.relative() < tolerance || worst.difference < tolerance,
          "%s %d: %s is off by %.2e of its largest value (%s, D %lld, Dv %lld, %lld queries, %lld keys)", tier,
          iteration, name, worst.relative(), bf16 ? "bf16" : "fp32", static_cast<long long>(a.d),
          static_cast<long long>(a.dv), static_cast<long long>(a.queries), static_cast<long long>(a.keys));
}

void run(const Case& c, const Kernels& kernel, Rng* rng) {
  const Attention& a = c.a;
  const int64_t rows = a.queries * (a.heads / a.kv_heads), cut = rng->below(rows + 1);
  for (int64_t b = 0; b < a.batch; b++)
    for (int64_t h = 0; h < a.kv_heads; h++) {
      if (cut > 0) kernel.attention_forward(a, {b, h, 0, cut});
      if (cut < rows) kernel.attention_forward(a, {b, h, cut, rows});
      kernel.attention_backward(a, c.g, {b, h, 0, a.keys, 0});
    }
}

// The sum of a mask's gradients over a row of scores is d_lse, since the probabilities' sum does not change.
void check_mask_gradient(const Case& c, const Kernels& kernel, int iteration) {
  const Attention& a = c.a;
  if (a.flavour != Flavour::f32 || c.out.view.dtype != DType::f32) return;
  Exact memory(a.queries * a.keys * 4, 0, 0);
  for (int64_t j = 0; j < a.keys; j += kMaskBlockKeys)
    kernel.attention_mask_gradient(
        a, c.g, {{0, 1}, {0, 1}, j, std::min(j + kMaskBlockKeys, a.keys), memory.as<float>(), a.keys});
  for (int64_t i = 0; i < a.queries; i++) {
    double sum = 0;
    for (int64_t j = 0; j < a.keys; j++) sum += memory.as<float>()[i * a.keys + j];
    const double expected = a.lse[i] == -INFINITY ? 0 : c.d_lse.as<float>()[i];
    CHECK(std::fabs(sum - expected) < 1e-4, "%s %d: the mask's gradient of query %lld sums to %g, expected %g",
          isa_name(kernel.isa), iteration, static_cast<long long>(i), sum, expected);
  }
}

}  // namespace

void test_attention(const Options& options) {
  Rng rng(options.seed);
  for (int i = 0; i < options.iterations / 3; i++) {  // the formulas in double are slow under the sanitizers
    const Case c = random_case(&rng);
    for (int isa = 0; isa <= static_cast<int>(best_isa()); isa++) {
      const Kernels& kernel = kernels_of(static_cast<Isa>(isa));
      run(c, kernel, &rng);
      compare(c, isa_name(kernel.isa), i);
      check_mask_gradient(c, kernel, i);
    }
  }
}

}  // namespace pbm::test
