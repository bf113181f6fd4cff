// What the tests of simulated kernels share: buffers with hard edges, random values, a count of failures.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "cuda/kernels/element.h"
#include "simulator.h"

namespace pbm::cuda_sim {

inline int failures = 0;

inline void expect(bool condition, const std::string& what) {
  if (condition) return;
  if (failures++ < 20) std::fprintf(stderr, "FAILED: %s\n", what.c_str());
}

template <typename Kernel, typename Params>
void simulate(int64_t blocks, int threads, const Schedule& schedule, Kernel kernel, const Params& params) {
  Simulator::instance().run(blocks, threads, schedule, [&] { kernel(params); });
}

// A buffer that starts on a 64-byte boundary, plus `offset` bytes, and ends where the heap block ends (ASan sees beyond).
template <typename T>
class Buffer {
 public:
  explicit Buffer(size_t count, size_t offset = 0) : count_(count), bytes_(count * sizeof(T) + offset + 64) {
    const auto address = reinterpret_cast<uintptr_t>(bytes_.data());
    start_ = (64 - address % 64) % 64 + offset;
    bytes_.resize(start_ + count * sizeof(T));  // never grows: the address stays
    std::memset(bytes_.data(), 0xa5, bytes_.size());
  }
  T* data() { return reinterpret_cast<T*>(bytes_.data() + start_); }
  T& operator[](size_t i) { return data()[i]; }
  size_t size() const { return count_; }

 private:
  size_t count_, start_ = 0;
  std::vector<unsigned char> bytes_;
};

inline std::mt19937 generator(7);
inline int random_int(int low, int high) { return std::uniform_int_distribution<int>(low, high)(generator); }
inline float random_float() { return std::normal_distribution<float>()(generator); }

template <typename T>
constexpr const char* kName = "?";
template <>
constexpr const char* kName<float> = "fp32";
template <>
constexpr const char* kName<cuda::BFloat16> = "bf16";
template <>
constexpr const char* kName<cuda::Float16> = "fp16";

}  // namespace pbm::cuda_sim
