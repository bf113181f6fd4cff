// Tile of int8_linear. Pure: a problem in, a tile out.
#pragma once

#include <cstdint>

#include "cuda/kernels/packed_int8_layout.h"

namespace pbm::cuda {

// A block of warps_m × warps_n warps computes rows × columns outputs; one warp has row_tiles × panels of 16×16.
template <int kWarpsM_, int kWarpsN_, int kRowTiles_, int kPanels_, int kStages_>
struct Int8LinearTile {
  static constexpr int kWarpsM = kWarpsM_, kWarpsN = kWarpsN_;
  static constexpr int kRowTiles = kRowTiles_, kPanels = kPanels_;
  static constexpr int kStages = kStages_;            // k-tiles in shared memory at once
  static constexpr int kTiles = kRowTiles * kPanels;  // of one warp
  static constexpr int kThreads = 32 * kWarpsM * kWarpsN;
  static constexpr int kMinBlocks = 512 / kThreads;  // per multiprocessor: leaves a thread 128 registers
  static constexpr int kRows = kWarpsM * kRowTiles * kMmaRows;
  static constexpr int kBlockPanels = kWarpsN * kPanels;
  static constexpr int kColumns = kBlockPanels * kPanel;
};

// Stages fill the 48 KiB of static shared memory without halving the blocks per multiprocessor of the largest tile.
using Int8LinearTileLarge = Int8LinearTile<2, 4, 4, 2, 2>;   // 128 × 128
using Int8LinearTileMedium = Int8LinearTile<2, 2, 2, 2, 4>;  // 64 × 64
using Int8LinearTileSmall = Int8LinearTile<1, 4, 1, 1, 8>;   // 16 × 64

enum class Int8LinearTileName { small, medium, large };

struct Int8LinearProblem {
  int64_t rows, columns;
  int multiprocessors;
};

template <typename Tile>
constexpr int64_t int8_linear_blocks(int64_t rows, int64_t columns) {
  return ceil_div(rows, Tile::kRows) * ceil_div(columns, Tile::kColumns);
}

constexpr Int8LinearTileName choose_int8_linear(const Int8LinearProblem& p) {
  // One row of mma tiles holds them all: the weight is read once and nothing is computed for absent rows.
  if (p.rows <= Int8LinearTileSmall::kRows) return Int8LinearTileName::small;
  // The large tile reads each operand half as often, if it leaves no multiprocessor idle.
  if (int8_linear_blocks<Int8LinearTileLarge>(p.rows, p.columns) >= p.multiprocessors) {
    return Int8LinearTileName::large;
  }
  return Int8LinearTileName::medium;
}

}  // namespace pbm::cuda
