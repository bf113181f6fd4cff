// One part of a cache: all scores, then the softmax of its keys, then the outputs, which are kept unnormalised beside
// the maximum and the sum of each row. Keys and values pass by once, in the order of memory.
#include "cpu/kernels/attention_decode.h"

#include "common/scratch.h"
#include "cpu/kernels/attention_decode_tiles.h"
#include "cpu/kernels/attention_scores.h"
#include "cpu/kernels/impl.h"

namespace pbm::PBM_TIER {
namespace {

constexpr int64_t kPitch = kSplitKeys + 16;  // of a row of scores: a tile writes up to 15 beyond the last key
constexpr int64_t kScoreKeys = 16;           // keys that pass by all rows at once: a multiple of every tile's
constexpr int64_t kValueBytes = 8192;        // of values that stay in L1 while all rows and columns pass by
constexpr int64_t kAheadBytes = 8192;        // how far ahead keys are fetched

// One item's working memory; every array has room for the padded rows.
struct Work {
  char* q;                   // rows of kQueryBytes
  float* scores;             // rows of kPitch
  char* p;                   // the scores' place, or 16-bit weights: rows of kPitch
  float* q_scale;            // s8: what a row's 16-bit integers stand for
  float *k_scale, *v_scale;  // s8: of the keys; of the values, times what a weight of 1 is as an integer
  float* out;                // accumulators: rows of out_stride. Not in the item's partial, which is cold
};

struct Part {
  const AttentionDecode& p;
  const Attention& a;
  const DecodeItem& item;
  const DecodeItem* next;
  int64_t rows, padded, keys;  // of this part
  int64_t out_stride;
  Work w;
};

Work carve(const Part& f, bool p_in_place) {
  const int64_t bytes = f.padded * (kQueryBytes + kPitch * 6 + f.out_stride * 4 + 4) + 2 * kPitch * 4;
  char* at = static_cast<char*>(scratch(ScratchSlot::attention, bytes));
  Work w;
  w.q = at;
  w.scores = reinterpret_cast<float*>(at += f.padded * kQueryBytes);
  w.p = at += f.padded * kPitch * 4;
  w.out = reinterpret_cast<float*>(at += f.padded * kPitch * 2);
  w.k_scale = w.out + f.padded * f.out_stride;
  w.v_scale = w.k_scale + kPitch;
  w.q_scale = w.v_scale + kPitch;
  if (p_in_place) w.p = reinterpret_cast<char*>(w.scores);
  return w;
}

// --- where keys lie --------------------------------------------------------------------------------------------------

int64_t block_of(const AttentionDecode& p, int64_t b, int64_t j) {
  return p.block_table ? p.block_table[b * p.table_row + j / p.a.keys] : b;
}

const char* row_of(const AttentionDecode& p, const DecodeItem& item, const AttentionOperand& x, int64_t j) {
  const int64_t slot = p.block_table ? j % p.a.keys : j;
  return static_cast<const char*>(x.data) +
         (block_of(p, item.b, j) * x.batch + item.kv_head * x.head + slot * x.row) * size_of(x.dtype);
}

// body(first, count) for keys that lie in one block, counted from the part's first.
template <class F>
PBM_INLINE void for_each_run(const Part& f, const F& body) {
  for (int64_t j = f.item.keys.begin; j < f.item.keys.end;) {
    const int64_t end = min64(f.item.keys.end, (j / f.a.keys + 1) * f.a.keys);
    body(j - f.item.keys.begin, end - j);
    j = end;
  }
}

void gather_scales(const Part& f, const CacheScales& s, float* out) {
  for_each_run(f, [&](int64_t first, int64_t count) {
    const int64_t j = f.item.keys.begin + first;
    const float* at = s.data + block_of(f.p, f.item.b, j) * s.batch + f.item.kv_head * s.head + j % f.a.keys * s.row;
    for (int64_t n = 0; n < count; n++) out[first + n] = at[n * s.row];
  });
}

// --- queries ---------------------------------------------------------------------------------------------------------

const char* query_row(const Part& f, int64_t r) {
  const AttentionOperand& q = f.a.q;
  const int64_t head = f.item.kv_head * (f.a.heads / f.a.kv_heads) + r / f.a.queries;
  return static_cast<const char*>(q.data) +
         (f.item.b * q.batch + head * q.head + r % f.a.queries * q.row) * size_of(q.dtype);
}

// A row as 16-bit integers times w.q_scale: each element is off by at most 2⁻¹⁶ of the largest.
template <DType Q>
void quantize_query(const Part& f, int64_t r, char* out) {
  const char* q = query_row(f, r);
  Vec largest = zero(), poison = zero();
  for (int64_t d = 0; d < f.a.d; d += kWidth) {
    const Vec x = load16_n<Q>(q, d, static_cast<int>(min64(kWidth, f.a.d - d)));
    largest = vmax(largest, vabs(x));
    poison = fmadd(x, zero(), poison);
  }
  const float most = __builtin_fmaxf(reduce_max(largest), 0x1p-100f), inverse = 32767.f / most;
  f.w.q_scale[r] = reduce_add(poison) == 0.f ? most / 32767.f : __builtin_nanf("");
  for (int64_t d = 0; d < f.a.d; d += kWidth) {
    const Vec x = load16_n<Q>(q, d, static_cast<int>(min64(kWidth, f.a.d - d)));
    narrow_u16(reinterpret_cast<uint16_t*>(out) + d, to_int(mul(x, set1(inverse))));
  }
}

template <DType T>
void prepare_queries(const Part& f) {
  constexpr DType kQuery = KeyDot<T>::kQuery;
  constexpr int64_t kSize = kQuery == DType::f32 ? 4 : 2;
  const int64_t used = ceil_div(f.a.d, KeyDot<T>::kChunk) * KeyDot<T>::kChunk * kSize;
  for (int64_t r = f.rows; r < f.padded; r++) std::memset(f.w.q + r * kQueryBytes, 0, used);
  for (int64_t r = 0; r < f.rows; r++) {
    char* out = f.w.q + r * kQueryBytes;
    if (used > f.a.d * kSize) std::memset(out + f.a.d * kSize, 0, used - f.a.d * kSize);
    if constexpr (kQuery == DType::s8) {
      with_float_dtype(f.a.q.dtype, [&]<DType Q>() { quantize_query<Q>(f, r, out); });
    } else if constexpr (kQuery == DType::bf16) {
      std::memcpy(out, query_row(f, r), f.a.d * 2);
    } else {
      for (int64_t d = 0; d < f.a.d; d += kWidth)
        store(reinterpret_cast<float*>(out) + d,
              load16_n<T>(query_row(f, r), d, static_cast<int>(min64(kWidth, f.a.d - d))));
    }
  }
}

// --- products --------------------------------------------------------------------------------------------------------

// body.template operator()<R, whether it is the first tile>(row) for tiles of R rows; three are padded to four.
template <class F>
PBM_INLINE void for_each_tile(const Part& f, const F& body) {
  const auto tile = [&]<int R>(int64_t r) __attribute__((always_inline)) {
    if (r == 0) {
      body.template operator()<R, true>(r);
    } else {
      body.template operator()<R, false>(r);
    }
  };
  int64_t r = 0;
  if constexpr (kTileRows == 4)
    for (; f.rows - r >= 3; r += 4) tile.template operator()<4>(r);
  for (; f.rows - r >= 2; r += 2) tile.template operator()<2>(r);
  if (r < f.rows) tile.template operator()<1>(r);
}

// What lies `j` keys behind the part's first: its own keys (of scores) and values, then the next part's keys.
Soon soon_of(const Part& f, int64_t j, bool scores) {
  const AttentionOperand* x = scores ? &f.a.k : &f.a.v;
  const DecodeItem* item = &f.item;
  if (j >= f.keys) {
    j -= f.keys;
    if (scores) {
      x = &f.a.v;
    } else if (f.next && f.next->keys.begin < f.next->keys.end) {
      x = &f.a.k;
      item = f.next;
    }
    j = min64(j, item->keys.end - item->keys.begin - 1);
  }
  return {row_of(f.p, *item, *x, item->keys.begin + j), x->row * size_of(x->dtype)};
}

template <DType T>
void score_run(const Part& f, int64_t first, int64_t count) {
  const int64_t row = f.a.k.row * size_of(T);
  const char* k = row_of(f.p, f.item, f.a.k, f.item.keys.begin + first);
  const int64_t ahead = max64(kAheadBytes / (f.a.d * size_of(T)), kScoreKeys);
  for (int64_t j = 0; j < count; j += kScoreKeys) {
    const int64_t n = min64(kScoreKeys, count - j);
    const Soon soon = soon_of(f, first + j + ahead, true);
    for_each_tile(f, [&]<int R, bool Fetch>(int64_t r) __attribute__((always_inline)) {
      constexpr int64_t kKeys = kTileScores / R;
      const char* q = f.w.q + r * kQueryBytes;
      float* s = f.w.scores + r * kPitch + first + j;
      Soon fetched = soon;
      int64_t i = 0;
      for (; i + kKeys <= n; i += kKeys, fetched.at += kKeys * soon.row)
        score_tile<T, R, false, Fetch>(q, k + (j + i) * row, row, kKeys, fetched, f.a.d, s + i, kPitch);
      if (i < n) score_tile<T, R, true, false>(q, k + (j + i) * row, row, n - i, soon, f.a.d, s + i, kPitch);
    });
  }
}

template <DType T>
void output_run(const Part& f, int64_t first, int64_t count) {
  constexpr int64_t kColumns = 16 * kTileVecs;
  constexpr int64_t kWeightBytes = ValueDot<T>::kWeight == DType::f32 ? 4 : 2;
  const int64_t row = f.a.v.row * size_of(T);
  const int64_t block = max64(kValueBytes / (f.a.dv * size_of(T)) / 16 * 16, 16);
  const char* v = row_of(f.p, f.item, f.a.v, f.item.keys.begin + first);
  for (int64_t j = 0; j < count; j += block) {
    const int64_t n = min64(block, count - j);
    const Soon soon = soon_of(f, first + j + n, false);
    for_each_tile(f, [&]<int R, bool Fetch>(int64_t r) __attribute__((always_inline)) {
      const char* p = f.w.p + (r * kPitch + first + j) * kWeightBytes;
      for (int64_t c = 0; c < f.a.dv; c += kColumns) {
        const char* at = v + j * row + c * size_of(T);
        // In the order of memory, where rows lie end to end; else by columns, as they are read.
        constexpr int64_t kStrip = kColumns * size_of(T);
        const bool dense = soon.row == f.a.dv * size_of(T);
        const Soon fetched =
            dense ? Soon{soon.at + c * size_of(T) * n, kStrip} : Soon{soon.at + c * size_of(T), soon.row};
        float* out = f.w.out + r * f.out_stride + c;
        if (f.a.dv - c >= kColumns) {
          output_tile<T, R, false, Fetch>(p, kPitch * kWeightBytes, at, row, n, fetched, 0, out, f.out_stride);
        } else {
          output_tile<T, R, true, Fetch>(p, kPitch * kWeightBytes, at, row, n, fetched, static_cast<int>(f.a.dv - c),
                                         out, f.out_stride);
        }
      }
    });
  }
}

// --- softmax ---------------------------------------------------------------------------------------------------------

// Keys [lo, hi) of the part are visible to a row; the other scores are hidden, up to a whole pair of vectors.
struct Seen {
  int64_t lo, hi, end;
};

Seen seen_by(const Part& f, int64_t r) {
  const Range seen = visible_keys(f.a, r % f.a.queries, f.a.queries, f.item.length);
  const int64_t lo = min64(max64(seen.begin - f.item.keys.begin, 0), f.keys);
  const int64_t hi = max64(min64(seen.end - f.item.keys.begin, f.keys), lo);
  return {lo, hi, ceil_div(f.keys, 2 * kWidth) * 2 * kWidth};
}

void hide(float* row, const Seen& seen) {
  for (int64_t j = 0; j < seen.lo; j++) row[j] = kHidden;
  store(row + seen.hi, set1(kHidden));  // also where a vector that begins in the middle reads
  for (int64_t j = seen.hi; j < seen.end; j += kWidth) store(row + j, set1(kHidden));
}

// Row r's products to scores; returns the largest.
Vec adjust_scores(const Part& f, int64_t r, const Seen& seen) {
  const Attention& a = f.a;
  const bool s8 = a.k.dtype == DType::s8;
  float* row = f.w.scores + r * kPitch;
  const int64_t head = f.item.kv_head * (a.heads / a.kv_heads) + r / a.queries, i = r % a.queries;
  const float unit = s8 ? a.scale * f.w.q_scale[r] : a.scale;
  const Vec inner = set1(a.softcap == 0.f ? unit : cap_factor(unit, a.softcap)), outer = set1(a.softcap);
  const Vec slope = set1(a.slopes ? -a.slopes[f.item.b * a.slopes_batch + head] : 0.f);
  const int64_t mask = f.item.b * a.mask.batch + head * a.mask.head + i * a.mask.row;
  const float at = static_cast<float>(f.item.keys.begin - i - (a.bottom_right ? f.item.length - a.queries : 0));
  Vec largest = set1(kHidden);
  int64_t j = seen.lo;
  for (; j < seen.hi; j += kWidth) {
    Vec x = mul(load(row + j), inner);
    if (s8) x = mul(x, load(f.w.k_scale + j));
    if (a.softcap != 0.f) x = mul(vtanh(x), outer);
    if (a.mask.kind != MaskKind::none)
      x = add_mask(x, mask_at_n(a.mask, mask, f.item.keys.begin + j, static_cast<int>(min64(kWidth, f.keys - j))));
    if (a.slopes) x = fmadd(vabs(add(iota(), set1(at + static_cast<float>(j)))), slope, x);
    store(row + j, x);
    if (j + kWidth <= seen.hi) largest = vmax(x, largest);
  }
  hide(row, seen);
  return j > seen.hi ? vmax(load(row + j - kWidth), largest) : largest;
}

float largest_of(const Part& f, int64_t r) {
  float* row = f.w.scores + r * kPitch;
  const Seen seen = seen_by(f, r);
  if (!plain_scores(f.a)) return reduce_max(adjust_scores(f, r, seen));
  hide(row, seen);
  Vec m[2] = {set1(kHidden), set1(kHidden)};
  for (int64_t j = 0; j < seen.end; j += 2 * kWidth) {
    m[0] = vmax(load(row + j), m[0]);
    m[1] = vmax(load(row + j + kWidth), m[1]);  // hidden, where it lies behind the end
  }
  return reduce_max(vmax(m[0], m[1]));
}

template <DType T>
PBM_INLINE Vec weights_of(const Part& f, int64_t r, int64_t j, Vec factor, Vec base) {
  constexpr DType kWeight = ValueDot<T>::kWeight;
  float* row = f.w.scores + r * kPitch + j;
  uint16_t* p = reinterpret_cast<uint16_t*>(f.w.p) + r * kPitch + j;
  const Vec x = fmadd(load(row), factor, base);
  const Vec e = kWeight == DType::bf16 ? vexp2_bf16(x) : vexp2(x);
  if constexpr (kWeight == DType::bf16) {
    store_bf16(p, e);
  } else if constexpr (kWeight == DType::s8) {
    narrow_u16(p, to_int(mul(e, load(f.w.v_scale + j))));
  } else {
    store(row, e);
  }
  return e;
}

// Scores to weights, all maxima before the first exponential: what they wait for then overlaps.
template <DType T>
void soften(const Part& f) {
  const int64_t end = ceil_div(f.keys, 2 * kWidth) * 2 * kWidth;
  float* largest = f.item.partial + f.padded * f.out_stride;
  float* sum = largest + f.padded;
  for (int64_t r = 0; r < f.rows; r++) largest[r] = largest_of(f, r);
  for (int64_t r = 0; r < f.rows; r++) {
    const float max = largest[r] == kHidden ? 0.f : largest[r], all = score_factor(f.a);
    const bool large = is_large(max * all);
    for (int64_t j = 0; large && j < end; j += kWidth) {
      float* at = f.w.scores + r * kPitch + j;
      store(at, mul(sub(load(at), set1(max)), set1(all)));
    }
    const Vec factor = set1(large ? 1.f : all), base = set1(large ? 0.f : -(max * all));
    Vec s[2] = {zero(), zero()};
    for (int64_t j = 0; j < end; j += 2 * kWidth) {
      s[0] = add(s[0], weights_of<T>(f, r, j, factor, base));
      s[1] = add(s[1], weights_of<T>(f, r, j + kWidth, factor, base));
    }
    sum[r] = reduce_add(add(s[0], s[1]));
  }
}

// The scales of a part's keys; those of its values as what turns a probability into a 16-bit weight. Returns what such a
// weight stands for, NaN if a scale is not finite.
float prepare_scales(const Part& f) {
  gather_scales(f, f.p.k_scale, f.w.k_scale);
  gather_scales(f, f.p.v_scale, f.w.v_scale);
  const int64_t end = ceil_div(f.keys, 2 * kWidth) * 2 * kWidth;
  for (int64_t j = f.keys; j < end; j++) f.w.v_scale[j] = 0.f;
  Vec largest = zero(), poison = zero();
  for (int64_t j = 0; j < end; j += kWidth) {
    const Vec x = load(f.w.v_scale + j);
    largest = vmax(vabs(x), largest);
    poison = fmadd(x, zero(), poison);
  }
  const float most = __builtin_fmaxf(reduce_max(largest), 0x1p-100f);
  for (int64_t j = 0; j < end; j += kWidth) store(f.w.v_scale + j, mul(load(f.w.v_scale + j), set1(32767.f / most)));
  return reduce_add(poison) == 0.f ? most / 32767.f : __builtin_nanf("");
}

template <DType T>
void attend(Part& f) {
  constexpr DType kWeight = ValueDot<T>::kWeight;
  f.w = carve(f, kWeight == DType::f32);
  const float unit = T == DType::s8 ? prepare_scales(f) : 1.f;
  prepare_queries<T>(f);
  for_each_run(f, [&](int64_t first, int64_t count) { score_run<T>(f, first, count); });
  soften<T>(f);
  // Rows that pad a tile have weights too: zeros.
  const int64_t weights = kPitch * (kWeight == DType::f32 ? 4 : 2);
  std::memset(f.w.p + f.rows * weights, 0, (f.padded - f.rows) * weights);
  std::memset(f.w.out, 0, f.padded * f.out_stride * 4);
  for_each_run(f, [&](int64_t first, int64_t count) { output_run<T>(f, first, count); });
  for (int64_t r = 0; r < f.rows; r++)
    for (int64_t c = 0; c < f.a.dv; c += 16 * ValueDot<T>::kVecs)
      ValueDot<T>::finish(f.w.out + r * f.out_stride + c, set1(unit), f.item.partial + r * f.out_stride + c);
}

const char* const kNames[] = {"attention_decode_f32." PBM_TIER_NAME, "attention_decode_bf16." PBM_TIER_NAME,
                              "attention_decode_f16." PBM_TIER_NAME, "", "attention_decode_s8." PBM_TIER_NAME};

}  // namespace

void attention_decode(const AttentionDecode& p, const DecodeItem& item, const DecodeItem* next) {
  note_kernel(kNames[static_cast<int>(p.a.k.dtype)]);
  Part f{p,
         p.a,
         item,
         next,
         decode_rows(p.a),
         decode_padded_rows(p.a),
         item.keys.end - item.keys.begin,
         decode_out_stride(p.a),
         {}};
  if (p.a.k.dtype == DType::s8) return attend<DType::s8>(f);
  with_float_dtype(p.a.k.dtype, [&]<DType T>() { attend<T>(f); });
}

}  // namespace pbm::PBM_TIER
