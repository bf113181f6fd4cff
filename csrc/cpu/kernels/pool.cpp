// Windows of an image, vectors of channels at a time. Where windows share pixels along w, the rows of a window are
// joined first, for each column once, and then the columns: 2·k instead of k² steps for an output of a k×k window.
#include "cpu/kernels/pool.h"

#include "common/scratch.h"
#include "cpu/kernels/convert.h"
#include "cpu/kernels/impl.h"
#include "cpu/kernels/pool_keys.h"

namespace pbm::PBM_TIER {
namespace {

// Both kinds: how a vector is read from the image, joined with another, kept between the two steps, and written.
template <DType T>
struct Greatest {
  using Values = IVec;
  static constexpr int64_t kSize = size_of(T), kKept = kSize, kLanes = 64 / kSize;
  PBM_INLINE IVec none() { return Keys<T>::least(); }
  PBM_INLINE IVec join(IVec a, IVec b) { return Keys<T>::greater(a, b); }
  PBM_INLINE IVec read(const char* p, int64_t n) { return Keys<T>::of(load_bytes(p, n * kSize)); }
  PBM_INLINE IVec read_kept(const char* p, int64_t n) { return load_bytes(p, n * kSize); }
  PBM_INLINE void keep(char* p, IVec a, int64_t n) { store_bytes(p, a, n * kSize); }
  PBM_INLINE void write(char* p, IVec a, int64_t n, float) { store_bytes(p, Keys<T>::value(a), n * kSize); }
};

template <DType T>
struct Average {
  using Values = Vec;
  static constexpr int64_t kSize = size_of(T), kKept = 4, kLanes = kWidth;
  PBM_INLINE Vec none() { return zero(); }
  PBM_INLINE Vec join(Vec a, Vec b) { return add(a, b); }
  PBM_INLINE Vec read(const char* p, int64_t n) { return load16_n<T>(p, 0, static_cast<int>(n)); }
  PBM_INLINE Vec read_kept(const char* p, int64_t n) { return load16_n<DType::f32>(p, 0, static_cast<int>(n)); }
  PBM_INLINE void keep(char* p, Vec a, int64_t n) { store16_n<DType::f32>(p, 0, a, static_cast<int>(n)); }
  PBM_INLINE void write(char* p, Vec a, int64_t n, float divisor) {
    store16_n<T>(p, 0, div(a, set1(divisor)), static_cast<int>(n));
  }
};

enum class Place { image, kept };

// What is joined: rows × columns, bytes apart.
struct Taps {
  const char* first;
  int64_t rows, next_row, columns, next_column;
};

// V vectors of n values each. Sums go along the rows first: their chains are as long as a side of the window.
template <class Op, Place From, Place To, int V>
PBM_INLINE void join_block(const Taps& t, const char* x, char* out, int64_t n, float divisor) {
  constexpr int64_t kFrom = From == Place::image ? Op::kSize : Op::kKept;
  constexpr int64_t kTo = To == Place::image ? Op::kSize : Op::kKept;
  typename Op::Values all[V];
  PBM_UNROLL for (int i = 0; i < V; i++) all[i] = Op::none();
  for (int64_t r = 0; r < t.rows; r++, x += t.next_row) {
    typename Op::Values row[V];
    PBM_UNROLL for (int i = 0; i < V; i++) row[i] = Op::none();
    const char* p = x;
    for (int64_t q = 0; q < t.columns; q++, p += t.next_column)
      PBM_UNROLL for (int i = 0; i < V; i++) {
        const char* at = p + i * Op::kLanes * kFrom;
        row[i] = Op::join(row[i], From == Place::image ? Op::read(at, n) : Op::read_kept(at, n));
      }
    PBM_UNROLL for (int i = 0; i < V; i++) all[i] = Op::join(all[i], row[i]);
  }
  PBM_UNROLL for (int i = 0; i < V; i++) {
    char* at = out + i * Op::kLanes * kTo;
    To == Place::image ? Op::write(at, all[i], n, divisor) : Op::keep(at, all[i], n);
  }
}

// `count` values that lie side by side.
template <class Op, Place From, Place To>
void join(const Taps& t, char* out, int64_t count, float divisor) {
  constexpr int64_t kFrom = From == Place::image ? Op::kSize : Op::kKept;
  constexpr int64_t kTo = To == Place::image ? Op::kSize : Op::kKept;
  constexpr int kVectors = 4;
  int64_t i = 0;
  for (; i + kVectors * Op::kLanes <= count; i += kVectors * Op::kLanes)
    join_block<Op, From, To, kVectors>(t, t.first + i * kFrom, out + i * kTo, Op::kLanes, divisor);
  for (; i + Op::kLanes <= count; i += Op::kLanes)
    join_block<Op, From, To, 1>(t, t.first + i * kFrom, out + i * kTo, Op::kLanes, divisor);
  if (i < count) join_block<Op, From, To, 1>(t, t.first + i * kFrom, out + i * kTo, count - i, divisor);
}

float divisor_of(const Pool& p, const PoolSpan& row, const PoolSpan& column) {
  if (p.divisor != 0) return p.divisor;
  return static_cast<float>(row.divisor) * static_cast<float>(column.divisor);
}

// Some channels of one row of outputs.
template <class Op>
struct Row {
  const Pool& p;
  const PoolSpan& span;
  const char* x;  // the first row of the window
  char* out;
  int64_t channels;

  // The rows of columns from `column` on.
  Taps taps(int64_t column) const {
    const int64_t next_row = p.step[0] * p.x_row * Op::kSize;
    return {x + column * p.x_pixel * Op::kSize, span.count, next_row, 1, 0};
  }

  void apart() const {
    for (int64_t w = 0; w < p.out_size[1]; w++) {
      const PoolSpan& column = p.columns[w];
      Taps t = taps(column.begin);
      t.columns = column.count;
      t.next_column = p.step[1] * p.x_pixel * Op::kSize;
      char* y = out + w * p.channels * Op::kSize;
      join<Op, Place::image, Place::image>(t, y, channels, divisor_of(p, span, column));
    }
  }

  // Runs of outputs whose columns stay in L1.
  void shared() const {
    constexpr int64_t kKeptBytes = 16384;
    const int64_t pixel = channels * Op::kKept, most = max64(kKeptBytes / pixel, 1);
    for (int64_t begin = 0, end; begin < p.out_size[1]; begin = end) {
      int64_t low = INT64_MAX, high = 0;
      for (end = begin; end < p.out_size[1]; end++) {
        const PoolSpan& c = p.columns[end];
        if (c.count == 0) continue;
        const int64_t least = min64(low, c.begin), past = max64(high, c.begin + (c.count - 1) * p.step[1] + 1);
        if (end > begin && past - least > most) break;
        low = least;
        high = past;
      }
      if (low > high) low = high;  // windows without a pixel
      char* kept = static_cast<char*>(scratch(ScratchSlot::a_rows, static_cast<size_t>((high - low) * pixel)));
      keep_columns(low, high, kept);
      for (int64_t w = begin; w < end; w++) {
        const PoolSpan& c = p.columns[w];
        const Taps t = {kept + (c.begin - low) * pixel, 1, 0, c.count, p.step[1] * pixel};
        char* y = out + w * p.channels * Op::kSize;
        join<Op, Place::kept, Place::image>(t, y, channels, divisor_of(p, span, c));
      }
    }
  }

  void keep_columns(int64_t low, int64_t high, char* kept) const {
    const bool touching = p.x_pixel == channels;  // a row of pixels is one run
    const int64_t each = touching ? high - low : 1;
    for (int64_t w = low; w < high; w += each)
      join<Op, Place::image, Place::kept>(taps(w), kept + (w - low) * channels * Op::kKept, each * channels, 0);
  }
};

template <class Op>
void pool_rows(const Pool& p, Range rows, Range channels) {
  // So that a few dozen columns of shared windows stay in L1.
  const int64_t most = p.shared ? 512 / Op::kKept : p.channels;
  for (int64_t row = rows.begin; row < rows.end; row++) {
    const PoolSpan& span = p.rows[row % p.out_size[0]];
    const int64_t from = row / p.out_size[0] * p.x_batch + span.begin * p.x_row;
    for (int64_t c = channels.begin; c < channels.end; c += most) {
      const char* x = static_cast<const char*>(p.x) + (from + c) * Op::kSize;
      char* out = static_cast<char*>(p.out) + (row * p.out_size[1] * p.channels + c) * Op::kSize;
      const Row<Op> part{p, span, x, out, min64(most, channels.end - c)};
      p.shared ? part.shared() : part.apart();
    }
  }
}

}  // namespace

void pool(const Pool& p, Range rows, Range channels) {
  note_kernel("pool." PBM_TIER_NAME);
  if (p.dtype == DType::u8) return pool_rows<Greatest<DType::u8>>(p, rows, channels);
  with_float_dtype(p.dtype, [&]<DType T>() {
    p.average ? pool_rows<Average<T>>(p, rows, channels) : pool_rows<Greatest<T>>(p, rows, channels);
  });
}

}  // namespace pbm::PBM_TIER
