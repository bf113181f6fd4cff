// Where attention's rows lie, and products of blocks of them.
#pragma once

#include "cpu/kernels/attention.h"
#include "cpu/kernels/impl.h"
#include "cpu/kernels/vec.h"

namespace pbm::PBM_TIER {

PBM_INLINE int64_t round_up(int64_t a, int64_t unit) { return ceil_div(a, unit) * unit; }

// A row of `k` elements in the flavour's dtype, in whole cache lines.
PBM_INLINE int64_t row_bytes(int64_t k, Flavour f) { return round_up(panel_groups(k, f) * 4, 64); }

PBM_INLINE const char* row_of(const AttentionOperand& x, int64_t b, int64_t head, int64_t i) {
  return static_cast<const char*>(x.data) + (b * x.batch + head * x.head + i * x.row) * size_of(x.dtype);
}
// Packed sequences lie in one batch, behind each other.
PBM_INLINE const char* query_row(const Attention& a, const AttentionOperand& x, int64_t b, int64_t head, int64_t i) {
  return a.query_start ? row_of(x, b / a.batch, head, a.query_start[b % a.batch] + i) : row_of(x, b, head, i);
}
PBM_INLINE const char* key_row(const Attention& a, const AttentionOperand& x, int64_t b, int64_t head, int64_t j) {
  return a.key_start ? row_of(x, 0, head, a.key_start[b] + j) : row_of(x, b, head, j);
}
PBM_INLINE int64_t row_index(const Attention& a, int64_t b, int64_t head, int64_t i) {
  return a.query_start ? head * a.row_head + a.query_start[b] + i : b * a.row_batch + head * a.row_head + i;
}

// Rows far apart are more streams than the hardware's prefetchers follow.
template <int Level>
PBM_INLINE void fetch_rows(const char* rows, int64_t count, int64_t stride, int64_t bytes) {
  for (int64_t r = 0; r < count; r++)
    for (int64_t x = 0; x < bytes; x += 64) __builtin_prefetch(rows + r * stride + x, 0, Level);
}

// Hands out aligned pieces of one allocation whose size is known in the end.
struct Carver {
  int64_t bytes = 0;
  int64_t take(int64_t size) {
    const int64_t begin = bytes;
    bytes += round_up(size, 64);
    return begin;
  }
};

// The register tile for products of a few rows: what is wide for its height reads A least often.
constexpr int kStrip = kTile.wide_panels == 4 ? kTile.wide_rows : kTile.max_rows;
constexpr int kStripPanels = kTile.wide_panels == 4 ? kTile.wide_panels : kTile.panels;

struct BlockA {
  const char* data;
  int64_t stride;  // bytes
  int64_t rows, k;
};
struct BlockB {
  const char* data;
  int64_t panel;  // bytes from one to the next
  int64_t panels;
};
struct BlockC {
  float* data;
  int64_t stride;  // elements
  bool accumulate;
};

// C (+)= A·B; a few panels of B at a time meet all rows of A.
PBM_INLINE void block_product(Flavour flavour, const BlockA& a, const BlockB& b, const BlockC& c) {
  Brgemm p;
  p.lda = a.stride;
  p.a_offset = p.b_offset = nullptr;
  p.b_panel = b.panel;
  p.batch = 1;
  p.k = a.k;
  p.ldc = c.stride;
  p.accumulate = c.accumulate;
  const int64_t strips = ceil_div(a.rows, kStrip);
  for (int64_t j = 0; j < b.panels; j += kStripPanels) {
    const int panels = static_cast<int>(min64(kStripPanels, b.panels - j));
    p.b = p.soon = b.data + j * b.panel;
    for (int64_t s = 0, r = 0; s < strips; s++) {
      const int rows = static_cast<int>(ceil_div(a.rows - r, strips - s));
      p.a = a.data + r * a.stride;
      p.c = c.data + r * c.stride + j * kPanel;
      brgemm(p, flavour, rows, panels);
      r += rows;
    }
  }
}

}  // namespace pbm::PBM_TIER
