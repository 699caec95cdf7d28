// In place of csrc/maths/approximations.h, on a CPU: what a GPU may approximate, which is any number within the bounds
// of NVIDIA's "PTX ISA". Which one that is, is drawn by lot from the bits of the argument, or said by a test.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

namespace fusedreg {

constexpr int kDrawn = 1000;  // in place of a number of places

struct Approximations {
  // How many floats beside the nearest one each result is, as far as the bounds allow.
  static inline int beside_reciprocal = kDrawn, beside_root = kDrawn, beside_inverse_root = kDrawn;

  static float reciprocal(float x) {
    x = flushed(x);
    if (x == 0 || !(absolute(x) < INFINITY)) return 1 / x;
    const double exact = 1 / static_cast<double>(x);
    return flushed(within(exact, std::ldexp(1.0, std::ilogb(exact) - 23), beside_reciprocal, x));
  }
  static float root(float x) {
    x = flushed(x);
    if (!(x > 0 && x < INFINITY)) return std::sqrt(x);
    const double exact = std::sqrt(static_cast<double>(x));
    return within(exact, exact * 0x1p-23, beside_root, x);
  }
  static float inverse_root(float x) {
    x = flushed(x);
    if (!(x > 0 && x < INFINITY)) return 1 / std::sqrt(x);
    const double exact = 1 / std::sqrt(static_cast<double>(x));
    return within(exact, exact * 1.0717734625362931 * 0x1p-23, beside_inverse_root, x);
  }

 private:
  static float flushed(float x) { return absolute(x) < std::numeric_limits<float>::min() ? std::copysign(0.0f, x) : x; }

  static float within(double exact, double bound, int beside, float x) {
    if (beside == kDrawn) beside = static_cast<int>((bit_cast<std::uint32_t>(x) * 0x9e3779b9u >> 16) % 7) - 3;
    const float nearest = static_cast<float>(exact);
    for (;;) {
      const float result = bit_cast<float>(bit_cast<std::uint32_t>(nearest) + static_cast<std::uint32_t>(beside));
      if (beside == 0 || std::abs(result - exact) <= bound) return result;
      beside -= beside > 0 ? 1 : -1;
    }
  }
};

}  // namespace fusedreg
