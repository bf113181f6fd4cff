// One filter a channel: sixteen channels at a time, a strip of output pixels in registers.
#include "common/scratch.h"
#include "cpu/kernels/convert.h"
#include "cpu/kernels/impl.h"

namespace pbm::PBM_TIER {
namespace {

constexpr int kStrip = 8;

// Where a strip of outputs reads along w, and the rows of the input that its kernel meets.
struct Strip {
  const void* x;             // the input pixel of tap 0 of the first output, in the first row
  int64_t w;                 // its index along w, which may lie outside
  int64_t width;             // of the input
  int64_t stride, dilation;  // pixels from one output, one tap to the next
  int64_t next, tap;         // the same in elements
  const int64_t* rows;       // elements from x to each row that exists
  const int* row_taps;       // the first tap of each of these
  int row_count;
  int taps;             // along w
  const float* weight;  // [tap][16]
  int channels;         // that exist
};

template <DType T, int S, bool Inside>
void run_strip(const Strip& p, float* out) {
  Vec acc[S];
  PBM_UNROLL for (int s = 0; s < S; s++) acc[s] = zero();
  for (int r = 0; r < p.row_count; r++) {
    const float* weight = p.weight + p.row_taps[r] * kWidth;
    for (int q = 0; q < p.taps; q++) {
      const Vec w = load(weight + q * kWidth);
      const int64_t first = p.rows[r] + q * p.tap;
      PBM_UNROLL for (int s = 0; s < S; s++) {
        const int64_t at = first + s * p.next;
        if constexpr (Inside) {
          acc[s] = fmadd(load16<T>(p.x, at), w, acc[s]);
        } else {
          const int64_t column = p.w + q * p.dilation + s * p.stride;
          if (static_cast<uint64_t>(column) < static_cast<uint64_t>(p.width))
            acc[s] = fmadd(load16_n<T>(p.x, at, p.channels), w, acc[s]);
        }
      }
    }
  }
  PBM_UNROLL for (int s = 0; s < S; s++) store(out + s * kWidth, acc[s]);
}

using StripFn = void (*)(const Strip&, float*);

#define PBM_LENGTHS(T, I)                                                                               \
  {run_strip<T, 1, I>, run_strip<T, 2, I>, run_strip<T, 3, I>, run_strip<T, 4, I>, run_strip<T, 5, I>, \
   run_strip<T, 6, I>, run_strip<T, 7, I>, run_strip<T, 8, I>}
#define PBM_STRIPS(T) {PBM_LENGTHS(T, false), PBM_LENGTHS(T, true)}

}  // namespace

// Output rows (batch, d, h) × blocks of sixteen channels.
void conv_depthwise(const Depthwise& p, Range rows, Range blocks) {
  static const StripFn strips[3][2][kStrip] = {PBM_STRIPS(DType::f32), PBM_STRIPS(DType::bf16),
                                               PBM_STRIPS(DType::f16)};
  note_kernel("conv_depthwise." PBM_TIER_NAME);
  const Conv& conv = p.conv;
  const ConvImage& x = conv.x;
  const int64_t channels = conv.groups, width = conv.out[2], size = size_of(p.dtype);
  const auto& of_type = strips[static_cast<int>(p.dtype)];
  // Outputs whose taps along w all lie inside.
  const int64_t reach = (p.kernel[2] - 1) * p.dilation[2];
  const int64_t inside_begin = min64(ceil_div(max64(p.pad[2], 0), p.stride[2]), width);
  const int64_t last = x.size[2] - 1 - reach + p.pad[2];
  const int64_t inside_end = last < 0 ? inside_begin : max64(min64(last / p.stride[2] + 1, width), inside_begin);

  int64_t* row_offsets = static_cast<int64_t*>(scratch(
      ScratchSlot::a_rows, static_cast<size_t>(p.kernel[0] * p.kernel[1]) * (sizeof(int64_t) + sizeof(int))));
  int* row_taps = reinterpret_cast<int*>(row_offsets + p.kernel[0] * p.kernel[1]);
  Gemm g = conv.out_rows;
  g.n = channels;
  g.c_row = p.out_stride[2];
  const int64_t out_size = size_of(g.c_dtype);
  alignas(64) float out[kStrip * kWidth];
  for (int64_t row = rows.begin; row < rows.end; row++) {
    const int64_t h = row % conv.out[1], d = row / conv.out[1] % conv.out[0], n = row / (conv.out[1] * conv.out[0]);
    const int64_t d0 = d * p.stride[0] - p.pad[0], h0 = h * p.stride[1] - p.pad[1];
    g.c = static_cast<char*>(conv.out_rows.c) + (n * p.out_batch + d * p.out_stride[0] + h * p.out_stride[1]) * out_size;
    if (g.residual)
      g.residual = static_cast<const char*>(conv.out_rows.residual) + row * width * g.residual_row * out_size;
    Strip s;
    s.row_count = 0;
    for (int64_t i = 0; i < p.kernel[0]; i++)
      for (int64_t j = 0; j < p.kernel[1]; j++) {
        const int64_t at_d = d0 + i * p.dilation[0], at_h = h0 + j * p.dilation[1];
        if (at_d < 0 || at_d >= x.size[0] || at_h < 0 || at_h >= x.size[1]) continue;
        row_offsets[s.row_count] = at_d * x.stride[0] + at_h * x.stride[1];
        row_taps[s.row_count++] = static_cast<int>((i * p.kernel[1] + j) * p.kernel[2]);
      }
    s.rows = row_offsets;
    s.row_taps = row_taps;
    s.width = x.size[2];
    s.stride = p.stride[2];
    s.dilation = p.dilation[2];
    s.next = p.stride[2] * x.stride[2];
    s.tap = p.dilation[2] * x.stride[2];
    s.taps = static_cast<int>(p.kernel[2]);
    for (int64_t block = blocks.begin; block < blocks.end; block++) {
      const int64_t c = block * kWidth;
      s.channels = static_cast<int>(min64(kWidth, channels - c));
      s.weight = static_cast<const float*>(conv.weight) + c * conv.taps;
      EpilogueTile e{};
      e.acc = out;
      e.ld_acc = kWidth;
      e.col = c;
      e.columns = s.channels;
      for (int64_t w = 0; w < width;) {
        const bool inside = s.channels == kWidth && w >= inside_begin && w < inside_end;
        const int64_t end = w < inside_begin ? inside_begin : w < inside_end ? inside_end : width;
        const int64_t length = min64(end - w, kStrip);
        s.w = w * p.stride[2] - p.pad[2];
        s.x = static_cast<const char*>(x.data) + (n * x.batch_stride + s.w * x.stride[2] + c) * size;
        of_type[inside][length - 1](s, out);
        e.rows = static_cast<int>(length);
        e.row = w;
        epilogue(g, e);
        w += length;
      }
    }
  }
}

}  // namespace pbm::PBM_TIER
