// Images to the bytes that int8 convolutions multiply.
#include "cpu/kernels/convert.h"
#include "cpu/kernels/impl.h"

namespace pbm::PBM_TIER {
namespace {

struct Quantizer {
  Vec inverse, low, high;
  IVec zero;

  explicit Quantizer(const QuantizeImage& p)
      : inverse(set1(p.inverse_scale)),
        low(set1(static_cast<float>(-p.zero_point))),
        high(set1(static_cast<float>(255 - p.zero_point))),
        zero(iset1(p.zero_point)) {}
};

// Sixteen values, one a lane; the bounds come before the conversion, which has none for NaN and what int32 cannot hold.
template <DType T>
PBM_INLINE IVec integers(const Quantizer& q, const void* x, int64_t at, int n) {
  if constexpr (T == DType::u8) {
    alignas(16) uint8_t bytes[16] = {};
    std::memcpy(bytes, static_cast<const uint8_t*>(x) + at, static_cast<size_t>(n));
    return widen_u8(bytes);
  } else {
    return iadd(to_int(vmin(vmax(mul(load16_n<T>(x, at, n), q.inverse), q.low), q.high)), q.zero);
  }
}

// `count` values that lie side by side to as many bytes.
template <DType T>
void quantize_run(const Quantizer& q, const void* x, int64_t at, int64_t count, uint8_t* out) {
  if constexpr (T == DType::u8) {
    std::memcpy(out, static_cast<const uint8_t*>(x) + at, static_cast<size_t>(count));
  } else {
    int64_t i = 0;
    for (; i + 4 * kWidth <= count; i += 4 * kWidth) {
      IVec r[4];
  PBM_UNROLL for (int j = 0; j < 4; j++) r[j] = integers<T>(q, x, at + i + j * kWidth, kWidth);
      saturate_bytes<false>(out + i, r);
    }
    for (; i < count; i += kWidth) {
      const int n = static_cast<int>(min64(kWidth, count - i));
      uint8_t bytes[16];
      narrow_u8(bytes, integers<T>(q, x, at + i, n));
      std::memcpy(out + i, bytes, static_cast<size_t>(n));
    }
  }
}

// Four channels of sixteen pixels, a byte each, as one lane a pixel.
PBM_INLINE void store_lanes(char* out, int64_t pixel, const IVec (&q)[4], int pixels) {
  constexpr int kInts = kTile.u8_lane_bytes / 4;
  alignas(64) int32_t lanes[kInts][16];
  if constexpr (kInts == 1) {
    istore(lanes[0], ior(ior(q[0], shl<8>(q[1])), ior(shl<16>(q[2]), shl<24>(q[3]))));
    if (pixel == 4 && pixels == kWidth) return istore(out, iload(lanes[0]));
  } else {
    istore(lanes[0], ior(q[0], shl<16>(q[2])));
    istore(lanes[1], ior(q[1], shl<16>(q[3])));
  }
  for (int i = 0; i < pixels; i++)
    PBM_UNROLL for (int k = 0; k < kInts; k++) std::memcpy(out + i * pixel + 4 * k, &lanes[k][i], 4);
}

// One row of w, of channels that lie in planes.
template <DType T>
void quantize_planes(const QuantizeImage& p, const Quantizer& q, int64_t from, char* out) {
  const int64_t lanes = panel_groups(p.c, Flavour::u8s8), pixel = p.groups * lanes * kTile.u8_lane_bytes;
  for (int64_t w = 0; w < p.size[2]; w += kWidth) {
    const int n = static_cast<int>(min64(kWidth, p.size[2] - w));
    for (int64_t l = 0; l < p.groups * lanes; l++) {
      const int64_t channel = l / lanes * p.c, first = l % lanes * 4;
      IVec four[4];
      for (int64_t i = 0; i < 4; i++)
        four[i] = first + i < p.c ? integers<T>(q, p.x, from + (channel + first + i) * p.x_channel + w, n) : izero();
      store_lanes(out + w * pixel + l * kTile.u8_lane_bytes, pixel, four, n);
    }
  }
}

// One row of w, of pixels whose channels lie side by side.
template <DType T>
void quantize_pixels(const QuantizeImage& p, const Quantizer& q, int64_t from, char* out) {
  const int64_t lanes = panel_groups(p.c, Flavour::u8s8), bytes = lanes * kTile.u8_lane_bytes;
  const bool whole = kTile.u8_lane_bytes == 4 && p.c % 4 == 0;  // a pixel's bytes are its values
  if (whole && (p.size[2] == 1 || p.x_stride[2] == p.groups * p.c))
    return quantize_run<T>(q, p.x, from, p.size[2] * p.groups * p.c, reinterpret_cast<uint8_t*>(out));
  constexpr int64_t kPiece = 64;
  for (int64_t w = 0; w < p.size[2]; w++)
    for (int64_t g = 0; g < p.groups; g++, out += bytes)
      for (int64_t i = 0; i < p.c; i += kPiece) {
        const int64_t count = min64(kPiece, p.c - i), at = from + w * p.x_stride[2] + g * p.c + i;
        alignas(32) uint8_t narrow[2 * kPiece] = {};  // widened in place: the values come into the second half
        uint8_t* values = kTile.u8_lane_bytes > 4 ? narrow + kPiece : narrow;
        quantize_run<T>(q, p.x, at, count, values);
        if (kTile.u8_lane_bytes > 4) widen_lanes(reinterpret_cast<char*>(narrow), kPiece);
        std::memcpy(out + i / 4 * kTile.u8_lane_bytes, narrow,
                    static_cast<size_t>(ceil_div(count, 4) * kTile.u8_lane_bytes));
      }
}

template <DType T>
void quantize_rows_of(const QuantizeImage& p, int64_t begin, int64_t end) {
  const Quantizer q(p);
  const int64_t pixel = p.groups * panel_groups(p.c, Flavour::u8s8) * kTile.u8_lane_bytes;
  const int64_t row_bytes = (p.before + p.size[2] + p.after) * pixel;
  const auto fill = [&](char* at, int64_t pixels) {
    if (kTile.u8_lane_bytes == 4) {
      std::memset(at, p.zero_point, static_cast<size_t>(pixels * pixel));
    } else {
      const uint16_t zero = static_cast<uint16_t>(p.zero_point);
      for (int64_t i = 0; i < pixels * pixel; i += 2) std::memcpy(at + i, &zero, 2);
    }
  };
  for (int64_t row = begin; row < end; row++) {
    const int64_t h = row % p.size[1], d = row / p.size[1] % p.size[0], n = row / (p.size[1] * p.size[0]);
    const int64_t from = n * p.x_batch + d * p.x_stride[0] + h * p.x_stride[1];
    char* out = p.out + row * row_bytes;
    fill(out, p.before);
    p.x_channel == 1 ? quantize_pixels<T>(p, q, from, out + p.before * pixel)
                     : quantize_planes<T>(p, q, from, out + p.before * pixel);
    fill(out + (p.before + p.size[2]) * pixel, p.after);
  }
}

}  // namespace

void quantize_image(const QuantizeImage& p, int64_t begin, int64_t end) {
  if (p.x_dtype == DType::u8) return quantize_rows_of<DType::u8>(p, begin, end);
  with_float_dtype(p.x_dtype, [&]<DType T>() { quantize_rows_of<T>(p, begin, end); });
}

}  // namespace pbm::PBM_TIER
