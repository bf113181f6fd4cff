// Which instructions the CPU (and the OS's XSAVE state) offers, and which tier of kernels runs.
#pragma once

#include <cstdint>

#define PBM_EXPORT __attribute__((visibility("default")))

namespace pbm {

// Ordered: a tier contains the ones below it. AMX and NEON will follow.
enum class Isa : int { scalar = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3 };
constexpr int kIsaCount = 4;

struct CpuFeatures {
  bool avx2, fma, f16c, avx512f, avx512bw, avx512dq, avx512vl, avx512_vnni, avx512_bf16;
  bool os_ymm, os_zmm;  // the OS saves these registers across context switches
};

PBM_EXPORT const CpuFeatures& cpu_features();
PBM_EXPORT const char* isa_name(Isa isa);
PBM_EXPORT bool isa_from_name(const char* name, Isa* isa);

// The highest tier that this CPU and OS can run.
PBM_EXPORT Isa best_isa();

// The tier in force: best_isa(), or what set_active_isa() or PYBIGMODEL_ISA asked for.
PBM_EXPORT Isa active_isa();

// False if the CPU lacks the tier; nothing changes then.
PBM_EXPORT bool set_active_isa(Isa isa);

// Every kernel notes its own name, compiled into its own tier, so that a test can assert what ran.
void note_kernel(const char* name);
PBM_EXPORT const char* last_kernel();

}  // namespace pbm
