#include "cpu/introspect.h"

#include <torch/csrc/stable/ops.h>

#include "cpu/kernels/roofline.h"

namespace pbm {

uint32_t num_threads() { return torch::stable::get_num_threads(); }

double measure_peak(int kind, double seconds) {
  static constexpr decltype(&scalar::measure_peak) tiers[kIsaCount] = {scalar::measure_peak, avx2::measure_peak,
                                                                       avx512::measure_peak, avx512_bf16::measure_peak};
  return tiers[static_cast<int>(active_isa())](kind, seconds);
}

double measure_read_bandwidth(size_t bytes, double seconds) {
  static constexpr decltype(&scalar::measure_read_bandwidth) tiers[kIsaCount] = {
      scalar::measure_read_bandwidth, avx2::measure_read_bandwidth, avx512::measure_read_bandwidth,
      avx512_bf16::measure_read_bandwidth};
  return tiers[static_cast<int>(active_isa())](bytes, seconds);
}

}  // namespace pbm
