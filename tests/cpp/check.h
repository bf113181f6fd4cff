// Checks, seeded random numbers and exact-size buffers for the torch-free tests.
#pragma once

#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

namespace pbm::test {

struct Options {
  uint64_t seed = 1;
  int iterations = 100;  // random cases of each kind and tier
};

inline int failures = 0;

[[gnu::format(printf, 4, 5)]] inline void check(bool ok, const char* file, int line, const char* format, ...) {
  if (ok) return;
  if (++failures > 20) return;  // one broken kernel fails thousands of times
  std::fprintf(stderr, "%s:%d: ", file, line);
  va_list args;
  va_start(args, format);
  std::vfprintf(stderr, format, args);
  va_end(args);
  std::fputc('\n', stderr);
}

// CHECK(condition, "what was expected and what came: %d", value)
#define CHECK(condition, ...) ::pbm::test::check((condition), __FILE__, __LINE__, __VA_ARGS__)

// splitmix64: the same numbers on every platform and standard library.
class Rng {
 public:
  explicit Rng(uint64_t seed) : state_(seed) {}
  uint64_t bits() {
    uint64_t z = (state_ += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  int64_t below(int64_t n) { return static_cast<int64_t>(bits() % static_cast<uint64_t>(n)); }
  int64_t between(int64_t low, int64_t high) { return low + below(high - low + 1); }
  bool chance(int one_in) { return below(one_in) == 0; }
  // Uniform in [-1, 1), 24 significant bits.
  float value() { return static_cast<float>(static_cast<int64_t>(bits() >> 40) - (1 << 23)) * 0x1p-23f; }
  template <class T, int64_t N>
  const T& of(const T (&choices)[N]) {
    return choices[below(N)];
  }

 private:
  uint64_t state_;
};

// A heap block of exactly the bytes asked for, so that ASan sees the first byte read or written behind it. `offset`
// bytes are left free in front: data that is aligned to its element only.
class Exact {
 public:
  Exact() = default;
  explicit Exact(int64_t bytes, int64_t offset = 0, unsigned char fill = 0xa5) : bytes_(bytes), offset_(offset) {
    block_ = static_cast<char*>(std::malloc(static_cast<size_t>(bytes + offset)));
    if (bytes) std::memset(block_ + offset, fill, static_cast<size_t>(bytes));
  }
  Exact(Exact&& other) noexcept { *this = static_cast<Exact&&>(other); }
  Exact& operator=(Exact&& other) noexcept {
    std::free(block_);
    block_ = other.block_;
    bytes_ = other.bytes_;
    offset_ = other.offset_;
    other.block_ = nullptr;
    return *this;
  }
  ~Exact() { std::free(block_); }
  char* data() const { return block_ ? block_ + offset_ : nullptr; }
  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(data());
  }
  int64_t bytes() const { return bytes_; }

 private:
  char* block_ = nullptr;
  int64_t bytes_ = 0, offset_ = 0;
};

void test_partition(const Options&);
void test_convert(const Options&);
void test_vecmath(const Options&);
void test_quantize(const Options&);
void test_pack(const Options&);
void test_brgemm(const Options&);
void test_gemm(const Options&);
void test_attention(const Options&);
void test_attention_decode(const Options&);
void test_additive(const Options&);
void test_conv_algorithm(const Options&);
void test_conv_copy(const Options&);
void test_conv_depthwise(const Options&);
void test_conv_direct(const Options&);
void test_conv_planes(const Options&);
void test_conv_spread(const Options&);
void test_conv_weight_gradient(const Options&);
void test_conv_winograd(const Options&);
void test_pool(const Options&);

}  // namespace pbm::test
