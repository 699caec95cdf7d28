// States in 8 bits: a code for each element, and a scale for each block of them. fusedreg/codes.py says what
// they mean, and has the same functions for the oracle.
#pragma once

#include "storage.h"

namespace fusedreg {

// Counted where the codes are in memory, from the first one on.
constexpr std::int64_t kBlockOfCodes = 256;

constexpr std::int64_t scale_count(std::int64_t codes) { return (codes + kBlockOfCodes - 1) / kBlockOfCodes; }

constexpr bool is_code(DType dtype) { return dtype == DType::kInt8 || dtype == DType::kUInt8; }

// int8: an element is code * scale; uint8: its root is.
template <class Code>
inline constexpr bool kIsRoot = std::is_unsigned_v<Code>;
template <class Code>
inline constexpr float kLargestCode = kIsRoot<Code> ? 255 : 127;
// Below, elements are zeros, or, of roots, the smallest that there is: its square is a normal number.
template <class Code>
inline constexpr float kSmallestScale = kIsRoot<Code> ? 0x1p-63f : 0x1p-100f;

constexpr float kOneInFixedPoint = 1 << 23;
constexpr std::int32_t kHalfInFixedPoint = 1 << 22;

// Of a block whose largest number, or root, is above zero and finite. Of so few digits that its products with codes are
// exact: what is decoded, encoded and decoded is the same.
template <class Code>
FUSEDREG_HD float scale_of(float largest) {
  const float scale = bit_cast<float>(bit_cast<std::uint32_t>(largest / kLargestCode<Code>) & 0xffffff00u);
  return scale < kSmallestScale<Code> ? kSmallestScale<Code> : scale;
}

// `code` is a float, or a vector of them.
template <class Code, class F>
FUSEDREG_HD F decode(F code, float scale) {
  const F x = code * scale;
  return kIsRoot<Code> ? x * x : x;
}

// `fixed`: a code, or what is between two, in fixed point; `up` is what it is rounded up by. A root that is not zero
// stays so: a step divides by it. In integers, which no compiler contracts.
template <class Code>
FUSEDREG_HD Code round_code(float fixed, float number, std::int32_t up) {
  if constexpr (kIsRoot<Code>) {
    const float at_least = fixed < kOneInFixedPoint ? kOneInFixedPoint : fixed;
    fixed = number > 0 ? at_least : fixed;
  }
  return static_cast<Code>((static_cast<std::int32_t>(fixed) + up) >> 23);
}

// To the nearest; `inverse` is kOneInFixedPoint over the scale.
template <class Code>
FUSEDREG_HD Code encode(float number, float inverse) {
  return round_code<Code>(number * inverse, number, kHalfInFixedPoint);
}

// `random` of 16 bits. The quotient, and not a product: what is a code already stays it.
template <class Code>
FUSEDREG_HD Code encode_stochastically(float number, float scale, std::uint32_t random) {
  float code = number / scale;
  code = code > kLargestCode<Code> ? kLargestCode<Code> : code;
  if constexpr (!kIsRoot<Code>) code = code < -kLargestCode<Code> ? -kLargestCode<Code> : code;
  return round_code<Code>(code * kOneInFixedPoint, number, static_cast<std::int32_t>(random * 128 + 64));
}

}  // namespace fusedreg
