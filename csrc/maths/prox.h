// Stage 6: the proximal operator of all element penalties and constraints, fused. Each is the identity at its default.
#pragma once

#include "hyperparameters.h"

namespace fusedreg {

// What a kernel's prox can do; each kind can do what those before it can, and is slower.
enum class ProxStages {
  kNone,    // no penalty, or one that enters through the gradient
  kShrink,  // l1, l2, frozen zeros
  kChoose,  // the box, and whether a weight is worth l0
  kFade,    // the minimax concave penalty
};

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

template <class A>
struct ProxConstants {
  A tau, l1, l2, shrink;
  A frozen;  // a weight that is equal to it stays zero: 0, or a NaN
  // Of the further stages. Objectives are multiplied by 2 * tau, and in a metric by d.
  A inv_gamma, tau_over_gamma, least_d;  // 1 / gamma, tau / gamma, the least d that leaves the problem convex
  A knee, height;                        // gamma * l1, from where on the minimax concave penalty is flat; how high
  A firm_up_to, firm_shrink;             // as knee and shrink, for the candidate
  A l0;                                  // what a weight costs that is not zero
  A lower, upper;
};

// On a GPU, whose threads have few registers, frozen zeros are one of the further stages, and the constants of those
// are read where they are needed.
#if defined(__CUDA_ARCH__)
constexpr ProxStages kFreezes = ProxStages::kChoose;
#else
constexpr ProxStages kFreezes = ProxStages::kShrink;
#endif

template <class A>
FUSEDREG_HD A fetch(const A& constant) {
#if defined(__CUDA_ARCH__)
  return *const_cast<const volatile A*>(&constant);
#else
  return constant;
#endif
}

// With the minimax concave penalty. First the best x that is not zero, by the firm threshold; then whether zero is
// better.
template <bool kInMetric, class A>
FUSEDREG_HD A prox_that_fades(A z, A w_old, const Metric<A>& metric, const ProxConstants<A>& c) {
  A scaled = z, ridge = A(1) + fetch(c.tau) * fetch(c.l2);
  if constexpr (kInMetric) {
    // The floor is half of the penalty's slope at w_old, as below; and the metric that keeps the problem convex.
    const A size = absolute(w_old), fading = fetch(c.l1) - fetch(c.inv_gamma) * size;
    const A floor = A(0.5) * ((fading > A(0) ? fading : A(0)) + fetch(c.l2) * size);
    const A d = max_keeping_nan(max_keeping_nan(metric.d, floor * metric.floor_ratio), fetch(c.least_d));
    scaled = d * z;
    ridge = d + fetch(c.tau) * fetch(c.l2);
  }
  const A threshold = fetch(c.tau) * fetch(c.l1), curvature = ridge - fetch(c.tau_over_gamma);
  const bool is_flat = absolute(scaled) > fetch(c.firm_up_to) * ridge;
  const A pulled = is_flat ? scaled : soft_threshold(scaled, threshold);
  A x =
      kInMetric ? pulled / (is_flat ? ridge : curvature) : pulled * (is_flat ? fetch(c.shrink) : fetch(c.firm_shrink));
  if constexpr (kInMetric) x = is_flat & (fetch(c.l2) == A(0)) ? z : x;  // to the bit: d * z / d is not always z
  x = x < fetch(c.lower) ? fetch(c.lower) : x;
  x = x > fetch(c.upper) ? fetch(c.upper) : x;
  const A size = absolute(x), pull = A(2) * absolute(scaled);
  const bool is_beyond = size > fetch(c.knee);
  const A gain = size * (pull - (is_beyond ? A(0) : A(2) * threshold) - size * (is_beyond ? ridge : curvature)) -
                 (is_beyond ? fetch(c.height) : A(0));
  const bool is_zero = gain <= fetch(c.l0);  // not where one is a NaN
  return is_zero ? A(0) : x;
}

// soft(z, tau * l1) / (1 + tau * l2). In a metric d, tau becomes tau / d; multiplied out, it is one division, not two.
template <ProxStages kStages, bool kInMetric, class A>
FUSEDREG_HD A prox_of_penalties(A z, A w_old, const Metric<A>& metric, const ProxConstants<A>& c) {
  if constexpr (kStages == ProxStages::kFade) return prox_that_fades<kInMetric>(z, w_old, metric, c);
  A scaled = z, ridge = A(1);
  if constexpr (kInMetric) {
    // The floor keeps a weight that never saw a gradient (d = eps) from vanishing at once: the penalty moves no
    // weight by more than 2 * tau a step. With a factor above 1/2 the elastic net's solutions are no longer exact.
    const A floor = A(0.5) * (c.l1 + c.l2 * absolute(w_old));
    const A d = max_keeping_nan(metric.d, floor * metric.floor_ratio);
    scaled = d * z;
    ridge = d;
  }
  const A pulled = soft_threshold(scaled, c.tau * c.l1);
  ridge = ridge + c.tau * c.l2;
  A x = kInMetric ? pulled / ridge : pulled * c.shrink;
  if constexpr (kStages == ProxStages::kShrink) return x;
  if constexpr (kInMetric) x = (pulled == scaled) & (c.l2 == A(0)) ? z : x;  // to the bit: d * z / d is not always z
  x = x < fetch(c.lower) ? fetch(c.lower) : x;
  x = x > fetch(c.upper) ? fetch(c.upper) : x;
  const A size = absolute(x), gain = size * (A(2) * absolute(pulled) - size * ridge);
  return gain <= fetch(c.l0) ? A(0) : x;  // not where one is a NaN
}

template <ProxStages kStages, bool kInMetric, class A>
FUSEDREG_HD A prox(A z, A w_old, const Metric<A>& metric, const ProxConstants<A>& c) {
  if constexpr (kStages == ProxStages::kNone) return z;
  const A x = prox_of_penalties<kStages, kInMetric>(z, w_old, metric, c);
  if constexpr (kStages < kFreezes) return x;
  const bool is_frozen = (w_old == fetch(c.frozen)) & (z == z);  // a NaN is to be seen
  return is_frozen ? A(0) : x;
}

FUSEDREG_HD ProxKind prox_kind(const CommonHyperparameters& common, const Penalties& penalties, bool rule_has_metric) {
  if (common.lr == 0) return {ProxStages::kNone, false};
  const bool acts = penalties.mode() != PenaltyMode::kSubgradient, shrinks = acts && penalties.any();
  const bool in_metric = shrinks && rule_has_metric && penalties.mode() == PenaltyMode::kProximal;
  if (acts && penalties.fades()) return {ProxStages::kFade, in_metric};
  if ((shrinks && penalties.l0 != 0) || penalties.is_boxed()) return {ProxStages::kChoose, in_metric};
  if (penalties.freeze_zeros != 0) return {kFreezes, in_metric};
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
  c.shrink = static_cast<A>(1 / (1 + tau * l2));  // one division a step, not one an element

  const bool fades = shrinks && penalties.fades();
  const double inv_gamma = fades ? 1 / penalties.mcp_gamma : 0, knee = fades ? penalties.mcp_gamma * l1 : INFINITY;
  c.inv_gamma = static_cast<A>(inv_gamma);
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
  // Where the problem is convex, x is not worse than zero.
  c.l0 = static_cast<A>(l0 != 0 || !is_firm ? 2 * tau * l0 : -INFINITY);
  c.lower = static_cast<A>(penalties.lower);
  c.upper = static_cast<A>(penalties.upper);
  c.frozen = penalties.freeze_zeros != 0 ? A(0) : static_cast<A>(NAN);
}

}  // namespace fusedreg
