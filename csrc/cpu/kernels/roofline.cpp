#include "cpu/kernels/roofline.h"

#include <immintrin.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <cstdint>

// Only C's library here: an inline function of C++'s, compiled with this tier's flags, could be the
// copy that the linker keeps for every tier.

#define PBM_UNROLL _Pragma("GCC unroll 32")

namespace pbm::PBM_TIER {
namespace {

double now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

// --- peaks ---
// Independent accumulators must cover ports × latency (2 × 4 for a multiply-add on the cores of
// today); 24 is the register tile of the kernels, 12 what sixteen registers hold. The products are
// written in assembly: from intrinsics GCC 12 kept half of the int8 accumulators on the stack, and
// the figure was half of the peak.
#if PBM_TIER_LEVEL >= 2
using Register = __m512;
constexpr int kAccumulators = 24;
#define PBM_REGISTER "v"
#elif PBM_TIER_LEVEL == 1
using Register = __m256;
constexpr int kAccumulators = 12;
#define PBM_REGISTER "x"
#else
using Register = __m128;
constexpr int kAccumulators = 12;
#define PBM_REGISTER "x"
#endif
constexpr int kLanes = sizeof(Register) / 4;

// Each kind: how many operations one step is, and the step acc += a·b.
struct Fp32 {
  static constexpr double kOps = 2 * kLanes;
  static inline __attribute__((always_inline)) void step(Register& acc, Register a, Register b) {
#if PBM_TIER_LEVEL >= 1
    __asm__ volatile("vfmadd231ps %1, %2, %0" : "+" PBM_REGISTER(acc) : PBM_REGISTER(b), PBM_REGISTER(a));
#else
    __asm__ volatile("" : "+x"(a));  // forgets what it holds, or one product would do for all
    acc = _mm_add_ps(acc, _mm_mul_ps(a, b));
#endif
  }
};

#if PBM_TIER_LEVEL >= 3
struct Bf16 {
  static constexpr double kOps = 4 * kLanes;
  static inline __attribute__((always_inline)) void step(Register& acc, Register a, Register b) {
    __asm__ volatile("vdpbf16ps %1, %2, %0" : "+" PBM_REGISTER(acc) : PBM_REGISTER(b), PBM_REGISTER(a));
  }
};
#else
using Bf16 = Fp32;
#endif

struct Int8 {
  static constexpr double kOps = (PBM_TIER_LEVEL >= 2 ? 8 : 4) * kLanes;
  static inline __attribute__((always_inline)) void step(Register& acc, Register a, Register b) {
#if PBM_TIER_LEVEL >= 2
    __asm__ volatile("vpdpbusd %1, %2, %0" : "+" PBM_REGISTER(acc) : PBM_REGISTER(b), PBM_REGISTER(a));
#elif PBM_TIER_LEVEL == 1
    Register product;
    __asm__ volatile("vpmaddwd %2, %3, %0\n\tvpaddd %0, %1, %1"
                     : "=&" PBM_REGISTER(product), "+" PBM_REGISTER(acc)
                     : PBM_REGISTER(b), PBM_REGISTER(a));
#else
    __asm__ volatile("" : "+x"(a));
    const __m128i product = _mm_madd_epi16(_mm_castps_si128(a), _mm_castps_si128(b));
    acc = _mm_castsi128_ps(_mm_add_epi32(_mm_castps_si128(acc), product));
#endif
  }
};

template <class Kind>
__attribute__((noinline)) double run_chunk(long iterations) {
  const double start = now();
  // Only set here: across the call, sixteen-register tiers would keep them on the stack for good.
  Register a, acc[kAccumulators];
  // Normal numbers far from overflow in every reading: 0x3c003c00 is 0.0078 as fp32, 0.0078 twice
  // as bf16, small as int8.
  const std::uint32_t pattern = 0x3c003c00u;
  for (int lane = 0; lane < kLanes; ++lane) {
    memcpy(reinterpret_cast<char*>(&a) + 4 * lane, &pattern, 4);
  }
  PBM_UNROLL
  for (int i = 0; i < kAccumulators; ++i) acc[i] = a;
  for (long it = 0; it < iterations; ++it) {
    PBM_UNROLL
    for (int i = 0; i < kAccumulators; ++i) Kind::step(acc[i], a, a);
  }
  PBM_UNROLL
  for (int i = 0; i < kAccumulators; ++i) __asm__ volatile("" : : PBM_REGISTER(acc[i]));
  const double seconds = now() - start;
  return Kind::kOps * kAccumulators * static_cast<double>(iterations) / seconds;
}

template <class Kind>
double best_chunk(double seconds) {
  // 1.15 M vectors are 0.15 ms at 2 a cycle and 4 GHz: long against the clock's 50 ns, short
  // against a time slice.
  const long iterations = 1152000 / kAccumulators;
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
static inline Loaded load(const char* p) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(p)); }
#else
using Loaded = __m128i;
static inline Loaded load(const char* p) { return _mm_load_si128(reinterpret_cast<const __m128i*>(p)); }
#endif
constexpr long kMaxRates = 4096;  // the latest chunks of a probe; 80 ms of the shortest
constexpr int kLoads = 8;         // in flight without a dependency between them

// One stream, left to the hardware's prefetcher: 2, 4 and 8 streams and software prefetches 0.5 to
// 4 KiB ahead were within the noise of it on Zen 5, in every cache level.
__attribute__((noinline)) std::uint32_t read_all(const char* p, std::size_t bytes) {
  Loaded acc[kLoads];
  PBM_UNROLL
  for (int i = 0; i < kLoads; ++i) acc[i] = Loaded{};
  for (std::size_t at = 0; at < bytes; at += kLoads * sizeof(Loaded)) {
    PBM_UNROLL
    for (int i = 0; i < kLoads; ++i) acc[i] |= load(p + at + i * sizeof(Loaded));
  }
  PBM_UNROLL
  for (int i = 1; i < kLoads; ++i) acc[0] |= acc[i];
  std::uint32_t first;
  memcpy(&first, &acc[0], 4);
  return first;
}

int compare(const void* a, const void* b) {
  const double x = *static_cast<const double*>(a), y = *static_cast<const double*>(b);
  return (x > y) - (x < y);
}

}  // namespace

double measure_peak(int kind, double seconds) {
  switch (static_cast<PeakKind>(kind)) {
    case PeakKind::fp32: return best_chunk<Fp32>(seconds);
    case PeakKind::bf16: return best_chunk<Bf16>(seconds);
    case PeakKind::int8: return best_chunk<Int8>(seconds);
  }
  return 0;
}

double measure_read_bandwidth(std::size_t bytes, double seconds) {
  if (bytes == 0) return 0;
  bytes = (bytes + kBlock - 1) / kBlock * kBlock;
  char* buffer = static_cast<char*>(aligned_alloc(kBlock, bytes));
  double* rates = static_cast<double*>(malloc(kMaxRates * sizeof(double)));
  double median = 0;
  if (buffer != nullptr && rates != nullptr) {
    memset(buffer, 1, bytes);  // untouched pages would all be the one zero page
    // At least 8 MiB between two looks at the clock: 20 µs at 400 GB/s.
    const long passes = 1 + static_cast<long>(((8u << 20) - 1) / bytes);
    volatile std::uint32_t sink = read_all(buffer, bytes);
    const double begin = now();
    double start = begin;
    long chunks = 0;
    do {
      for (long i = 0; i < passes; ++i) sink = sink | read_all(buffer, bytes);
      const double end = now();
      rates[chunks++ % kMaxRates] = static_cast<double>(passes) * static_cast<double>(bytes) / (end - start);
      start = end;
    } while (start - begin < seconds);
    const long count = chunks < kMaxRates ? chunks : kMaxRates;
    qsort(rates, static_cast<std::size_t>(count), sizeof(double), compare);
    median = rates[count / 2];
  }
  free(rates);
  free(buffer);
  return median;
}

}  // namespace pbm::PBM_TIER
