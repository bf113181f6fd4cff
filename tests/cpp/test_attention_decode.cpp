// Decoding on every tier: caches of every dtype, contiguous and paged, of exactly their size, so that the sanitizers see
// what is read beyond them; against the formulas in double.
#include <cmath>
#include <vector>

#include "cpu/kernels/tiers.h"
#include "elements.h"

namespace pbm::test {
namespace {

struct Case {
  AttentionDecode p{};
  std::vector<int64_t> lengths;
  Exact q, k, v, out, k_scale, v_scale, table, lse, max, inverse_sum, slopes, mask;

  int64_t slot(const AttentionOperand& x, int64_t b, int64_t h, int64_t j) const {
    const int64_t block = p.block_table ? p.block_table[b * p.table_row + j / p.a.keys] : b;
    return block * x.batch + h * x.head + (p.block_table ? j % p.a.keys : j) * x.row;
  }
  double value(const AttentionOperand& x, const CacheScales& s, int64_t b, int64_t h, int64_t j, int64_t d) const {
    const double scale = s.data ? s.data[slot({nullptr, x.dtype, s.batch, s.head, s.row}, b, h, j)] : 1.;
    return get(x.dtype, x.data, slot(x, b, h, j) + d) * scale;
  }
};

// (batch, heads, rows, d) with heads or rows first in memory; the last row ends where the memory does.
AttentionOperand operand(Rng* rng, Exact* memory, DType dtype, int64_t batch, int64_t heads, int64_t rows, int64_t d) {
  const int64_t gap = rng->below(4), wide = d + gap;
  const bool rows_first = rng->chance(2);
  const int64_t count = batch * heads * rows * wide - gap;
  *memory = Exact(count * size_of(dtype), size_of(dtype));
  for (int64_t i = 0; i < count; i++) {
    if (dtype == DType::s8) {
      memory->as<int8_t>()[i] = static_cast<int8_t>(rng->below(255) - 127);
    } else {
      put(dtype, memory->data(), i, rng->value());
    }
  }
  return {memory->data(), dtype, heads * rows * wide, rows_first ? wide : rows * wide,
          rows_first ? heads * wide : wide};
}

CacheScales scales(Rng* rng, Exact* memory, int64_t blocks, int64_t heads, int64_t rows) {
  *memory = Exact(blocks * heads * rows * 4);
  for (int64_t i = 0; i < blocks * heads * rows; i++) memory->as<float>()[i] = (1.1f + rng->value()) / 100;
  return {memory->as<float>(), heads * rows, rows, 1};
}

Case random_case(Rng* rng) {
  Case c;
  Attention& a = c.p.a;
  const DType dtype = rng->of({DType::f32, DType::bf16, DType::f16});
  const bool s8 = rng->chance(3), paged = rng->chance(2);
  a.batch = rng->between(1, 3);
  a.kv_heads = rng->between(1, 2);
  a.heads = a.kv_heads * rng->between(1, 6);
  a.queries = rng->of({int64_t{1}, rng->between(1, 5)});
  a.d = rng->of({rng->between(1, 9), int64_t{64}, rng->between(10, 140), int64_t{256}});
  a.dv = rng->chance(2) ? a.d : rng->between(1, 140);
  const int64_t room = rng->of({rng->between(1, 40), rng->between(41, 200), rng->between(500, 1100)});
  a.keys = paged ? rng->of({int64_t{1}, int64_t{16}, rng->between(1, 300)}) : room;
  const int64_t per_sequence = ceil_div(room, a.keys), blocks = paged ? a.batch * per_sequence : a.batch;
  a.q = operand(rng, &c.q, dtype, a.batch, a.heads, a.queries, a.d);
  a.k = operand(rng, &c.k, s8 ? DType::s8 : dtype, blocks, a.kv_heads, a.keys, a.d);
  a.v = operand(rng, &c.v, s8 ? DType::s8 : dtype, blocks, a.kv_heads, a.keys, a.dv);
  a.out = operand(rng, &c.out, dtype, a.batch, a.heads, a.queries, a.dv);
  if (s8) {
    c.p.k_scale = scales(rng, &c.k_scale, blocks, a.kv_heads, a.keys);
    c.p.v_scale = scales(rng, &c.v_scale, blocks, a.kv_heads, a.keys);
  }
  for (int64_t b = 0; b < a.batch; b++) c.lengths.push_back(b + 1 == a.batch ? room : rng->below(room + 1));
  if (paged) {
    c.table = Exact(blocks * 4);
    for (int64_t i = 0; i < blocks; i++) c.table.as<int32_t>()[i] = static_cast<int32_t>((i * 7 + 3) % blocks);
    if (blocks % 7 == 0)
      for (int64_t i = 0; i < blocks; i++) c.table.as<int32_t>()[i] = static_cast<int32_t>(blocks - 1 - i);
    c.p.block_table = c.table.as<int32_t>();
    c.p.table_row = per_sequence;
  }
  const int64_t rows = a.batch * a.heads * a.queries;
  for (Exact* e : {&c.lse, &c.max, &c.inverse_sum}) *e = Exact(rows * 4);
  a.lse = c.lse.as<float>();
  a.max = c.max.as<float>();
  a.inverse_sum = c.inverse_sum.as<float>();
  a.row_head = a.queries;
  a.row_batch = a.heads * a.queries;
  a.scale = rng->chance(5) ? -0.2f : static_cast<float>(1 / std::sqrt(static_cast<double>(a.d)));
  a.softcap = rng->chance(4) ? 2.f : 0.f;
  a.left = rng->chance(3) ? rng->below(30) : -1;
  a.right = rng->chance(3) ? -1 : rng->below(3);
  a.bottom_right = !rng->chance(4);
  if (rng->chance(4)) {
    c.slopes = Exact(a.heads * 4);
    for (int64_t h = 0; h < a.heads; h++) c.slopes.as<float>()[h] = 0.1f * static_cast<float>(h + 1);
    a.slopes = c.slopes.as<float>();
  }
  if (!paged && rng->chance(3)) {
    const bool boolean = rng->chance(2), per_head = rng->chance(2);
    const int64_t mask_rows = a.batch * (per_head ? a.heads : 1) * a.queries;
    c.mask = Exact(mask_rows * a.keys * (boolean ? 1 : 4));
    for (int64_t i = 0; i < mask_rows * a.keys; i++) {
      if (boolean) {
        c.mask.data()[i] = !rng->chance(4);
      } else {
        c.mask.as<float>()[i] = rng->chance(8) ? -INFINITY : rng->value();
      }
    }
    a.mask = {boolean ? MaskKind::boolean : MaskKind::additive,
              c.mask.data(),
              DType::f32,
              mask_rows / a.batch * a.keys,
              per_head ? a.queries * a.keys : 0,
              a.keys,
              1};
  }
  return c;
}

// Weights of one query, 0 where hidden, and their log-sum-exp.
double weights_of(const Case& c, int64_t b, int64_t h, int64_t i, std::vector<double>* p) {
  const Attention& a = c.p.a;
  const int64_t length = c.lengths[b], kv = h / (a.heads / a.kv_heads);
  const int64_t at = i + (a.bottom_right ? length - a.queries : 0);
  double max = -INFINITY, sum = 0;
  p->assign(length, -INFINITY);
  for (int64_t j = 0; j < length; j++) {
    if ((a.left >= 0 && j < at - a.left) || (a.right >= 0 && j > at + a.right)) continue;
    const int64_t m = b * a.mask.batch + h * a.mask.head + i * a.mask.row + j;
    if (a.mask.kind == MaskKind::boolean && !c.mask.data()[m]) continue;
    double s = 0;
    for (int64_t d = 0; d < a.d; d++)
      s += get(a.q.dtype, a.q.data, b * a.q.batch + h * a.q.head + i * a.q.row + d) *
           c.value(a.k, c.p.k_scale, b, kv, j, d);
    s *= a.scale;
    if (a.softcap > 0) s = a.softcap * std::tanh(s / a.softcap);
    if (a.mask.kind == MaskKind::additive) s += c.mask.as<float>()[m];
    if (a.slopes) s -= a.slopes[h] * std::fabs(static_cast<double>(at - j));
    (*p)[j] = s;
    max = std::max(max, s);
  }
  for (double& s : *p) sum += s = max == -INFINITY ? 0 : std::exp(s - max);
  for (double& s : *p) s /= sum > 0 ? sum : 1;
  return sum > 0 ? max + std::log(sum) : -INFINITY;
}

// As ops cut them: parts of kSplitKeys.
void run(const Case& c, const Kernels& kernel) {
  const Attention& a = c.p.a;
  for (int64_t b = 0; b < a.batch; b++)
    for (int64_t h = 0; h < a.kv_heads; h++) {
      std::vector<DecodeItem> items;
      std::vector<Exact> partials;
      int64_t begin = 0;
      do {
        const int64_t end = std::min(begin + kSplitKeys, c.lengths[b]);
        partials.emplace_back(decode_partial_floats(a) * 4, 0, 0);
        items.push_back({b, h, c.lengths[b], {begin, end}, partials.back().as<float>()});
        begin = end;
      } while (begin < c.lengths[b]);
      for (size_t n = 0; n < items.size(); n++)
        kernel.attention_decode(c.p, items[n], n + 1 < items.size() ? &items[n + 1] : nullptr);
      kernel.attention_decode_merge(c.p, items.data(), static_cast<int64_t>(items.size()));
    }
}

void compare(const Case& c, const char* tier, int iteration) {
  const Attention& a = c.p.a;
  // Of bf16 operands weights are rounded to 2⁻⁹ of themselves; of s8 caches to 2⁻¹⁶ of the largest.
  const double tolerance = a.k.dtype == DType::bf16 ? 8e-3 : a.k.dtype == DType::s8 ? 1e-3 : 1e-5;
  double worst = 0, worst_lse = 0, largest = 1e-6;
  std::vector<double> p;
  for (int64_t b = 0; b < a.batch; b++)
    for (int64_t h = 0; h < a.heads; h++)
      for (int64_t i = 0; i < a.queries; i++) {
        const double lse = weights_of(c, b, h, i, &p), got = a.lse[b * a.row_batch + h * a.row_head + i];
        const bool empty = lse == -INFINITY;
        CHECK((got == -INFINITY) == empty, "%s %d: lse %g, expected %g", tier, iteration, got, lse);
        if (!empty) worst_lse = std::max(worst_lse, std::fabs(got - lse));
        for (int64_t d = 0; d < a.dv; d++) {
          double o = 0;
          for (int64_t j = 0; j < c.lengths[b]; j++)
            o += p[j] * c.value(a.v, c.p.v_scale, b, h / (a.heads / a.kv_heads), j, d);
          const double y = get(a.out.dtype, a.out.data, b * a.out.batch + h * a.out.head + i * a.out.row + d);
          const double off = std::fabs(y - o) - rounding(a.out.dtype, o);
          worst = std::max(worst, std::isnan(off) ? INFINITY : off);
          largest = std::max(largest, std::fabs(o));
        }
      }
  CHECK(worst <= tolerance * largest && worst_lse <= tolerance,
        "%s %d: out is off by %.2e of its largest value, lse by %.2e (%s cache, D %lld, Dv %lld, %lld rows, %s)", tier,
        iteration, worst / largest, worst_lse, name(a.k.dtype), static_cast<long long>(a.d),
        static_cast<long long>(a.dv), static_cast<long long>(decode_rows(a)), c.p.block_table ? "paged" : "one block");
}

}  // namespace

void test_attention_decode(const Options& options) {
  Rng rng(options.seed);
  for (int i = 0; i < options.iterations / 3; i++) {
    const Case c = random_case(&rng);
    for (const Isa isa : tiers()) {
      const Kernels& kernel = kernels_of(isa);
      run(c, kernel);
      compare(c, isa_name(isa), i);
    }
  }
}

}  // namespace pbm::test
