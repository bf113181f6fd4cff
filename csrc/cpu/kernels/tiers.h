// The kernels of the active tier.
#pragma once

#include "common/isa.h"
#include "cpu/kernels/additive_attention.h"
#include "cpu/kernels/attention.h"
#include "cpu/kernels/attention_decode.h"
#include "cpu/kernels/brgemm.h"
#include "cpu/kernels/conv.h"
#include "cpu/kernels/gemm.h"
#include "cpu/kernels/pool.h"
#include "cpu/kernels/quantize.h"

namespace pbm {

struct Kernels {
  Isa isa;
  TileShape tile;
  // rows ≤ tile.max_rows, panels ≤ what the tile shape allows for that many rows.
  void (*brgemm)(const Brgemm&, Flavour, int rows, int panels);
  // Rows [m.begin, m.end) and columns [n.begin, n.end) of the product; n.begin is a multiple of 16.
  void (*gemm)(const Gemm&, Range m, Range n);
  // Panels [begin, end).
  void (*pack_b)(const PackB&, int64_t begin, int64_t end);
  void (*quantize_rows)(const QuantizeRows&, int64_t begin, int64_t end);
  ValueRange (*value_range)(const void* x, DType dtype, int64_t begin, int64_t end);
  // Rows (batch, d, h).
  void (*quantize_image)(const QuantizeImage&, int64_t begin, int64_t end);
  // out[j] = Σ_i x[i·row + j], summed in blocks; columns [begin, end).
  void (*column_sum)(const ColumnSum&, int64_t begin, int64_t end);
  void (*attention_forward)(const Attention&, const AttentionItem&);
  void (*attention_backward)(const Attention&, const AttentionGradients&, const AttentionBackwardItem&);
  void (*attention_mask_gradient)(const Attention&, const AttentionGradients&, const AttentionMaskItem&);
  // One part of a cache to item.partial; `next`, where it is not null, is what this thread does after it.
  void (*attention_decode)(const AttentionDecode&, const DecodeItem& item, const DecodeItem* next);
  // All parts of one (sequence, kv head), in their order, to out and lse.
  void (*attention_decode_merge)(const AttentionDecode&, const DecodeItem* items, int64_t count);
  AdditiveKernels additive;
  // Rows of a grid (its pixels, batch by batch) and panels of a group.
  void (*conv_direct)(const Conv&, const ConvGrid&, int64_t group, Range rows, Range panels);
  void (*conv_winograd)(const Winograd&, int64_t group, Range tiles, Range panels);
  // Output rows (batch, d, h) and blocks of sixteen channels.
  void (*conv_depthwise)(const Depthwise&, Range rows, Range blocks);
  // Rows of outputs of an image; the sums of lanes [n][c][tap][16] of the weight gradient, of some images.
  void (*conv_planes)(const ConvPlanes&, int64_t image, Range rows);
  void (*conv_planes_gradient)(const ConvPlanes&, const void* dy, Range images, float* sums);
  // Rows (image, h) of outputs.
  void (*conv_spread)(const ConvSpread&, int64_t begin, int64_t end);
  // Rows of n and panels of c.
  void (*conv_weight_sum)(const WeightSum&, Range rows, Range panels);
  // Tile i of the range comes to place i of the tiles.
  void (*winograd_gradient_tiles)(const WinogradTiles&, int64_t group, Range tiles);
  // Gᵀ M G: (m + 2)² sums, `next` floats apart, to nine, for `count` (a multiple of 16) of each.
  void (*winograd_gradient_output)(int m, const float* sums, int64_t next, float* out, int64_t out_next, int64_t count);
  // Blocks of sixteen channels.
  void (*depthwise_weight_sum)(const DepthwiseWeightSum&, Range blocks);
  // Rows (batch, d, h).
  void (*conv_copy)(const ConvCopy&, int64_t begin, int64_t end);
  // Panels [begin, end) of all groups.
  void (*pack_winograd)(const WinogradPack&, int64_t begin, int64_t end);
  // Rows (batch, h) of outputs and some of their channels.
  void (*pool)(const Pool&, Range rows, Range channels);
};

const Kernels& kernels();  // of active_isa()
const Kernels& kernels_of(Isa isa);

#define PBM_DECLARE_TIER(tier) \
  namespace tier {             \
  extern const Kernels table;  \
  }
PBM_DECLARE_TIER(scalar)
PBM_DECLARE_TIER(avx2)
PBM_DECLARE_TIER(avx512)
PBM_DECLARE_TIER(avx512_bf16)
#undef PBM_DECLARE_TIER

}  // namespace pbm
