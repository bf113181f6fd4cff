// Function qualifiers, so that index and scalar arithmetic is one piece of code on the device, in the host code that
// launches kernels, and in the torch-free tests, which no CUDA compiler sees.
#pragma once

#if defined(__CUDACC__)
#define PBM_HOST_DEVICE __host__ __device__ __forceinline__
#define PBM_DEVICE __device__ __forceinline__
#define PBM_KERNEL __global__
#define PBM_LAUNCH_BOUNDS(...) __launch_bounds__(__VA_ARGS__)
#define PBM_UNROLL _Pragma("unroll")
#define PBM_NO_UNROLL _Pragma("unroll 1")
#else
#define PBM_HOST_DEVICE inline
#define PBM_DEVICE inline
#define PBM_KERNEL inline
#define PBM_LAUNCH_BOUNDS(...)
#define PBM_UNROLL
#define PBM_NO_UNROLL
#endif
