#include "cpu/kernels/tiers.h"

namespace pbm {

const Kernels& kernels_of(Isa isa) {
  static const Kernels* const tables[kIsaCount] = {&scalar::table, &avx2::table, &avx512::table, &avx512_bf16::table};
  return *tables[static_cast<int>(isa)];
}

const Kernels& kernels() { return kernels_of(active_isa()); }

}  // namespace pbm
