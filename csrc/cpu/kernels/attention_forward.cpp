// Keys outside, queries inside: a block of K and V is packed once and stays in L2 while every row of the item passes by;
// a strip of scores stays in L1. Running maxima, sums and outputs are kept per row (online softmax).
#include "common/scratch.h"
#include "cpu/kernels/attention_rows.h"
#include "cpu/kernels/attention_scores.h"
#include "cpu/kernels/impl.h"

namespace pbm::PBM_TIER {
namespace {

// Bytes of packed K and V that stay in L2 beside what passes by, and the most keys of a block.
constexpr int64_t kBlockBytes = int64_t{256} << 10;
constexpr int64_t kMostKeys = 512;
// Independent of the item, the batch and the threads, so that a row's result is too.
int64_t block_keys(const Attention& a) {
  const int64_t bytes = (a.d + a.dv) * 4 / k_per_lane(a.flavour);
  return max64(min64(kBlockBytes / max64(bytes, 1), kMostKeys) / 64 * 64, 64);
}

// One item's working memory.
struct Work {
  char *k, *v;      // packed panels of the block
  char* q;          // rows converted, where they cannot be read in place
  float* scores;    // kStrip × pitch
  char* p;          // kStrip × pitch, in the flavour's dtype; scores themselves in fp32
  float* out;       // rows × out_stride
  float *max, *sum;  // per row
  bool* started;    // per row: whether out holds anything
};

struct Forward {
  const Attention& a;
  const AttentionItem& item;
  int64_t queries, keys, block, group;
  int64_t q_stride, out_stride;  // bytes; elements
  int64_t pitch;  // elements of a row of scores: room for one panel more than a block
  bool convert_q;
  Work w;
};

// Rows [row, row + rows) of one query head, from query `i` on, and the columns of the block that any of them sees.
struct Strip {
  int64_t row, head, i;
  int rows;
  Range columns;  // within the block; begin is a multiple of 16, as is end
};

Work carve(const Forward& f) {
  const int64_t rows = f.item.end - f.item.begin, strip = kStrip * f.pitch;
  const bool bf16 = f.a.flavour == Flavour::bf16;
  Carver c;
  const int64_t k = c.take(f.block * panel_groups(f.a.d, f.a.flavour) * 4);
  const int64_t v = c.take(f.out_stride * panel_groups(f.block, f.a.flavour) * 4);
  const int64_t q = c.take(f.convert_q ? rows * f.q_stride : 0);
  const int64_t scores = c.take(strip * 4), p = bf16 ? c.take(strip * 2) : scores;
  const int64_t out = c.take(rows * f.out_stride * 4), max = c.take(rows * 4), sum = c.take(rows * 4);
  const int64_t started = c.take(rows);
  char* base = static_cast<char*>(scratch(ScratchSlot::attention, c.bytes));
  const auto floats = [&](int64_t at) { return reinterpret_cast<float*>(base + at); };
  return {base + k,    base + v,    base + q,    floats(scores), base + p,
          floats(out), floats(max), floats(sum), reinterpret_cast<bool*>(base + started)};
}

void pack_block(const Forward& f, Range j) {
  const Attention& a = f.a;
  const int64_t n = j.end - j.begin;
  pack_b({n, a.d, a.flavour, key_row(a, a.k, f.item.b, f.item.kv_head, j.begin), a.k.dtype, 1, a.k.row, false, f.w.k}, 0,
         ceil_div(n, kPanel));
  pack_b({a.dv, n, a.flavour, key_row(a, a.v, f.item.b, f.item.kv_head, j.begin), a.v.dtype, a.v.row, 1, false, f.w.v},
         0, ceil_div(a.dv, kPanel));
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
  const float slope = a.slopes ? a.slopes[f.item.b * a.slopes_batch + s.head] * kLog2e : 0.f;
  for (int r = 0; r < s.rows; r++) {
    float* row = f.w.scores + r * f.pitch;
    const int64_t i = s.i + r;
    const int64_t mask_row = f.item.b * a.mask.batch + s.head * a.mask.head + i * a.mask.row + j0;
    const float relative = static_cast<float>(j0 - i - offset);
    for (int64_t j = s.columns.begin; j < s.columns.end; j += kWidth) {
      Vec x = load(row + j);
      if (a.softcap != 0.f) {
        x = mul(vtanh(mul(x, set1(a.scale / a.softcap))), set1(a.softcap * kLog2e));
      } else {
        x = mul(x, set1(a.scale * kLog2e));
      }
      if (a.mask.kind != MaskKind::none) {
        const int64_t left = f.keys - j0 - j;
        if (left > 0) x = add(x, mask_at_n(a.mask, mask_row + j, static_cast<int>(min64(left, kWidth))));
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
    float* row = f.w.scores + r * f.pitch;
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

// One row: p = 2^(s·factor − max); returns what the row's earlier sum and output are multiplied with.
template <Flavour F>
PBM_INLINE float soften(float* row, char* p, Range columns, float factor, float* max, float* sum) {
  Vec m0 = set1(kHidden), m1 = m0;
  int64_t j = columns.begin;
  for (; j + 2 * kWidth <= columns.end; j += 2 * kWidth) {
    m0 = vmax(load(row + j), m0);
    m1 = vmax(load(row + j + kWidth), m1);
  }
  if (j < columns.end) {
    m0 = vmax(load(row + j), m0);
    store(row + columns.end, set1(kHidden));
  }
  const float old = *max, now = __builtin_fmaxf(old, reduce_max(vmax(m0, m1)) * factor);
  *max = now;
  const float base = now == kHidden ? 0.f : now;
  Vec s0 = zero(), s1 = zero();
  for (j = columns.begin; j < columns.end; j += 2 * kWidth) {
    const Vec x0 = exponential<F>(fmadd(load(row + j), set1(factor), set1(-base)));
    const Vec x1 = exponential<F>(fmadd(load(row + j + kWidth), set1(factor), set1(-base)));
    s0 = add(s0, x0);
    s1 = add(s1, x1);
    store_p<F>(p, j, x0, x1);
  }
  const float rescale = old == now ? 1.f : reduce_max(vexp2(set1(old - base)));
  *sum = *sum * rescale + reduce_add(add(s0, s1));
  return rescale;
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
          store(reinterpret_cast<float*>(f.w.p) + at, mul(load(reinterpret_cast<float*>(f.w.p) + at), keep));
        } else {
          uint16_t* p = reinterpret_cast<uint16_t*>(f.w.p) + at;
          store_bf16(p, mul(load16<DType::bf16>(p, 0), keep));
        }
      }
    }
}

// --- a strip through a block --------------------------------------------------------------------------------------------

void rescale_out(const Forward& f, const Strip& s, const float* factors) {
  for (int r = 0; r < s.rows; r++) {
    if (factors[r] == 1.f) continue;
    float* out = f.w.out + (s.row + r) * f.out_stride;
    for (int64_t d = 0; d < f.out_stride; d += kWidth) store(out + d, mul(load(out + d), set1(factors[r])));
  }
}

void attend(const Forward& f, const Strip& s, Range block) {
  const Attention& a = f.a;
  const int64_t groups = panel_groups(a.d, a.flavour), first = s.columns.begin / kPanel;
  const int64_t q_row = f.convert_q ? f.q_stride : a.q.row * size_of(a.q.dtype);
  const char* q = f.convert_q ? f.w.q + s.row * f.q_stride : query_row(a, a.q, f.item.b, s.head, s.i);
  const int64_t k = f.convert_q ? round_up(a.d, k_per_lane(a.flavour)) : a.d;
  block_product(a.flavour, {q, q_row, s.rows, k},
                {f.w.k + first * groups * kGroupBytes, groups * kGroupBytes, (s.columns.end - s.columns.begin) / kPanel},
                {f.w.scores + s.columns.begin, f.pitch, false});

  const bool plain = plain_scores(a);
  if (!plain) adjust_scores(f, s, block.begin);
  const Range top = visible_keys(a, s.i, f.queries, f.keys), last = visible_keys(a, s.i + s.rows - 1, f.queries, f.keys);
  if (top.end - block.begin < s.columns.end || last.begin - block.begin > s.columns.begin) hide(f, s, block.begin);

  float rescale[8];
  const float factor = plain ? a.scale * kLog2e : 1.f;
  for (int r = 0; r < s.rows; r++) {
    float* row = f.w.scores + r * f.pitch;
    float *max = f.w.max + s.row + r, *sum = f.w.sum + s.row + r;
    rescale[r] = a.flavour == Flavour::f32
                     ? soften<Flavour::f32>(row, f.w.p + r * f.pitch * 4, s.columns, factor, max, sum)
                     : soften<Flavour::bf16>(row, f.w.p + r * f.pitch * 2, s.columns, factor, max, sum);
  }
  if (a.dropout.threshold) drop(f, s, block.begin);

  const int64_t per_lane = k_per_lane(a.flavour), size = 4 / per_lane;
  const int64_t v_groups = panel_groups(block.end - block.begin, a.flavour);
  const int64_t used = min64(s.columns.end, round_up(block.end - block.begin, per_lane)) - s.columns.begin;
  if (f.w.started[s.row]) rescale_out(f, s, rescale);
  block_product(a.flavour, {f.w.p + s.columns.begin * size, f.pitch * size, s.rows, used},
                {f.w.v + s.columns.begin / per_lane * kGroupBytes, v_groups * kGroupBytes, f.out_stride / kPanel},
                {f.w.out + s.row * f.out_stride, f.out_stride, f.w.started[s.row]});
  f.w.started[s.row] = true;
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
      const int64_t at = f.item.b * m.batch + s.head * m.head + (s.i + r) * m.row + block.begin + j;
      alignas(64) float x[16];
      store(x, mask_at_n(m, at, n));
      for (int l = 0; l < n; l++)
        if (x[l] != kHidden) return false;
    }
    return true;
  };
  while (c.end > c.begin && hidden(c.end - kPanel)) c.end -= kPanel;
  while (c.begin < c.end && hidden(c.begin)) c.begin += kPanel;
  return c;
}

template <class F>
void for_each_strip(const Forward& f, const F& body) {
  for (int64_t row = f.item.begin; row < f.item.end;) {
    const int64_t i = row % f.queries;
    const int64_t last = min64(f.item.end, row - i + f.queries);
    const int64_t strips = ceil_div(last - row, kStrip);
    Strip s{row - f.item.begin, f.item.kv_head * f.group + row / f.queries, i, 0, {0, 0}};
    s.rows = static_cast<int>(ceil_div(last - row, strips));
    body(s);
    row += s.rows;
  }
}

// --- results -----------------------------------------------------------------------------------------------------------

void finish(const Forward& f, const Strip& s) {
  const Attention& a = f.a;
  for (int r = 0; r < s.rows; r++) {
    const float sum = f.w.sum[s.row + r], inverse = sum == 0.f ? 0.f : 1.f / sum;
    const float* row = f.w.out + (s.row + r) * f.out_stride;
    const bool empty = !f.w.started[s.row] || sum == 0.f;
    char* to = const_cast<char*>(query_row(a, a.out, f.item.b, s.head, s.i + r));
    with_float_dtype(a.out.dtype, [&]<DType T>() {
      for (int64_t d = 0; d < a.dv; d += kWidth)
        store16_n<T>(to, d, empty ? zero() : mul(load(row + d), set1(inverse)), static_cast<int>(min64(kWidth, a.dv - d)));
    });
    if (a.lse)
      a.lse[lse_index(a, f.item.b, s.head, s.i + r)] =
          sum == 0.f ? kHidden : (f.w.max[s.row + r] + std::log2(sum)) / kLog2e;
  }
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
            a.q.dtype != (a.flavour == Flavour::f32 ? DType::f32 : DType::bf16),
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
    for_each_strip(f, [&](Strip s) {
      s.columns = columns_of(f, s, block);
      if (s.columns.begin >= s.columns.end) return;
      if (!packed) pack_block(f, block);
      packed = true;
      attend(f, s, block);
    });
  }
  for_each_strip(f, [&](const Strip& s) { finish(f, s); });
}

}  // namespace pbm::PBM_TIER
