// The building block: C (+)= Σ_i A_i·B_i on packed panels of B. One register tile, three flavours.
//
// A is addressed in lanes along k (one fp32, two bf16, four u8; TileShape has their bytes); row r of A_i starts at
// a + a_offset[i] + r·lda.
// B_i is `panels` panels of 16 columns; panel j starts at b + b_offset[i] + j·b_panel and is read 64 bytes a lane.
// C is a row-major tile of raw accumulators (fp32 or int32), `panels`·16 wide; nothing is masked here.
#pragma once

#include <cstdint>

#include "cpu/kernels/types.h"

namespace pbm {

struct Brgemm {
  const char* a;
  int64_t lda;              // bytes
  const int64_t* a_offset;  // bytes, per batch entry; null: one entry at 0
  const char* b;
  int64_t b_panel;  // bytes from one panel to the next
  const int64_t* b_offset;
  int64_t batch;
  int64_t k;         // elements (not lanes) of one batch entry
  void* c;           // 4-byte elements
  int64_t ldc;       // elements
  bool accumulate;   // C += instead of C =
  const char* soon;  // what the caller reads next: 64 bytes a lane from here on are fetched into L2; b if nothing is
};

// The register tile of a tier: the most rows, the panels for that many rows, the form of A's lanes.
struct TileShape {
  int max_rows;
  int panels;         // at max_rows
  int wide_rows;      // up to this many rows ...
  int wide_panels;    // ... the tile may be this wide
  int u8_lane_bytes;  // 4, or 8: each lane's u8 widened to 16 bits in the order 0, 2, 1, 3 and the last one filled up
};

}  // namespace pbm
