// One filter a channel: sixteen channels at a time, a strip of output pixels in registers. Rows of the input come to the
// L1 cache first, in fp32 and with their padding, so that no output is a special case.
#include "common/scratch.h"
#include "cpu/kernels/convert.h"
#include "cpu/kernels/impl.h"

namespace pbm::PBM_TIER {
namespace {

constexpr int kStrip = 8;

// Sixteen channels of one row of outputs; distances in floats.
struct Row {
  const float* const* rows;     // of the input, from tap 0 of output 0 on; those that exist
  const float* const* weights;  // the first tap of each of these: [tap][16]
  int64_t row_count;
  int64_t taps;       // along w
  int64_t next, tap;  // from one output, one tap to the next
  float* out;
  int64_t out_next;
  int channels;  // that are written
  // At once with the sums, where they are all there is to do.
  const float* bias;
  float low, high;
};

// Into a register: gcc would read it again for each use.
PBM_INLINE Vec load_once(const float* p) {
  Vec v = load(p);
#if PBM_TIER_LEVEL >= 2
  asm("" : "+v"(v.v));
#endif
  return v;
}

// Sums of a strip to the output.
template <int S>
PBM_INLINE void finish_strip(const Row& p, int64_t w, const Vec (&acc)[S]) {
  const Vec bias = p.bias ? load_n(p.bias, p.channels) : zero(), low = set1(p.low), high = set1(p.high);
  float* out = p.out + w * p.out_next;
  PBM_UNROLL for (int s = 0; s < S; s++) {
    const Vec y = vmin(high, vmax(low, add(acc[s], bias)));  // NaN stays: the second operand
    p.channels == kWidth ? store(out + s * p.out_next, y) : store_n(out + s * p.out_next, y, p.channels);
  }
}

// `count` strips from output w on, of any kernel.
template <int S>
void run_strips(const Row& p, int64_t w, int64_t count) {
  for (; count > 0; count--, w += S) {
    Vec acc[S];
    PBM_UNROLL for (int s = 0; s < S; s++) acc[s] = zero();
    for (int64_t r = 0; r < p.row_count; r++) {
      const float *x = p.rows[r] + w * p.next, *weight = p.weights[r];
      for (int64_t q = 0; q < p.taps; q++, x += p.tap, weight += kWidth) {
        const Vec v = load(weight);
        PBM_UNROLL for (int s = 0; s < S; s++) acc[s] = fmadd(load(x + s * p.next), v, acc[s]);
      }
    }
    finish_strip<S>(p, w, acc);
  }
}

// The same of a kernel of K taps without dilation: each pixel is read once for all outputs that see it.
template <int K, int Stride, int S>
void run_strips_of(const Row& p, int64_t w, int64_t count) {
  for (; count > 0; count--, w += S) {
    Vec acc[S];
    PBM_UNROLL for (int s = 0; s < S; s++) acc[s] = zero();
    for (int64_t r = 0; r < p.row_count; r++) {
      const float* x = p.rows[r] + w * (Stride * kWidth);
      Vec weight[K];
      PBM_UNROLL for (int q = 0; q < K; q++) weight[q] = load(p.weights[r] + q * kWidth);
      // All pixels first, then tap by tap: the next sum into the same register is S away.
      constexpr int kPixels = (S - 1) * Stride + K;
      Vec v[kPixels];
      PBM_UNROLL for (int i = 0; i < kPixels; i++) v[i] = load_once(x + i * kWidth);
      PBM_UNROLL for (int q = 0; q < K; q++) PBM_UNROLL for (int s = 0; s < S; s++)
        acc[s] = fmadd(v[s * Stride + q], weight[q], acc[s]);
    }
    finish_strip<S>(p, w, acc);
  }
}

using StripsFn = void (*)(const Row&, int64_t w, int64_t count);
constexpr StripsFn kStrips[kStrip] = {run_strips<1>, run_strips<2>, run_strips<3>, run_strips<4>,
                                      run_strips<5>, run_strips<6>, run_strips<7>, run_strips<8>};
template <int K, int Stride>
constexpr StripsFn kStripsOf[kStrip] = {
    run_strips_of<K, Stride, 1>, run_strips_of<K, Stride, 2>, run_strips_of<K, Stride, 3>, run_strips_of<K, Stride, 4>,
    run_strips_of<K, Stride, 5>, run_strips_of<K, Stride, 6>, run_strips_of<K, Stride, 7>, run_strips_of<K, Stride, 8>};

// The strips of one to eight outputs for this kernel.
const StripsFn* strips_for(const Depthwise& p) {
  const int64_t k = p.kernel[2], stride = p.stride[2];
  if (p.dilation[2] != 1 || stride > 2 || (k != 3 && k != 5)) return kStrips;
  if (k == 3) return stride == 1 ? kStripsOf<3, 1> : kStripsOf<3, 2>;
  return stride == 1 ? kStripsOf<5, 1> : kStripsOf<5, 2>;
}

// Strips of equal length, but that the last few are shorter by one.
void run_row(const StripsFn* strips, const Row& p, int64_t width) {
  if (width <= 0) return;
  const int64_t count = ceil_div(width, kStrip), length = ceil_div(width, count);
  const int64_t shorter = count * length - width, longer = count - shorter;
  strips[length - 1](p, 0, longer);
  if (shorter > 0) strips[length - 2](p, longer * length, shorter);
}

// Rows of the input, sixteen channels of them, between zeros; the last few that were asked for.
class Window {
 public:
  explicit Window(const Depthwise& p)
      : p_(p),
        pixels_((p.conv.out[2] - 1) * p.stride[2] + (p.kernel[2] - 1) * p.dilation[2] + 1),
        height_(max64((p.kernel[1] - 1) * p.dilation[1] + 1, 1)),
        slots_(max64(p.kernel[0], 1) * height_) {
    const int64_t floats = max64(pixels_, 1) * kWidth;
    const size_t bytes = static_cast<size_t>(slots_) * (static_cast<size_t>(floats) * sizeof(float) + sizeof(int64_t));
    data_ = static_cast<float*>(scratch(ScratchSlot::a_rows, bytes));
    held_ = reinterpret_cast<int64_t*>(data_ + slots_ * floats);
    std::memset(data_, 0, static_cast<size_t>(slots_ * floats) * sizeof(float));
    // Pixels of a row that are in the window, [first, last).
    first_ = max64(-p.pad[2], 0);
    last_ = min64(p.conv.x.size[2], pixels_ - p.pad[2]);
  }

  // Forget the rows of another block of channels.
  void start(int64_t block) {
    c_ = block * kWidth;
    channels_ = static_cast<int>(min64(kWidth, p_.conv.groups - c_));
    for (int64_t i = 0; i < slots_; i++) held_[i] = -1;
  }

  // Where row h is kept, among height_ of them; h ≥ −pad.
  int64_t place_of(int64_t h) const { return (h + p_.pad[1]) % height_; }
  int64_t place_after(int64_t place, int64_t rows) const {  // at most height_ of them
    place += rows;
    return place < height_ ? place : place - height_;
  }

  const float* row(int64_t image, int64_t tap_d, int64_t d, int64_t h, int64_t place) {
    const ConvImage& x = p_.conv.x;
    const int64_t slot = tap_d * height_ + place, id = (image * x.size[0] + d) * x.size[1] + h;
    float* to = data_ + slot * pixels_ * kWidth;
    if (held_[slot] == id) return to;
    held_[slot] = id;
    const int64_t from = image * x.batch_stride + d * x.stride[0] + h * x.stride[1] + c_;
    with_float_dtype(p_.dtype, [&]<DType T>() {
      float* out = to + (first_ + p_.pad[2]) * kWidth;
      const char* below = static_cast<const char*>(x.data) + (from + x.stride[1]) * size_of(T);
      for (int64_t w = first_; w < last_; w++, out += kWidth) {
        // The row after it: too far apart for the hardware to see.
        __builtin_prefetch(below + w * x.stride[2] * size_of(T), 0, 3);
        store(out, load16_n<T>(x.data, from + w * x.stride[2], channels_));
      }
    });
    return to;
  }

 private:
  const Depthwise& p_;
  const int64_t pixels_, height_, slots_;
  int64_t first_, last_, c_ = 0;
  int channels_ = 0;
  float* data_;
  int64_t* held_;
};

bool is_cut(Activation a) { return a == Activation::none || a == Activation::relu || a == Activation::relu6; }

}  // namespace

// Output rows (batch, d, h) × blocks of sixteen channels.
void conv_depthwise(const Depthwise& p, Range rows, Range blocks) {
  note_kernel("conv_depthwise." PBM_TIER_NAME);
  constexpr float kInfinity = __builtin_inff();
  if (rows.begin >= rows.end) return;
  const Conv& conv = p.conv;
  const int64_t width = conv.out[2], kernel_rows = p.kernel[0] * p.kernel[1];
  Gemm g = conv.out_rows;
  const int64_t out_size = size_of(g.c_dtype);
  const bool at_once = is_cut(g.activation) && g.c_dtype == DType::f32 && !g.residual && (!g.bias || g.bias_dtype == DType::f32);
  g.n = conv.groups;
  g.c_row = p.out_stride[2];
  // An epilogue's: the sums of a row, then the two lists.
  float* later = static_cast<float*>(scratch(
      ScratchSlot::accumulators, static_cast<size_t>(width * kWidth) * sizeof(float) + static_cast<size_t>(2 * kernel_rows) * 8));
  const float** lists = reinterpret_cast<const float**>(later + width * kWidth);

  Row r{};
  r.rows = lists;
  r.weights = lists + kernel_rows;
  r.taps = p.kernel[2];
  r.next = p.stride[2] * kWidth;
  r.tap = p.dilation[2] * kWidth;
  r.low = at_once && g.activation != Activation::none ? 0.f : -kInfinity;
  r.high = at_once && g.activation == Activation::relu6 ? 6.f : kInfinity;
  const StripsFn* strips = strips_for(p);
  Window window(p);
  for (int64_t block = blocks.begin; block < blocks.end; block++) {
    const int64_t c = block * kWidth;
    const float* weight = static_cast<const float*>(conv.weight) + c * conv.taps;
    const int channels = static_cast<int>(min64(kWidth, conv.groups - c));
    window.start(block);
    int64_t h = rows.begin % conv.out[1], d = rows.begin / conv.out[1] % conv.out[0];
    int64_t n = rows.begin / (conv.out[1] * conv.out[0]);
    for (int64_t row = rows.begin; row < rows.end; row++) {
      const int64_t first = h * p.stride[1] - p.pad[1], place = window.place_of(first);
      r.row_count = 0;
      for (int64_t i = 0; i < p.kernel[0]; i++)
        for (int64_t j = 0; j < p.kernel[1]; j++) {
          const int64_t at_d = d * p.stride[0] - p.pad[0] + i * p.dilation[0], at_h = first + j * p.dilation[1];
          if (at_d < 0 || at_d >= conv.x.size[0] || at_h < 0 || at_h >= conv.x.size[1]) continue;
          lists[r.row_count] = window.row(n, i, at_d, at_h, window.place_after(place, j * p.dilation[1]));
          lists[kernel_rows + r.row_count++] = weight + (i * p.kernel[1] + j) * p.kernel[2] * kWidth;
        }
      const int64_t at = n * p.out_batch + d * p.out_stride[0] + h * p.out_stride[1];
      if (++h == conv.out[1]) {
        h = 0;
        if (++d == conv.out[0]) {
          d = 0;
          n++;
        }
      }
      r.out = at_once ? static_cast<float*>(conv.out_rows.c) + at + c : later;
      r.out_next = at_once ? g.c_row : kWidth;
      r.channels = at_once ? channels : kWidth;
      r.bias = at_once && g.bias ? static_cast<const float*>(g.bias) + c : nullptr;
      run_row(strips, r, width);
      if (at_once) continue;
      g.c = static_cast<char*>(conv.out_rows.c) + at * out_size;
      if (g.residual)
        g.residual = static_cast<const char*>(conv.out_rows.residual) + row * width * g.residual_row * out_size;
      EpilogueTile e{};
      e.acc = later;
      e.ld_acc = kWidth;
      e.rows = static_cast<int>(width);
      e.col = c;
      e.columns = channels;
      epilogue(g, e);
    }
  }
}

}  // namespace pbm::PBM_TIER
