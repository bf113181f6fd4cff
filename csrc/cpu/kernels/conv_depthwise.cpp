// One filter a channel: sixteen channels at a time, a strip of output pixels in registers. Pixels are read where they are;
// strips at an edge of the image, or of fewer channels, read zeros for what does not exist.
#include "common/scratch.h"
#include "cpu/kernels/conv_finish.h"

namespace pbm::PBM_TIER {
namespace {

constexpr int kStrip = 8;

// Sixteen channels of one row of outputs.
struct Row {
  const void* const* rows;  // of the input, pixel 0; those that the kernel sees
  const int64_t* taps_of;   // where each has its taps in weight: [tap][16]
  const float* weight;
  int64_t first;  // channel
  int64_t row_count;
  int64_t width, pixel;                 // of the input: pixels, elements from one to the next
  int64_t taps, stride, dilation, pad;  // along w
  int channels;                         // that exist
  const Finish* finish;
  FinishAt at;  // output 0
};

// The sixteen channels from element i of a row on. Careful: those lanes, the others zero.
template <DType T, bool Careful>
PBM_INLINE Vec channels_at(const void* row, int64_t i, Lanes lanes) {
  if constexpr (Careful) return load16_lanes<T>(row, i, lanes);
  return load16<T>(row, i);
}

// What exists of pixel w.
PBM_INLINE Lanes lanes_at(const Row& p, int64_t w) { return first_lanes(w < 0 || w >= p.width ? 0 : p.channels); }

// Into a register: gcc would read it again for each use.
PBM_INLINE Vec once(Vec v) {
#if PBM_TIER_LEVEL >= 2
  asm("" : "+v"(v.v));
#endif
  return v;
}

template <int S>
PBM_INLINE void finish_strip(const Row& p, int64_t w, Vec (&acc)[S][1]) {
  FinishAt at = p.at;
  at.move(*p.finish, w, 0, 0);
  finish_tile<S, 1>(*p.finish, at, acc, nullptr, 0);
}

// Of kernels of any kind.
struct AnyKernel {
  template <DType T, bool Careful, int S>
  static void strips(const Row& p, int64_t w, int64_t count) {
    for (; count > 0; count--, w += S) {
      Vec acc[S][1];
    PBM_UNROLL for (int s = 0; s < S; s++) acc[s][0] = zero();
      for (int64_t r = 0; r < p.row_count; r++)
        for (int64_t q = 0; q < p.taps; q++) {
          const Vec weight = load(p.weight + p.taps_of[r] + q * kWidth);
          int64_t at = w * p.stride - p.pad + q * p.dilation;
          PBM_UNROLL for (int s = 0; s < S; s++, at += p.stride) {
            const Lanes lanes = Careful ? lanes_at(p, at) : Lanes{};
            acc[s][0] = fmadd(channels_at<T, Careful>(p.rows[r], at * p.pixel + p.first, lanes), weight, acc[s][0]);
          }
        }
      finish_strip<S>(p, w, acc);
    }
  }
};

// Of K taps without dilation: each pixel is read once for all outputs that see it.
template <int K, int Stride>
struct Kernel {
  template <DType T, bool Careful, int S>
  static void strips(const Row& p, int64_t w, int64_t count) {
    const int64_t pixel = p.pixel;
    for (; count > 0; count--, w += S) {
      Vec acc[S][1];
      PBM_UNROLL for (int s = 0; s < S; s++) acc[s][0] = zero();
      const int64_t first = w * Stride - p.pad;
      constexpr int kPixels = (S - 1) * Stride + K;
      Lanes lanes[kPixels] = {};
      if constexpr (Careful) PBM_UNROLL for (int i = 0; i < kPixels; i++) lanes[i] = lanes_at(p, first + i);
      for (int64_t r = 0; r < p.row_count; r++) {
        Vec weight[K];
        PBM_UNROLL for (int q = 0; q < K; q++) weight[q] = load(p.weight + p.taps_of[r] + q * kWidth);
        // All pixels first, then tap by tap: the next sum into the same register is S away.
        Vec v[kPixels];
        int64_t at = first * pixel + p.first;
        PBM_UNROLL for (int i = 0; i < kPixels; i++, at += pixel)
          v[i] = once(channels_at<T, Careful>(p.rows[r], at, lanes[i]));
        PBM_UNROLL for (int q = 0; q < K; q++) PBM_UNROLL for (int s = 0; s < S; s++)
          acc[s][0] = fmadd(v[s * Stride + q], weight[q], acc[s][0]);
      }
      finish_strip<S>(p, w, acc);
    }
  }
};

using StripsFn = void (*)(const Row&, int64_t w, int64_t count);
struct Strips {
  StripsFn careful[kStrip];     // of one to eight outputs
  StripsFn inner[kStrip];       // null: rows that have inner strips have long ones
};
template <class K, DType T>
constexpr Strips kStrips = {
    {K::template strips<T, true, 1>, K::template strips<T, true, 2>, K::template strips<T, true, 3>,
     K::template strips<T, true, 4>, K::template strips<T, true, 5>, K::template strips<T, true, 6>,
     K::template strips<T, true, 7>, K::template strips<T, true, 8>},
    {nullptr, nullptr, nullptr, nullptr, nullptr, K::template strips<T, false, 6>, K::template strips<T, false, 7>,
     K::template strips<T, false, 8>}};

// For this kernel.
template <DType T>
const Strips& strips_of([[maybe_unused]] const Depthwise& p) {
#if PBM_TIER_LEVEL > 0
  if constexpr (T != DType::f16) {
    const int64_t k = p.kernel[2], stride = p.stride[2];
    if (p.dilation[2] == 1 && stride == 1) {
      if (k == 3) return kStrips<Kernel<3, 1>, T>;
      if (k == 5) return kStrips<Kernel<5, 1>, T>;
      if (k == 7) return kStrips<Kernel<7, 1>, T>;
    }
    if (p.dilation[2] == 1 && stride == 2) {
      if (k == 3) return kStrips<Kernel<3, 2>, T>;
      if (k == 5) return kStrips<Kernel<5, 2>, T>;
    }
  }
#endif
  return kStrips<AnyKernel, T>;
}

const Strips& strips_for(const Depthwise& p) {
  return *with_float_dtype(p.dtype, [&]<DType T>() { return &strips_of<T>(p); });
}

// How a row of outputs is cut: strips of equal length, but that the last few are shorter by one.
class Cut {
 public:
  // Inner strips may see no pixel beside the image, and no channel beyond the last.
  Cut(const Strips& strips, const Depthwise& p, bool all_channels) {
    const int64_t width = p.conv.out[2];
    if (width <= 0) return;
    const int64_t count = ceil_div(width, kStrip), length = ceil_div(width, count);
    const int64_t shorter = count * length - width, longer = count - shorter;
    // Inner outputs.
    const int64_t room = p.conv.x.size[2] + p.pad[2] - (p.kernel[2] - 1) * p.dilation[2], stride = p.stride[2];
    const bool some = all_channels && room > 0;
    const Range inner = {ceil_div(max64(p.pad[2], 0), stride), some ? min64(width, ceil_div(room, stride)) : 0};
    add(strips, 0, length, longer, inner);
    if (shorter > 0) add(strips, longer * length, length - 1, shorter, inner);
  }

  void run(const Row& p) const {
    for (int i = 0; i < pieces_; i++) piece_[i].run(p, piece_[i].w, piece_[i].count);
  }

 private:
  void add(StripsFn run, int64_t w, int64_t count) {
    if (count > 0) piece_[pieces_++] = {run, w, count};
  }
  // `count` strips of `length` outputs from w on.
  void add(const Strips& strips, int64_t w, int64_t length, int64_t count, Range inner) {
    const StripsFn careful = strips.careful[length - 1], plain = strips.inner[length - 1];
    const int64_t before = plain ? min64(count, ceil_div(max64(inner.begin - w, 0), length)) : count;
    const int64_t first = w + before * length;
    const int64_t plainly = plain ? min64(count - before, max64(inner.end - first, 0) / length) : 0;
    add(careful, w, before);
    add(plain, first, plainly);
    add(careful, first + plainly * length, count - before - plainly);
  }

  struct Piece {
    StripsFn run;
    int64_t w, count;
  };
  Piece piece_[6];
  int pieces_ = 0;
};

// Rows of the input that the kernel sees of one output, and where their taps are.
class Seen {
 public:
  Seen(const Depthwise& p, void* room)
      : p_(p), rows_(static_cast<const void**>(room)), taps_(reinterpret_cast<int64_t*>(rows_ + p.kernel[0] * p.kernel[1])) {}
  static size_t bytes(const Depthwise& p) { return static_cast<size_t>(16 * p.kernel[0] * p.kernel[1]); }

  void find(int64_t n, int64_t d, int64_t h, Row* out) {
    const ConvImage& x = p_.conv.x;
    const int64_t size = size_of(p_.dtype);
    int64_t count = 0;
    for (int64_t i = 0; i < p_.kernel[0]; i++) {
      const int64_t at_d = d * p_.stride[0] - p_.pad[0] + i * p_.dilation[0];
      if (at_d < 0 || at_d >= x.size[0]) continue;
      const char* plane = static_cast<const char*>(x.data) + (n * x.batch_stride + at_d * x.stride[0]) * size;
      for (int64_t j = 0; j < p_.kernel[1]; j++) {
        const int64_t at_h = h * p_.stride[1] - p_.pad[1] + j * p_.dilation[1];
        if (at_h < 0 || at_h >= x.size[1]) continue;
        rows_[count] = plane + at_h * x.stride[1] * size;
        taps_[count++] = (i * p_.kernel[1] + j) * p_.kernel[2] * kWidth;
      }
    }
    out->rows = rows_;
    out->taps_of = taps_;
    out->row_count = count;
  }

 private:
  const Depthwise& p_;
  const void** rows_;
  int64_t* taps_;
};

// Blocks of channels whose rows, as many as the kernel is high and one, are in the L1 cache together.
int64_t blocks_at_once(const Depthwise& p) {
  constexpr int64_t kBytes = 32 << 10;
  const int64_t row = p.conv.x.size[2] * kWidth * size_of(p.dtype);
  return max64(kBytes / max64((p.kernel[0] * p.kernel[1] + 1) * row, 1), 1);
}

// Where rows of outputs go: finished in registers, or by way of a row of sums.
class RowOutput {
 public:
  RowOutput(const Depthwise& p, float* later) : p_(p), g_(p.conv.out_rows), later_(later) {
    g_.n = p.conv.groups;
    g_.c_row = p.out_stride[2];
    at_once_ = finish_of(g_, p.conv, &finish_, &first_);
    if (at_once_) return;
    finish_ = {};
    finish_.out_type = Operand::f32;
    finish_.out_row = kWidth;
    finish_.low = -__builtin_inff();
    finish_.high = __builtin_inff();
  }
  const Finish* finish() const { return &finish_; }

  // Row `row` of all outputs, element `at` of the output, from channel c on.
  FinishAt start(int64_t row, int64_t at, int64_t c, int channels) const {
    if (!at_once_) return {reinterpret_cast<char*>(later_), nullptr, nullptr, nullptr, nullptr, kWidth};
    FinishAt here = first_;
    here.out += (at + c) * bytes_of(finish_.out_type);
    here.residual += (row * p_.conv.out[2] * finish_.residual_row + c) * bytes_of(finish_.residual_type);
    if (here.bias) here.bias += c;
    here.columns = channels;
    return here;
  }
  void end(int64_t row, int64_t at, int64_t c, int channels) {
    if (at_once_) return;
    const int64_t size = size_of(g_.c_dtype), width = p_.conv.out[2];
    g_.c = static_cast<char*>(p_.conv.out_rows.c) + at * size;
    if (g_.residual)
      g_.residual = static_cast<const char*>(p_.conv.out_rows.residual) + row * width * g_.residual_row * size;
    EpilogueTile e{};
    e.acc = later_;
    e.ld_acc = kWidth;
    e.rows = static_cast<int>(width);
    e.col = c;
    e.columns = channels;
    epilogue(g_, e);
  }

 private:
  const Depthwise& p_;
  Gemm g_;
  float* later_;
  Finish finish_{};
  FinishAt first_{};
  bool at_once_;
};

}  // namespace

// Output rows (batch, d, h) × blocks of sixteen channels.
void conv_depthwise(const Depthwise& p, Range rows, Range blocks) {
  note_kernel("conv_depthwise." PBM_TIER_NAME);
  const Conv& conv = p.conv;
  const size_t sums = static_cast<size_t>(conv.out[2] * kWidth) * sizeof(float);
  char* room = static_cast<char*>(scratch(ScratchSlot::accumulators, sums + Seen::bytes(p)));
  RowOutput output(p, reinterpret_cast<float*>(room));
  Seen seen(p, room + sums);
  const Strips& strips = strips_for(p);
  const Cut of_all(strips, p, true), of_some(strips, p, false);
  Row r{};
  r.width = conv.x.size[2];
  r.pixel = conv.x.stride[2];
  r.taps = p.kernel[2];
  r.stride = p.stride[2];
  r.dilation = p.dilation[2];
  r.pad = p.pad[2];
  r.finish = output.finish();
  const int64_t at_once = blocks_at_once(p);
  for (int64_t first = blocks.begin; first < blocks.end; first += at_once)
    for (int64_t row = rows.begin; row < rows.end; row++) {
      const int64_t h = row % conv.out[1], d = row / conv.out[1] % conv.out[0], n = row / (conv.out[1] * conv.out[0]);
      const int64_t at = n * p.out_batch + d * p.out_stride[0] + h * p.out_stride[1];
      seen.find(n, d, h, &r);
      for (int64_t block = first; block < min64(first + at_once, blocks.end); block++) {
        const int64_t c = r.first = block * kWidth;
        r.weight = static_cast<const float*>(conv.weight) + c * conv.taps;
        r.channels = static_cast<int>(min64(kWidth, conv.groups - c));
        r.at = output.start(row, at, c, r.channels);
        (r.channels == kWidth ? of_all : of_some).run(r);
        output.end(row, at, c, r.channels);
      }
    }
  if (output.finish()->streams) streams_end();
}

}  // namespace pbm::PBM_TIER
