// Stage 6: the proximal operator of all element penalties, fused. Each is the identity at its default.
#pragma once

#include "hyperparameters.h"

namespace fusedreg {

enum class ProxKind {
  kNone,     // no penalty, or one that enters through the gradient
  kMetric,   // tau / d, element by element: the metric of an adaptive step
  kUniform,  // one tau: SGD's step, and penalty_mode="decoupled"
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
};

// soft(z, tau * l1) / (1 + tau * l2). In a metric d, tau becomes tau / d; multiplied out, it is one division, not two.
template <ProxKind kKind, class A>
FUSEDREG_HD A prox(A z, A w_old, const Metric<A>& metric, const ProxConstants<A>& c) {
  if constexpr (kKind == ProxKind::kNone) {
    return z;
  } else if constexpr (kKind == ProxKind::kUniform) {
    return soft_threshold(z, c.tau * c.l1) * c.shrink;
  } else {
    // The floor keeps a weight that never saw a gradient (d = eps) from vanishing at once: the penalty moves no
    // weight by more than 2 * tau a step. With a factor above 1/2 the elastic net's solutions are no longer exact.
    const A floor = A(0.5) * (c.l1 + c.l2 * absolute(w_old));
    const A d = max_keeping_nan(metric.d, floor * metric.floor_ratio);
    return soft_threshold(d * z, c.tau * c.l1) / (d + c.tau * c.l2);
  }
}

FUSEDREG_HD ProxKind prox_kind(const CommonHyperparameters& common, const Penalties& penalties, bool rule_has_metric) {
  const bool moves_nothing = common.lr == 0 || !penalties.any();
  if (moves_nothing || penalties.mode() == PenaltyMode::kSubgradient) return ProxKind::kNone;
  return rule_has_metric && penalties.mode() == PenaltyMode::kProximal ? ProxKind::kMetric : ProxKind::kUniform;
}

// `tau` is the rule's.
template <class A>
FUSEDREG_HD void fill_prox(ProxConstants<A>& c, const CommonHyperparameters& common, const Penalties& penalties,
                           double tau) {
  if (penalties.mode() == PenaltyMode::kDecoupled) tau = common.lr;
  c.tau = static_cast<A>(tau);
  c.l1 = static_cast<A>(penalties.l1);
  c.l2 = static_cast<A>(penalties.l2);
  c.shrink = static_cast<A>(1 / (1 + tau * penalties.l2));  // one division a step, not one an element
}

}  // namespace fusedreg
