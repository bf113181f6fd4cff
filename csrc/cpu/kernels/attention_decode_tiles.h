// Register tiles of attention_decode: scores of keys × rows and outputs of rows × columns, straight from the caches. Each
// element of a cache is loaded once for all rows of a tile.
#pragma once

#include "cpu/kernels/attention_decode_dots.h"

namespace pbm::PBM_TIER {

constexpr int kQueryBytes = 1024;  // of a row of queries: 256 elements
// Vectors of 16 columns of a tile of outputs, as many as its accumulators leave registers for.
constexpr int kTileVecs = PBM_TIER_LEVEL >= 2 ? 4 : 2;

// Rows that are wanted soon: each tile fetches as many of them as it reads, cache line by cache line.
struct Soon {
  const char* at;
  int64_t row;
};

// Scores of R rows of queries (kQueryBytes apart) and kTileScores/R keys, `row` bytes apart. Keys from `keys` on do not
// exist (Clamp): their scores, which are written too, mean nothing.
template <DType T, int R, bool Clamp, bool Fetch>
PBM_INLINE void score_tile(const char* q, const char* k, int64_t row, int64_t keys, Soon soon, int64_t d, float* s,
                           int64_t pitch) {
  using D = KeyDot<T>;
  constexpr int kKeys = kTileScores / R, kStep = kKeys < 4 ? kKeys : 4;
  constexpr int64_t kBytes = D::kChunk * size_of(T);
  const int64_t whole = d / D::kChunk * kBytes;
  const int tail = static_cast<int>(d % D::kChunk);
  typename D::Acc acc[kTileScores];
  PBM_UNROLL for (int i = 0; i < kTileScores; i++) acc[i] = D::none();
  PBM_UNROLL for (int g = 0; g < kKeys; g += kStep) {
    const char* at[kStep];
    PBM_UNROLL for (int j = 0; j < kStep; j++) at[j] = k + (Clamp && g + j >= keys ? keys - 1 : g + j) * row;
    const auto chunk = [&](int64_t bytes, int n, bool fetch) __attribute__((always_inline)) {
      typename D::X x[kStep];
      PBM_UNROLL for (int j = 0; j < kStep; j++) {
        x[j] = n ? D::key_n(at[j] + bytes, n) : D::key(at[j] + bytes);
        if (Fetch && fetch) __builtin_prefetch(soon.at + (g + j) * soon.row + bytes, 0, 3);
      }
      PBM_UNROLL for (int r = 0; r < R; r++) {
        const typename D::X y = D::query(q + r * kQueryBytes + bytes / kBytes * 64);
        PBM_UNROLL for (int j = 0; j < kStep; j++) acc[r * kKeys + g + j] = D::step(acc[r * kKeys + g + j], y, x[j]);
      }
    };
    int64_t bytes = 0;
    for (; bytes + 64 <= whole; bytes += 64) {
      PBM_UNROLL for (int64_t b = 0; b < 64; b += kBytes) chunk(bytes + b, 0, b == 0);
    }
    if (kBytes < 64 && bytes < whole) chunk(bytes, 0, true);
    if (tail) chunk(whole, tail, true);
  }
  put_scores<R>(acc, s, pitch);
}

// out += p·v for R rows and kTileVecs·16 columns (Tail: the first `columns` of them) over `keys` keys.
template <DType T, int R, bool Tail, bool Fetch>
PBM_INLINE void output_tile(const char* p, int64_t p_row, const char* v, int64_t row, int64_t keys, Soon soon, int columns,
                            float* out, int64_t out_stride) {
  using D = ValueDot<T>;
  constexpr int kColumns = 16 * D::kVecs, kBytes = kColumns * static_cast<int>(size_of(T));
  constexpr int kWeightBytes = D::kWeight == DType::f32 ? 4 : 2;
  typename D::Acc acc[R][kTileVecs];
  PBM_UNROLL for (int r = 0; r < R; r++) PBM_UNROLL for (int n = 0; n < kTileVecs; n++)
    acc[r][n] = D::acc(out + r * out_stride + 16 * n);
  const auto step = [&](const char* v0, const char* v1, int64_t j, bool first_only) __attribute__((always_inline)) {
    typename D::X x[kTileVecs];
    PBM_UNROLL for (int n = 0; n < kTileVecs; n += D::kVecs) {
      const int at = n / D::kVecs * kBytes;
      if constexpr (Tail) {
        D::values_n(v0 + at, v1 + at, x + n, columns - 16 * n);
      } else {
        D::values(v0 + at, v1 + at, x + n);
      }
    }
    PBM_UNROLL for (int r = 0; r < R; r++) {
      const typename D::X w = D::weight(p + r * p_row + j * kWeightBytes, first_only);
      PBM_UNROLL for (int n = 0; n < kTileVecs; n++) acc[r][n] = D::step(acc[r][n], w, x[n]);
    }
  };
  int64_t j = 0;
  for (; j + D::kKeys <= keys; j += D::kKeys, v += D::kKeys * row) {
    step(v, v + row, j, false);
    if constexpr (Fetch) {
      PBM_UNROLL for (int i = 0; i < D::kKeys; i++) PBM_UNROLL for (int b = 0; b < kTileVecs / D::kVecs * kBytes; b += 64)
        __builtin_prefetch(soon.at + i * soon.row + b, 0, 3);
      soon.at += D::kKeys * soon.row;
    }
  }
  if (D::kKeys == 2 && j < keys) step(v, v, j, true);
  PBM_UNROLL for (int r = 0; r < R; r++) PBM_UNROLL for (int n = 0; n < kTileVecs; n++)
    D::put(out + r * out_stride + 16 * n, acc[r][n]);
}

}  // namespace pbm::PBM_TIER
