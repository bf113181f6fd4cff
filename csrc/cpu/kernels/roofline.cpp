#include "cpu/kernels/roofline.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <cstdint>

#if PBM_TIER_LEVEL >= 1
#include <immintrin.h>
#endif

// Only C's library here: an inline function of C++'s, compiled with this tier's flags, could be the
// copy that the linker keeps for every tier.

#define PBM_UNROLL _Pragma("GCC unroll 32")
// Makes the compiler forget what a register holds, at no cost, so that equal products are neither
// merged nor hoisted.
#define PBM_OPAQUE(x) __asm__ volatile("" : PBM_REG(x))
#if PBM_TIER_LEVEL >= 2
#define PBM_REG(x) "+v"(x)
#else
#define PBM_REG(x) "+x"(x)
#endif

namespace pbm::PBM_TIER {
namespace {

double now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

// --- peaks ---
// Independent accumulators must cover ports × latency (2 × 4 for a multiply-add on the cores of
// today); 24 is the register tile of the kernels, 12 what sixteen registers hold. Two-instruction
// products take a register each while in flight, and only their add (latency 1) is a chain: with 12
// of them GCC 12 spilled, with 6 all stay in registers.
#if PBM_TIER_LEVEL >= 2
using Floats = __m512;
using Ints = __m512i;
#elif PBM_TIER_LEVEL == 1
using Floats = __m256;
using Ints = __m256i;
#else
typedef float Floats __attribute__((vector_size(16)));
typedef std::uint32_t Ints __attribute__((vector_size(16)));
#endif
constexpr int kLanes = sizeof(Floats) / 4;

struct Fp32 {
  using Register = Floats;
#if PBM_TIER_LEVEL >= 2
  static constexpr int kAccumulators = 24;
#elif PBM_TIER_LEVEL == 1
  static constexpr int kAccumulators = 12;
#else
  static constexpr int kAccumulators = 6;
#endif
  static constexpr double kOps = 2 * kLanes;
  static inline __attribute__((always_inline)) void step(Floats& acc, Floats& a, Floats& b) {
#if PBM_TIER_LEVEL >= 2
    acc = _mm512_fmadd_ps(a, b, acc);
#elif PBM_TIER_LEVEL == 1
    acc = _mm256_fmadd_ps(a, b, acc);
#else
    PBM_OPAQUE(a);
    acc += a * b;
#endif
  }
};

#if PBM_TIER_LEVEL >= 3
struct Bf16 {
  using Register = Floats;
  static constexpr int kAccumulators = 24;
  static constexpr double kOps = 4 * kLanes;
  static inline __attribute__((always_inline)) void step(Floats& acc, Floats& a, Floats& b) {
    acc = _mm512_dpbf16_ps(acc, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }
};
#else
using Bf16 = Fp32;
#endif

struct Int8 {
  using Register = Ints;
#if PBM_TIER_LEVEL >= 2
  static constexpr int kAccumulators = 24;
  static constexpr double kOps = 8 * kLanes;
#elif PBM_TIER_LEVEL == 1
  static constexpr int kAccumulators = 6;
  static constexpr double kOps = 4 * kLanes;
#else
  static constexpr int kAccumulators = 6;
  static constexpr double kOps = 2 * kLanes;
#endif
  static inline __attribute__((always_inline)) void step(Ints& acc, Ints& a, Ints& b) {
#if PBM_TIER_LEVEL >= 2
    acc = _mm512_dpbusd_epi32(acc, a, b);
#elif PBM_TIER_LEVEL == 1
    PBM_OPAQUE(a);
    acc = _mm256_add_epi32(acc, _mm256_madd_epi16(a, b));
#else
    PBM_OPAQUE(a);
    acc += a * b;
#endif
  }
};

template <class Kind>
__attribute__((noinline)) double run_chunk(long iterations) {
  using Register = typename Kind::Register;
  constexpr int n = Kind::kAccumulators;
  Register a, b, acc[n];
  // Normal numbers far from overflow in every reading: 0x3c003c00 is 0.0078 as fp32, 0.0078 twice
  // as bf16, small as int8.
  const std::uint32_t pattern = 0x3c003c00u;
  for (int lane = 0; lane < kLanes; ++lane) {
    memcpy(reinterpret_cast<char*>(&a) + 4 * lane, &pattern, 4);
    memcpy(reinterpret_cast<char*>(&b) + 4 * lane, &pattern, 4);
  }
  PBM_UNROLL for (int i = 0; i < n; ++i) {
    acc[i] = a;
    PBM_OPAQUE(acc[i]);
  }
  const double start = now();
  for (long it = 0; it < iterations; ++it) {
    PBM_OPAQUE(a);
    PBM_OPAQUE(b);
    PBM_UNROLL for (int i = 0; i < n; ++i) Kind::step(acc[i], a, b);
  }
  PBM_UNROLL for (int i = 0; i < n; ++i) PBM_OPAQUE(acc[i]);
  return Kind::kOps * n * static_cast<double>(iterations) / (now() - start);
}

template <class Kind>
double best_chunk(double seconds) {
  // 1.15 M vectors are 0.15 ms at 2 a cycle and 4 GHz: long against the clock's 50 ns, short
  // against a time slice.
  const long iterations = 1152000 / Kind::kAccumulators;
  const double end = now() + seconds;
  double best = run_chunk<Kind>(iterations);  // the first also wakes the vector units
  do {
    const double rate = run_chunk<Kind>(iterations);
    best = rate > best ? rate : best;
  } while (now() < end);
  return best;
}

// --- bandwidth ---
constexpr std::size_t kBlock = 4096;  // a multiple of every tier's step

#if PBM_TIER_LEVEL >= 2
using Loaded = __m512i;
static inline Loaded load(const char* p) { return _mm512_load_si512(p); }
#elif PBM_TIER_LEVEL == 1
using Loaded = __m256i;
static inline Loaded load(const char* p) {
  return _mm256_load_si256(reinterpret_cast<const __m256i*>(p));
}
#else
using Loaded = Ints;
static inline Loaded load(const char* p) { return *reinterpret_cast<const Loaded*>(p); }
#endif
constexpr int kLoads = 8;  // in flight without a dependency between them

// One stream, left to the hardware's prefetcher: 2, 4 and 8 streams and software prefetches 0.5 to
// 4 KiB ahead were within the noise of it on Zen 5, in every cache level.
__attribute__((noinline)) std::uint32_t read_all(const char* p, std::size_t bytes) {
  Loaded acc[kLoads];
  PBM_UNROLL for (int i = 0; i < kLoads; ++i) acc[i] = Loaded{};
  for (std::size_t at = 0; at < bytes; at += kLoads * sizeof(Loaded)) {
    PBM_UNROLL for (int i = 0; i < kLoads; ++i) acc[i] |= load(p + at + i * sizeof(Loaded));
  }
  PBM_UNROLL for (int i = 1; i < kLoads; ++i) acc[0] |= acc[i];
  std::uint32_t first;
  memcpy(&first, &acc[0], 4);
  return first;
}

}  // namespace

double measure_peak(int kind, double seconds) {
  switch (static_cast<PeakKind>(kind)) {
    case PeakKind::fp32:
      return best_chunk<Fp32>(seconds);
    case PeakKind::bf16:
      return best_chunk<Bf16>(seconds);
    case PeakKind::int8:
      return best_chunk<Int8>(seconds);
  }
  return 0;
}

double measure_read_bandwidth(std::size_t bytes, double seconds) {
  if (bytes == 0) return 0;
  bytes = (bytes + kBlock - 1) / kBlock * kBlock;
  char* buffer = static_cast<char*>(aligned_alloc(kBlock, bytes));
  if (buffer == nullptr) return 0;
  memset(buffer, 1, bytes);  // untouched pages would all be the one zero page
  // Small buffers are read several times between two looks at the clock.
  const long passes = bytes >= (1u << 20) ? 1 : static_cast<long>((1u << 20) / bytes);
  volatile std::uint32_t sink = read_all(buffer, bytes);
  const double start = now();
  double elapsed = 0, total = 0;
  do {
    for (long i = 0; i < passes; ++i) sink = sink | read_all(buffer, bytes);
    total += static_cast<double>(passes) * static_cast<double>(bytes);
    elapsed = now() - start;
  } while (elapsed < seconds);
  free(buffer);
  return total / elapsed;
}

}  // namespace pbm::PBM_TIER
