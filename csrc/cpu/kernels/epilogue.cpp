// Accumulators to C: dequantise, bias, activation, residual, conversion. Each combination is its own function, so that
// the loops hold no branches; column terms are loaded once a tile.
#include "cpu/kernels/convert.h"
#include "cpu/kernels/impl.h"
#include "cpu/kernels/vecmath.h"

namespace pbm::PBM_TIER {
namespace {

enum class Source { fp32, int32, digits };

// The scales are applied one by one: their product may be subnormal where y is not (rows of 1e-30, weights of 1e-3).
template <Source S>
PBM_INLINE Vec dequantise(const EpilogueTile& t, int r, int64_t j, IVec column_sum, Vec col_scale) {
  const char* acc = static_cast<const char*>(t.acc);
  if constexpr (S == Source::fp32) {
    return load(reinterpret_cast<const float*>(acc) + r * t.ld_acc + j);
  } else if constexpr (S == Source::int32) {
    const IVec raw = iload(acc + (r * t.ld_acc + j) * 4);
    const IVec exact = isub(raw, imul(column_sum, iset1(t.row_zero[r])));
    return mul(mul(to_float(exact), col_scale), set1(t.row_scale[r]));
  } else {
    const char* digit = acc + (3 * r * t.ld_acc + j) * 4;
    const IVec high = isub(iload(digit), imul(column_sum, iset1(128)));
    const Vec middle = to_float(iload(digit + t.ld_acc * 4)), low = to_float(iload(digit + t.ld_acc * 8));
    const Vec sum = fmadd(to_float(high), set1(65536.f), fmadd(middle, set1(256.f), low));
    return mul(mul(sum, col_scale), set1(t.row_scale[r]));
  }
}

// y to u8; the bounds are applied before the conversion, which has none for NaN and what int32 cannot hold.
PBM_INLINE void store_quantised(const Gemm& g, int64_t at, Vec y, int n) {
  const float zero = static_cast<float>(g.c_zero_point);
  const Vec q = vmin(vmax(mul(y, set1(g.c_inverse_scale)), set1(-zero)), set1(255.f - zero));
  const IVec integers = iadd(to_int(q), iset1(g.c_zero_point));
  uint8_t* out = static_cast<uint8_t*>(g.c) + at;
  if (n == kWidth) return narrow_u8(out, integers);
  uint8_t bytes[16];
  narrow_u8(bytes, integers);
  std::memcpy(out, bytes, n);
}

template <Source S, DType T>
PBM_INLINE Vec residual_of(const Gemm& g, int64_t at, int n) {
  if (S == Source::int32 && g.residual_scale != 0) {
    const uint8_t* from = static_cast<const uint8_t*>(g.residual) + at;
    alignas(16) uint8_t bytes[16] = {};
    if (n < kWidth) from = static_cast<const uint8_t*>(std::memcpy(bytes, from, n));
    return mul(to_float(isub(widen_u8(from), iset1(g.residual_zero))), set1(g.residual_scale));
  }
  return load16_n<T == DType::u8 ? DType::f32 : T>(g.residual, at, n);
}

template <Source S, Activation A, DType T>
void run(const Gemm& g, const EpilogueTile& t) {
  for (int64_t j = 0; j < t.columns; j += kWidth) {
    const int n = static_cast<int>(t.columns - j < kWidth ? t.columns - j : kWidth);
    const int64_t col = t.col + j;
    IVec column_sum = izero();
    Vec col_scale = zero();
    if constexpr (S != Source::fp32) {
      column_sum = iload(t.column_sums + j / kPanel * t.column_sums_panel);
      col_scale = load_n(g.col_scale + col, n);
    }
    Vec bias = zero();
    if (g.bias) bias = with_float_dtype(g.bias_dtype, [&]<DType B>() { return load16_n<B>(g.bias, col, n); });
    for (int r = 0; r < t.rows; r++) {
      Vec y = add(dequantise<S>(t, r, j, column_sum, col_scale), bias);
      const int64_t at = (t.row + r) * g.c_row + col;
      Vec residual = zero();
      if (g.residual) residual = residual_of<S, T>(g, (t.row + r) * g.residual_row + col, n);
      y = g.residual_first ? activate<A>(add(y, residual), g.slope) : add(activate<A>(y, g.slope), residual);
      if constexpr (T == DType::u8) {
        store_quantised(g, at, y, n);
      } else {
        store16_n<T>(g.c, at, y, n);
      }
    }
  }
}

using RunFn = void (*)(const Gemm&, const EpilogueTile&);

#define PBM_DTYPES(S, A) {run<S, A, DType::f32>, run<S, A, DType::bf16>, run<S, A, DType::f16>, run<S, A, DType::u8>}
#define PBM_ACTIVATIONS(S)                                                                                          \
  {PBM_DTYPES(S, Activation::none),      PBM_DTYPES(S, Activation::relu),      PBM_DTYPES(S, Activation::gelu_erf), \
   PBM_DTYPES(S, Activation::gelu_tanh), PBM_DTYPES(S, Activation::silu),      PBM_DTYPES(S, Activation::relu6),    \
   PBM_DTYPES(S, Activation::hardswish), PBM_DTYPES(S, Activation::leaky_relu)}

}  // namespace

void epilogue(const Gemm& g, const EpilogueTile& t) {
  static const RunFn table[3][kActivationCount][4] = {PBM_ACTIVATIONS(Source::fp32), PBM_ACTIVATIONS(Source::int32),
                                                      PBM_ACTIVATIONS(Source::digits)};
  const Source source = g.flavour != Flavour::u8s8      ? Source::fp32
                        : g.prepare == APrepare::digits ? Source::digits
                                                        : Source::int32;
  table[static_cast<int>(source)][static_cast<int>(g.activation)][static_cast<int>(g.c_dtype)](g, t);
}

}  // namespace pbm::PBM_TIER
