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
  std::vector<int64_t> query_start, key_start;  // of packed sequences
  int64_t parts = 1;                            // of the keys, in the backward pass

  double at(const Operand& x, const std::vector<int64_t>& start, int64_t b, int64_t h, int64_t i, int64_t d) const {
    return start.empty() ? x.at(b, h, i, d) : x.at(0, h, start[b] + i, d);
  }
  double query_at(const Operand& x, int64_t b, int64_t h, int64_t i, int64_t d) const {
    return at(x, query_start, b, h, i, d);
  }
  double key_at(const Operand& x, int64_t b, int64_t h, int64_t j, int64_t d) const {
    return at(x, key_start, b, h, j, d);
  }
  // d_q of several parts is their sum.
  double d_q_at(int64_t b, int64_t h, int64_t i, int64_t d) const {
    double sum = 0;
    for (int64_t p = 0; p < parts; p++)
      sum += query_start.empty() ? d_q.at(p * a.batch + b, h, i, d) : d_q.at(p, h, query_start[b] + i, d);
    return sum;
  }
  int64_t row_at(int64_t b, int64_t h, int64_t i) const {
    return query_start.empty() ? b * a.row_batch + h * a.row_head + i : h * a.row_head + query_start[b] + i;
  }
};

// Lengths of sequences in a row, some of them 0, and where they begin.
std::vector<int64_t> starts(Rng* rng, int64_t sequences, int64_t longest) {
  std::vector<int64_t> s = {0};
  for (int64_t b = 0; b < sequences; b++) s.push_back(s.back() + (rng->chance(5) ? 0 : rng->between(1, longest)));
  return s;
}

void random_mask(Rng* rng, Case* c) {
  Attention& a = c->a;
  const bool boolean = rng->chance(2), per_col = !rng->chance(4), per_row = rng->chance(2);
  const int64_t cols = per_col ? a.keys : 1, rows = per_row ? a.queries : 1;
  const int64_t heads = rng->chance(2) ? a.heads : 1, batch = rng->chance(2) ? a.batch : 1;
  const DType dtype = rng->of({DType::f32, c->q.view.dtype});
  const int64_t count = batch * heads * rows * cols, size = boolean ? 1 : size_of(dtype);
  c->mask = Exact(count * size, size);
  for (int64_t i = 0; i < count; i++) {
    if (boolean) {
      c->mask.data()[i] = !rng->chance(4);
    } else {
      put(dtype, c->mask.data(), i, rng->chance(8) ? -INFINITY : rng->value());
    }
  }
  a.mask = {boolean ? MaskKind::boolean : MaskKind::additive,
            c->mask.data(),
            dtype,
            batch > 1 ? heads * rows * cols : 0,
            heads > 1 ? rows * cols : 0,
            rows > 1 ? cols : 0,
            cols > 1 ? 1 : 0};
}

// What element (b, h, i, j) of a mask adds to a score.
double mask_at(const Attention& a, int64_t b, int64_t h, int64_t i, int64_t j) {
  const AttentionMask& m = a.mask;
  if (m.kind == MaskKind::none) return 0;
  const int64_t at = b * m.batch + h * m.head + i * m.row + j * m.col;
  if (m.kind == MaskKind::boolean) return static_cast<const uint8_t*>(m.data)[at] ? 0 : -INFINITY;
  return get(m.dtype, m.data, at);
}

// One counter's words, in 64-bit arithmetic.
void philox(uint64_t seed, uint32_t (&c)[4]) {
  uint32_t k[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
  for (int round = 0; round < 10; round++) {
    const uint64_t x = uint64_t{0xD2511F53} * c[0], y = uint64_t{0xCD9E8D57} * c[2];
    const uint32_t next[4] = {static_cast<uint32_t>(y >> 32) ^ c[1] ^ k[0], static_cast<uint32_t>(y),
                              static_cast<uint32_t>(x >> 32) ^ c[3] ^ k[1], static_cast<uint32_t>(x)};
    for (int i = 0; i < 4; i++) c[i] = next[i];
    k[0] = static_cast<uint32_t>(k[0] + uint64_t{0x9E3779B9});
    k[1] = static_cast<uint32_t>(k[1] + uint64_t{0xBB67AE85});
  }
}

double kept_at(const Attention& a, int64_t b, int64_t h, int64_t i, int64_t j) {
  if (a.dropout.threshold == 0) return 1;
  uint32_t c[4] = {static_cast<uint32_t>(j / 4), static_cast<uint32_t>(i), static_cast<uint32_t>(b * a.heads + h), 0};
  philox(a.dropout.seed, c);
  return static_cast<int32_t>(c[j % 4] >> 8) >= a.dropout.threshold ? static_cast<double>(a.dropout.factor) : 0;
}

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
  int64_t batch = a.batch, queries = a.queries, keys = a.keys;  // of the operands
  if (rng->chance(4)) {
    a.batch = rng->between(1, 4);
    c.query_start = starts(rng, a.batch, a.queries);
    c.key_start = starts(rng, a.batch, a.keys);
    batch = 1;
    queries = c.query_start.back();
    keys = c.key_start.back();
  }
  c.parts = rng->chance(3) ? rng->between(2, 4) : 1;
  c.q = operand(rng, dtype, batch, a.heads, queries, a.d);
  c.k = operand(rng, dtype, batch, a.kv_heads, keys, a.d);
  c.v = operand(rng, dtype, batch, a.kv_heads, keys, a.dv);
  c.out = operand(rng, dtype, batch, a.heads, queries, a.dv);
  c.d_out = operand(rng, dtype, batch, a.heads, queries, a.dv);
  c.d_q = operand(rng, c.parts > 1 ? DType::f32 : dtype, batch * c.parts, a.heads, queries, a.d);
  c.d_k = operand(rng, dtype, batch, a.kv_heads, keys, a.d);
  c.d_v = operand(rng, dtype, batch, a.kv_heads, keys, a.dv);
  const int64_t rows = batch * a.heads * queries;
  for (Exact* e : {&c.lse, &c.max, &c.inverse_sum, &c.d_lse}) *e = Exact(rows * 4);
  for (int64_t i = 0; i < rows; i++) c.d_lse.as<float>()[i] = rng->value();
  a.row_head = queries;
  a.row_batch = a.heads * queries;
  a.scale = rng->chance(5) ? -0.2f : static_cast<float>(1 / std::sqrt(static_cast<double>(a.d)));
  a.softcap = rng->chance(4) ? 2.f : 0.f;
  a.left = rng->chance(3) ? rng->below(30) : -1;
  a.right = rng->chance(2) ? rng->below(3) : -1;
  a.bottom_right = rng->chance(2);
  if (c.query_start.empty() && rng->chance(3)) random_mask(rng, &c);
  if (rng->chance(4)) a.dropout = {rng->bits(), int32_t{1} << rng->between(20, 23), 1.5f};
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

// The starts lie where the case does, which is moved when it is returned.
void attach(Case* c) {
  c->a.query_start = c->query_start.empty() ? nullptr : c->query_start.data();
  c->a.key_start = c->key_start.empty() ? nullptr : c->key_start.data();
}

// One query's probabilities, what dropout makes of them, and the derivatives of its scores by the products q·k.
struct Row {
  std::vector<double> p, kept, slope;
  double lse = -INFINITY;
};

Row row_of(const Case& c, int64_t b, int64_t h, int64_t i) {
  const Attention& a = c.a;
  const int64_t keys = keys_of(a, b), kv = h / (a.heads / a.kv_heads);
  const int64_t at = i + (a.bottom_right ? keys - queries_of(a, b) : 0);
  Row r;
  double sum = 0, max = -INFINITY;
  for (int64_t j = 0; j < keys; j++) {
    double s = 0, slope = a.scale;
    for (int64_t d = 0; d < a.d; d++) s += c.query_at(c.q, b, h, i, d) * c.key_at(c.k, b, kv, j, d);
    s *= a.scale;
    if (a.softcap > 0) {
      const double t = std::tanh(s / a.softcap);
      s = a.softcap * t;
      slope *= 1 - t * t;
    }
    s += mask_at(a, b, h, i, j);
    if (a.slopes) s -= a.slopes[h] * std::fabs(static_cast<double>(at - j));
    if ((a.left >= 0 && j < at - a.left) || (a.right >= 0 && j > at + a.right)) s = -INFINITY;
    r.p.push_back(s);
    r.slope.push_back(slope);
    r.kept.push_back(kept_at(a, b, h, i, j));
    max = std::max(max, s);
  }
  for (double& p : r.p) sum += p = max == -INFINITY ? 0 : std::exp(p - max);
  if (sum > 0) r.lse = max + std::log(sum);
  for (double& p : r.p) p = sum > 0 ? p / sum : 0;
  return r;
}

// The gradients of one query's scores before softcap and scale: of what a mask is added to.
std::vector<double> score_gradients(const Case& c, const Row& r, int64_t b, int64_t h, int64_t i) {
  const Attention& a = c.a;
  const int64_t keys = keys_of(a, b), kv = h / (a.heads / a.kv_heads);
  std::vector<double> ds(keys);
  double delta = -c.d_lse.as<float>()[c.row_at(b, h, i)];
  for (int64_t j = 0; j < keys; j++) {
    for (int64_t d = 0; d < a.dv; d++)
      ds[j] += r.kept[j] * c.query_at(c.d_out, b, h, i, d) * c.key_at(c.v, b, kv, j, d);
    delta += r.p[j] * ds[j];
  }
  for (int64_t j = 0; j < keys; j++) ds[j] = r.p[j] * (ds[j] - delta);
  return ds;
}

// What is compared: the largest difference, in units of the largest value.
struct Worst {
  double difference = 0, largest = 0.1;  // what is smaller than that is held to an absolute difference
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
  for (int64_t b = 0; b < a.batch; b++)
    for (int64_t kv = 0; kv < a.kv_heads; kv++) {
      const int64_t group = a.heads / a.kv_heads, keys = keys_of(a, b);
      std::vector<double> exact_k(keys * a.d), exact_v(keys * a.dv);
      for (int64_t h = kv * group; h < (kv + 1) * group; h++)
        for (int64_t i = 0; i < queries_of(a, b); i++) {
          const Row r = row_of(c, b, h, i);
          const float got = a.lse[c.row_at(b, h, i)];
          if (r.lse == -INFINITY) {
            CHECK(got == -INFINITY, "%s %d: lse of a row that sees nothing: %g", tier, iteration, got);
          } else {
            lse.see(got, r.lse);
          }
          const std::vector<double> ds = score_gradients(c, r, b, h, i);
          std::vector<double> o(a.dv), dq(a.d);
          for (int64_t j = 0; j < keys; j++) {
            const double p = r.p[j] * r.kept[j], s = ds[j] * r.slope[j];
            for (int64_t d = 0; d < a.dv; d++) {
              o[d] += p * c.key_at(c.v, b, kv, j, d);
              exact_v[j * a.dv + d] += p * c.query_at(c.d_out, b, h, i, d);
            }
            for (int64_t d = 0; d < a.d; d++) {
              dq[d] += s * c.key_at(c.k, b, kv, j, d);
              exact_k[j * a.d + d] += s * c.query_at(c.q, b, h, i, d);
            }
          }
          for (int64_t d = 0; d < a.dv; d++) out.see(c.query_at(c.out, b, h, i, d), o[d]);
          for (int64_t d = 0; d < a.d; d++) d_q.see(c.d_q_at(b, h, i, d), dq[d]);
        }
      for (int64_t j = 0; j < keys; j++) {
        for (int64_t d = 0; d < a.d; d++) d_k.see(c.key_at(c.d_k, b, kv, j, d), exact_k[j * a.d + d]);
        for (int64_t d = 0; d < a.dv; d++) d_v.see(c.key_at(c.d_v, b, kv, j, d), exact_v[j * a.dv + d]);
      }
    }
  // Operands rounded to bf16 are off by 2⁻⁹; scores of up to about 8 then by 0.03.
  const bool bf16 = a.flavour == Flavour::bf16, half = c.out.view.dtype != DType::f32;
  const double tolerance = bf16 ? 0.06 : half ? 4e-3 : 2e-5;
  const struct {
    const char* name;
    const Worst& worst;
  } results[] = {{"out", out}, {"lse", lse}, {"d_q", d_q}, {"d_k", d_k}, {"d_v", d_v}};
  for (const auto& [name, worst] : results)
    CHECK(worst.relative() < tolerance,
          "%s %d: %s is off by %.2e of its largest value (%s, D %lld, Dv %lld, %lld queries, %lld keys)", tier,
          iteration, name, worst.relative(), bf16 ? "bf16" : "fp32", static_cast<long long>(a.d),
          static_cast<long long>(a.dv), static_cast<long long>(a.queries), static_cast<long long>(a.keys));
}

void run(const Case& c, const Kernels& kernel, Rng* rng) {
  const Attention& a = c.a;
  for (int64_t b = 0; b < a.batch; b++)
    for (int64_t h = 0; h < a.kv_heads; h++) {
      const int64_t rows = queries_of(a, b) * (a.heads / a.kv_heads), cut = rng->below(rows + 1);
      if (cut > 0) kernel.attention_forward(a, {b, h, 0, cut});
      if (cut < rows) kernel.attention_forward(a, {b, h, cut, rows});
      for (int64_t p = 0; p < c.parts; p++) {  // also empty ones
        const Range keys = part(keys_of(a, b), 2, c.parts, p);
        kernel.attention_backward(a, c.g, {b, h, keys.begin, keys.end, p});
      }
    }
}

// The gradient of a mask of (batch, head, row, column), or of what any of them is broadcast to.
void check_mask_gradient(const Case& c, const Kernels& kernel, Rng* rng, int iteration) {
  const Attention& a = c.a;
  if (!c.query_start.empty() || a.flavour != Flavour::f32 || c.out.view.dtype != DType::f32) return;
  const bool rows = rng->chance(2), cols = rng->chance(2), heads = rng->chance(2);
  const int64_t row = rows ? (cols ? a.keys : 1) : 0, head = (rows ? a.queries : 1) * (cols ? a.keys : 1);
  const int64_t count = (heads ? a.heads : 1) * head;
  Exact memory(count * 4, 4, 0);
  std::vector<double> exact(count);
  for (int64_t h = 0; h < (heads ? a.heads : 1); h++)
    for (int64_t i = 0; i < a.queries; i += rows ? kMaskChunkQueries : a.queries)
      for (int64_t j = 0; j < a.keys; j += cols ? kMaskBlockKeys : a.keys)
        kernel.attention_mask_gradient(a, c.g,
                                       {{0, a.batch},
                                        {heads ? h : 0, heads ? h + 1 : a.heads},
                                        {i, rows ? std::min(i + kMaskChunkQueries, a.queries) : a.queries},
                                        {j, cols ? std::min(j + kMaskBlockKeys, a.keys) : a.keys},
                                        memory.as<float>() + h * head,
                                        row,
                                        cols});
  for (int64_t b = 0; b < a.batch; b++)
    for (int64_t h = 0; h < a.heads; h++)
      for (int64_t i = 0; i < a.queries; i++) {
        const std::vector<double> ds = score_gradients(c, row_of(c, b, h, i), b, h, i);
        for (int64_t j = 0; j < a.keys; j++) exact[(heads ? h : 0) * head + i * row + (cols ? j : 0)] += ds[j];
      }
  Worst worst;
  for (int64_t i = 0; i < count; i++) worst.see(memory.as<float>()[i], exact[i]);
  CHECK(worst.relative() < 1e-4, "%s %d: the gradient of a mask is off by %.2e of its largest value",
        isa_name(kernel.isa), iteration, worst.relative());
}

}  // namespace

void test_attention(const Options& options) {
  Rng rng(options.seed);
  for (int i = 0; i < options.iterations / 3; i++) {  // the formulas in double are slow under the sanitizers
    Case c = random_case(&rng);
    attach(&c);
    for (int isa = 0; isa <= static_cast<int>(best_isa()); isa++) {
      const Kernels& kernel = kernels_of(static_cast<Isa>(isa));
      run(c, kernel, &rng);
      compare(c, isa_name(kernel.isa), i);
      check_mask_gradient(c, kernel, &rng, i);
    }
  }
}

}  // namespace pbm::test
