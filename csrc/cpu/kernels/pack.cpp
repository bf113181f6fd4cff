// Matrices into what brgemm reads: panels of B, rows of A.
#include "cpu/kernels/convert.h"
#include "cpu/kernels/impl.h"

namespace pbm::PBM_TIER {
namespace {

// Bytes that a column is fetched ahead: sixteen columns are more streams than the hardware's prefetchers follow.
constexpr int64_t kPrefetch = 512;

// `count` consecutive elements from `base[i...]`, at most one register of lanes (16, 32 or 64 by flavour), zero-padded.
template <Flavour F, DType T>
PBM_INLINE IVec lanes_from(const void* base, int64_t i, int64_t count) {
  if constexpr (F == Flavour::f32) {
    return as_int(load16_n<T>(base, i, static_cast<int>(count)));
  } else {
    alignas(64) uint16_t half[32] = {};
    alignas(64) char bytes[64] = {};
    if constexpr (F == Flavour::u8s8) {
      if (count == 64) return iload(static_cast<const char*>(base) + i);
      std::memcpy(bytes, static_cast<const char*>(base) + i, count);
      return iload(bytes);
    } else if constexpr (T == DType::bf16) {
      const uint16_t* p = static_cast<const uint16_t*>(base) + i;
      if (count == 32) return iload(p);
      std::memcpy(half, p, count * 2);
      return iload(half);
    } else {
      store_bf16(half, load16_n<T>(base, i, static_cast<int>(min64(count, 16))));
      if (count > 16) store_bf16(half + 16, load16_n<T>(base, i + 16, static_cast<int>(count - 16)));
      return iload(half);
    }
  }
}

// B's columns are contiguous along k, as a weight (N, K) is: blocks of 16 columns × 16 lanes, transposed.
template <Flavour F, DType T>
void pack_columns(const PackB& p, int64_t j0, char* out) {
  constexpr int64_t kBlock = 16 * k_per_lane(F);
  const int64_t columns = min64(kPanel, p.n - j0);
  for (int64_t k = 0; k < p.k; k += kBlock) {
    const int64_t count = min64(kBlock, p.k - k);
    IVec r[16];
    if (columns == kPanel && count == kBlock) {  // unrolled, so that the block stays in registers
  PBM_UNROLL for (int j = 0; j < 16; j++) {
        const int64_t at = (j0 + j) * p.b_col + k;
        __builtin_prefetch(static_cast<const char*>(p.b) + at * size_of(T) + kPrefetch, 0, 3);
        r[j] = lanes_from<F, T>(p.b, at, kBlock);
      }
      transpose16(r);
      PBM_UNROLL for (int l = 0; l < 16; l++) istore(out + l * kGroupBytes, r[l]);
    } else {
      for (int64_t j = 0; j < 16; j++)
        r[j] = j < columns ? lanes_from<F, T>(p.b, (j0 + j) * p.b_col + k, count) : izero();
      transpose16(r);
      const int64_t groups = ceil_div(count, k_per_lane(F));
      for (int64_t l = 0; l < groups; l++) istore(out + l * kGroupBytes, r[l]);
    }
    out += 16 * kGroupBytes;
  }
}

// The bf16 that x rounds to, one a lane; what was bf16 in memory is so already.
template <DType T>
PBM_INLINE IVec bf16_lanes(Vec x) {
  return T == DType::bf16 ? shr<16>(as_int(x)) : bf16_bits(x);
}

// Sixteen columns of a matrix with contiguous rows, from row k on, as one lane: of rows k, or k and k + 1, below k_end.
template <Flavour F, DType T>
PBM_INLINE IVec lane_of_rows(const void* base, int64_t at, int64_t row, int64_t k, int64_t k_end, int n) {
  const Vec even = k < k_end ? load16_n<T>(base, at, n) : zero();
  if constexpr (F == Flavour::f32) return as_int(even);
  const Vec odd = k + 1 < k_end ? load16_n<T>(base, at + row, n) : zero();
  return ior(bf16_lanes<T>(even), shl<16>(bf16_lanes<T>(odd)));
}

// B's rows are contiguous along n: NP whole panels at once, so that whole pieces of a row are read; or one of n < 16.
template <Flavour F, DType T, int NP>
void pack_rows(const PackB& p, int64_t j0, int n, char* out, int64_t panel_bytes) {
  for (int64_t k = 0; k < p.k; k += k_per_lane(F), out += kGroupBytes)
    PBM_UNROLL for (int64_t j = 0; j < NP; j++) {
      const int64_t at = k * p.b_row + j0 + j * kPanel;
      istore(out + j * panel_bytes, lane_of_rows<F, T>(p.b, at, p.b_row, k, p.k, n));
    }
}

void sum_columns(const char* panel, int64_t groups, char* out) {
  int32_t sums[16] = {};
  for (int64_t l = 0; l < groups; l++)
    for (int j = 0; j < 16; j++)
      for (int q = 0; q < 4; q++) sums[j] += static_cast<int8_t>(panel[l * kGroupBytes + 4 * j + q]);
  std::memcpy(out, sums, 64);
}

template <Flavour F, DType T>
void pack_panels(const PackB& p, int64_t begin, int64_t end, char* out, int64_t panel_bytes) {
  constexpr int kAtOnce = 3;
  for (int64_t j = begin; j < end;) {
    char* to = out + j * panel_bytes;
    const int64_t columns = min64(end * kPanel, p.n) - j * kPanel;
    if (p.b_row == 1 || F == Flavour::u8s8) {
      pack_columns<F, T>(p, j * kPanel, to);
      j++;
    } else if constexpr (F != Flavour::u8s8) {
      if (columns >= kAtOnce * kPanel) {
        pack_rows<F, T, kAtOnce>(p, j * kPanel, kPanel, to, panel_bytes);
        j += kAtOnce;
      } else {
        pack_rows<F, T, 1>(p, j * kPanel, static_cast<int>(min64(kPanel, columns)), to, panel_bytes);
        j++;
      }
    }
  }
}

// A(i, p) with rows contiguous along i (a transposed matrix): blocks of 16 rows × 16 lanes.
template <Flavour F, DType T>
void transpose_rows(const Gemm& g, int64_t begin, int64_t end, char* out, int64_t row_bytes) {
  constexpr int64_t kPerLane = k_per_lane(F);
  for (int64_t i = begin; i < end; i += 16) {
    const int rows = static_cast<int>(min64(16, end - i));
    for (int64_t k = 0; k < g.k; k += 16 * kPerLane) {
      const int64_t lanes = min64(16, ceil_div(g.k - k, kPerLane));
      char* to = out + (i - begin) * row_bytes + k / kPerLane * 4;
      IVec r[16];
      if (rows == 16 && g.k - k >= 16 * kPerLane) {  // unrolled, so that the block stays in registers
        PBM_UNROLL for (int q = 0; q < 16; q++)
          r[q] = lane_of_rows<F, T>(g.a, (k + q * kPerLane) * g.a_col + i, g.a_col, 0, kPerLane, 16);
        transpose16(r);
        PBM_UNROLL for (int q = 0; q < 16; q++) istore(to + q * row_bytes, r[q]);
      } else {
        for (int q = 0; q < 16; q++)
          r[q] = lane_of_rows<F, T>(g.a, (k + q * kPerLane) * g.a_col + i, g.a_col, k + q * kPerLane, g.k, rows);
        transpose16(r);
        for (int q = 0; q < rows; q++) store_n(reinterpret_cast<float*>(to + q * row_bytes), as_float(r[q]), static_cast<int>(lanes));
      }
    }
  }
}

template <Flavour F, DType T>
void copy_rows(const Gemm& g, int64_t begin, int64_t end, char* out, int64_t row_bytes) {
  constexpr int64_t kBlock = 16 * k_per_lane(F);
  for (int64_t i = begin; i < end; i++, out += row_bytes) {
    int64_t k = 0;
    for (; k + kBlock <= g.k; k += kBlock)
      istore(out + k / k_per_lane(F) * 4, lanes_from<F, T>(g.a, i * g.a_row + k, kBlock));
    if (k < g.k) {
      alignas(64) char last[64];
      istore(last, lanes_from<F, T>(g.a, i * g.a_row + k, g.k - k));
      std::memcpy(out + k / k_per_lane(F) * 4, last, ceil_div(g.k - k, k_per_lane(F)) * 4);
    }
  }
}

}  // namespace

void pack_b(const PackB& p, int64_t begin, int64_t end) {
  const int64_t groups = panel_groups(p.k, p.flavour), panel_bytes = (groups + p.column_sums) * kGroupBytes;
  char* out = static_cast<char*>(p.out);
  if (p.flavour == Flavour::u8s8) {
    pack_panels<Flavour::u8s8, DType::s8>(p, begin, end, out, panel_bytes);
  } else {
    with_float_dtype(p.b_dtype, [&]<DType T>() {
      p.flavour == Flavour::f32 ? pack_panels<Flavour::f32, T>(p, begin, end, out, panel_bytes)
                                : pack_panels<Flavour::bf16, T>(p, begin, end, out, panel_bytes);
    });
  }
  if (p.column_sums)
    for (int64_t j = begin; j < end; j++)
      sum_columns(out + j * panel_bytes, groups, out + j * panel_bytes + groups * kGroupBytes);
}

void convert_rows(const Gemm& g, int64_t begin, int64_t end, char* out, int64_t row_bytes) {
  with_float_dtype(g.a_dtype, [&]<DType T>() {
    const bool rows = g.a_col == 1;
    if (g.flavour == Flavour::f32) {
      rows ? copy_rows<Flavour::f32, T>(g, begin, end, out, row_bytes)
           : transpose_rows<Flavour::f32, T>(g, begin, end, out, row_bytes);
    } else {
      rows ? copy_rows<Flavour::bf16, T>(g, begin, end, out, row_bytes)
           : transpose_rows<Flavour::bf16, T>(g, begin, end, out, row_bytes);
    }
  });
}

void column_sum(const ColumnSum& s, int64_t begin, int64_t end) {
  constexpr int64_t kBlockRows = 64;  // sums of sums: the rounding error grows with √(rows/64), not with √rows
  with_float_dtype(s.dtype, [&]<DType T>() {
    for (int64_t j = begin; j < end; j += kWidth) {
      const int n = static_cast<int>(min64(kWidth, end - j));
      Vec total = zero();
      for (int64_t i0 = 0; i0 < s.rows; i0 += kBlockRows) {
        Vec block = zero();
        for (int64_t i = i0; i < min64(i0 + kBlockRows, s.rows); i++)
          block = add(block, load16_n<T>(s.x, i * s.row + j, n));
        total = add(total, block);
      }
      with_float_dtype(s.out_dtype, [&]<DType O>() { store16_n<O>(s.out, j, total, n); });
    }
  });
}

}  // namespace pbm::PBM_TIER
