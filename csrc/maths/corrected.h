// Division and square root of floats on a GPU, without a branch. The compiler's own call a slow path where an operand
// is out of the ordinary, and the root of a zero always is.
//
// `Approximations` are what the hardware has; see approximations.h. What is made of them is not wrong by more than
// 2^-24 * (1 + 2^-20), relative, or half the smallest subnormal number, and is exact where a float is the exact result.
// tests/backends/test_corrected.py proves it, for all approximations that keep to their bounds.
#pragma once

namespace fusedreg {

// a / b, for b >= 0. Within 2^-22 of the largest number it may overflow.
template <class Approximations>
FUSEDREG_HD float corrected_quotient(float a, float b) {
  // No reciprocal and no remainder leaves the range then, unless the quotient does.
  const float power = absolute(a) > 0x1p64f || b > 0x1p64f ? 0x1p-32f : 0x1p32f;
  a *= power;
  b *= power;
  const float reciprocal = Approximations::reciprocal(b), quotient = a * reciprocal;
  const float excess = fmaf(b, quotient, -a);  // not the remainder, its negative: -0 / b would become +0
  const float corrected = fmaf(excess, -reciprocal, quotient);
  return corrected == corrected ? corrected : quotient;  // b is 0, or something is infinite
}

template <class Approximations>
FUSEDREG_HD float corrected_root(float x) {
  const bool is_small = x < 0x1p-64f;
  x = is_small ? x * 0x1p64f : x;
  const float root = Approximations::root(x), excess = fmaf(root, root, -x);
  float corrected = fmaf(excess, -0.5f * Approximations::inverse_root(x), root);
  corrected = corrected == corrected ? corrected : root;  // of 0 and of infinity
  return is_small ? corrected * 0x1p-32f : corrected;
}

}  // namespace fusedreg
