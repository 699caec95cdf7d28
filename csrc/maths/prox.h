// Stage 6: the proximal operator of all element penalties and constraints, fused. Each is the identity at its default.
#pragma once

#include "hyperparameters.h"

namespace fusedreg {

// What a kernel's prox can do.
enum class ProxStages {
  kNone,             // no penalty, or one that enters through the gradient
  kShrink,           // l1, l2
  kSelect,           // the box, whether a weight is worth l0, frozen zeros: no weight is shrunk
  kShrinkAndSelect,  // both
  kFade,             // and the minimax concave penalty
};

// What a kernel's loop sees to of the box, l0 and frozen zeros. One of them alone takes less.
enum class Further { kAll, kNone, kBox, kL0, kFreeze };

struct ProxKind {
  ProxStages stages;
  bool in_metric;  // tau / d is the step size, element by element, in the metric of an adaptive step; else one for all
};

// What a rule's step says of the metric that it was taken in.
template <class A>
struct Metric {
  A d;  // the step is tau / d times a gradient
  // What the safeguard's floor goes by, in proportion: 1, or d over what d would be, where d may vanish at a solution.
  A floor_ratio = A(1);
};

// The metric of a rule that has none.
template <class A>
FUSEDREG_HD Metric<A> no_metric() {
  return {A(1)};
}

// What the step of a rule says that leaves its division to the prox, which has one of its own: w is to move by
// -numerator / d.
template <class A>
struct Quotient {
  A numerator;
  Metric<A> metric;
};

template <class A>
struct ProxConstants {
  A tau, l1, l2, shrink;
  A half_l1, half_l2;  // of the floor
  A inv_half_l1;
  A frozen;  // a weight that is equal to it stays zero: 0, or a NaN
  // Of the further stages. Objectives are multiplied by 2 * tau, and in a metric by d.
  A half_inv_gamma, tau_over_gamma, least_d;  // 1 / (2 gamma), tau / gamma, the least d that leaves it convex
  A knee, height;                             // gamma * l1, from where on the minimax concave penalty is flat; how high
  A firm_up_to, firm_shrink;                  // as knee and shrink, for the candidate
  A l0;                                       // what a weight costs that is not zero; or a NaN
  A lower, upper;
};

// Of which x is a quotient.
constexpr bool shrinks(ProxStages stages) {
  return stages == ProxStages::kShrink || stages == ProxStages::kShrinkAndSelect;
}

// The problem of one weight, argmin over x of d (x - z)^2 / (2 tau) + l1, l2 and l0, times a number > 0.
template <class A>
struct ProxProblem {
  A scaled, ridge, unit;  // d * z, d + tau * l2 and 1, each times that number
};

// The floor keeps a weight that never saw a gradient (d = eps) from vanishing at once: the penalty moves no weight by
// more than 2 * tau a step. It is half of the penalty's slope at w_old; more, and the elastic net's solutions are no
// longer exact.
template <ProxStages kStages, class A>
FUSEDREG_HD A prox_metric(const Metric<A>& metric, A w_old, const ProxConstants<A>& c) {
  const A size = absolute(w_old);
  A slope = fetch(c.half_l1);
  if constexpr (kStages == ProxStages::kFade) {
    slope = slope - fetch(c.half_inv_gamma) * size;
    slope = slope > A(0) ? slope : A(0);
  }
  const A floor = (slope + fetch(c.half_l2) * size) * metric.floor_ratio;
  // A floor is a NaN where the weight is infinite. Where d is one, so is z.
  const A d = max_keeping_nan_of_second(metric.d, floor);
  // The metric that keeps the problem convex.
  return kStages == ProxStages::kFade && fetch(c.least_d) > d ? fetch(c.least_d) : d;
}

// soft(z, tau * l1) / (1 + tau * l2), with tau / d for tau in a metric, multiplied out.
template <bool kInMetric, class A>
FUSEDREG_HD A shrink(const ProxProblem<A>& of, A pulled, const ProxConstants<A>& c) {
  return kInMetric ? divide(pulled, of.ridge) : pulled * c.shrink;
}

template <bool kInMetric, class A>
FUSEDREG_HD A shrink(const ProxProblem<A>& of, const ProxConstants<A>& c) {
  return shrink<kInMetric>(of, soft_threshold(of.scaled, c.tau * c.l1 * of.unit), c);
}

// x, within the box; or zero, where it gains no more than l0 costs. Not where one is a NaN.
template <bool kInMetric, Further kFurther, class A>
FUSEDREG_HD A shrink_and_select(const ProxProblem<A>& of, const ProxConstants<A>& c) {
  const A pulled = soft_threshold(of.scaled, fetch(c.tau) * fetch(c.l1) * of.unit);
  A x = shrink<kInMetric>(of, pulled, c);
  if constexpr (kFurther == Further::kFreeze) return x;
  if constexpr (kFurther != Further::kL0) x = clamp(x, fetch(c.lower), fetch(c.upper));
  if constexpr (kFurther == Further::kBox) return x;
  // Both have one sign: where l0 acts, a box has zero in it. Where none has moved x, it is pulled / ridge.
  const A gain = kFurther == Further::kL0 ? x * pulled : x * (A(2) * pulled - x * of.ridge);
  return gain <= fetch(c.l0) * of.unit ? A(0) : x;
}

// First the best x that is not zero, by the firm threshold; then whether zero is better.
template <bool kInMetric, Further kFurther, class A>
FUSEDREG_HD A fade(A z, A d, const ProxConstants<A>& c) {
  const A scaled = d * z, size_of_scaled = absolute(scaled), threshold = fetch(c.tau) * fetch(c.l1);
  const A ridge = d + fetch(c.tau) * fetch(c.l2), curvature = ridge - fetch(c.tau_over_gamma);
  const bool is_flat = size_of_scaled > fetch(c.firm_up_to) * ridge;
  const A pulled = is_flat ? scaled : soft_threshold(scaled, threshold);
  // Read whether they are needed or not: a GPU would branch.
  const A height = fetch(c.height), flat_shrink = fetch(c.shrink), firm_shrink = fetch(c.firm_shrink);
  A x = kInMetric ? divide(pulled, is_flat ? ridge : curvature) : pulled * (is_flat ? flat_shrink : firm_shrink);
  if constexpr (kInMetric) x = is_flat & (fetch(c.l2) == A(0)) ? z : x;  // to the bit: d * z / d is not always z
  if constexpr (kFurther == Further::kNone) return x;
  x = clamp(x, fetch(c.lower), fetch(c.upper));
  const A size = absolute(x);
  const bool is_beyond = size > fetch(c.knee);
  const A slope = size_of_scaled - (is_beyond ? A(0) : threshold);
  const A gain = size * (A(2) * slope - size * (is_beyond ? ridge : curvature)) - (is_beyond ? height : A(0));
  return gain <= fetch(c.l0) ? A(0) : x;
}

// z, or a bound; or zero, where it gains no more than `price`. `d` is the metric, times any number that the price has.
template <Further kFurther, class A>
FUSEDREG_HD A select(A z, A d, A price, const ProxConstants<A>& c) {
  if constexpr (kFurther == Further::kFreeze) return z;
  const A x = kFurther == Further::kL0 ? z : clamp(z, fetch(c.lower), fetch(c.upper));
  if constexpr (kFurther == Further::kBox) return x;
  const A gain = d * (kFurther == Further::kL0 ? x * x : x * (A(2) * z - x));  // one sign, as above
  return gain <= price ? A(0) : x;
}

template <ProxStages kStages, Further kFurther, class A>
FUSEDREG_HD A keep_frozen(A x, A w_old, A z, const ProxConstants<A>& c) {
  constexpr bool kFreezes = kFurther == Further::kAll || kFurther == Further::kFreeze;
  if constexpr (kStages < ProxStages::kSelect || !kFreezes) return x;
  const bool is_frozen = (w_old == fetch(c.frozen)) & (z == z);  // a NaN is to be seen
  return is_frozen ? A(0) : x;
}

template <ProxStages kStages, bool kInMetric, Further kFurther, class A>
FUSEDREG_HD A prox_of_problem(const ProxProblem<A>& problem, A w_old, const ProxConstants<A>& c) {
  constexpr bool kSelects = kStages == ProxStages::kShrinkAndSelect;
  const A x = kSelects ? shrink_and_select<kInMetric, kFurther>(problem, c) : shrink<kInMetric>(problem, c);
  return keep_frozen<kStages, kFurther>(x, w_old, problem.scaled, c);
}

template <ProxStages kStages, bool kInMetric, Further kFurther, class A>
FUSEDREG_HD A prox(A z, A w_old, const Metric<A>& metric, const ProxConstants<A>& c) {
  if constexpr (kStages == ProxStages::kNone) {
    return z;
  } else if constexpr (kStages == ProxStages::kSelect) {
    const A x = select<kFurther>(z, kInMetric ? metric.d : A(1), fetch(c.l0), c);
    return keep_frozen<kStages, kFurther>(x, w_old, z, c);
  } else {
    const A d = kInMetric ? prox_metric<kStages>(metric, w_old, c) : A(1);
    if constexpr (kStages == ProxStages::kFade) {
      return keep_frozen<kStages, kFurther>(fade<kInMetric, kFurther>(z, d, c), w_old, z, c);
    }
    return prox_of_problem<kStages, kInMetric, kFurther>({d * z, d + fetch(c.tau) * fetch(c.l2), A(1)}, w_old, c);
  }
}

// Moves w by a quotient and takes the prox, without l2 and with a floor that is the same for all: what the prox would
// divide by is the larger of d and it, and the smaller of their inverses is known.
template <ProxStages kStages, Further kFurther, class A>
FUSEDREG_HD A prox_by_inverse(A w, const Quotient<A>& by, A w_old, const ProxConstants<A>& c) {
  const A inverse = divide(A(1), by.metric.d), z = w - by.numerator * inverse;
  const A inverse_in_prox = inverse < fetch(c.inv_half_l1) ? inverse : fetch(c.inv_half_l1);
  A x = soft_threshold(z, fetch(c.tau) * fetch(c.l1) * inverse_in_prox);
  if constexpr (kStages == ProxStages::kShrinkAndSelect) {
    x = select<kFurther>(x, A(1), fetch(c.l0) * inverse_in_prox, c);
  }
  return keep_frozen<kStages, kFurther>(x, w_old, z, c);
}

// The same in general: with one division for both, where the prox has one. w_old is w before its decay.
template <ProxStages kStages, bool kInMetric, Further kFurther, class A>
FUSEDREG_HD A prox_of_quotient(A w, const Quotient<A>& by, A w_old, const ProxConstants<A>& c) {
  if constexpr (!kInMetric || !shrinks(kStages)) {
    const A z = w - divide(by.numerator, by.metric.d);
    return prox<kStages, kInMetric, kFurther>(z, w_old, by.metric, c);
  } else {
    // Where the floor does not act, step and prox share their metric. Where it does, all is multiplied by the step's.
    const A moved = by.metric.d * w - by.numerator;
    const A d = prox_metric<kStages>(by.metric, w_old, c), ridge = d + fetch(c.tau) * fetch(c.l2);
    const bool is_at_floor = d != by.metric.d;
    const A floor = is_at_floor ? d : A(1), unit = is_at_floor ? by.metric.d : A(1);
    return prox_of_problem<kStages, kInMetric, kFurther>({floor * moved, ridge * unit, unit}, w_old, c);
  }
}

// What acts in a step, the same for all its elements.
struct Acting {
  Further further;
  bool l2;
};

template <class A>
FUSEDREG_HD Acting acting_in(const ProxConstants<A>& c) {
  const bool is_boxed = c.lower != -A(INFINITY) || c.upper != A(INFINITY);
  const bool has_l0 = c.l0 == c.l0, freezes = c.frozen == c.frozen;  // else a NaN
  const Further alone = is_boxed ? Further::kBox : has_l0 ? Further::kL0 : freezes ? Further::kFreeze : Further::kNone;
  return {is_boxed + has_l0 + freezes > 1 ? Further::kAll : alone, c.l2 != A(0)};
}

FUSEDREG_HD ProxKind prox_kind(const CommonHyperparameters& common, const Penalties& penalties, bool rule_has_metric) {
  if (common.lr == 0) return {ProxStages::kNone, false};
  const bool acts = penalties.mode() != PenaltyMode::kSubgradient, shrinks = acts && penalties.shrinks();
  const bool selects = (acts && penalties.l0 != 0) || penalties.is_boxed() || penalties.freeze_zeros != 0;
  const bool in_metric = acts && penalties.any() && rule_has_metric && penalties.mode() == PenaltyMode::kProximal;
  if (acts && penalties.fades()) return {ProxStages::kFade, in_metric};
  if (selects) return {shrinks ? ProxStages::kShrinkAndSelect : ProxStages::kSelect, in_metric};
  return {shrinks ? ProxStages::kShrink : ProxStages::kNone, in_metric};
}

// `tau` is the rule's.
template <class A>
FUSEDREG_HD void fill_prox(ProxConstants<A>& c, const CommonHyperparameters& common, const Penalties& penalties,
                           bool rule_has_metric, double tau) {
  if (penalties.mode() == PenaltyMode::kDecoupled) tau = common.lr;
  const bool shrinks = penalties.any() && penalties.mode() != PenaltyMode::kSubgradient;
  if (!shrinks) tau = 0;  // an infinite one times no penalty would be a NaN
  const double l1 = shrinks ? penalties.l1 : 0, l2 = shrinks ? penalties.l2 : 0, l0 = shrinks ? penalties.l0 : 0;
  c.tau = static_cast<A>(tau);
  c.l1 = static_cast<A>(l1);
  c.l2 = static_cast<A>(l2);
  c.half_l1 = static_cast<A>(l1 / 2);
  c.half_l2 = static_cast<A>(l2 / 2);
  c.inv_half_l1 = static_cast<A>(2 / l1);
  c.shrink = static_cast<A>(1 / (1 + tau * l2));  // one division a step, not one an element

  const bool fades = shrinks && penalties.fades();
  const double inv_gamma = fades ? 1 / penalties.mcp_gamma : 0, knee = fades ? penalties.mcp_gamma * l1 : INFINITY;
  c.half_inv_gamma = static_cast<A>(inv_gamma / 2);
  c.tau_over_gamma = static_cast<A>(tau * inv_gamma);
  c.least_d = static_cast<A>(2 * tau * inv_gamma);
  c.knee = static_cast<A>(knee);
  c.height = static_cast<A>(fades ? tau * knee * l1 : 0);
  // With one step size for all, the penalty may be more concave than the quadratic is convex: then there is nothing
  // between zero and the flat part. In a metric, least_d sees to it.
  const bool in_metric = rule_has_metric && penalties.mode() == PenaltyMode::kProximal;
  const double curvature = 1 + tau * (l2 - inv_gamma);
  const bool is_firm = in_metric || curvature > 0;
  c.firm_up_to = static_cast<A>(l1 != 0 && is_firm ? knee : -1);
  c.firm_shrink = is_firm ? static_cast<A>(1 / curvature) : c.shrink;
  // Where the problem is convex, x is not worse than zero: no gain is below a NaN, not even one that a far bound makes
  // -infinity.
  c.l0 = static_cast<A>(l0 != 0 || !is_firm ? 2 * tau * l0 : NAN);
  c.lower = static_cast<A>(penalties.lower);
  c.upper = static_cast<A>(penalties.upper);
  c.frozen = penalties.freeze_zeros != 0 ? A(0) : static_cast<A>(NAN);
}

}  // namespace fusedreg
