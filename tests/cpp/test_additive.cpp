// Additive attention forward and backward on every tier: random sizes, strides, dtypes and masks with exact-size operands
// and workspaces, so that the sanitizers see what is read or written beyond them, against the formulas in double.
#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/kernels/tiers.h"
#include "elements.h"

namespace pbm::test {
namespace {

// A (batch, row, column) operand whose rows have a gap behind them.
struct Operand {
  AttentionOperand view{};
  Exact memory;
  double at(int64_t b, int64_t i, int64_t d) const {
    return get(view.dtype, view.data, b * view.batch + i * view.row + d);
  }
};

Operand operand(Rng* rng, DType dtype, int64_t batch, int64_t rows, int64_t columns, float size = 1) {
  const int64_t gap = rng->below(4), wide = columns + gap, count = batch * rows * wide - gap;
  Operand o;
  o.memory = Exact(count * size_of(dtype), size_of(dtype));
  for (int64_t i = 0; i < count; i++) put(dtype, o.memory.data(), i, size * rng->value());
  o.view = {o.memory.data(), dtype, rows * wide, 0, wide};
  return o;
}

struct Case {
  AdditiveAttention a{};
  AdditiveGradients g{};
  AdditiveFew f{};
  Operand query, key, value, out, d_out, d_query, d_key, d_value;
  Exact v, lse, d_lse, mask, d_v, d_mask;
  // What the torch boundary allocates.
  Exact blocks, forms, columns, panels, p, d_s, d_columns, d_value_sums, part_query, part_v;
};

float* floats(Exact* memory, int64_t count) {
  *memory = Exact(count * 4);
  return memory->as<float>();
}

void random_mask(Rng* rng, Case* c) {
  AdditiveAttention& a = c->a;
  const bool boolean = rng->chance(2), per_row = rng->chance(2), per_batch = rng->chance(2);
  const int64_t rows = (per_batch ? a.batch : 1) * (per_row ? a.queries : 1);
  c->mask = Exact(rows * a.keys * (boolean ? 1 : 4));
  for (int64_t i = 0; i < rows * a.keys; i++) {
    if (boolean) {
      c->mask.data()[i] = !rng->chance(4);
    } else {
      c->mask.as<float>()[i] = rng->chance(8) ? -INFINITY : rng->value();
    }
  }
  if (rng->chance(3)) {  // a row that sees nothing, and behind it blocks that nobody sees
    for (int64_t i = 0; i < rows; i++)
      for (int64_t j = i == 0 ? 0 : std::min<int64_t>(a.keys, 64); j < a.keys; j++) {
        if (boolean) {
          c->mask.data()[i * a.keys + j] = 0;
        } else {
          c->mask.as<float>()[i * a.keys + j] = -INFINITY;
        }
      }
  }
  a.mask = {boolean ? MaskKind::boolean : MaskKind::additive,   c->mask.data(),       DType::f32,
            per_batch ? (per_row ? a.queries : 1) * a.keys : 0, per_row ? a.keys : 0, 1};
  if (boolean) return;
  c->g.d_mask = floats(&c->d_mask, rows * a.keys);
  c->g.d_mask_batch = a.mask.batch;
  c->g.d_mask_row = a.mask.row;
}

Case random_case(Rng* rng) {
  Case c;
  AdditiveAttention& a = c.a;
  const DType dtype = rng->of({DType::f32, DType::bf16, DType::f16});
  a.batch = rng->between(1, 2);
  a.queries = rng->of({rng->between(1, kFewQueries), rng->between(4, 20), rng->between(60, 140)});
  a.keys = rng->of({int64_t{1}, rng->between(2, 70), rng->between(120, 200)});
  a.hidden = rng->of({rng->between(1, 9), int64_t{32}, rng->between(30, 70)});
  a.values = rng->of({int64_t{1}, rng->between(2, 40), rng->between(120, 150)});
  // Both forms of tanh, and tanh itself.
  const float size = rng->of({0.5f, 1.5f, 4.f, 25.f});
  c.query = operand(rng, dtype, a.batch, a.queries, a.hidden, size);
  c.key = operand(rng, dtype, a.batch, a.keys, a.hidden, size);
  c.value = operand(rng, dtype, a.batch, a.keys, a.values);
  c.out = operand(rng, dtype, a.batch, a.queries, a.values);
  c.d_out = operand(rng, dtype, a.batch, a.queries, a.values);
  c.d_query = operand(rng, dtype, a.batch, a.queries, a.hidden);
  c.d_key = operand(rng, dtype, a.batch, a.keys, a.hidden);
  c.d_value = operand(rng, dtype, a.batch, a.keys, a.values);
  float* v = floats(&c.v, padded_hidden(a));
  for (int64_t h = 0; h < padded_hidden(a); h++) v[h] = h < a.hidden ? rng->value() : 0;
  const int64_t rows = a.batch * a.queries;
  a.lse = floats(&c.lse, rows);
  float* d_lse = floats(&c.d_lse, rows);
  for (int64_t i = 0; i < rows; i++) d_lse[i] = rng->value();
  if (rng->chance(2)) random_mask(rng, &c);
  a.query = c.query.view;
  a.key = c.key.view;
  a.value = c.value.view;
  a.out = c.out.view;
  a.v = v;
  a.direct = rng->chance(5);
  c.g.d_out = c.d_out.view;
  c.g.d_lse = d_lse;
  c.g.d_query = c.d_query.view;
  c.g.d_key = c.d_key.view;
  c.g.d_v = floats(&c.d_v, a.batch * padded_hidden(a));
  return c;
}

// --- as the torch boundary calls the kernels -----------------------------------------------------------------------------

void prepare(Case* c, const Kernels& kernel, bool backward) {
  AdditiveAttention& a = c->a;
  const int64_t columns = backward ? a.keys : a.values, depth = backward ? a.values : a.keys;
  const int64_t panels = ceil_div(columns, kPanel), elements = padded_hidden(a) * padded_keys(a);
  float* packed = floats(&c->panels, a.batch * panels * depth * kPanel);
  a.panels = packed;
  a.blocks = floats(&c->blocks, a.batch * elements);
  c->forms = Exact(a.batch * padded_hidden(a) * key_blocks(a) * 4);
  a.forms = c->forms.as<int32_t>();
  a.columns = backward ? floats(&c->columns, a.batch * elements) : nullptr;
  for (int64_t b = 0; b < a.batch; b++) {
    for (int64_t block = 0; block < key_blocks(a); block++) kernel.additive.prepare(a, b, block);
    const char* value = static_cast<const char*>(a.value.data) + b * a.value.batch * size_of(a.value.dtype);
    const int64_t row = backward ? 1 : a.value.row, column = backward ? a.value.row : 1;
    kernel.pack_b(
        {columns, depth, Flavour::f32, value, a.value.dtype, row, column, false, packed + b * panels * depth * kPanel},
        0, panels);
  }
}

// Queries in two items; the second may start anywhere.
void forward(Case* c, const Kernels& kernel, Rng* rng) {
  prepare(c, kernel, false);
  const AdditiveAttention& a = c->a;
  const int64_t cut = rng->below(a.queries + 1);
  for (int64_t b = 0; b < a.batch; b++) {
    if (cut > 0) kernel.additive.forward(a, {b, {0, cut}, 0});
    if (cut < a.queries) kernel.additive.forward(a, {b, {cut, a.queries}, 0});
  }
}

// In one strip for each unit of queries, or in one for all.
void backward(Case* c, const Kernels& kernel, Rng* rng) {
  prepare(c, kernel, true);
  AdditiveAttention& a = c->a;
  AdditiveGradients& g = c->g;
  const int64_t strip = rng->chance(2) ? kAdditiveRows : a.queries, rows = std::min(strip, a.queries);
  g.p = floats(&c->p, rows * (padded_keys(a) + 16));
  g.d_s = floats(&c->d_s, rows * (padded_keys(a) + 16));
  g.d_columns = floats(&c->d_columns, a.batch * padded_hidden(a) * padded_keys(a));
  g.d_value = floats(&c->d_value_sums, a.batch * a.keys * a.values);
  for (int64_t b = 0; b < a.batch; b++)
    for (int64_t i = 0; i < a.queries; i += strip) {
      const AdditiveItem item = {b, {i, std::min(i + strip, a.queries)}, 0};
      const bool first = i == 0, last = item.rows.end == a.queries;
      kernel.additive.score_gradients(a, g, item);
      kernel.additive.hidden_gradients(a, g, {item, {0, padded_hidden(a) / 16}, first, last});
      kernel.additive.value_gradients(a, g, {item, {0, a.keys}, first, last});
      if (g.d_mask) kernel.additive.mask_gradient(a, g, item, {0, a.keys});
    }
  for (int64_t b = 0; b < a.batch; b++)
    for (int64_t j = 0; j < a.keys; j++)
      for (int64_t d = 0; d < a.values; d++)
        put(c->d_value.view.dtype, c->d_value.memory.data(), b * c->d_value.view.batch + j * c->d_value.view.row + d,
            g.d_value[(b * a.keys + j) * a.values + d]);
}

void few(Case* c, const Kernels& kernel) {
  AdditiveAttention& a = c->a;
  AdditiveFew& f = c->f;
  const int64_t rows = a.batch * a.queries, parts = few_parts(a), floats_a_row = padded_keys(a) + 16;
  f = {};
  f.p = floats(&c->p, rows * floats_a_row);
  const auto each_part = [&](auto kernel_of_part) {
    for (int64_t n = 0; n < a.batch * parts; n++) kernel_of_part(a, f, n / parts, n % parts);
  };
  each_part(kernel.additive.few_scores);
  for (int64_t b = 0; b < a.batch; b++) kernel.additive.few_output(a, f, b);
  f.d_s = c->g.d_s = floats(&c->d_s, rows * floats_a_row);
  f.d_out = c->g.d_out;
  f.d_lse = c->g.d_lse;
  f.d_query = c->g.d_query;
  f.d_key = c->g.d_key;
  f.d_value = c->d_value.view;
  f.d_v = c->g.d_v;
  f.part_query = floats(&c->part_query, rows * parts * padded_hidden(a));
  f.part_v = floats(&c->part_v, a.batch * parts * padded_hidden(a));
  each_part(kernel.additive.few_scores);
  for (int64_t b = 0; b < a.batch; b++) kernel.additive.few_score_gradients(a, f, b);
  each_part(kernel.additive.few_gradients);
  for (int64_t b = 0; b < a.batch; b++) kernel.additive.few_sums(a, f, b);
  for (int64_t b = 0; b < a.batch && c->g.d_mask; b++)
    kernel.additive.mask_gradient(a, c->g, {b, {0, a.queries}, b * a.queries}, {0, a.keys});
}

// --- the formulas --------------------------------------------------------------------------------------------------------

struct Exactly {
  std::vector<double> out, lse, d_query, d_key, d_value, d_v, d_mask;
};

// Probabilities of one query in place of its scores, and the logarithm of their sum.
double softmax(std::vector<double>* s) {
  const double max = *std::max_element(s->begin(), s->end());
  if (max == -INFINITY) {
    std::fill(s->begin(), s->end(), 0);
    return max;
  }
  double sum = 0;
  for (double& x : *s) sum += x = std::exp(x - max);
  for (double& x : *s) x /= sum;
  return max + std::log(sum);
}

std::vector<double> scores(const Case& c, int64_t b, int64_t i) {
  const AdditiveAttention& a = c.a;
  std::vector<double> s(a.keys);
  for (int64_t j = 0; j < a.keys; j++) {
    for (int64_t h = 0; h < a.hidden; h++) s[j] += a.v[h] * std::tanh(c.query.at(b, i, h) + c.key.at(b, j, h));
    const int64_t m = b * a.mask.batch + i * a.mask.row + j;
    if (a.mask.kind == MaskKind::boolean && !c.mask.data()[m]) s[j] = -INFINITY;
    if (a.mask.kind == MaskKind::additive) s[j] += c.mask.as<float>()[m];
  }
  return s;
}

void add_row(const Case& c, int64_t b, int64_t i, Exactly* x) {
  const AdditiveAttention& a = c.a;
  std::vector<double> p = scores(c, b, i), dp(a.keys);
  const int64_t row = b * a.queries + i;
  x->lse[row] = softmax(&p);
  double delta = -c.g.d_lse[row];
  for (int64_t j = 0; j < a.keys; j++) {
    const int64_t key = b * a.keys + j;
    for (int64_t d = 0; d < a.values; d++) {
      x->out[row * a.values + d] += p[j] * c.value.at(b, j, d);
      x->d_value[key * a.values + d] += p[j] * c.d_out.at(b, i, d);
      dp[j] += c.d_out.at(b, i, d) * c.value.at(b, j, d);
    }
    delta += p[j] * dp[j];
  }
  for (int64_t j = 0; j < a.keys; j++) {
    const double ds = p[j] * (dp[j] - delta);
    if (c.g.d_mask) x->d_mask[b * c.g.d_mask_batch + i * c.g.d_mask_row + j] += ds;
    for (int64_t h = 0; h < a.hidden; h++) {
      const double t = std::tanh(c.query.at(b, i, h) + c.key.at(b, j, h)), by_sum = ds * a.v[h] * (1 - t * t);
      x->d_query[row * a.hidden + h] += by_sum;
      x->d_key[(b * a.keys + j) * a.hidden + h] += by_sum;
      x->d_v[b * padded_hidden(a) + h] += ds * t;
    }
  }
}

Exactly exactly(const Case& c) {
  const AdditiveAttention& a = c.a;
  const int64_t rows = a.batch * a.queries, keys = a.batch * a.keys;
  const auto zeros = [](int64_t count) { return std::vector<double>(count); };
  Exactly x = {zeros(rows * a.values),     zeros(rows),
               zeros(rows * a.hidden),     zeros(keys * a.hidden),
               zeros(keys * a.values),     zeros(a.batch * padded_hidden(a)),
               zeros(c.d_mask.bytes() / 4)};
  for (int64_t b = 0; b < a.batch; b++)
    for (int64_t i = 0; i < a.queries; i++) add_row(c, b, i, &x);
  return x;
}

// --- the comparison ------------------------------------------------------------------------------------------------------

// The largest difference, in units of the largest value, or of one thousandth.
struct Worst {
  double difference = 0, largest = 1e-3;
  void see(double got, double expected) {
    if (got == expected) return;  // infinities
    const double off = std::fabs(got - expected);
    difference = std::max(difference, std::isnan(off) ? INFINITY : off);
    largest = std::max(largest, std::fabs(expected));
  }
};

Worst of_operand(const Operand& got, int64_t rows, int64_t columns, const std::vector<double>& expected) {
  Worst worst;
  for (size_t n = 0; n < expected.size(); n++) {
    const int64_t at = static_cast<int64_t>(n) / columns;
    worst.see(got.at(at / rows, at % rows, static_cast<int64_t>(n) % columns), expected[n]);
  }
  return worst;
}

Worst of_floats(const float* got, const std::vector<double>& expected) {
  Worst worst;
  for (size_t n = 0; n < expected.size(); n++) worst.see(got[n], expected[n]);
  return worst;
}

void compare(const Case& c, const Exactly& x, const char* tier, int iteration) {
  const AdditiveAttention& a = c.a;
  const struct {
    const char* name;
    Worst worst;
  } results[] = {{"out", of_operand(c.out, a.queries, a.values, x.out)},
                 {"lse", of_floats(a.lse, x.lse)},
                 {"d_query", of_operand(c.d_query, a.queries, a.hidden, x.d_query)},
                 {"d_key", of_operand(c.d_key, a.keys, a.hidden, x.d_key)},
                 {"d_value", of_operand(c.d_value, a.keys, a.values, x.d_value)},
                 {"d_v", of_floats(c.g.d_v, x.d_v)},
                 {"d_mask", of_floats(c.g.d_mask, x.d_mask)}};
  for (const auto& [name, worst] : results) {
    const bool half = a.query.dtype != DType::f32 && name[0] != 'l' && std::strcmp(name, "d_v") != 0 &&
                      std::strcmp(name, "d_mask") != 0;
    const double relative = worst.difference / worst.largest;
    // What is left of terms that cancel is as exact as the terms.
    CHECK(relative < (half ? 4e-3 : 3e-5) || worst.difference < 2e-6,
          "%s %d: %s is off by %.2e of its largest value (%s, %lld queries, %lld keys, hidden %lld, values %lld)", tier,
          iteration, name, relative, pbm::test::name(a.query.dtype), static_cast<long long>(a.queries),
          static_cast<long long>(a.keys), static_cast<long long>(a.hidden), static_cast<long long>(a.values));
  }
}

}  // namespace

void test_additive(const Options& options) {
  Rng rng(options.seed);
  for (int i = 0; i < options.iterations / 3; i++) {  // the formulas in double are slow under the sanitizers
    Case c = random_case(&rng);
    const Exactly x = exactly(c);
    for (int isa = 0; isa <= static_cast<int>(best_isa()); isa++) {
      const Kernels& kernel = kernels_of(static_cast<Isa>(isa));
      if (c.g.d_mask) std::memset(c.g.d_mask, 0, static_cast<size_t>(c.d_mask.bytes()));
      if (c.a.queries <= kFewQueries && !rng.chance(4)) {
        few(&c, kernel);
      } else {
        forward(&c, kernel, &rng);
        backward(&c, kernel, &rng);
      }
      compare(c, x, isa_name(kernel.isa), i);
    }
  }
}

}  // namespace pbm::test
