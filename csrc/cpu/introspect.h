// What _native shows of the CPU library beyond isa.h. No tensors.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "common/isa.h"

namespace pbm {

PBM_EXPORT uint32_t num_threads();  // of torch's pool, on which every op runs
// Of the calling thread on the active tier; see cpu/kernels/roofline.h.
PBM_EXPORT double measure_peak(int kind, double seconds);
PBM_EXPORT double measure_read_bandwidth(size_t bytes, double seconds);

// The ConvAlgorithm chosen for an input (N, C, spatial…) and a weight (K, C / groups, kernel…); padding: before and
// after, axis by axis. 0 where the lists do not describe a convolution.
PBM_EXPORT int conv_algorithm(const std::vector<int64_t>& input, const std::vector<int64_t>& weight,
                              const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                              const std::vector<int64_t>& dilation, int64_t groups, bool bf16, bool exact,
                              bool channels_last);

}  // namespace pbm
