#include "common/isa.h"

#include <cpuid.h>

#include <atomic>
#include <cstring>

namespace pbm {
namespace {

uint64_t xgetbv0() {
  uint32_t lo, hi;
  __asm__ volatile("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
  return (uint64_t{hi} << 32) | lo;
}

CpuFeatures detect() {
  CpuFeatures f{};
  uint32_t a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return f;
  const bool osxsave = c & (1u << 27);
  f.fma = c & (1u << 12);
  f.f16c = c & (1u << 29);
  if (osxsave) {
    const uint64_t xcr0 = xgetbv0();
    f.os_ymm = (xcr0 & 0x6) == 0x6;                // SSE, AVX
    f.os_zmm = f.os_ymm && (xcr0 & 0xe0) == 0xe0;  // opmask, upper halves, zmm16-31
  }
  uint32_t max_subleaf = 0;
  if (__get_cpuid_count(7, 0, &max_subleaf, &b, &c, &d)) {
    f.avx2 = b & (1u << 5);
    f.avx512f = b & (1u << 16);
    f.avx512dq = b & (1u << 17);
    f.avx512bw = b & (1u << 30);
    f.avx512vl = b & (1u << 31);
    f.avx512_vnni = c & (1u << 11);
    if (max_subleaf >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) f.avx512_bf16 = a & (1u << 5);
  }
  return f;
}

std::atomic<Isa>& active() {
  static std::atomic<Isa> isa{best_isa()};
  return isa;
}

std::atomic<const char*> last_kernel_name{""};

}  // namespace

const CpuFeatures& cpu_features() {
  static const CpuFeatures features = detect();
  return features;
}

const char* isa_name(Isa isa) {
  static const char* const names[kIsaCount] = {"scalar", "avx2", "avx512", "avx512_bf16"};
  return names[static_cast<int>(isa)];
}

bool isa_from_name(const char* name, Isa* isa) {
  for (int i = 0; i < kIsaCount; i++) {
    if (std::strcmp(name, isa_name(static_cast<Isa>(i))) == 0) {
      *isa = static_cast<Isa>(i);
      return true;
    }
  }
  return false;
}

Isa best_isa() {
  const CpuFeatures& f = cpu_features();
  if (!(f.avx2 && f.fma && f.f16c && f.os_ymm)) return Isa::scalar;
  if (!(f.avx512f && f.avx512bw && f.avx512dq && f.avx512vl && f.avx512_vnni && f.os_zmm)) return Isa::avx2;
  return f.avx512_bf16 ? Isa::avx512_bf16 : Isa::avx512;
}

Isa active_isa() { return active().load(std::memory_order_relaxed); }

bool set_active_isa(Isa isa) {
  if (isa > best_isa()) return false;
  active().store(isa, std::memory_order_relaxed);
  return true;
}

void note_kernel(const char* name) { last_kernel_name.store(name, std::memory_order_relaxed); }
const char* last_kernel() { return last_kernel_name.load(std::memory_order_relaxed); }

}  // namespace pbm
