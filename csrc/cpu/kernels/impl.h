// What the kernel files of one tier call in each other.
#pragma once

#include "cpu/kernels/tiers.h"

#define PBM_STRINGIZE_(x) #x
#define PBM_STRINGIZE(x) PBM_STRINGIZE_(x)
#define PBM_TIER_NAME PBM_STRINGIZE(PBM_TIER)

namespace pbm::PBM_TIER {

#if PBM_TIER_LEVEL >= 2
// 24 accumulators. 8×3 is the most even in its loads (docs/design.md); few rows take 4 panels to have enough in flight.
constexpr TileShape kTile = {8, 3, 6, 4, 4};
#else
// 12 ymm accumulators, two for the panel of B, the broadcast. Without VNNI u8 is widened for vpmaddwd: for A in memory,
// once, since in registers it would be 12 of a step's 66 instructions.
constexpr TileShape kTile = {6, 1, 3, 2, PBM_TIER_LEVEL == 1 ? 8 : 4};
#endif
constexpr int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
constexpr int64_t lane_bytes(Flavour f) { return f == Flavour::u8s8 ? kTile.u8_lane_bytes : 4; }

void brgemm(const Brgemm& p, Flavour flavour, int rows, int panels);
void gemm(const Gemm& g, Range m, Range n);
void attention_forward(const Attention& a, const AttentionItem& item);
void attention_backward(const Attention& a, const AttentionGradients& g, const AttentionBackwardItem& item);
void attention_mask_gradient(const Attention& a, const AttentionGradients& g, const AttentionMaskItem& item);
void attention_decode(const AttentionDecode& p, const DecodeItem& item, const DecodeItem* next);
void attention_decode_merge(const AttentionDecode& p, const DecodeItem* items, int64_t count);
void additive_prepare(const AdditiveAttention& a, int64_t b, int64_t block);
void additive_forward(const AdditiveAttention& a, const AdditiveItem& item);
void additive_score_gradients(const AdditiveAttention& a, const AdditiveGradients& g, const AdditiveItem& item);
void additive_hidden_gradients(const AdditiveAttention& a, const AdditiveGradients& g, const AdditivePart& x);
void additive_value_gradients(const AdditiveAttention& a, const AdditiveGradients& g, const AdditivePart& x);
void additive_mask_gradient(const AdditiveAttention& a, const AdditiveGradients& g, const AdditiveItem& item,
                            Range keys);
void additive_few_scores(const AdditiveAttention& a, const AdditiveFew& f, int64_t b, int64_t part);
void additive_few_output(const AdditiveAttention& a, const AdditiveFew& f, int64_t b);
void additive_few_score_gradients(const AdditiveAttention& a, const AdditiveFew& f, int64_t b);
void additive_few_gradients(const AdditiveAttention& a, const AdditiveFew& f, int64_t b, int64_t part);
void additive_few_sums(const AdditiveAttention& a, const AdditiveFew& f, int64_t b);
void conv_direct(const Conv& conv, const ConvGrid& grid, int64_t group, Range rows, Range panels);
void conv_winograd(const Winograd& p, int64_t group, Range tiles, Range panels);
void conv_depthwise(const Depthwise& p, Range rows, Range blocks);
void conv_copy(const ConvCopy& p, int64_t begin, int64_t end);
void conv_weight_sum(const WeightSum& p, Range rows, Range panels);
void winograd_gradient_tiles(const WinogradTiles& p, int64_t group, Range tiles);
void winograd_gradient_output(int m, const float* sums, int64_t next, float* out, int64_t out_next, int64_t count);
void depthwise_weight_sum(const DepthwiseWeightSum& p, Range blocks);
void conv_spread(const ConvSpread& p, int64_t begin, int64_t end);
void conv_planes(const ConvPlanes& p, int64_t image, Range rows);
void conv_planes_gradient(const ConvPlanes& p, const void* dy, Range images, float* sums);
void pool(const Pool& p, Range rows, Range channels);
void pack_winograd(const WinogradPack& p, int64_t begin, int64_t end);
void pack_b(const PackB& p, int64_t begin, int64_t end);
void quantize_rows(const QuantizeRows& q, int64_t begin, int64_t end);
ValueRange value_range(const void* x, DType dtype, int64_t begin, int64_t end);
void quantize_image(const QuantizeImage& p, int64_t begin, int64_t end);
void column_sum(const ColumnSum& s, int64_t begin, int64_t end);

// A row of `bytes` u8 (a multiple of 32) at row + bytes to lanes of 8 bytes from row on.
void widen_lanes(char* row, int64_t bytes);

// Rows [begin, end) of A in the flavour's dtype, lanes zero-padded, row i at out + (i - begin)·row_bytes.
void convert_rows(const Gemm& g, int64_t begin, int64_t end, char* out, int64_t row_bytes);

// Accumulators of rows × (up to 64) columns to C.
struct EpilogueTile {
  const void* acc;
  int64_t ld_acc;
  int rows;                // of C
  int64_t row, col;        // of C, where the tile starts
  int64_t columns;         // that exist
  const float* row_scale;  // of the first row; u8s8 only, as are the next two
  const int32_t* row_zero;
  const int32_t* column_sums;  // of the first column
  int64_t column_sums_panel;   // int32s from one panel's sums to the next
};
void epilogue(const Gemm& g, const EpilogueTile& t);

// The epilogue of one group of a convolution: its columns from 0 on.
inline Gemm group_epilogue(const Conv& conv, int64_t group) {
  Gemm g = conv.out_rows;
  const int64_t column = group * g.n, size = size_of(g.c_dtype);
  g.c = static_cast<char*>(g.c) + column * size;
  const int64_t residual_size = g.residual_scale != 0 ? 1 : size == 1 ? 4 : size;
  if (g.residual) g.residual = static_cast<const char*>(g.residual) + column * residual_size;
  if (g.bias) g.bias = static_cast<const char*>(g.bias) + column * size_of(g.bias_dtype);
  if (g.col_scale) g.col_scale += column;
  return g;
}

}  // namespace pbm::PBM_TIER
