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
  Vec low = zero(), high = zero(), poison = zero();
  // x·0 is 0 for every finite x and NaN for the rest, which min and max would hide.
  for (int64_t p = 0; p < k; p += kWidth) {
    const Vec v = load16_n<T>(x, at + p, static_cast<int>(k - p < kWidth ? k - p : kWidth));
    low = vmin(low, v);
    high = vmax(high, v);
    poison = fmadd(v, zero(), poison);
  }
  return {reduce_min(low), reduce_max(high), reduce_add(poison) == 0.f};
}

// Writes q = clamp(round(x·inverse) + offset, lowest, highest), one byte each, for one row.
struct ByteRule {
  float inverse, offset, lowest, highest;
};

template <DType T>
void quantize_bytes(const QuantizeRows& q, int64_t at, uint8_t* out, const ByteRule& rule) {
  const Vec scale = set1(rule.inverse), offset = set1(rule.offset);
  const Vec lowest = set1(rule.lowest), highest = set1(rule.highest);
  for (int64_t p = 0; p < q.k; p += kWidth) {
    const int n = static_cast<int>(q.k - p < kWidth ? q.k - p : kWidth);
    const Vec v = load16_n<T>(q.x, at + p, n);
    const Vec r = add(round_even(mul(v, scale)), offset);  // may reach highest + 1
    const IVec u = to_int(vmin(vmax(r, lowest), highest));
    if (n == kWidth) {
      narrow_u8(out + p, u);
    } else {
      uint8_t last[16];
      narrow_u8(last, u);
      std::memcpy(out + p, last, n);
    }
  }
  if (q.q_padded > q.k) std::memset(out + q.k, 0, q.q_padded - q.k);
}

template <DType T>
void quantize_digits(const QuantizeRows& q, int64_t at, uint8_t* out, float inverse) {
  const Vec scale = set1(inverse);
  for (int64_t p = 0; p < q.k; p += kWidth) {
    const int n = static_cast<int>(q.k - p < kWidth ? q.k - p : kWidth);
    const IVec v = to_int(mul(load16_n<T>(q.x, at + p, n), scale));
    const IVec biased = iadd(v, iset1(128 << 16));  // v in [-2^23, 2^23)
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
// Below 2^-100 the scale stops shrinking: what is lost there is smaller than 2^-124.
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
    // Divided before subtracting: high - low may exceed the largest float.
    scale = asymmetric ? range.high / 255.f - range.low / 255.f : amax / 127.f;
    if (scale < 0x1p-126f) scale = amax == 0.f ? 1.f : 0x1p-126f;  // 1/scale must stay finite
    const float inverse = 1.f / scale;
    if (asymmetric) zero = static_cast<int32_t>(__builtin_nearbyintf(-range.low * inverse));
    zero = zero > 255 ? 255 : zero;
    const float offset = static_cast<float>(zero);
    const float reach = asymmetric ? 255.f : 127.f;
    quantize_bytes<T>(q, at, out, {inverse, offset, asymmetric ? 0.f : offset - reach,
                                   asymmetric ? reach : offset + reach});
  }
  q.scale[i] = scale;
  if (q.zero_point) q.zero_point[i] = zero;
}

}  // namespace

void quantize_rows(const QuantizeRows& q, int64_t begin, int64_t end) {
  with_float_dtype(q.dtype, [&]<DType T>() {
    for (int64_t i = begin; i < end; i++) quantize_row<T>(q, i);
  });
}

}  // namespace pbm::PBM_TIER
