#include "cpu/kernels/quantize.h"

#include "cpu/kernels/convert.h"
#include "cpu/kernels/impl.h"

namespace pbm::PBM_TIER {
namespace {

struct RowRange {
  float low, high;  // of the row and zero
  bool finite;
};

template <DType T>
RowRange range_of(const void* x, int64_t at, int64_t k) {
  constexpr int kChains = 4;  // min, max and the sum take 4 cycles each to answer
  Vec low[kChains], high[kChains], poison[kChains];
  PBM_UNROLL for (int c = 0; c < kChains; c++) low[c] = high[c] = poison[c] = zero();
  // x·0 is 0 for every finite x and NaN for the rest, which min and max would hide.
  const auto take = [&](int c, Vec v) __attribute__((always_inline)) {
    low[c] = vmin(low[c], v);
    high[c] = vmax(high[c], v);
    poison[c] = fmadd(v, zero(), poison[c]);
  };
  int64_t p = 0;
  for (; p + kChains * kWidth <= k; p += kChains * kWidth)
    PBM_UNROLL for (int c = 0; c < kChains; c++) take(c, load16<T>(x, at + p + c * kWidth));
  for (; p < k; p += kWidth) take(0, load16_n<T>(x, at + p, static_cast<int>(k - p < kWidth ? k - p : kWidth)));
  PBM_UNROLL for (int c = 1; c < kChains; c++) {
    low[0] = vmin(low[0], low[c]);
    high[0] = vmax(high[0], high[c]);
    poison[0] = add(poison[0], poison[c]);
  }
  return {reduce_min(low[0]), reduce_max(high[0]), reduce_add(poison[0]) == 0.f};
}

// Writes q = round(x·inverse) + offset, saturated to a byte, for one row.
template <DType T, bool Signed>
void quantize_bytes(const QuantizeRows& q, int64_t at, uint8_t* out, float inverse, int32_t offset) {
  const Vec scale = set1(inverse);
  const IVec shift = iset1(offset);
  const auto integer = [&](Vec v) __attribute__((always_inline)) { return iadd(to_int(mul(v, scale)), shift); };
  int64_t p = 0;
  for (; p + 4 * kWidth <= q.k; p += 4 * kWidth) {
    IVec r[4];
    PBM_UNROLL for (int c = 0; c < 4; c++) r[c] = integer(load16<T>(q.x, at + p + c * kWidth));
    saturate_bytes<Signed>(out + p, r);
  }
  if (p < q.k) {
    IVec r[4];
    for (int c = 0; c < 4; c++) {
      const int64_t left = q.k - p - c * kWidth;
      r[c] = left > 0 ? integer(load16_n<T>(q.x, at + p + c * kWidth, static_cast<int>(left < kWidth ? left : kWidth)))
                      : izero();
    }
    alignas(64) uint8_t last[64];
    saturate_bytes<Signed>(last, r);
    std::memcpy(out + p, last, q.k - p);
  }
  if (q.q_padded > q.k) std::memset(out + q.k, 0, q.q_padded - q.k);
}

template <DType T>
void quantize_digits(const QuantizeRows& q, int64_t at, uint8_t* out, float inverse) {
  const Vec scale = set1(inverse);
  for (int64_t p = 0; p < q.k; p += kWidth) {
    const int n = static_cast<int>(q.k - p < kWidth ? q.k - p : kWidth);
    // A mantissa of 24 ones lies half a unit below 2^23 and would be rounded up to it, out of the digits' range.
    const Vec scaled = vmin(mul(load16_n<T>(q.x, at + p, n), scale), set1(8388607.f));
    const IVec biased = iadd(to_int(scaled), iset1(128 << 16));  // from [-2^23, 2^23)
    alignas(16) uint8_t digit[3][16];
    narrow_u8(digit[0], shr<16>(biased));
    narrow_u8(digit[1], iand(shr<8>(biased), iset1(255)));
    narrow_u8(digit[2], iand(biased, iset1(255)));
    for (int d = 0; d < 3; d++) std::memcpy(out + d * q.q_row + p, digit[d], n);
  }
  for (int d = 0; d < 3; d++)
    if (q.q_padded > q.k) std::memset(out + d * q.q_row + q.k, 0, q.q_padded - q.k);
}

// 2^(e+1-23) for amax in [2^e, 2^(e+1)): a power of two, so that scaling is exact and the largest |x| stays below 2^23.
// Below 2^-100 the scale stops shrinking: what is lost there is at most 2^-123.
float digit_scale(float amax) {
  uint32_t bits;
  const float bounded = amax < 0x1p-100f ? 0x1p-100f : amax;
  std::memcpy(&bits, &bounded, 4);
  const uint32_t exponent = (bits >> 23) - 22;
  const uint32_t scale = exponent << 23;
  float result;
  std::memcpy(&result, &scale, 4);
  return result;
}

template <DType T>
void quantize_row(const QuantizeRows& q, int64_t i) {
  const int64_t at = i * q.row;
  const int64_t rows = q.kind == QuantKind::digits ? 3 : 1;
  uint8_t* out = static_cast<uint8_t*>(q.q) + i * rows * q.q_row;
  const RowRange range = range_of<T>(q.x, at, q.k);
  int32_t zero = q.kind == QuantKind::symmetric_u8 ? 128 : 0;
  if (!range.finite) {  // nothing is hidden: the scale makes every output of this row NaN
    q.scale[i] = __builtin_nanf("");
    if (q.zero_point) q.zero_point[i] = zero;
    for (int64_t r = 0; r < rows; r++) std::memset(out + r * q.q_row, zero, q.q_padded);
    return;
  }
  const float amax = range.high > -range.low ? range.high : -range.low;
  float scale;
  if (q.kind == QuantKind::digits) {
    scale = digit_scale(amax);
    quantize_digits<T>(q, at, out, 1.f / scale);
  } else {
    const bool asymmetric = q.kind == QuantKind::asymmetric;
    if (asymmetric) {
      const ByteScale found = byte_scale(range.low, range.high);
      scale = found.scale;
      zero = found.zero_point;
    } else {
      scale = amax / 127.f;
      if (scale < 0x1p-126f) scale = amax == 0.f ? 1.f : 0x1p-126f;  // 1/scale must stay finite
    }
    const float inverse = 1.f / scale;
    q.kind == QuantKind::symmetric_s8 ? quantize_bytes<T, true>(q, at, out, inverse, 0)
                                      : quantize_bytes<T, false>(q, at, out, inverse, zero);
  }
  q.scale[i] = scale;
  if (q.zero_point) q.zero_point[i] = zero;
}

}  // namespace

void widen_lanes(char* row, int64_t bytes) {
#if PBM_TIER_LEVEL == 1
  for (int64_t p = 0; p < bytes; p += 16) {
    const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + bytes + p));
    const __m128i even = _mm_and_si128(x, _mm_set1_epi16(0xff)), odd = _mm_srli_epi16(x, 8);
    __m128i* out = reinterpret_cast<__m128i*>(row + 2 * p);
    _mm_storeu_si128(out, _mm_unpacklo_epi32(even, odd));
    _mm_storeu_si128(out + 1, _mm_unpackhi_epi32(even, odd));
  }
#else
  static_assert(kTile.u8_lane_bytes == 4, "only AVX2 widens");
  (void)row, (void)bytes;
#endif
}

ValueRange value_range(const void* x, DType dtype, int64_t begin, int64_t end) {
  return with_float_dtype(dtype, [&]<DType T>() -> ValueRange {
    const RowRange r = range_of<T>(x, begin, end - begin);
    return {r.finite ? r.low : __builtin_nanf(""), r.high};
  });
}

void quantize_rows(const QuantizeRows& q, int64_t begin, int64_t end) {
  with_float_dtype(q.dtype, [&]<DType T>() {
    for (int64_t i = begin; i < end; i++) quantize_row<T>(q, i);
  });
}

}  // namespace pbm::PBM_TIER
