// Stage 7: the proximal operator of the penalties on units (rows, columns, a whole tensor), after the element
// penalties'.
//
// For one unit: argmin over x of sum e_i (x_i - y_i)^2 / (2 tau) + group_l1 * ||x||, subject to ||x|| <= max_unit_norm,
// where y is what stage 6 has left and e = d + tau * l2. Its minimiser is
//   y_i * e_i r / (e_i r + tau * group_l1)   with r = ||x||, the root of ||e y / (e r + tau * group_l1)|| = 1, or 0
//   where
//                                            ||e y|| <= tau * group_l1; Yuan and Lin, 10.1111/j.1467-9868.2005.00532.x
//   y_i * e_i / (e_i + mu)                   where that is too long, with the mu that makes the norm right.
// Both are y_i * e_i * r * t_i with t_i = 1 / (e_i r + m), and one of r and m is sought. As in More and Sorensen's
// "Computing a trust region step" (10.1137/0904038), the norm's inverse is concave in it: Newton's steps come to the
// root from below after the first, and need few.
#pragma once

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
inline UnitConstants make_unit_constants(const CommonHyperparameters& common, const Penalties& penalties,
                                         bool rule_has_metric, double tau) {
  UnitConstants c;
  if (penalties.mode() == PenaltyMode::kDecoupled) tau = common.lr;
  const bool shrinks = penalties.mode() != PenaltyMode::kSubgradient;
  c.threshold = shrinks && penalties.group_l1 != 0 ? tau * penalties.group_l1 : 0;
  c.ridge = shrinks && penalties.l2 != 0 ? tau * penalties.l2 : 0;
  c.in_metric = rule_has_metric && penalties.mode() == PenaltyMode::kProximal;
  c.furthest = 2 * tau;
  c.max_norm = penalties.max_unit_norm;
  return c;
}

// Sums over a unit, with t = 1 / (e r + m) and q = e y t: what Newton's steps are made of.
struct UnitSums {
  double squares = 0;  // q^2
  double by_r = 0;     // q^2 e t: minus half of the first's derivative by r
  double by_m = 0;     // q^2 t: by m
  // The largest |y| m t floor_ratio: how far a weight moves, beside what the safeguard allows.
  double furthest = INFINITY;
};

// Finds r and m of one unit. It is asked what sums it wants next, and given them, until it is done.
class UnitRoot {
 public:
  enum class Wants { kFirst, kSums, kNorm, kNothing };

  double r = 1, m = 0;       // x = y * e * r / (e r + m)
  bool is_identity = false;  // x = y
  bool is_guarded = false;   // and no x_i is farther from y_i than it may be
  Wants wants = Wants::kFirst;

  // The squares of ||y|| and ||e y||.
  void take_first(const UnitConstants& c, double y_squares, double scaled_squares, double precision) {
    precision_ = precision;
    norm_ = std::sqrt(y_squares);
    const double scaled = std::sqrt(scaled_squares);
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
    r = norm_ - c.threshold * norm_ / scaled;  // exact where e is the same everywhere
    if (!(r > 0)) r = 0;
    wants = Wants::kSums;
  }

  void take(const UnitConstants& c, const UnitSums& sums) {
    const double norm = std::sqrt(sums.squares);
    double& sought = is_projecting_ ? m : r;
    const double ratio = is_projecting_ ? norm / c.max_norm : norm;
    const double slope = is_projecting_ ? sums.by_m : sums.by_r;
    const double change = sums.squares * (ratio - 1) / slope;
    const double before = sought, next = before + change;
    const bool is_number = next < INFINITY;
    if (is_number) sought = next > 0 ? next : 0;
    // Steps are quadratic: the next one would be about the square of this.
    const bool is_close = std::abs(sought - before) <= precision_ * sought;
    if (is_number && !is_close && ++steps_ != kMostSteps) return;
    // Of the root before this step, which was not far.
    if (!is_projecting_ && is_close && sums.furthest * 1.01 <= c.furthest) is_guarded = false;
    is_projecting_ ? finish() : look_at_norm(c);
  }

  // The square of ||x||.
  void take_norm(const UnitConstants& c, double squares) {
    std::sqrt(squares) > c.max_norm ? seek_projection() : finish();
  }

 private:
  static constexpr int kMostSteps = 64;

  void finish() { wants = Wants::kNothing; }
  void finish_as_identity() {
    is_identity = true;
    finish();
  }
  void look_at_norm(const UnitConstants& c) {
    wants = norm_ > c.max_norm ? Wants::kNorm : Wants::kNothing;
    steps_ = 0;
  }
  void seek_projection() {
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

// A weight, from the root.
template <class A>
FUSEDREG_HD A unit_prox(A y, A e, A r, A m) {
  const A product = e * r, x = y * (product / (product + m));
  return x == A(0) ? A(0) : x;
}

// The same, not farther from y than the safeguard allows; where floor_ratio is not above zero, it allows everything.
template <class A>
FUSEDREG_HD A guarded_unit_prox(A y, A e, A furthest, A floor_ratio, A r, A m) {
  const A shrunk = unit_prox(y, e, r, m), nearest = absolute(y) - furthest / floor_ratio;
  return (floor_ratio > A(0)) & (nearest > absolute(shrunk)) ? copy_sign(nearest, y) : shrunk;
}

}  // namespace fusedreg
