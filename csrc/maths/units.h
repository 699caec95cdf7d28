// Stage 7: the proximal operator of the penalties on units (rows, columns, a whole tensor), after the element
// penalties'.
//
// For one unit: argmin over x of sum e_i (x_i - y_i)^2 / (2 tau) + group_l1 * ||x||, subject to ||x|| <= max_unit_norm,
// where y is what stage 6 has left and e = d + tau * l2. Its minimiser is
//   y_i * e_i r / (e_i r + tau * group_l1)   with r = ||x||, the root of ||e y / (e r + tau * group_l1)|| = 1, or 0
//   where
//                                            ||e y|| <= tau * group_l1; Yuan and Lin, 10.1111/j.1467-9868.2005.00532.x
//   y_i * e_i / (e_i + mu)                   where that is too long, with the mu that makes the norm right.
// Both are y_i * e_i * r * t_i with t_i = 1 / (e_i r + m), and one of r and m is sought. Without a metric e is the same
// everywhere, and both are closed forms of ||y||. Else, as in More and Sorensen's
// "Computing a trust region step" (10.1137/0904038), the norm's inverse is concave in it: Newton's steps come to the
// root from below after the first, and need few.
#pragma once

#include <type_traits>

#include "hyperparameters.h"

namespace fusedreg {

// Of a group's penalties on units, for a parameter; in double, as units are few.
struct UnitConstants {
  double threshold = 0;    // tau * group_l1
  double ridge = 0;        // tau * l2
  double furthest = 0;     // how far group_l1 may move a weight in a step: the safeguard, as the prox's floor
  double max_norm = 0;     // max_unit_norm
  bool in_metric = false;  // d is the rule's metric; else it is 1
};

FUSEDREG_HD bool has_units(const CommonHyperparameters& common, const Penalties& penalties) {
  return common.lr != 0 && (penalties.group_l1 != 0 || penalties.max_unit_norm != INFINITY);
}

// `tau` is the rule's.
FUSEDREG_HD UnitConstants make_unit_constants(const CommonHyperparameters& common, const Penalties& penalties,
                                              bool rule_has_metric, double tau) {
  UnitConstants c;
  if (penalties.mode() == PenaltyMode::kDecoupled) tau = common.lr;
  const bool shrinks = penalties.mode() != PenaltyMode::kSubgradient;
  c.threshold = shrinks && penalties.group_l1 != 0 ? tau * penalties.group_l1 : 0;
  c.ridge = shrinks && penalties.l2 != 0 ? tau * penalties.l2 : 0;
  c.in_metric = rule_has_metric && penalties.mode() == PenaltyMode::kProximal;
  c.furthest = c.in_metric ? 2 * tau : INFINITY;
  c.max_norm = penalties.max_unit_norm;
  return c;
}

// What `furthest` is for one weight, whose metric says floor_ratio. Below zero there is no floor.
template <class A>
FUSEDREG_HD A unit_furthest(A furthest, A floor_ratio) {
  return floor_ratio > A(0) ? divide(furthest, floor_ratio) : A(INFINITY);
}

// A weight, from the root. `furthest` is the safeguard's bound.
template <class A>
FUSEDREG_HD A unit_prox(A y, A e, A furthest, A r, A m) {
  const A product = e * r, shrunk = y * divide(product, product + m);
  const A nearest = absolute(y) - furthest;
  const A x = nearest > absolute(shrunk) ? copy_sign(nearest, y) : shrunk;
  return x == A(0) ? A(0) : x;
}

// 1 / x, for x >= 0; of a number, or of each in a vector.
template <class A>
FUSEDREG_HD A inverse(A x) {
  if constexpr (std::is_arithmetic_v<A>) {
    return divide(A(1), x);
  } else {
    return 1 / x;
  }
}

// The most sums over a unit's weights that its root wants at once.
constexpr int kUnitSums = 3;

// What one weight adds to the sums that a root wants. A is a number, or a vector of them. kFirst: the squares of ||y||
// and ||e y||.
template <class A, class Sum>
FUSEDREG_HD void add_first_sums(A y, A e, Sum& squares, Sum& scaled_squares) {
  const Sum weight = y, scaled = weight * static_cast<Sum>(e);
  squares += weight * weight;
  scaled_squares += scaled * scaled;
}

// For take_series: sums of y^2, y^2 / e and (y / e)^2. `moved` is y / e.
template <class A>
FUSEDREG_HD void add_series_sums(A y, A moved, A& squares, A& by_inverse, A& by_inverse_square) {
  squares += y * y;
  by_inverse += y * moved;
  by_inverse_square += moved * moved;
}

// kSums: with t = 1 / (e r + m) and q = e y t what Newton's steps are made of: q^2; q^2 e t, minus half of its
// derivative by r; q^2 t, by m. Returns t: a weight loses m t of itself.
template <class A, class Root, class Sum>
FUSEDREG_HD A add_newton_sums(A y, A e, Root r, Root m, Sum& squares, Sum& by_r, Sum& by_m) {
  const A t = inverse(e * r + m), share = e * t;
  const Sum q = y * share, square = q * q;
  squares += square;
  by_r += square * static_cast<Sum>(share);
  by_m += square * static_cast<Sum>(t);
  return t;
}

// kNorm: the square of ||x||.
template <class A>
FUSEDREG_HD void add_norm_sums(A y, A e, A furthest, A r, A m, double& squares) {
  const double x = unit_prox(y, e, furthest, r, m);
  squares += x * x;
}

// Half of the digits of A: the root then has them all, as Newton's steps are quadratic.
template <class A>
FUSEDREG_HD constexpr double unit_precision() {
  return sizeof(A) == sizeof(double) ? 1e-8 : 1e-4;
}

// How large u = m / (e r) may be, for each weight, where x = y / (1 + u) is taken from its series: the first term that
// is left out, u^4, is then too small to be seen.
template <class A>
FUSEDREG_HD constexpr double unit_series_limit() {
  return sizeof(A) == sizeof(double) ? 0x1p-14 : 0x1p-7;
}

// A weight, by the series: `strength` is m / r. Zeros are +0.0.
template <class A, class Root>
FUSEDREG_HD A unit_series(A y, A inverse, Root strength) {
  const A u = strength * inverse;
  return y - y * (u * (1 - u * (1 - u)));
}

// Finds r and m of one unit. It is asked what sums it wants next, and given them, until it is done.
class UnitRoot {
 public:
  enum class Wants { kFirst, kSums, kNorm, kNothing };

  double r = 1, m = 0;       // x = y * e * r / (e r + m)
  bool is_identity = false;  // x = y
  bool is_guarded = false;   // and no x_i is farther from y_i than it may be
  bool is_series = false;    // x by unit_series
  Wants wants = Wants::kFirst;

  // What each weight loses of itself where e is the same everywhere.
  FUSEDREG_HD double lost(double e) const { return m / (e * r + m); }

  // `furthest`, beside kSums: the largest |y| m t floor_ratio, which is how far a weight moves beside what the
  // safeguard allows; infinite where that is not known.
  FUSEDREG_HD void take(const UnitConstants& c, double precision, double sum, double second, double third,
                        double furthest = INFINITY) {
    precision_ = precision;
    if (wants == Wants::kFirst) {
      take_first(c, sum, second);
    } else if (wants == Wants::kSums) {
      take_sums(c, sum, is_projecting_ ? third : second, furthest);
    } else if (wants == Wants::kNorm) {
      square_root(sum) > c.max_norm ? seek_projection() : finish();
    }
  }

  // In place of kFirst: where e is the same everywhere, and ||y|| is all there is to know.
  FUSEDREG_HD void take_norm(const UnitConstants& c, double y_squares) {
    norm_ = square_root(y_squares);
    if (!(norm_ < INFINITY) || norm_ == 0) return finish_as_identity();  // a NaN is to be seen
    const double e = 1 + c.ridge;
    m = c.threshold;
    r = norm_ - m / e;
    if (!(r > 0)) r = 0;
    if (r > c.max_norm) {
      m = e * (norm_ / c.max_norm - 1);
      r = 1;
    }
    is_identity = m == 0;
    finish();
  }

  // Before kFirst, where there is a largest norm alone: most units keep to it.
  FUSEDREG_HD void take_norm_alone(const UnitConstants& c, double y_squares) {
    if (square_root(y_squares) <= c.max_norm) finish_as_identity();
  }

  // Before kFirst: if the penalty moves each weight little, r is a series in u = m / (e ||y||), and what is left out of
  // it and of unit_series moves x by 3 u^4 at most. `furthest`: the largest |y| / e * floor_ratio.
  FUSEDREG_HD void take_series(const UnitConstants& c, double limit, double y_squares, double by_inverse,
                               double by_inverse_square, double largest_inverse, double furthest) {
    const double norm = square_root(y_squares), scale = c.threshold / y_squares;
    const double first = scale * by_inverse / norm, second = scale * scale * by_inverse_square;
    const double root = norm * (1 - first + 1.5 * (second - first * first)), strength = c.threshold / root;
    // Not where one is a NaN, or norm is infinite. A root above norm is none, of a series that does not converge.
    const bool is_small = strength * largest_inverse <= limit && strength * furthest <= c.furthest;
    if (!is_small || !(root > 0 && root <= norm) || !(norm < INFINITY) || norm > c.max_norm) return;
    r = root;
    m = c.threshold;
    is_series = true;
    finish();
  }

 private:
  static constexpr int kMostSteps = 64;

  FUSEDREG_HD void take_first(const UnitConstants& c, double y_squares, double scaled_squares) {
    if (!c.in_metric) return take_norm(c, y_squares);
    norm_ = square_root(y_squares);
    const double scaled = square_root(scaled_squares);
    if (!(norm_ < INFINITY) || !(scaled < INFINITY) || norm_ == 0) return finish_as_identity();  // a NaN is to be seen
    if (c.threshold == 0) {
      is_identity = true;
      return norm_ > c.max_norm ? seek_projection() : finish();
    }
    m = c.threshold;
    is_guarded = true;
    if (scaled <= c.threshold) {
      r = 0;
      return look_at_norm(c);
    }
    r = norm_ - c.threshold * norm_ / scaled;  // it, where e is the same everywhere
    if (!(r > 0)) r = 0;
    wants = Wants::kSums;
  }

  FUSEDREG_HD void take_sums(const UnitConstants& c, double squares, double slope, double furthest) {
    const double norm = square_root(squares);
    const double ratio = is_projecting_ ? norm / c.max_norm : norm;
    const double change = squares * (ratio - 1) / slope;
    const double before = is_projecting_ ? m : r, next = before + change;
    const bool is_number = next < INFINITY;
    const double sought = !is_number ? before : next > 0 ? next : 0;
    is_projecting_ ? m = sought : r = sought;
    // Steps are quadratic: the next one would be about the square of this. And no step mends what the sums' roundings
    // make of the ratio: of a unit that is just over its largest norm, that is all there is.
    const bool is_close =
        absolute(sought - before) <= precision_ * sought || absolute(ratio - 1) <= 32 * precision_ * precision_;
    if (is_number && !is_close && ++steps_ != kMostSteps) return;
    // As the weights moved with the root before this step, which was not far.
    if (!is_projecting_ && is_close && furthest * 1.01 <= c.furthest) is_guarded = false;
    is_projecting_ ? finish() : look_at_norm(c);
  }

  FUSEDREG_HD void finish() { wants = Wants::kNothing; }
  FUSEDREG_HD void finish_as_identity() {
    is_identity = true;
    finish();
  }
  FUSEDREG_HD void look_at_norm(const UnitConstants& c) {
    wants = norm_ > c.max_norm ? Wants::kNorm : Wants::kNothing;
    steps_ = 0;
  }
  FUSEDREG_HD void seek_projection() {
    is_identity = is_guarded = false;
    is_projecting_ = true;
    r = 1;
    m = 0;
    steps_ = 0;
    wants = Wants::kSums;
  }

  double norm_ = 0, precision_ = 0;
  int steps_ = 0;
  bool is_projecting_ = false;
};

}  // namespace fusedreg
