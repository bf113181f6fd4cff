// y = act((Σ q·w − zero_point·Σ w)·w_scale·x_scale + bias) + residual on mma.m16n8k32: k-tiles of 64 through a ring of
// shared-memory stages filled by cp.async, accumulators in registers, the epilogue on them.
#pragma once

#include <cstdint>

#include "cuda/kernels/device.h"
#include "cuda/kernels/element.h"
#include "cuda/kernels/epilogue.h"
#include "cuda/kernels/int8_linear_config.h"
#include "cuda/kernels/packed_int8_layout.h"
#include "cuda/kernels/ptx/cp_async.h"
#include "cuda/kernels/ptx/ldmatrix.h"
#include "cuda/kernels/ptx/mma_int8.h"

namespace pbm::cuda {

template <typename Q>
constexpr bool kUnsigned = static_cast<Q>(-1) > 0;  // u8 q: asymmetric, with zero points

template <typename T>
struct Int8LinearParams {
  const uint8_t* q;      // (rows, depth) int8 or uint8, 16-byte aligned
  int64_t q_stride;      // bytes between rows: a multiple of 16, ≥ depth; the padding is readable, its value is free
  const float* x_scale;  // (rows)
  const int32_t* zero_point;    // (rows); not read for int8 q
  const int8_t* packed_weight;  // 16-byte aligned
  const float* w_scale;         // (columns)
  const void* bias;             // (columns), float if bias_is_float, else T; null: none
  bool bias_is_float;
  const T* residual;  // (rows, columns), contiguous; null: none
  T* output;          // (rows, columns), contiguous
  int64_t rows, columns;
  int64_t groups;  // ceil(depth / 4)
  Activation activation;
  bool vectorized;  // columns % 4 == 0, and residual and output aligned to 4 elements
};

template <typename Tile>
struct Int8LinearShared {
  struct Stage {
    alignas(16) uint8_t a[Tile::kRows * kARowStride];
    alignas(16) int8_t b[Tile::kBlockPanels * kBPanelBytes];
  };
  Stage stages[Tile::kStages];
};

// Starts the copies of k-tile `k_tile`; what lies outside the operands becomes 0. Rolled loops: unrolled, the addresses
// take 20 registers more, and two blocks of the large tile no longer fit on a multiprocessor.
template <typename Tile, typename T>
PBM_DEVICE void load_int8_k_tile(typename Int8LinearShared<Tile>::Stage& stage, const Int8LinearParams<T>& p,
                                 int64_t first_row, int64_t first_panel, int k_tile) {
  constexpr int kChunk = 16;
  constexpr int kRowChunks = kTileDepth / kChunk;
  PBM_NO_UNROLL
  for (int i = thread_index(); i < Tile::kRows * kRowChunks; i += Tile::kThreads) {
    const int tile_row = i / kRowChunks, byte = i % kRowChunks * kChunk;
    const int64_t row = first_row + tile_row;
    const int k = k_tile * kTileDepth + byte;
    const bool valid = row < p.rows && k < p.q_stride;
    const uint8_t* source = p.q + (valid ? row * p.q_stride + k : 0);
    ptx::cp_async_16(stage.a + tile_row * kARowStride + byte, source, valid);
  }
  constexpr int kGroupChunks = kGroupBytes / kChunk;
  constexpr int kPanelChunks = kTileGroups * kGroupChunks;
  PBM_NO_UNROLL
  for (int i = thread_index(); i < Tile::kBlockPanels * kPanelChunks; i += Tile::kThreads) {
    const int tile_panel = i / kPanelChunks, tile_group = i / kGroupChunks % kTileGroups;
    const int byte = i % kGroupChunks * kChunk;
    const int64_t panel = first_panel + tile_panel;
    const int group = k_tile * kTileGroups + tile_group;
    // Past the last group stand the column sums: never operands.
    const bool valid = panel < ceil_div(p.columns, kPanel) && group < p.groups;
    const int64_t offset = panel * int8_panel_bytes(p.groups) + group * kGroupBytes + byte;
    ptx::cp_async_16(stage.b + tile_panel * kBPanelBytes + b_shared_byte(tile_group, byte),
                     p.packed_weight + (valid ? offset : 0), valid);
  }
}

// One lane's part of a 16×16 tile: [mma][register].
struct Int8Accumulators {
  int32_t sums[kMmasPerPanel][4];
};

// accumulators[row tile · panels + panel] += the warp's part of one stage.
template <typename Q, typename Tile>
PBM_DEVICE void multiply_int8_k_tile(const typename Int8LinearShared<Tile>::Stage& stage, int warp_m, int warp_n,
                                     Int8Accumulators (&accumulators)[Tile::kTiles]) {
  const int lane = lane_index();
  PBM_UNROLL
  for (int step = 0; step < kTileDepth / kMmaDepth; step++) {
    uint32_t a[Tile::kRowTiles][4];
    PBM_UNROLL
    for (int tile = 0; tile < Tile::kRowTiles; tile++) {
      const int row = (warp_m * Tile::kRowTiles + tile) * kMmaRows + a_tile_row(lane);
      ptx::ldmatrix_x4(a[tile], stage.a + row * kARowStride + step * kMmaDepth + a_tile_byte(lane));
    }
    PBM_UNROLL
    for (int panel = 0; panel < Tile::kPanels; panel++) {
      const int8_t* base = stage.b + (warp_n * Tile::kPanels + panel) * kBPanelBytes;
      uint32_t b[kMmasPerPanel][2];
      PBM_UNROLL
      for (int half = 0; half < 2; half++) {
        const int group = step * (kMmaDepth / kGroupDepth) + b_group(lane, half);
        const auto words =
            *reinterpret_cast<const Packet<uint32_t, kMmasPerPanel>*>(base + b_shared_byte(group, b_byte(lane)));
        b[0][half] = words.values[0];
        b[1][half] = words.values[1];
      }
      PBM_UNROLL
      for (int tile = 0; tile < Tile::kRowTiles; tile++) {
        PBM_UNROLL
        for (int mma = 0; mma < kMmasPerPanel; mma++) {
          ptx::mma_m16n8k32<Q>(accumulators[tile * Tile::kPanels + panel].sums[mma], a[tile], b[mma]);
        }
      }
    }
  }
}

// What the epilogue needs of a lane's four columns; zeros beyond the last one.
struct Int8ColumnTerms {
  float w_scale[kColumnsPerLane], bias[kColumnsPerLane];
  int32_t sum[kColumnsPerLane];
};

template <typename Q, typename T>
PBM_DEVICE Int8ColumnTerms load_int8_column_terms(const Int8LinearParams<T>& p, int64_t column) {
  Int8ColumnTerms terms = {};
  PBM_UNROLL
  for (int c = 0; c < kColumnsPerLane; c++) {
    if (column + c >= p.columns) break;
    terms.w_scale[c] = p.w_scale[column + c];
    if (p.bias != nullptr) {
      terms.bias[c] = p.bias_is_float ? static_cast<const float*>(p.bias)[column + c]
                                      : to_float(static_cast<const T*>(p.bias)[column + c]);
    }
    if constexpr (kUnsigned<Q>) {
      terms.sum[c] = *reinterpret_cast<const int32_t*>(p.packed_weight + int8_column_sum_offset(p.groups, column + c));
    }
  }
  return terms;
}

// Four neighbouring outputs of one row.
template <typename T>
PBM_DEVICE void finish_int8_outputs(const Int8LinearParams<T>& p, int64_t row, int64_t column,
                                    const int32_t (&sums)[kColumnsPerLane], const Int8ColumnTerms& terms) {
  using Outputs = Packet<T, kColumnsPerLane>;
  const int64_t offset = row * p.columns + column;
  const float x_scale = p.x_scale[row];
  float y[kColumnsPerLane];
  PBM_UNROLL
  for (int c = 0; c < kColumnsPerLane; c++) {
    y[c] = activate(dequantize(sums[c], x_scale, terms.w_scale[c]) + terms.bias[c], p.activation);
  }
  if (p.vectorized) {
    Outputs outputs;
    if (p.residual != nullptr) {
      const Outputs residual = *reinterpret_cast<const Outputs*>(p.residual + offset);
      PBM_UNROLL
      for (int c = 0; c < kColumnsPerLane; c++) y[c] += to_float(residual.values[c]);
    }
    PBM_UNROLL
    for (int c = 0; c < kColumnsPerLane; c++) outputs.values[c] = from_float<T>(y[c]);
    *reinterpret_cast<Outputs*>(p.output + offset) = outputs;
    return;
  }
  PBM_UNROLL
  for (int c = 0; c < kColumnsPerLane; c++) {
    if (column + c >= p.columns) break;
    if (p.residual != nullptr) y[c] += to_float(p.residual[offset + c]);
    p.output[offset + c] = from_float<T>(y[c]);
  }
}

// The outputs of one 16×16 tile whose first one is (first_row, first_column).
template <typename Q, typename T>
PBM_DEVICE void finish_int8_tile(const Int8LinearParams<T>& p, int64_t first_row, int64_t first_column,
                                 const Int8Accumulators& accumulators) {
  const int lane = lane_index();
  const int64_t column = first_column + accumulator_first_column(lane);
  if (column >= p.columns) return;
  const Int8ColumnTerms terms = load_int8_column_terms<Q>(p, column);
  PBM_UNROLL
  for (int half = 0; half < 2; half++) {
    const int64_t row = first_row + accumulator_row(lane, half);
    if (row >= p.rows) return;
    const int32_t zero_point = kUnsigned<Q> ? p.zero_point[row] : 0;
    int32_t sums[kColumnsPerLane];
    PBM_UNROLL
    for (int c = 0; c < kColumnsPerLane; c++) {
      const int32_t sum = accumulators.sums[accumulator_mma(c)][accumulator_register(c, half)];
      sums[c] = remove_zero_point(sum, zero_point, terms.sum[c]);
    }
    finish_int8_outputs(p, row, column, sums, terms);
  }
}

// Q: uint8_t (asymmetric) or int8_t (symmetric). Grid: int8_linear_blocks<Tile>() blocks, rows fastest.
template <typename T, typename Q, typename Tile>
PBM_KERNEL void PBM_LAUNCH_BOUNDS(Tile::kThreads, Tile::kMinBlocks) int8_linear_sm80(const Int8LinearParams<T> p) {
  constexpr int kStages = Tile::kStages;
  auto& shared = shared_storage<Int8LinearShared<Tile>>();
  const int64_t row_blocks = ceil_div(p.rows, Tile::kRows);
  const int64_t first_row = block_index() % row_blocks * Tile::kRows;
  const int64_t first_panel = block_index() / row_blocks * Tile::kBlockPanels;
  const int k_tiles = static_cast<int>(ceil_div(p.groups, kTileGroups));
  const int warp_m = warp_index() / Tile::kWarpsN, warp_n = warp_index() % Tile::kWarpsN;

  Int8Accumulators accumulators[Tile::kTiles] = {};
  PBM_UNROLL
  for (int k_tile = 0; k_tile < kStages - 1; k_tile++) {
    if (k_tile < k_tiles) {
      load_int8_k_tile<Tile>(shared.stages[k_tile], p, first_row, first_panel, k_tile);
    }
    ptx::cp_async_commit();
  }
  for (int k_tile = 0; k_tile < k_tiles; k_tile++) {
    ptx::cp_async_wait<kStages - 2>();
    barrier();  // k_tile has landed for all, and all have finished with the stage that is filled next
    const int ahead = k_tile + kStages - 1;
    if (ahead < k_tiles) {
      load_int8_k_tile<Tile>(shared.stages[ahead % kStages], p, first_row, first_panel, ahead);
    }
    ptx::cp_async_commit();  // also when empty, so that wait counts k-tiles
    multiply_int8_k_tile<Q, Tile>(shared.stages[k_tile % kStages], warp_m, warp_n, accumulators);
  }

  // Tile 0 is finished and the others move down, so that registers have constant indices in a rolled loop: unrolled, the
  // inlined activations are repeated for every tile and the larger kernels spill.
  PBM_NO_UNROLL
  for (int i = 0; i < Tile::kTiles; i++) {
    const int tile = warp_m * Tile::kRowTiles + i / Tile::kPanels;
    const int64_t panel = first_panel + warp_n * Tile::kPanels + i % Tile::kPanels;
    finish_int8_tile<Q>(p, first_row + tile * kMmaRows, panel * kPanel, accumulators[0]);
    PBM_UNROLL
    for (int next = 1; next < Tile::kTiles; next++) accumulators[next - 1] = accumulators[next];
  }
}

}  // namespace pbm::cuda
