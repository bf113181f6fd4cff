// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011) on sixteen lanes.
#pragma once

#include "cpu/kernels/vec.h"

namespace pbm::PBM_TIER {

// Counters (c0, c1, c2, 0) in c[0..2]; the four words replace them.
PBM_INLINE void philox4x32(IVec (&c)[4], uint64_t seed) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  c[3] = izero();
  for (int round = 0; round < 10; round++) {
    IVec high0, low0, high1, low1;
    multiply_wide(c[0], 0xD2511F53u, &high0, &low0);
    multiply_wide(c[2], 0xCD9E8D57u, &high1, &low1);
    c[0] = ixor(ixor(high1, c[1]), iset1(static_cast<int32_t>(k0)));
    c[2] = ixor(ixor(high0, c[3]), iset1(static_cast<int32_t>(k1)));
    c[1] = low1;
    c[3] = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

// What the sixteen words of lanes multiply with: 0 where the upper 24 bits are below the threshold, or the factor.
PBM_INLINE Vec kept(IVec words, int32_t threshold, float factor) {
  return where_negative(to_float(isub(shr<8>(words), iset1(threshold))), zero(), set1(factor));
}

}  // namespace pbm::PBM_TIER
