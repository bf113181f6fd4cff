// Attention of a few queries over a long cache of keys and values, which is read once and in place: split over its keys,
// merged by the log-sum-exp (Dao et al., "Flash-Decoding", 2023). Pointers, sizes and strides; no torch.
#pragma once

#include <cstdint>

#include "cpu/kernels/attention.h"

namespace pbm {

// Element (b, h, j, d) of an int8 cache is its integer times data[b·batch + h·head + j·row].
struct CacheScales {
  const float* data;
  int64_t batch, head, row;
};

struct AttentionDecode {
  // k and v are caches, of blocks of `keys` slots (batch: from block to block), in q's dtype or s8. Of the rest, flavour,
  // dropout, query_start and key_start are not used. Query i of a sequence of n keys stands at i + n − queries.
  Attention a;
  CacheScales k_scale, v_scale;  // of s8 caches
  // Key j of sequence b is slot j mod keys of block block_table[b·table_row + j/keys]; null: sequence b is block b.
  const int32_t* block_table;
  int64_t table_row;
};

// Keys of one part. A constant: neither threads nor neighbours change how a row is summed. At most 512, so that the int32
// sums of an s8 cache, 512·2¹⁵·2⁷, cannot overflow.
constexpr int64_t kSplitKeys = 512;

// One part of the keys of one (sequence, kv head), for all rows that share them: row r is query r mod queries of query
// head kv_head·group + r / queries.
struct DecodeItem {
  int64_t b, kv_head;
  int64_t length;  // of the sequence
  Range keys;
  float* partial;  // decode_partial_floats() of them: the rows' outputs, maxima and sums
};

constexpr int64_t kDecodeColumns = 64;  // what the outputs' rows are padded to
inline int64_t decode_rows(const Attention& a) { return a.heads / a.kv_heads * a.queries; }
inline int64_t decode_out_stride(const Attention& a) { return ceil_div(a.dv, kDecodeColumns) * kDecodeColumns; }
inline int64_t decode_padded_rows(const Attention& a) { return ceil_div(decode_rows(a), 4) * 4; }
inline int64_t decode_partial_floats(const Attention& a) {
  return ceil_div(decode_padded_rows(a) * (decode_out_stride(a) + 2), 16) * 16;
}

}  // namespace pbm
