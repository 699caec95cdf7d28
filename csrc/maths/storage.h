// Elements in memory: their dtypes, and how they are loaded and stored.
#pragma once

#include "math.h"

namespace fusedreg {

struct BFloat16 {
  std::uint16_t bits;
};
struct Float16 {
  std::uint16_t bits;
};

// The type that arithmetic on parameters of type T is done in.
template <class T>
struct Arithmetic {
  using type = float;
};
template <>
struct Arithmetic<double> {
  using type = double;
};
template <class T>
using ArithmeticOf = typename Arithmetic<T>::type;

// kInt8 and kUInt8: codes of states (codes.h), which are read and written by blocks.
enum class DType : std::uint8_t { kFloat32, kFloat64, kBFloat16, kFloat16, kInt8, kUInt8 };

template <class A>
constexpr DType dtype_of() {  // of the arithmetic types
  return sizeof(A) == sizeof(double) ? DType::kFloat64 : DType::kFloat32;
}

// Calls visitor with a value of the type that a dtype's elements have in memory. Always inline, as what the visitor
// does is compiled for the instruction set of the function that it is inlined into.
template <class Visitor>
FUSEDREG_HD auto visit_dtype(DType dtype, Visitor&& visitor) {
  switch (dtype) {
    case DType::kFloat64:
      return visitor(double{});
    case DType::kBFloat16:
      return visitor(BFloat16{});
    case DType::kFloat16:
      return visitor(Float16{});
    default:
      return visitor(float{});
  }
}

FUSEDREG_HD float load(const float& x) { return x; }
FUSEDREG_HD double load(const double& x) { return x; }

FUSEDREG_HD float load(const BFloat16& x) { return bit_cast<float>(static_cast<std::uint32_t>(x.bits) << 16); }

// On a CPU, integer arithmetic and selects rather than half-precision instructions: it vectorises on every instruction
// set.
FUSEDREG_HD float load(const Float16& x) {
#if defined(__CUDA_ARCH__)
  float to;
  asm("cvt.f32.f16 %0, %1;" : "=f"(to) : "h"(x.bits));
  return to;
#else
  const std::uint32_t sign = static_cast<std::uint32_t>(x.bits & 0x8000u) << 16;
  const std::uint32_t magnitude = static_cast<std::uint32_t>(x.bits & 0x7fffu) << 13;
  const std::uint32_t exponent = magnitude & 0x0f800000u;
  const std::uint32_t normal = magnitude + ((127u - 15u) << 23);
  const std::uint32_t inf_or_nan = magnitude | 0x7f800000u;
  const std::uint32_t subnormal =
      bit_cast<std::uint32_t>(bit_cast<float>(magnitude + (113u << 23)) - bit_cast<float>(113u << 23));
  const std::uint32_t bits = exponent == 0x0f800000u ? inf_or_nan : exponent == 0 ? subnormal : normal;
  return bit_cast<float>(sign | bits);
#endif
}

FUSEDREG_HD void store(float& to, float x) { to = x; }
FUSEDREG_HD void store(double& to, double x) { to = x; }

// Round to nearest, ties to even; NaN stays NaN.
FUSEDREG_HD void store(BFloat16& to, float x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(to.bits) : "f"(x));
#else
  const std::uint32_t bits = bit_cast<std::uint32_t>(x);
  const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  to.bits = static_cast<std::uint16_t>(x != x ? 0x7fc0u : rounded);
#endif
}

FUSEDREG_HD void store(Float16& to, float x) {
#if defined(__CUDA_ARCH__)
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to.bits) : "f"(x));
#else
  const std::uint32_t bits = bit_cast<std::uint32_t>(x);
  const std::uint32_t sign = bits & 0x80000000u;
  const std::uint32_t magnitude = bits ^ sign;
  // Adding 0.5 makes the float unit round a half-precision subnormal to the place where its last bit is.
  const std::uint32_t half_bits = 126u << 23;
  const std::uint32_t subnormal =
      bit_cast<std::uint32_t>(bit_cast<float>(magnitude) + bit_cast<float>(half_bits)) - half_bits;
  const std::uint32_t normal = (magnitude - ((127u - 15u) << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const std::uint32_t inf_or_nan = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const std::uint32_t small = magnitude < (113u << 23) ? subnormal : normal;
  to.bits = static_cast<std::uint16_t>((magnitude >= (143u << 23) ? inf_or_nan : small) | (sign >> 16));
#endif
}

}  // namespace fusedreg
