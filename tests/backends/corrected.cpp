// Proves csrc/maths/corrected.h, whatever a GPU approximates within its bounds: for every significand, or every so
// many, and for all exponents. Scaling by powers of two is exact, so that the two together are every number.
//
//   corrected quotients STEP | roots STEP | exponents
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#define FUSEDREG_APPROXIMATIONS "approximations_model.h"
#include "maths/math.h"

using fusedreg::Approximations;

namespace {

constexpr double kSlack = 1 + 0x1p-20;

[[noreturn]] void fail(const char* what, double a, double b, double result) {
  std::printf("%s of %a, %a is %a, where approximations are %d, %d, %d floats off\n", what, a, b, result,
              Approximations::beside_reciprocal, Approximations::beside_root, Approximations::beside_inverse_root);
  std::exit(1);
}

// Whether a result that is no subnormal number is off by half of its last place at the most, but for the slack.
bool is_rounded(double result, double exact) {
  return std::abs(result - exact) <= std::ldexp(0.5 * kSlack, std::ilogb(exact) - 23);
}

void check_quotient(float a, float b) {
  const float result = fusedreg::divide(a, b);
  // In doubles, their product is exact, and so is its difference from a. That of the division is far below the slack.
  const double last_place = std::ldexp(1.0, (a >= b ? 0 : -1) - 23);
  if (!(std::abs(static_cast<double>(result) * b - a) <= 0.5 * kSlack * last_place * b))
    fail("a quotient", a, b, result);
}

// For significands a and b from 1 to 2: of a few a, and of that where the quotient is next to the middle of two floats.
void quotients(std::uint32_t step) {
  std::mt19937 draw(step);
  for (std::uint32_t i = 1u << 23; i < 1u << 24; i += step) {
    const std::uint32_t at = step == 1 ? i : i + draw() % step;
    if (at >= 1u << 24) break;
    const float b = std::ldexp(static_cast<float>(at), -23);
    std::vector<float> numerators = {1, b, std::nextafter(b, 0.0f), std::nextafter(b, 3.0f),
                                     std::nextafter(2.0f, 0.0f)};
    for (int k = 0; k < 4; ++k)
      numerators.push_back(std::ldexp(static_cast<float>((1u << 23) + draw() % (1u << 23)), -23));
    if (at % 2 == 1) {
      for (std::uint32_t rest : {at / 2, at / 2 + 1}) {  // of numerator * 2^24 over b, as integers
        std::uint64_t numerator = rest;
        for (int k = 0; k < 24; ++k) numerator = (numerator % 2 == 0 ? numerator : numerator + at) / 2;
        const float hard = std::ldexp(static_cast<float>(numerator), -23);
        if (2 * hard >= b) numerators.push_back(hard);
      }
    }
    for (int beside = -1; beside <= 1; ++beside) {
      Approximations::beside_reciprocal = beside;
      for (const float a : numerators) check_quotient(a, b);
    }
  }
  // What is a float is to come out.
  for (int i = 0; i < 1 << 20; ++i) {
    const float x = static_cast<float>(1 + draw() % 4095), y = static_cast<float>(1 + draw() % 4095);
    Approximations::beside_reciprocal = i % 3 - 1;
    if (fusedreg::divide(x * y, y) != x) fail("a quotient", x * y, y, fusedreg::divide(x * y, y));
  }
}

void roots(std::uint32_t step) {
  std::mt19937 draw(step);
  for (std::uint32_t i = 1u << 23; i < 3u << 23; i += step) {
    const std::uint32_t at = step == 1 ? i : i + draw() % step;
    const bool is_above_two = at >= 1u << 24;
    const float x = std::ldexp(static_cast<float>(is_above_two ? at - (1u << 23) : at), is_above_two ? -22 : -23);
    if (x >= 4) break;
    const double exact = std::sqrt(static_cast<double>(x));
    for (int beside_root = -2; beside_root <= 2; ++beside_root) {
      for (int beside_inverse_root = -3; beside_inverse_root <= 3; ++beside_inverse_root) {
        Approximations::beside_root = beside_root;
        Approximations::beside_inverse_root = beside_inverse_root;
        const float result = fusedreg::square_root(x);
        if (!is_rounded(result, exact)) fail("a root", x, 0, result);
      }
    }
  }
  for (int i = 1; i < 4096; ++i) {
    const float x = static_cast<float>(i);
    if (fusedreg::square_root(x * x) != x) fail("a root", x * x, 0, fusedreg::square_root(x * x));
  }
}

bool is_same(float a, float b) { return (a != a && b != b) || std::memcmp(&a, &b, sizeof(a)) == 0; }

// Whether it is what IEEE 754 demands of a result, but for the slack: infinities, NaNs and signs as well.
bool is_close(float result, float ieee, double exact) {
  if (is_same(result, ieee)) return true;
  if (result != result || ieee != ieee || std::signbit(result) != std::signbit(ieee)) return false;
  constexpr double kLargest = std::numeric_limits<float>::max();
  if (std::abs(exact) * (1 + 0x1p-22) > kLargest) return std::abs(result) >= kLargest * (1 - 0x1p-22);
  return std::abs(result - exact) <= 0x1p-24 * kSlack * std::abs(exact) + 0x1p-150 * kSlack;
}

// Of every exponent, subnormal numbers among them, and what is no number.
void exponents() {
  std::vector<float> all = {0.0f, INFINITY, NAN, std::numeric_limits<float>::max()};
  for (int exponent = -149; exponent < 128; ++exponent) {
    for (const float significand : {1.0f, 1.1920929e-7f + 1, 1.4142135f, 1.9999999f})
      all.push_back(std::ldexp(significand, exponent));
  }
  for (int beside = -1; beside <= 1; ++beside) {
    Approximations::beside_reciprocal = Approximations::beside_root = Approximations::beside_inverse_root = beside;
    for (const float b : all) {
      for (const float size : all) {
        for (const float a : {size, -size}) {
          const float result = fusedreg::divide(a, b);
          if (!is_close(result, a / b, static_cast<double>(a) / b)) fail("a quotient", a, b, result);
        }
      }
      for (const float x : {b, -b}) {
        const float result = fusedreg::square_root(x);
        if (!is_close(result, std::sqrt(x), std::sqrt(static_cast<double>(x)))) fail("a root", x, 0, result);
      }
    }
  }
}

}  // namespace

int main(int, char** arguments) {
  const std::uint32_t step = arguments[2] != nullptr ? std::atoi(arguments[2]) : 1;
  if (std::strcmp(arguments[1], "quotients") == 0) quotients(step);
  if (std::strcmp(arguments[1], "roots") == 0) roots(step);
  if (std::strcmp(arguments[1], "exponents") == 0) exponents();
}
