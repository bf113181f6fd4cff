// Gradients of attention without its matrix. Queries outside in chunks, keys inside in blocks, scores transposed:
//
//   Sᵀ = K·Qᵀ, Pᵀ = e^(Sᵀ − lse), dPᵀ = V·dOᵀ, dSᵀ = Pᵀ∘(dPᵀ − δ);  dV += Pᵀ·dO, dK += dSᵀ·Q, dQᵀ += Kᵀ·dSᵀ
//
// so that Pᵀ and dSᵀ come out as the rows that the next products read, and the row statistics lie along the lanes. dK and
// dV stay in fp32 for all keys of an item; dQᵀ is complete after a chunk. δ_i = Σ_d dO_id·O_id − dlse_i.
#include "cpu/kernels/attention_backward_chunk.h"

namespace pbm::PBM_TIER {
namespace {

// --- scores ----------------------------------------------------------------------------------------------------------

// Queries that see key j: [begin, end).
Range seeing(const Backward& f, int64_t j) {
  const int64_t at = j - f.offset;
  const int64_t begin = f.a.right < 0 ? 0 : max64(at - f.a.right, 0);
  const int64_t end = f.a.left < 0 ? f.queries : min64(at + f.a.left + 1, f.queries);
  return {begin, end};
}

void hide(const Backward& f, const Chunk& c, const Tile& t) {
  for (int64_t j = t.j.begin; j < t.j.end; j++) {
    const Range seen = seeing(f, j);
    float* row = f.w.s + (j - t.j.begin) * kPitch;
    const int64_t begin = min64(seen.begin - c.i.begin, t.c.end), end = max64(seen.end - c.i.begin, t.c.begin);
    for (int64_t x = t.c.begin; x < begin; x++) row[x] = kHidden;
    for (int64_t x = end; x < t.c.end; x++) row[x] = kHidden;
  }
}

// Keys j … of sixteen queries from column x on, as additions to the scores: one vector a key.
void mask_transposed(const Backward& f, const Chunk& c, int64_t x, int64_t j, IVec (&r)[16]) {
  const AttentionMask& m = f.a.mask;
  const int n = static_cast<int>(min64(kWidth, f.keys - j));
  for (int64_t l = 0; l < 16; l++) {
    const int64_t i = min64(c.i.begin + x + l, c.i.end - 1);
    r[l] = as_int(mask_at_n(m, f.item.b * m.batch + c.head * m.head + i * m.row, j, n));
  }
  transpose16(r);
}

// Products to scores; for a softcap, its derivative stays where the scores' gradient will need it.
void adjust_scores(const Backward& f, const Chunk& c, const Tile& t, float* slope_of_cap) {
  const Attention& a = f.a;
  const float slope = a.slopes ? a.slopes[f.item.b * a.slopes_batch + c.head] : 0.f;
  for (int64_t j0 = t.j.begin; j0 < t.j.end; j0 += 16)
    for (int64_t x = t.c.begin; x < t.c.end; x += kWidth) {
      IVec mask[16];
      if (a.mask.kind != MaskKind::none) mask_transposed(f, c, x, j0, mask);
      for (int64_t j = j0; j < min64(j0 + 16, t.j.end); j++) {
        float* at = f.w.s + (j - t.j.begin) * kPitch + x;
        Vec s = load(at);
        if (a.softcap != 0.f) {
          const Vec tanh = vtanh(mul(s, set1(cap_factor(a.scale, a.softcap))));
          s = mul(tanh, set1(a.softcap));
          store(slope_of_cap + (j - t.j.begin) * kPitch + x, sub(set1(1.f), mul(tanh, tanh)));
        } else {
          s = mul(s, set1(a.scale));
        }
        if (a.mask.kind != MaskKind::none) s = add_mask(s, as_float(mask[j - j0]));
        if (a.slopes) {
          const float relative = static_cast<float>(c.i.begin + x + f.offset - j);
          s = fmadd(vabs(add(iota(), set1(relative))), set1(-slope), s);
        }
        store(at, s);
      }
    }
}

// Factors of dropout for one key and sixteen queries. Four keys in a row share their random numbers, which are kept for
// every column until the next four come.
class Keep {
 public:
  Keep(const Backward& f, const Chunk& c) : f_(f), c_(c) {}

  Vec at(int64_t j, int64_t x) {
    Column& column = columns_[x / kWidth];
    if (column.counter != j / 4) {
      column.counter = j / 4;
      column.words[0] = iset1(static_cast<int32_t>(column.counter));
      column.words[1] = iadd(to_int(iota()), iset1(static_cast<int32_t>(c_.i.begin + x)));
      column.words[2] = iset1(static_cast<int32_t>(f_.item.b * f_.a.heads + c_.head));
      philox4x32(column.words, f_.a.dropout.seed);
    }
    return kept(column.words[j % 4], f_.a.dropout.threshold, f_.a.dropout.factor);
  }

 private:
  struct Column {
    IVec words[4];
    int64_t counter = -1;
  };
  const Backward& f_;
  const Chunk& c_;
  Column columns_[kChunkQueries / kWidth];
};

// Two keys' sixteen values each to their rows, and to their panel if there is one.
template <Flavour F>
PBM_INLINE void store_pair(char* row0, char* row1, int64_t x, Vec v0, Vec v1, char* panel) {
  if constexpr (F == Flavour::f32) {
    store(reinterpret_cast<float*>(row0) + x, v0);
    store(reinterpret_cast<float*>(row1) + x, v1);
    if (panel) {
      store(reinterpret_cast<float*>(panel), v0);
      store(reinterpret_cast<float*>(panel + kGroupBytes), v1);
    }
    return;
  }
#if PBM_TIER_LEVEL >= 3
  const __m512bh both = _mm512_cvtne2ps_pbh(v1.v, v0.v);
  __m512i h;
  std::memcpy(&h, &both, 64);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(row0 + 2 * x), _mm512_castsi512_si256(h));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(row1 + 2 * x), _mm512_extracti64x4_epi64(h, 1));
  alignas(64) static constexpr uint16_t kPairs[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  if (panel) istore(panel, {_mm512_permutexvar_epi16(_mm512_load_si512(kPairs), h)});
#else
  const IVec h0 = bf16_bits(v0), h1 = bf16_bits(v1);
  narrow_u16(reinterpret_cast<uint16_t*>(row0) + x, h0);
  narrow_u16(reinterpret_cast<uint16_t*>(row1) + x, h1);
  if (panel) istore(panel, ior(h0, shl<16>(h1)));
#endif
}

// Sixteen queries of one key: the probability that V's gradient takes, and the gradient of the score.
struct Sixteen {
  Vec p, ds;
};

template <Flavour F, bool Dropped>
PBM_INLINE Sixteen sixteen(const Backward& f, Keep* keep, int64_t j, int64_t x, int64_t at, float factor) {
  const Vec exponent = fmadd(load(f.w.s + at), set1(factor), sub(zero(), load(f.w.base + x)));
  const Vec p = mul(F == Flavour::bf16 ? vexp2_bf16(exponent) : vexp2(exponent), load(f.w.inverse_sum + x));
  Vec dp = load(f.w.dp + at);
  if constexpr (!Dropped) return {p, mul(p, sub(dp, load(f.w.delta + x)))};
  const Vec m = keep->at(j, x);
  return {mul(p, m), mul(p, sub(mul(dp, m), load(f.w.delta + x)))};
}

// P and dS of a tile from its scores and gradients of probabilities.
template <Flavour F, bool Dropped>
void differentiate(const Backward& f, const Chunk& c, const Tile& t, float factor, const float* slope_of_cap) {
  Keep keep(f, c);
  const int64_t block_panel = kBlockKeys / f.per_lane * kGroupBytes;
  for (int64_t r = 0; r < t.j.end - t.j.begin; r += 2) {
    const int64_t at = r * kPitch, j = t.j.begin + r, row = at * f.size, next = row + kPitch * f.size;
    for (int64_t x = t.c.begin; x < t.c.end; x += kWidth) {
      Sixteen y0 = sixteen<F, Dropped>(f, &keep, j, x, at + x, factor);
      Sixteen y1 = sixteen<F, Dropped>(f, &keep, j + 1, x, at + kPitch + x, factor);
      if (slope_of_cap) {
        y0.ds = mul(y0.ds, load(slope_of_cap + at + x));
        y1.ds = mul(y1.ds, load(slope_of_cap + at + kPitch + x));
      }
      store_pair<F>(f.w.p + row, f.w.p + next, x, y0.p, y1.p, nullptr);
      store_pair<F>(f.w.ds + row, f.w.ds + next, x, y0.ds, y1.ds,
                    f.w.ds_panels + x / kPanel * block_panel + r / f.per_lane * kGroupBytes);
    }
  }
}

// A tile's part in the gradient of the mask, added to the rows of its queries.
template <Flavour F, bool Dropped>
void add_to_mask(const Backward& f, const Chunk& c, const Tile& t, float factor, const AttentionMaskItem& item) {
  Keep keep(f, c);
  for (int64_t x = t.c.begin; x < t.c.end; x += 16)
    for (int64_t j = t.j.begin; j < t.j.end; j += 16) {
      const int n = static_cast<int>(min64(16, t.j.end - j));
      IVec r[16];
      for (int l = 0; l < 16; l++)
        r[l] = l < n ? as_int(sixteen<F, Dropped>(f, &keep, j + l, x, (j + l - t.j.begin) * kPitch + x, factor).ds)
                     : izero();
      transpose16(r);
      for (int64_t l = 0; l < min64(16, c.i.end - c.i.begin - x); l++) {
        float* to = item.out + (c.i.begin + x + l) * item.row + j * item.col;
        if (item.col == 0) {
          *to += reduce_add(as_float(r[l]));
        } else {
          store_n(to, add(load_n(to, n), as_float(r[l])), n);
        }
      }
    }
}

template <class Body>
void with_variant(const Attention& a, const Body& body) {
  const auto flavoured = [&]<Flavour F>() {
    a.dropout.threshold ? body.template operator()<F, true>() : body.template operator()<F, false>();
  };
  a.flavour == Flavour::f32 ? flavoured.template operator()<Flavour::f32>()
                            : flavoured.template operator()<Flavour::bf16>();
}

// --- a block of keys ---------------------------------------------------------------------------------------------------

// A tile's scores to exponents, of a chunk in which some row's base is large; the same to the bit for the others.
void subtract_max(const Backward& f, const Tile& t, int64_t rows) {
  const Vec factor = set1(score_factor(f.a));
  for (int64_t x = t.c.begin; x < t.c.end; x += kWidth) {
    const Vec max = load(f.w.max + x), base = mul(max, factor);
    for (int64_t r = 0; r < rows; r++) {
      float* at = f.w.s + r * kPitch + x;
      const Vec s = load(at);
      store(at, where_large(base, mul(sub(s, max), factor), fmadd(s, factor, sub(zero(), base))));
    }
  }
}

// Scores and the gradients of probabilities. What is returned times the scores, minus w.base, are the exponents.
float scores(const Backward& f, const Chunk& c, const Tile& t, float* slope_of_cap) {
  const Attention& a = f.a;
  const int64_t rows = t.j.end - t.j.begin, panels = (t.c.end - t.c.begin) / kPanel;
  const int64_t row = t.j.begin - f.item.begin, p0 = t.c.begin / kPanel;
  const char* k = f.convert_k ? f.w.k + row * f.k_stride : key_row(a, a.k, f.item.b, f.item.kv_head, t.j.begin);
  const char* v = f.convert_v ? f.w.v + row * f.v_stride : key_row(a, a.v, f.item.b, f.item.kv_head, t.j.begin);
  const BlockA k_rows = {k, f.convert_k ? f.k_stride : a.k.row * f.size, rows,
                         f.convert_k ? round_up(a.d, f.per_lane) : a.d};
  const BlockA v_rows = {v, f.convert_v ? f.v_stride : a.v.row * f.size, rows,
                         f.convert_v ? round_up(a.dv, f.per_lane) : a.dv};
  const int64_t q_panel = f.q_groups * kGroupBytes, do_panel = f.do_groups * kGroupBytes;
  block_product(a.flavour, k_rows, {f.w.q_t + p0 * q_panel, q_panel, panels}, {f.w.s + t.c.begin, kPitch, false});
  block_product(a.flavour, v_rows, {f.w.do_t + p0 * do_panel, do_panel, panels}, {f.w.dp + t.c.begin, kPitch, false});

  const bool plain = plain_scores(a);
  if (!plain) adjust_scores(f, c, t, slope_of_cap);
  hide(f, c, t);
  for (int64_t r = 0; f.bad_k && a.softcap != 0.f && r < rows; r++)  // as clean_keys does
    if (!is_finite_key(f, t.j.begin + r)) std::memset(slope_of_cap + r * kPitch, 0, kPitch * 4);
  if (rows % 2) {  // what is written in pairs has a partner without weight
    for (int64_t x = t.c.begin; x < t.c.end; x++) {
      f.w.s[rows * kPitch + x] = kHidden;
      f.w.dp[rows * kPitch + x] = 0.f;
    }
    if (a.softcap != 0.f) std::memset(slope_of_cap + rows * kPitch, 0, kPitch * 4);
  }
  if (!c.large) return score_factor(a);
  subtract_max(f, t, rows);
  return 1.f;
}

void backpropagate(const Backward& f, const Chunk& c, const Tile& t, float* slope_of_cap) {
  const Attention& a = f.a;
  const float factor = scores(f, c, t, slope_of_cap);
  with_variant(a, [&]<Flavour F, bool Dropped>() {
    differentiate<F, Dropped>(f, c, t, factor, a.softcap != 0.f ? slope_of_cap : nullptr);
  });

  const int64_t rows = t.j.end - t.j.begin, row = t.j.begin - f.item.begin;
  const int64_t count = c.i.end - c.i.begin, used = min64(t.c.end, round_up(count, f.per_lane)) - t.c.begin;
  const int64_t chunk_panel = panel_groups(count, a.flavour) * kGroupBytes, skip = t.c.begin / f.per_lane * kGroupBytes;
  const int64_t stride = kPitch * f.size, first = t.c.begin * f.size;
  block_product(a.flavour, {f.w.p + first, stride, rows, used}, {f.w.d_o + skip, chunk_panel, f.dv_stride / kPanel},
                {f.w.dv + row * f.dv_stride, f.dv_stride, true});
  block_product(a.flavour, {f.w.ds + first, stride, rows, used}, {f.w.q + skip, chunk_panel, f.dk_stride / kPanel},
                {f.w.dk + row * f.dk_stride, f.dk_stride, true});
  const int64_t block_panel = kBlockKeys / f.per_lane * kGroupBytes;
  block_product(a.flavour, {block_transposed(f, t.j.begin), f.kt_stride, a.d, round_up(rows, f.per_lane)},
                {f.w.ds_panels + t.c.begin / kPanel * block_panel, block_panel, (t.c.end - t.c.begin) / kPanel},
                {f.w.dq_t + t.c.begin, kPitch, true});
}

// The chunk's columns of which a block of keys sees any.
Range columns_of(const Backward& f, const Chunk& c, Range j) {
  const int64_t begin = max64(seeing(f, j.begin).begin, c.i.begin), end = min64(seeing(f, j.end - 1).end, c.i.end);
  if (begin >= end) return {0, 0};
  return {(begin - c.i.begin) / kPanel * kPanel, round_up(end - c.i.begin, kPanel)};
}

// The end of what is computed at once from key j on: the rest of a block, or a part where it is not all seen.
int64_t block_end(const Backward& f, const Chunk& c, int64_t j) {
  const int64_t at = j - f.item.begin, end = min64(j - at % kBlockKeys + kBlockKeys, f.item.end);
  const Range first = seeing(f, j), last = seeing(f, end - 1);
  const bool all = max64(first.begin, last.begin) <= c.i.begin && min64(first.end, last.end) >= c.i.end;
  return all ? end : min64(j + kPartialKeys, end);
}

void finish_chunk(const Backward& f, const Chunk& c) {
  const Attention& a = f.a;
  for (int64_t x = 0; x < c.i.end - c.i.begin; x += 16)
    for (int64_t d = 0; d < a.d; d += 16) {
      const int n = static_cast<int>(min64(16, a.d - d));
      IVec r[16];
      for (int l = 0; l < 16; l++)
        r[l] = l < n ? as_int(mul(load(f.w.dq_t + (d + l) * kPitch + x), set1(a.scale))) : izero();
      transpose16(r);
      for (int64_t l = 0; l < min64(16, c.i.end - c.i.begin - x); l++) {
        char* to =
            const_cast<char*>(query_row(a, f.g.d_q, f.item.b + f.item.part * a.batch, c.head, c.i.begin + x + l));
        with_float_dtype(f.g.d_q.dtype, [&]<DType T>() { store16_n<T>(to, d, as_float(r[l]), n); });
      }
    }
}

void finish_keys(const Backward& f, const AttentionOperand& x, const float* from, int64_t stride, int64_t d,
                 float scale) {
  for (int64_t j = f.item.begin; j < f.item.end; j++) {
    const float* row = from + (j - f.item.begin) * stride;
    char* to = const_cast<char*>(key_row(f.a, x, f.item.b, f.item.kv_head, j));
    with_float_dtype(x.dtype, [&]<DType T>() {
      for (int64_t e = 0; e < d; e += kWidth)
        store16_n<T>(to, e, mul(load(row + e), set1(scale)), static_cast<int>(min64(kWidth, d - e)));
    });
  }
}

Backward backward(const Attention& a, const AttentionGradients& g, const AttentionBackwardItem& item) {
  const int64_t per_lane = k_per_lane(a.flavour), queries = queries_of(a, item.b), keys = keys_of(a, item.b);
  const DType native = a.flavour == Flavour::f32 ? DType::f32 : DType::bf16;
  const bool bad_k = !are_finite(a, a.k, item, {item.begin, item.end}, a.d),
             bad_v = !are_finite(a, a.v, item, {item.begin, item.end}, a.dv);
  return {a,
          g,
          item,
          queries,
          keys,
          a.bottom_right ? keys - queries : 0,
          per_lane,
          4 / per_lane,
          round_up(a.d, kPanel),
          round_up(a.dv, kPanel),
          row_bytes(a.d, a.flavour),
          row_bytes(a.dv, a.flavour),
          row_bytes(kBlockKeys, a.flavour) + 64,  // not a power of two
          panel_groups(a.d, a.flavour),
          panel_groups(a.dv, a.flavour),
          a.k.dtype != native,
          a.v.dtype != native || bad_v,
          bad_k,
          bad_v,
          {}};
}

template <class Body>
void for_each_chunk(const Backward& f, int64_t head, Range queries, const Body& body) {
  for (int64_t i = queries.begin; i < min64(queries.end, f.queries); i += kChunkQueries)
    body(Chunk{head, {i, min64(i + kChunkQueries, f.queries)}});
}

}  // namespace

void attention_backward(const Attention& a, const AttentionGradients& g, const AttentionBackwardItem& item) {
  Backward f = backward(a, g, item);
  f.w = carve(f);
  prepare_keys(f);
  const int64_t group = a.heads / a.kv_heads;
  for (int64_t h = item.kv_head * group; h < (item.kv_head + 1) * group; h++)
    for_each_chunk(f, h, {0, f.queries}, [&](Chunk c) {
      std::memset(f.w.dq_t, 0, a.d * kPitch * 4);
      bool prepared = false;
      for (Tile t{{item.begin, 0}, {}}; t.j.begin < item.end; t.j.begin = t.j.end) {
        t.j.end = min64(block_end(f, c, t.j.begin), item.end);
        t.c = columns_of(f, c, t.j);
        if (t.c.begin >= t.c.end) continue;
        if (!prepared) prepare_chunk(f, &c);
        prepared = true;
        backpropagate(f, c, t, f.w.slope_of_cap);
      }
      finish_chunk(f, c);
    });
  finish_keys(f, g.d_k, f.w.dk, f.dk_stride, a.d, a.scale);
  finish_keys(f, g.d_v, f.w.dv, f.dv_stride, a.dv, 1.f);
}

void attention_mask_gradient(const Attention& a, const AttentionGradients& g, const AttentionMaskItem& item) {
  const int64_t group = a.heads / a.kv_heads;
  for (int64_t b = item.batch.begin; b < item.batch.end; b++)
    for (int64_t h = item.head.begin; h < item.head.end; h++)
      for (int64_t j = item.keys.begin; j < item.keys.end; j += kBlockKeys) {
        const AttentionBackwardItem keys = {b, h / group, j, min64(j + kBlockKeys, item.keys.end), 0};
        Backward f = backward(a, g, keys);
        f.w = carve(f);
        prepare_keys(f);
        for_each_chunk(f, h, item.queries, [&](Chunk c) {
          Tile t{{keys.begin, keys.end}, {}};
          t.c = columns_of(f, c, t.j);
          if (t.c.begin >= t.c.end) return;
          prepare_chunk(f, &c);
          const float factor = scores(f, c, t, f.w.slope_of_cap);
          with_variant(a, [&]<Flavour F, bool Dropped>() { add_to_mask<F, Dropped>(f, c, t, factor, item); });
        });
      }
}

}  // namespace pbm::PBM_TIER
