// Where a kernel runs: the tensor's device and torch's current stream on it.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace pbm::cuda {

inline void check_cuda(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string("pybigmodel: ") + what + ": " + cudaGetErrorName(status) + ", " +
                           cudaGetErrorString(status));
}

// The tensor's device is current while this lives.
class LaunchScope {
 public:
  explicit LaunchScope(const torch::stable::Tensor& on) : device_(on.get_device_index()), guard_(device_) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  cudaStream_t stream() const { return stream_; }

  int multiprocessors() const {
    int count = 0;
    check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device_), "number of multiprocessors");
    return count;
  }

 private:
  int32_t device_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

constexpr int64_t kMaxBlocks = 0x7fffffff;  // of grid dimension x

#if defined(__CUDACC__)
// At most kMaxBlocks blocks. `name` stands in the error of a failed launch.
template <typename Params>
void launch(const char* name, void (*kernel)(Params), int64_t blocks, int threads, cudaStream_t stream,
            const Params& params) {
  kernel<<<static_cast<unsigned>(blocks), static_cast<unsigned>(threads), 0, stream>>>(params);
  check_cuda(cudaGetLastError(), name);
}
#endif

}  // namespace pbm::cuda
