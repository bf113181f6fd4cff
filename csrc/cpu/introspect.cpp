#include "cpu/introspect.h"

#include <torch/csrc/stable/ops.h>

#include "cpu/kernels/conv_algorithm.h"
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

int conv_algorithm(const std::vector<int64_t>& input, const std::vector<int64_t>& weight,
                   const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                   const std::vector<int64_t>& dilation, int64_t groups, bool bf16, bool exact, bool channels_last) {
  const size_t axes = input.size() - 2;
  if (input.size() < 3 || input.size() > 5 || weight.size() != input.size() || stride.size() != axes ||
      padding.size() != 2 * axes || dilation.size() != axes || groups < 1)
    return 0;
  ConvShape s{};
  s.batch = input[0];
  s.groups = groups;
  s.c = weight[1];
  s.n = weight[0] / groups;
  for (size_t i = 0; i < 3; i++) {
    const bool there = i + axes >= 3;
    const size_t at = there ? i + axes - 3 : 0;
    s.in[i] = there ? input[2 + at] : 1;
    s.kernel[i] = there ? weight[2 + at] : 1;
    s.stride[i] = there ? stride[at] : 1;
    s.dilation[i] = there ? dilation[at] : 1;
    s.pad[i] = there ? padding[2 * at] : 0;
    s.pad_end[i] = there ? padding[2 * at + 1] : 0;
  }
  return static_cast<int>(choose_conv(s, bf16 ? Flavour::bf16 : Flavour::f32, exact, !channels_last));
}

}  // namespace pbm
