// What the calling thread can do at most on each tier: the denominators of every efficiency that
// the benchmarks print.
#pragma once

#include <cstddef>

namespace pbm {

enum class PeakKind : int {
  fp32,  // fused multiply-adds
  bf16,  // vdpbf16ps; on a tier without it, what the fp32 units give (an upper bound: unpacking
         // comes on top)
  int8,  // vpdpbusd; without it, exact 16-bit products (vpmaddwd and an add)
};
// The scalar tier, an oracle and no contender, counts the baseline's mulps + addps and pmaddwd.

#define PBM_DECLARE_ROOFLINE(tier)                                  \
  namespace tier {                                                  \
  double measure_peak(int kind, double seconds);                    \
  double measure_read_bandwidth(std::size_t bytes, double seconds); \
  }
// measure_peak: operations a second, a multiply-add being two, from registers: the fastest of the
// chunks of about 0.2 ms that `seconds` holds. 0 for a kind that does not exist.
// measure_read_bandwidth: bytes a second, the median of repeated passes over a buffer of `bytes`
// (rounded up to 4 KiB; it is allocated, written once and read once before timing). 0 if the
// allocation fails.
PBM_DECLARE_ROOFLINE(scalar)
PBM_DECLARE_ROOFLINE(avx2)
PBM_DECLARE_ROOFLINE(avx512)
PBM_DECLARE_ROOFLINE(avx512_bf16)
#undef PBM_DECLARE_ROOFLINE

}  // namespace pbm
