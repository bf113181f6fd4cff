// The packed int8 weight, the same on every device, and how a warp's mma fragments map onto it. Index arithmetic only:
// the kernels and the tests share it.
//
// A weight (N, K) is cut into panels of 16 columns of Wᵀ. A panel is ceil(K/4) groups of 64 bytes, 4 consecutive k of
// each of its 16 columns (zeros beyond K and N), and a last group with the int32 column sums. 4 consecutive k of a column
// are one B register of mma.m16n8k32.
#pragma once

#include <cstdint>

#include "common/types.h"

namespace pbm::cuda {

constexpr int kGroupDepth = k_per_lane(Flavour::u8s8);  // k values of one column in a group

constexpr int64_t int8_panel_bytes(int64_t groups) { return (groups + 1) * kGroupBytes; }

// The byte of weight (column, k).
constexpr int64_t int8_weight_offset(int64_t groups, int64_t column, int64_t k) {
  return column / kPanel * int8_panel_bytes(groups) + k / kGroupDepth * kGroupBytes + column % kPanel * kGroupDepth +
         k % kGroupDepth;
}
// The first byte of the int32 sum of a column.
constexpr int64_t int8_column_sum_offset(int64_t groups, int64_t column) {
  return int8_weight_offset(groups, column, groups * kGroupDepth);
}

// --- one mma.m16n8k32, lane = 4·g + t ---------------------------------------------------------------------------------
constexpr int kMmaRows = 16;
constexpr int kMmaDepth = 32;
constexpr int kMmasPerPanel = 2;  // 8 columns each

// ldmatrix.x4 fills A's registers in order when matrix q is rows 8·(q % 2)… and bytes 16·(q / 2)… of the 16×32 tile.
constexpr int a_tile_row(int lane) { return lane % 8 + lane / 8 % 2 * 8; }
constexpr int a_tile_byte(int lane) { return lane / 16 * 16; }

// Which column of B stands where in an mma is free as long as the accumulators are read the same way. Column g of mma j
// is column 2g + j of the panel: a lane then reads both mmas' B registers as 8 consecutive bytes, and its accumulators
// of one row are 4 consecutive columns.
constexpr int b_group(int lane, int half) { return half * 4 + lane % 4; }
constexpr int b_byte(int lane) { return lane / 4 * 2 * kGroupDepth; }

constexpr int kColumnsPerLane = 4;
constexpr int accumulator_row(int lane, int half) { return half * 8 + lane / 4; }
constexpr int accumulator_first_column(int lane) { return lane % 4 * kColumnsPerLane; }
// Column c of the lane's four, in row half h: mma j and its register.
constexpr int accumulator_mma(int c) { return c % 2; }
constexpr int accumulator_register(int c, int half) { return half * 2 + c / 2; }

// --- shared-memory tiles ----------------------------------------------------------------------------------------------
// B: groups as they come, but the 32-byte halves of every other pair of groups exchanged. Lanes 0–15 read 8 bytes each
// (g = 0…3, t = 0…3), groups t at 64·t: without the exchange t = 0, 2 and t = 1, 3 share their banks.
constexpr int b_shared_byte(int group, int byte) { return group * kGroupBytes + (byte ^ (group / 2 % 2 * 32)); }

// A: 64 bytes of k per row, rows 80 bytes apart: the 8 rows that one ldmatrix phase reads start at 16-byte slots
// 0, 5, 2, 7, 4, 1, 6, 3 of the 128-byte bank line, so none conflict.
constexpr int kTileDepth = 64;
constexpr int kTileGroups = kTileDepth / kGroupDepth;
constexpr int kARowStride = kTileDepth + 16;
constexpr int kBPanelBytes = kTileGroups * kGroupBytes;

}  // namespace pbm::cuda
