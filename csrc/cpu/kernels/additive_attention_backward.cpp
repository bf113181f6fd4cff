// Gradients of additive attention, strip by strip of queries. With t = tanh(q + k), computed again, and δ = ds·sech²(q + k):
//   dq_ih = v_h·Σ_j δ_ijh,  dk_jh = v_h·Σ_i δ_ijh,  dv_h = Σ_ij ds_ij·t_ijh,
//   ds_ij = p_ij·(m_ij·(dO_i·value_j) − Σ_j' p_ij'·m_ij'·(dO_i·value_j') + dlse_i),  dvalue = (p∘m)ᵀ·dO.
// Columns of hidden are independent of each other once ds is there: each part is summed by one thread, in one order.
#include "common/scratch.h"
#include "cpu/kernels/additive_attention_rows.h"

namespace pbm::PBM_TIER {
namespace {

// Queries that meet one load of a key, and add to its sum in registers.
constexpr int kRows = PBM_TIER_LEVEL >= 2 ? 4 : 1;

// --- sixteen columns of hidden ------------------------------------------------------------------------------------------

// tanh(q + k) = n/d and sech²(q + k) = s/d², with d = k·z + w, n = k·x + y of the query, and s of the key alone: 1 − tanh²
// would lose its digits where tanh is near ±1. By form:
//   large, k = e^(2k'):    x = z = e^q/2,   w = −y = e^(−q)/2,   s = k;
//   small, k = tanh k':    x = w = cosh q,  y = z = sinh q,      s = 1 − k².
struct Coefficients {
  Vec x, y, z, w;
};

// A unit of queries: 16 KB that stay in L1 while the keys pass by, and two times 4 KB for sums.
struct Unit {
  float q[kAdditiveRows][16], grow[kAdditiveRows][16], decay[kAdditiveRows][16], sinh[kAdditiveRows][16];
  float d_q[kAdditiveRows][16];
  float d_k[kAdditiveKeys][16];
  Vec d_v;
};

PBM_INLINE void load_query(Vec q, int64_t i, Unit* u) {
  // Where |k'| ≤ 15, nothing changes beyond 40. The order of the operands keeps a NaN.
  const Vec c = vmax(set1(-40.f), vmin(set1(40.f), q)), half = set1(0.5f);
  const Vec grow = mul(vexp(c), half), decay = mul(vexp(sub(zero(), c)), half);
  store(u->q[i], q);
  store(u->grow[i], grow);
  store(u->decay[i], decay);
  store(u->sinh[i], mul(vtanh(c), add(grow, decay)));
  store(u->d_q[i], zero());
}

PBM_INLINE Coefficients coefficients(const Unit& u, int64_t i, Vec is_large) {
  const Vec grow = load(u.grow[i]), decay = load(u.decay[i]), sinh = load(u.sinh[i]), cosh = add(grow, decay);
  return {where_negative(is_large, cosh, grow), where_negative(is_large, sinh, sub(zero(), decay)),
          where_negative(is_large, sinh, grow), where_negative(is_large, cosh, decay)};
}

PBM_INLINE Vec key_factor(Vec k, Vec is_large) { return where_negative(is_large, fnmadd(k, k, set1(1.f)), k); }

// Negative where a column of the block takes the small form: bit 2 of what stands in forms is set for the large one.
PBM_INLINE Vec large_columns(const int32_t* forms) {
  return as_float(ixor(ior(shl<29>(iload(forms)), as_int(set1(1.f))), iset1(INT32_MIN)));
}

struct Tile {
  const float* keys;  // 16 a key
  int64_t count;
  bool direct, masked;
  Vec is_large;
  const float* d_s;
  int64_t pitch;
};

// d_k, and d_v and d_q of R queries, without the factors s and v of d_k and v of d_q.
template <int R>
void tile(Unit& u, int64_t i, const Tile t) {
  Coefficients c[R];
  Vec d_q[R], d_v[2] = {zero(), zero()};  // one chain of additions would be the slowest of all
  PBM_UNROLL for (int r = 0; r < R; r++) {
    c[r] = coefficients(u, i + r, t.is_large);
    d_q[r] = zero();
  }
  for (int64_t j = 0; j < t.count; j++) {
    const Vec k = load(t.keys + 16 * j), s = key_factor(k, t.is_large);
    Vec d_k = load(u.d_k[j]);
    PBM_UNROLL for (int r = 0; r < R; r++) {
      const Vec inverse = reciprocal(fmadd(k, c[r].z, c[r].w));
      const Vec once = mul(inverse, set1(t.d_s[r * t.pitch + j])), twice = mul(once, inverse);
      d_v[r % 2] = fmadd(once, fmadd(k, c[r].x, c[r].y), d_v[r % 2]);
      d_q[r] = fmadd(twice, s, d_q[r]);
      d_k = add(d_k, twice);
    }
    store(u.d_k[j], d_k);
  }
  PBM_UNROLL for (int r = 0; r < R; r++) store(u.d_q[i + r], add(load(u.d_q[i + r]), d_q[r]));
  u.d_v = add(u.d_v, add(d_v[0], d_v[1]));
}

// The same in a direct block, where k is k' itself.
void direct_tile(Unit& u, int64_t i, const Tile t) {
  const Vec q = load(u.q[i]);
  Vec d_q = zero(), d_v = zero();
  for (int64_t j = 0; j < t.count; j++) {
    const Vec x = add(q, load(t.keys + 16 * j)), d_s = set1(t.d_s[j]);
    const TanhSech f = tanh_sech2(x);
    const Vec by_x = mul(d_s, f.sech2);
    d_v = fmadd(d_s, f.tanh, d_v);
    d_q = add(d_q, by_x);
    store(u.d_k[j], add(load(u.d_k[j]), by_x));
  }
  store(u.d_q[i], add(load(u.d_q[i]), d_q));
  u.d_v = add(u.d_v, d_v);
}

// Whether the gradients of all scores of a tile are zero, as those of hidden keys are.
bool no_gradient(const Tile& t, int rows) {
  IVec bits = izero();
  for (int r = 0; r < rows; r++)
    for (int64_t j = 0; j < t.count; j += 16)
      bits = ior(bits, as_int(load_n(t.d_s + r * t.pitch + j, static_cast<int>(min64(16, t.count - j)))));
  return reduce_max(to_float(iand(bits, iset1(INT32_MAX)))) == 0.f;  // a zero may be negative
}

void unit_tiles(Unit& u, int64_t rows, Tile t) {
  for (int64_t i = 0; i < rows;) {
    const int height = !t.direct && rows - i >= kRows ? kRows : 1;
    if (t.masked && no_gradient(t, height)) {
    } else if (t.direct) {
      direct_tile(u, i, t);
    } else {
      height == kRows ? tile<kRows>(u, i, t) : tile<1>(u, i, t);
    }
    t.d_s += height * t.pitch;
    i += height;
  }
}

template <DType T>
void store_hidden(const AttentionOperand& to, int64_t b, int64_t i, int64_t h, int n, Vec x) {
  store16_n<T>(const_cast<char*>(row_of(to, b, 0, i)), h, x, n);
}

template <DType T>
void hidden_gradients(const AdditiveAttention& a, const AdditiveGradients& g, const AdditivePart& x, int64_t h) {
  const int64_t b = x.item.b, width = padded_hidden(a), pitch = score_pitch(a);
  const int n = static_cast<int>(min64(16, a.hidden - h));
  const float* keys = a.columns + (b * width + h) * padded_keys(a);
  float* d_keys = g.d_columns + (b * width + h) * padded_keys(a);
  if (x.first) std::memset(d_keys, 0, a.keys * 16 * sizeof(float));
  float* d_v = g.d_v + b * width + h;
  Vec d_v_sum = x.first ? zero() : load(d_v);
  const Vec v = load(a.v + h);
  Unit* u = static_cast<Unit*>(scratch(ScratchSlot::attention, sizeof(Unit)));
  for (int64_t i = x.item.rows.begin; i < x.item.rows.end; i += kAdditiveRows) {
    const Range rows = {i, min64(i + kAdditiveRows, x.item.rows.end)};
    for (int64_t r = i; r < rows.end; r++) load_query(load16_n<T>(row_of(a.query, b, 0, r), h, n), r - i, u);
    u->d_v = zero();
    const float* d_s = g.d_s + (x.item.at + i - x.item.rows.begin) * pitch;
    for (int64_t block = 0; block < key_blocks(a); block++) {
      const int64_t j0 = block * kAdditiveKeys, count = min64(kAdditiveKeys, a.keys - j0);
      const int32_t* forms = a.forms + (b * key_blocks(a) + block) * width;
      std::memset(u->d_k, 0, sizeof(u->d_k));
      const bool masked = a.mask.kind != MaskKind::none;
      unit_tiles(*u, rows.end - rows.begin,
                 {keys + j0 * 16, count, forms[0] < 0, masked, large_columns(forms + h), d_s + j0, pitch});
      for (int64_t j = 0; j < count; j++) {
        float* to = d_keys + (j0 + j) * 16;
        store(to, add(load(to), load(u->d_k[j])));
      }
    }
    for (int64_t r = rows.begin; r < rows.end; r++)
      store_hidden<T>(g.d_query, b, r, h, n, mul(load(u->d_q[r - rows.begin]), v));
    d_v_sum = add(d_v_sum, u->d_v);
  }
  store(d_v, d_v_sum);
  for (int64_t j = 0; x.last && j < a.keys; j++) {
    const int32_t* forms = a.forms + (b * key_blocks(a) + j / kAdditiveKeys) * width;
    const Vec s = forms[0] < 0 ? set1(1.f) : key_factor(load(keys + j * 16), large_columns(forms + h));
    store_hidden<T>(g.d_key, b, j, h, n, mul(mul(load(d_keys + j * 16), s), v));
  }
}

// --- scores -------------------------------------------------------------------------------------------------------------

// dO·valueᵀ, into d_s.
void value_products(const AdditiveAttention& a, const AdditiveGradients& g, const AdditiveItem& x, float* d_s) {
  Gemm m{};
  m.m = x.rows.end - x.rows.begin;
  m.n = a.keys;
  m.k = a.values;
  m.a = row_of(g.d_out, x.b, 0, x.rows.begin);
  m.a_dtype = g.d_out.dtype;
  m.a_row = g.d_out.row;
  m.a_col = 1;
  m.prepare = m.a_dtype == DType::f32 ? APrepare::none : APrepare::convert;
  m.b = a.panels + x.b * ceil_div(a.keys, kPanel) * a.values * kPanel;
  m.b_packed = true;
  m.c = d_s;
  m.c_row = score_pitch(a);
  gemm(m, {0, m.m}, {0, m.n});
}

const char kName[] = "additive_attention_backward." PBM_TIER_NAME;

}  // namespace

void additive_score_gradient(const AdditiveAttention& a, int64_t b, int64_t i, const float* d_lse, float* p, float* d_s) {
  for (int64_t j = a.keys; j % 16; j++) d_s[j] = 0;
  drop(a, b, i, d_s);
  Vec sum = zero();
  for (int64_t j = 0; j < a.keys; j += 16) sum = fmadd(load(p + j), load(d_s + j), sum);
  const Vec shift = set1(reduce_add(sum) - (d_lse ? d_lse[b * a.queries + i] : 0.f));
  for (int64_t j = 0; j < a.keys; j += 16) store(d_s + j, mul(load(p + j), sub(load(d_s + j), shift)));
  drop(a, b, i, p);
}

void additive_score_gradients(const AdditiveAttention& a, const AdditiveGradients& g, const AdditiveItem& item) {
  const int64_t pitch = score_pitch(a);
  float *p = g.p + item.at * pitch, *d_s = g.d_s + item.at * pitch;
  additive_probabilities(a, item.b, item.rows, p);
  value_products(a, g, item, d_s);
  for (int64_t i = item.rows.begin; i < item.rows.end; i++, p += pitch, d_s += pitch)
    additive_score_gradient(a, item.b, i, g.d_lse, p, d_s);
  note_kernel(kName);
}

void additive_hidden_gradients(const AdditiveAttention& a, const AdditiveGradients& g, const AdditivePart& x) {
  with_float_dtype(a.query.dtype, [&]<DType T>() {
    for (int64_t panel = x.part.begin; panel < x.part.end; panel++) hidden_gradients<T>(a, g, x, panel * 16);
  });
  note_kernel(kName);
}

void additive_value_gradients(const AdditiveAttention& a, const AdditiveGradients& g, const AdditivePart& x) {
  const int64_t pitch = score_pitch(a);
  float* d_value = g.d_value + (x.item.b * a.keys + x.part.begin) * a.values;
  Gemm m{};
  m.m = x.part.end - x.part.begin;
  m.n = a.values;
  m.k = x.item.rows.end - x.item.rows.begin;
  m.a = g.p + x.item.at * pitch + x.part.begin;
  m.a_row = 1;
  m.a_col = pitch;
  m.prepare = APrepare::convert;
  m.b = row_of(g.d_out, x.item.b, 0, x.item.rows.begin);
  m.b_dtype = g.d_out.dtype;
  m.b_row = g.d_out.row;
  m.b_col = 1;
  m.c = d_value;
  m.c_row = a.values;
  m.residual = x.first ? nullptr : d_value;
  m.residual_row = a.values;
  gemm(m, {0, m.m}, {0, m.n});
  note_kernel(kName);
}

void additive_mask_gradient(const AdditiveAttention& a, const AdditiveGradients& g, const AdditiveItem& item, Range keys) {
  const int64_t pitch = score_pitch(a);
  for (int64_t j = keys.begin; j < keys.end; j += 16) {
    const int n = static_cast<int>(min64(16, keys.end - j));
    for (int64_t i = item.rows.begin; i < item.rows.end;) {
      // Queries that share a row of the mask, at most a unit of them.
      const int64_t end = g.d_mask_row ? i + 1 : min64(i + kAdditiveRows, item.rows.end);
      float* to = g.d_mask + item.b * g.d_mask_batch + i * g.d_mask_row + j;
      Vec sum = zero();
      for (; i < end; i++) sum = add(sum, load(g.d_s + (item.at + i - item.rows.begin) * pitch + j));
      store_n(to, add(load_n(to, n), sum), n);
    }
  }
}

}  // namespace pbm::PBM_TIER
