// What a GPU approximates a reciprocal and roots by. Subnormal numbers are taken and given as zeros. How far from the
// truth they may be is said by NVIDIA's "PTX ISA", section "Floating Point Instructions".
#pragma once

namespace fusedreg {

struct Approximations {
  __device__ __forceinline__ static float reciprocal(float x) {  // 1 ulp
    asm("rcp.approx.ftz.f32 %0, %0;" : "+f"(x));
    return x;
  }
  __device__ __forceinline__ static float root(float x) {  // 2^-23, relative
    asm("sqrt.approx.ftz.f32 %0, %0;" : "+f"(x));
    return x;
  }
  __device__ __forceinline__ static float inverse_root(float x) {  // 2^-22.9, relative
    asm("rsqrt.approx.ftz.f32 %0, %0;" : "+f"(x));
    return x;
  }
};

}  // namespace fusedreg
