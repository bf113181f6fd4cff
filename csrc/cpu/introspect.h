// What _native shows of the CPU library beyond isa.h. No tensors.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/isa.h"

namespace pbm {

PBM_EXPORT uint32_t num_threads();  // of torch's pool, on which every op runs
// Of the calling thread on the active tier; see cpu/kernels/roofline.h.
PBM_EXPORT double measure_peak(int kind, double seconds);
PBM_EXPORT double measure_read_bandwidth(size_t bytes, double seconds);

}  // namespace pbm
