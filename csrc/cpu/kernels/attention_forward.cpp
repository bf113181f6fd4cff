// Keys outside, queries inside: a block of K and V is packed once and stays in L2 while every row of the item passes by;
// a strip of scores stays in L1. Running maxima, sums and outputs are kept per row (online softmax).
#include "common/scratch.h"
#include "cpu/kernels/attention_scores.h"
#include "cpu/kernels/attention_tiles.h"
#include "cpu/kernels/impl.h"

namespace pbm::PBM_TIER {
namespace {

// Bytes of packed K and V that stay in L2 beside what passes by, and the most keys of a block.
constexpr int64_t kBlockBytes = int64_t{256} << 10;
constexpr int64_t kMostKeys = 512;
// Strips take turns, so that no step waits for the one before it to leave the pipeline.
constexpr int kTurns = 2;
// Independent of the item, the batch and the threads, so that a row's result is too. Of a narrow window little of a block is in
// use at a time, and fewer strips see two of them if they are long.
int64_t block_keys(const Attention& a) {
  const int64_t bytes = (a.d + a.dv) * 4 / k_per_lane(a.flavour);
  const int64_t times = a.left >= 0 && a.right >= 0 && a.left + a.right < kMostKeys ? 2 : 1;
  return max64(min64(times * kBlockBytes / max64(bytes, 1), times * kMostKeys) / 64 * 64, 64);
}

// One item's working memory.
struct Work {
  char *k, *v;             // packed panels of the block
  char* q;                 // rows converted, where they cannot be read in place
  float* scores;           // kTurns strips of kStrip × pitch
  char* p;                 // the same in the flavour's dtype; scores themselves in fp32
  float* out;              // rows × out_stride
  float *max, *sum, *lse;  // per row
  bool* started;           // per row: whether out holds anything
};

struct Forward {
  const Attention& a;
  const AttentionItem& item;
  int64_t queries, keys, block, group;
  int64_t q_stride, out_stride;  // bytes; elements
  int64_t pitch;                 // elements of a row of scores: room for one panel more than a block
  bool convert_q;
  Work w;
};

// Rows [row, row + rows) of one query head, from query `i` on, and the columns of the block that any of them sees.
struct Strip {
  int64_t row, head, i;
  int rows;
  Range columns;  // within the block; begin is a multiple of 16, as is end
  // Of the turn that the strip takes: its scores, what its sums and outputs are rescaled with.
  float* scores;
  char* p;
  float* rescale;
};

Work carve(const Forward& f) {
  const int64_t rows = f.item.end - f.item.begin, strip = kTurns * kStrip * f.pitch;
  const bool bf16 = f.a.flavour == Flavour::bf16;
  Carver c;
  const int64_t k = c.take(f.block * panel_groups(f.a.d, f.a.flavour) * 4);
  const int64_t v = c.take(f.out_stride * panel_groups(f.block, f.a.flavour) * 4);
  const int64_t q = c.take(f.convert_q ? rows * f.q_stride : 0);
  const int64_t scores = c.take(strip * 4), p = bf16 ? c.take(strip * 2) : scores;
  const int64_t out = c.take(rows * f.out_stride * 4), max = c.take(rows * 4), sum = c.take(rows * 4);
  const int64_t lse = c.take(rows * 4), started = c.take(rows);
  char* base = static_cast<char*>(scratch(ScratchSlot::attention, c.bytes));
  const auto floats = [&](int64_t at) { return reinterpret_cast<float*>(base + at); };
  return {base + k,    base + v,    base + q,    floats(scores), base + p,
          floats(out), floats(max), floats(sum), floats(lse),    reinterpret_cast<bool*>(base + started)};
}

void pack_block(const Forward& f, Range j) {
  const Attention& a = f.a;
  const int64_t n = j.end - j.begin, k_size = size_of(a.k.dtype), v_size = size_of(a.v.dtype);
  const char* k = key_row(a, a.k, f.item.b, f.item.kv_head, j.begin);
  const char* v = key_row(a, a.v, f.item.b, f.item.kv_head, j.begin);
  const PackB keys = {n, a.d, a.flavour, k, a.k.dtype, 1, a.k.row, false, f.w.k};
  for (int64_t p = 0; p < ceil_div(n, kPanel); p++) {
    const int64_t next = (p + 1) * kPanel, now = p * kPanel;
    if (next < n) fetch_rows<3>(k + next * a.k.row * k_size, min64(kPanel, n - next), a.k.row * k_size, a.d * k_size);
    fetch_rows<2>(v + now * a.v.row * v_size, min64(kPanel, n - now), a.v.row * v_size, a.dv * v_size);
    pack_b(keys, p, p + 1);
  }
  pack_b({a.dv, n, a.flavour, v, a.v.dtype, a.v.row, 1, false, f.w.v}, 0, ceil_div(a.dv, kPanel));
}

void convert_queries(const Forward& f, int64_t head, int64_t i, int64_t count, int64_t row) {
  Gemm g{};
  g.k = f.a.d;
  g.flavour = f.a.flavour;
  g.a = query_row(f.a, f.a.q, f.item.b, head, i);
  g.a_dtype = f.a.q.dtype;
  g.a_row = f.a.q.row;
  g.a_col = 1;
  convert_rows(g, 0, count, f.w.q + row * f.q_stride, f.q_stride);
}

// --- scores ----------------------------------------------------------------------------------------------------------

// Everything but visibility by position, which hide() adds.
void adjust_scores(const Forward& f, const Strip& s, int64_t j0) {
  const Attention& a = f.a;
  const int64_t offset = a.bottom_right ? f.keys - f.queries : 0;
  const float slope = a.slopes ? a.slopes[f.item.b * a.slopes_batch + s.head] : 0.f;
  for (int r = 0; r < s.rows; r++) {
    float* row = s.scores + r * f.pitch;
    const int64_t i = s.i + r;
    const int64_t mask_row = f.item.b * a.mask.batch + s.head * a.mask.head + i * a.mask.row;
    const float relative = static_cast<float>(j0 - i - offset);
    for (int64_t j = s.columns.begin; j < s.columns.end; j += kWidth) {
      Vec x = load(row + j);
      if (a.softcap != 0.f) {
        x = mul(vtanh(mul(x, set1(cap_factor(a.scale, a.softcap)))), set1(a.softcap));
      } else {
        x = mul(x, set1(a.scale));
      }
      if (a.mask.kind != MaskKind::none) {
        const int64_t left = f.keys - j0 - j;
        if (left > 0) x = add_mask(x, mask_at_n(a.mask, mask_row, j0 + j, static_cast<int>(min64(left, kWidth))));
      }
      if (a.slopes) {
        const Vec distance = vabs(add(iota(), set1(relative + static_cast<float>(j))));
        x = fmadd(distance, set1(-slope), x);
      }
      store(row + j, x);
    }
  }
}

void hide(const Forward& f, const Strip& s, int64_t j0) {
  for (int r = 0; r < s.rows; r++) {
    const Range seen = visible_keys(f.a, s.i + r, f.queries, f.keys);
    float* row = s.scores + r * f.pitch;
    const int64_t begin = min64(seen.begin - j0, s.columns.end), end = max64(seen.end - j0, s.columns.begin);
    for (int64_t j = s.columns.begin; j < begin; j++) row[j] = kHidden;
    for (int64_t j = end; j < s.columns.end; j++) row[j] = kHidden;
  }
}

template <Flavour F>
PBM_INLINE void store_p(char* p, int64_t j, Vec x0, Vec x1) {
  if constexpr (F == Flavour::f32) {
    store(reinterpret_cast<float*>(p) + j, x0);
    store(reinterpret_cast<float*>(p) + j + kWidth, x1);
  } else {
#if PBM_TIER_LEVEL >= 3
    const __m512bh h = _mm512_cvtne2ps_pbh(x1.v, x0.v);
    std::memcpy(p + 2 * j, &h, 64);
#else
    store_bf16(reinterpret_cast<uint16_t*>(p) + j, x0);
    store_bf16(reinterpret_cast<uint16_t*>(p) + j + kWidth, x1);
#endif
  }
}

template <Flavour F>
PBM_INLINE Vec exponential(Vec x) {
  return F == Flavour::bf16 ? vexp2_bf16(x) : vexp2(x);
}

// The rows' maxima, where scores were changed since the product.
void find_maxima(const Forward& f, const Strip& s, float* max) {
  for (int r = 0; r < s.rows; r++) {
    Vec m = set1(kHidden);
    for (int64_t j = s.columns.begin; j < s.columns.end; j += kWidth) m = vmax(load(s.scores + r * f.pitch + j), m);
    max[r] = reduce_max(m);
  }
}

// A row's scores to exponents, for a base that fmadd cannot be left to subtract.
void subtract_max(const Strip& s, float* row, float max, float factor) {
  for (int64_t j = s.columns.begin; j < s.columns.end; j += kWidth)
    store(row + j, mul(sub(load(row + j), set1(max)), set1(factor)));
}

// p = 2^((s − max)·factor) for a strip whose rows have the maxima found_max.
template <Flavour F>
void soften(const Forward& f, const Strip& s, float factor, const float* found_max) {
  const Vec old = load_n(f.w.max + s.row, s.rows);
  const Vec now = vmax(load(found_max), old), seen = where_hidden(now, zero(), now);
  alignas(64) float max[16], base[16], sums[16] = {};
  store(max, seen);
  store(base, mul(seen, set1(factor)));
  store_n(f.w.max + s.row, now, s.rows);
  const int64_t pairs = (s.columns.end - s.columns.begin) / (2 * kWidth) * (2 * kWidth);
  for (int r = 0; r < s.rows; r++) {
    float* row = s.scores + r * f.pitch;
    char* p = s.p + r * f.pitch * (F == Flavour::f32 ? 4 : 2);
    const bool large = is_large(base[r]);
    if (large) subtract_max(s, row, max[r], factor);
    const Vec low = set1(large ? 0.f : -base[r]), scale = set1(large ? 1.f : factor);
    Vec s0 = zero(), s1 = zero();
    int64_t j = s.columns.begin;
    for (; j < s.columns.begin + pairs; j += 2 * kWidth) {
      const Vec x0 = exponential<F>(fmadd(load(row + j), scale, low));
      const Vec x1 = exponential<F>(fmadd(load(row + j + kWidth), scale, low));
      s0 = add(s0, x0);
      s1 = add(s1, x1);
      store_p<F>(p, j, x0, x1);
    }
    if (j < s.columns.end) {  // there is room for one panel more
      const Vec x0 = exponential<F>(fmadd(load(row + j), scale, low));
      s0 = add(s0, x0);
      store_p<F>(p, j, x0, zero());
    }
    sums[r] = reduce_add(add(s0, s1));
  }
  const Vec earlier = vexp2(rescaling(old, seen, set1(factor)));
  store(s.rescale, earlier);
  store_n(f.w.sum + s.row, fmadd(load_n(f.w.sum + s.row, s.rows), earlier, load(sums)), s.rows);
}

void drop(const Forward& f, const Strip& s, int64_t j0) {
  const Dropout& d = f.a.dropout;
  const int64_t bh = f.item.b * f.a.heads + s.head;
  for (int r = 0; r < s.rows; r++)
    for (int64_t j = s.columns.begin / 64 * 64; j < s.columns.end; j += 64) {
      float factors[4][16], in_order[64];
      IVec c[4];
      c[0] = iadd(to_int(iota()), iset1(static_cast<int32_t>((j0 + j) / 4)));
      c[1] = iset1(static_cast<int32_t>(s.i + r));
      c[2] = iset1(static_cast<int32_t>(bh));
      philox4x32(c, d.seed);
      for (int w = 0; w < 4; w++) store(factors[w], kept(c[w], d.threshold, d.factor));
      for (int x = 0; x < 64; x++) in_order[x] = factors[x % 4][x / 4];
      for (int64_t x = j; x < j + 64; x += kWidth) {
        if (x < s.columns.begin || x >= s.columns.end) continue;
        const int64_t at = r * f.pitch + x;
        const Vec keep = load(in_order + (x - j));
        if (f.a.flavour == Flavour::f32) {
          store(reinterpret_cast<float*>(s.p) + at, mul(load(reinterpret_cast<float*>(s.p) + at), keep));
        } else {
          uint16_t* p = reinterpret_cast<uint16_t*>(s.p) + at;
          store_bf16(p, mul(load16<DType::bf16>(p, 0), keep));
        }
      }
    }
}

// --- a strip through a block --------------------------------------------------------------------------------------------

// Scores, and the rows' maxima.
template <Flavour F>
void score(const Forward& f, const Strip& s, Range block, float* max) {
  const Attention& a = f.a;
  constexpr int64_t kSize = 4 / k_per_lane(F);
  const int64_t lanes = panel_groups(a.d, F), first = s.columns.begin / kPanel;
  ScoreStrip products;
  products.q = f.convert_q ? f.w.q + s.row * f.q_stride : query_row(a, a.q, f.item.b, s.head, s.i);
  products.q_stride = f.convert_q ? f.q_stride : a.q.row * kSize;
  products.lanes = lanes;
  products.k = f.w.k + first * lanes * kGroupBytes;
  products.panels = (s.columns.end - s.columns.begin) / kPanel;
  products.scores = s.scores + s.columns.begin;
  products.pitch = f.pitch;
  products.max = max;
  if (!f.convert_q && s.i + s.rows < f.queries)  // the next strip's
    fetch_rows<3>(products.q + s.rows * products.q_stride, kStrip, products.q_stride, a.d * kSize);
  score_strip<F>(s.rows, products);

  const bool plain = plain_scores(a);
  if (!plain) adjust_scores(f, s, block.begin);
  const Range top = visible_keys(a, s.i, f.queries, f.keys),
              last = visible_keys(a, s.i + s.rows - 1, f.queries, f.keys);
  const bool all_seen = top.end - block.begin >= s.columns.end && last.begin - block.begin <= s.columns.begin;
  if (!all_seen) hide(f, s, block.begin);
  if (!plain || !all_seen) find_maxima(f, s, max);
}

template <Flavour F>
void add_values(const Forward& f, const Strip& s, Range block) {
  constexpr int64_t kSize = 4 / k_per_lane(F);
  const int64_t keys = round_up(block.end - block.begin, k_per_lane(F));
  ValueStrip values;
  values.p = s.p + s.columns.begin * kSize;
  values.p_stride = f.pitch * kSize;
  values.lanes = (min64(s.columns.end, keys) - s.columns.begin) / k_per_lane(F);
  values.v = f.w.v + s.columns.begin / k_per_lane(F) * kGroupBytes;
  values.v_panel = keys / k_per_lane(F) * kGroupBytes;
  values.panels = f.out_stride / kPanel;
  values.out = f.w.out + s.row * f.out_stride;
  values.out_stride = f.out_stride;
  values.rescale = f.w.started[s.row] ? s.rescale : nullptr;
  value_strip<F>(s.rows, values);
  f.w.started[s.row] = true;
}

template <Flavour F>
void attend(const Forward& f, Strip* strips, int count, Range block) {
  alignas(64) float max[kTurns][16] = {}, rescale[kTurns][16];
  for (int t = 0; t < count; t++) {
    strips[t].scores = f.w.scores + t * kStrip * f.pitch;
    strips[t].p = f.w.p + t * kStrip * f.pitch * (4 / k_per_lane(F));
    strips[t].rescale = rescale[t];
    score<F>(f, strips[t], block, max[t]);
  }
  const float factor = score_factor(f.a);
  for (int t = 0; t < count; t++) soften<F>(f, strips[t], factor, max[t]);
  if (f.a.dropout.threshold)
    for (int t = 0; t < count; t++) drop(f, strips[t], block.begin);
  for (int t = 0; t < count; t++) add_values<F>(f, strips[t], block);
}

// The columns that the rows of a strip see of a block, cut by what a mask hides from all of them.
Range columns_of(const Forward& f, const Strip& s, Range block) {
  const Range top = visible_keys(f.a, s.i, f.queries, f.keys);
  const Range last = visible_keys(f.a, s.i + s.rows - 1, f.queries, f.keys);
  const int64_t begin = max64(top.begin, block.begin), end = min64(last.end, block.end);
  if (begin >= end) return {0, 0};
  Range c = {(begin - block.begin) / kPanel * kPanel, round_up(end - block.begin, kPanel)};
  const AttentionMask& m = f.a.mask;
  if (m.kind == MaskKind::none) return c;
  const auto hidden = [&](int64_t j) {
    const int n = static_cast<int>(min64(kWidth, f.keys - block.begin - j));
    for (int r = 0; r < (m.row ? s.rows : 1); r++) {
      const int64_t row = f.item.b * m.batch + s.head * m.head + (s.i + r) * m.row;
      alignas(64) float x[16];
      store(x, mask_at_n(m, row, block.begin + j, n));
      for (int l = 0; l < n; l++)
        if (x[l] != kHidden) return false;
    }
    return true;
  };
  while (c.end > c.begin && hidden(c.end - kPanel)) c.end -= kPanel;
  while (c.begin < c.end && hidden(c.begin)) c.begin += kPanel;
  return c;
}

// Queries that see keys of a block, if not more.
Range queries_seeing(const Forward& f, Range block) {
  const int64_t offset = f.a.bottom_right ? f.keys - f.queries : 0;
  return {f.a.right < 0 ? 0 : block.begin - offset - f.a.right,
          f.a.left < 0 ? f.queries : block.end - offset + f.a.left};
}

// Strips with rows of these queries: a head's rows are cut into strips whatever is seen, so that results do not depend on it.
template <class F>
void for_each_strip(const Forward& f, Range queries, const F& body) {
  for (int64_t row = f.item.begin; row < f.item.end;) {
    const int64_t i = row % f.queries, rows = min64(f.item.end - row, f.queries - i);
    const int64_t strips = ceil_div(rows, kStrip), height = rows / strips, higher = rows % strips;
    const int64_t head = f.item.kv_head * f.group + row / f.queries;
    for (int64_t n = max64(queries.begin - i, 0) / (height + 1); n < strips; n++) {
      const int64_t at = n * height + min64(n, higher);  // the first `higher` strips have a row more
      if (i + at >= queries.end) break;
      const int count = static_cast<int>(height + (n < higher));
      body(Strip{row - f.item.begin + at, head, i + at, count, {0, 0}, nullptr, nullptr, nullptr});
    }
    row += rows;
  }
}

template <class F>
void for_each_strip(const Forward& f, const F& body) {
  for_each_strip(f, {0, f.queries}, body);
}

// --- results -----------------------------------------------------------------------------------------------------------

// Sums to their reciprocals, 0 where no key was seen; and the log-sum-exps.
void finish_statistics(const Forward& f) {
  const int64_t rows = f.item.end - f.item.begin;
  for (int64_t r = 0; r < rows; r += kWidth) {
    const int n = static_cast<int>(min64(kWidth, rows - r));
    const Vec sum = load_n(f.w.sum + r, n), max = load_n(f.w.max + r, n);
    const Vec nothing = where_hidden(max, set1(1.f), zero());
    store_n(f.w.sum + r, div(sub(set1(1.f), nothing), add(sum, nothing)), n);
    store_n(f.w.lse + r, log_sum_exp(f.a, max, add(sum, nothing)), n);
  }
}

void finish(const Forward& f, const Strip& s) {
  const Attention& a = f.a;
  const int64_t row_size = size_of(a.out.dtype);
  if (s.i + s.rows < f.queries)
    for (int64_t r = 0; r < kStrip; r++)
      for (int64_t x = 0; x < a.dv * row_size; x += 64)
        __builtin_prefetch(query_row(a, a.out, f.item.b, s.head, s.i + s.rows + r) + x, 1, 3);
  for (int r = 0; r < s.rows; r++) {
    const Vec inverse = set1(f.w.sum[s.row + r]);
    const float* row = f.w.out + (s.row + r) * f.out_stride;
    const bool started = f.w.started[s.row] && f.w.sum[s.row + r] != 0.f;
    char* to = const_cast<char*>(query_row(a, a.out, f.item.b, s.head, s.i + r));
    with_float_dtype(a.out.dtype, [&]<DType T>() {
      for (int64_t d = 0; d < a.dv; d += kWidth) {
        const Vec x = started ? mul(load(row + d), inverse) : zero();
        store16_n<T>(to, d, x, static_cast<int>(min64(kWidth, a.dv - d)));
      }
    });
  }
  const int64_t at = row_index(a, f.item.b, s.head, s.i);
  const auto copy = [&](float* to, const float* from) {
    if (to) std::memcpy(to + at, from + s.row, s.rows * 4);
  };
  copy(a.lse, f.w.lse);
  copy(a.max, f.w.max);
  copy(a.inverse_sum, f.w.sum);
}

const char* const kNames[2] = {"attention_f32." PBM_TIER_NAME, "attention_bf16." PBM_TIER_NAME};

}  // namespace

void attention_forward(const Attention& a, const AttentionItem& item) {
  note_kernel(kNames[a.flavour == Flavour::bf16]);
  Forward f{a,
            item,
            queries_of(a, item.b),
            keys_of(a, item.b),
            block_keys(a),
            a.heads / a.kv_heads,
            row_bytes(a.d, a.flavour),
            round_up(a.dv, kPanel),
            block_keys(a) + kPanel,
            a.q.dtype != (a.flavour == Flavour::f32 ? DType::f32 : DType::bf16) || a.d % k_per_lane(a.flavour) != 0,
            {}};
  const int64_t rows = item.end - item.begin;
  f.w = carve(f);
  for (int64_t r = 0; r < rows; r++) {
    f.w.max[r] = kHidden;
    f.w.sum[r] = 0.f;
    f.w.started[r] = false;
  }
  if (f.convert_q) for_each_strip(f, [&](const Strip& s) { convert_queries(f, s.head, s.i, s.rows, s.row); });
  for (int64_t j = 0; j < f.keys; j += f.block) {
    const Range block = {j, min64(j + f.block, f.keys)};
    bool packed = false;
    Strip turn[kTurns];
    int count = 0;
    const auto flush = [&] {
      if (count > 0)
        a.flavour == Flavour::f32 ? attend<Flavour::f32>(f, turn, count, block)
                                  : attend<Flavour::bf16>(f, turn, count, block);
      count = 0;
    };
    for_each_strip(f, queries_seeing(f, block), [&](Strip s) {
      s.columns = columns_of(f, s, block);
      if (s.columns.begin >= s.columns.end) return;
      if (!packed) pack_block(f, block);
      packed = true;
      turn[count++] = s;
      if (count == kTurns) flush();
    });
    flush();
  }
  if (item.kv_head + 1 < a.kv_heads) {
    const int64_t n = min64(f.keys, 64), kb = size_of(a.k.dtype), qb = size_of(a.q.dtype);
    fetch_rows<2>(key_row(a, a.k, item.b, item.kv_head + 1, 0), n, a.k.row * kb, a.d * kb);
    fetch_rows<2>(query_row(a, a.q, item.b, (item.kv_head + 1) * f.group, 0), kStrip, a.q.row * qb, a.d * qb);
  }
  finish_statistics(f);
  for_each_strip(f, [&](const Strip& s) { finish(f, s); });
}

}  // namespace pbm::PBM_TIER
