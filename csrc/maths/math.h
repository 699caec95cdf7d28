// The few functions that the update is made of.
// Everything in the maths headers compiles for the host and for CUDA, and knows nothing of torch.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define FUSEDREG_HD __host__ __device__ __forceinline__
#else
// always_inline: the helpers take the instruction set of the loop that they are inlined into.
#define FUSEDREG_HD inline __attribute__((always_inline))
#endif

namespace fusedreg {

template <class To, class From>
FUSEDREG_HD To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

FUSEDREG_HD float absolute(float x) {
#if defined(__CUDA_ARCH__)
  return fabsf(x);  // no instruction, but part of one
#else
  return bit_cast<float>(bit_cast<std::uint32_t>(x) & 0x7fffffffu);
#endif
}
FUSEDREG_HD double absolute(double x) { return bit_cast<double>(bit_cast<std::uint64_t>(x) & 0x7fffffffffffffffull); }

}  // namespace fusedreg

// Where it is defined, a header that approximates as GPUs do.
#if defined(__CUDA_ARCH__)
#define FUSEDREG_APPROXIMATIONS "approximations.h"
#endif
#if defined(FUSEDREG_APPROXIMATIONS)
#include FUSEDREG_APPROXIMATIONS
#endif
#include "corrected.h"

namespace fusedreg {

// a / b, for b >= 0.
FUSEDREG_HD float divide(float a, float b) {
#if defined(FUSEDREG_APPROXIMATIONS)
  return corrected_quotient<Approximations>(a, b);
#else
  return a / b;
#endif
}
FUSEDREG_HD double divide(double a, double b) { return a / b; }

FUSEDREG_HD float square_root(float x) {
#if defined(FUSEDREG_APPROXIMATIONS)
  return corrected_root<Approximations>(x);
#else
  return sqrtf(x);
#endif
}
FUSEDREG_HD double square_root(double x) { return sqrt(x); }

FUSEDREG_HD float copy_sign(float magnitude, float sign) { return copysignf(magnitude, sign); }
FUSEDREG_HD double copy_sign(double magnitude, double sign) { return copysign(magnitude, sign); }

// A constant that is read where it is needed: a GPU's threads have few registers to keep it in.
template <class A>
FUSEDREG_HD A fetch(const A& constant) {
#if defined(__CUDA_ARCH__)
  return *const_cast<const volatile A*>(&constant);
#else
  return constant;
#endif
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
#define FUSEDREG_HAS_MAX_WITH_NAN  // one instruction, where a comparison and a select are two
#endif

// fmax drops a NaN; this maximum keeps one in either argument, as torch.maximum does.
template <class A>
FUSEDREG_HD A max_keeping_nan(A a, A b) {
#if defined(FUSEDREG_HAS_MAX_WITH_NAN)
  if constexpr (sizeof(A) == sizeof(float)) {
    asm("max.NaN.f32 %0, %0, %1;" : "+f"(a) : "f"(b));
    return a;
  }
#endif
  return b > a || b != b ? b : a;
}

// Likewise, for a `b` that is to be seen where it is a NaN. Where `a` is one, what comes does not matter.
template <class A>
FUSEDREG_HD A max_keeping_nan_of_second(A a, A b) {
#if defined(FUSEDREG_HAS_MAX_WITH_NAN)
  return max_keeping_nan(a, b);
#else
  return a > b ? a : b;
#endif
}

// condition ? a : b, for a condition that is the same for all elements: a compiler for GPUs would make a loop for
// either.
template <class A>
FUSEDREG_HD A choose(bool condition, A a, A b) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(A) == sizeof(float)) {
    asm("{.reg .pred p; setp.ne.u32 p, %2, 0; selp.f32 %0, %0, %1, p;}" : "+f"(a) : "f"(b), "r"(condition ? 1u : 0u));
    return a;
  }
#endif
  return condition ? a : b;
}

// a + weight * (b - a), as torch's: from the nearer end. From the far one a large a would swallow a small b.
template <class A>
FUSEDREG_HD A lerp(A a, A b, A weight, A one_minus_weight) {
  const A change = b - a;
#if defined(FUSEDREG_APPROXIMATIONS)
  const bool is_nearer_to_a = weight < A(0.5);
  return choose(is_nearer_to_a, a, b) + choose(is_nearer_to_a, weight, -one_minus_weight) * change;
#else
  return weight < A(0.5) ? a + weight * change : b - one_minus_weight * change;
#endif
}

// A NaN stays NaN, and infinite bounds are none.
template <class A>
FUSEDREG_HD A clamp(A x, A lower, A upper) {
#if defined(FUSEDREG_HAS_MAX_WITH_NAN)
  if constexpr (sizeof(A) == sizeof(float)) {
    asm("max.NaN.f32 %0, %0, %1; min.NaN.f32 %0, %0, %2;" : "+f"(x) : "f"(lower), "f"(upper));
    return x;
  }
#endif
  x = x < lower ? lower : x;
  return x > upper ? upper : x;
}

// 0 for a NaN.
template <class A>
FUSEDREG_HD A sign(A x) {
  return absolute(x) > A(0) ? copy_sign(A(1), x) : A(0);
}

// soft(z, t) = sign(z) * max(|z| - t, 0). The zeros are +0.0, a NaN in z or t stays NaN.
template <class A>
FUSEDREG_HD A soft_threshold(A z, A t) {
  return absolute(z) <= t ? A(0) : z - copy_sign(t, z);
}

}  // namespace fusedreg
