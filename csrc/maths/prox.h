// Stage 6: the proximal operator of all element penalties and constraints, fused. Each is the identity at its default.
#pragma once

#include "hyperparameters.h"

namespace fusedreg {

enum class ProxKind {
  kNone,           // no penalty, or one that enters through the gradient
  kMetric,         // l1 and l2 in tau / d, element by element: the metric of an adaptive step
  kUniform,        // l1 and l2 with one tau: SGD's step, and penalty_mode="decoupled"
  kMetricStages,   // as kMetric and kUniform, and all the other stages, which constants choose from: together they are
  kUniformStages,  // worth a kernel of their own, so that l1 and l2 alone do not pay for them; one by one they are not
};

constexpr bool is_in_metric(ProxKind kind) { return kind == ProxKind::kMetric || kind == ProxKind::kMetricStages; }
constexpr bool has_stages(ProxKind kind) { return kind == ProxKind::kMetricStages || kind == ProxKind::kUniformStages; }

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
  // of the further stages
  A freezes;
};

// The stages behind l1 and l2.
template <class A>
FUSEDREG_HD A further_stages(A x, A z, A w_old, const ProxConstants<A>& c) {
  const bool stays_zero = c.freezes != A(0) && w_old == A(0) && z == z;  // a NaN is to be seen
  return stays_zero ? A(0) : x;
}

// soft(z, tau * l1) / (1 + tau * l2). In a metric d, tau becomes tau / d; multiplied out, it is one division, not two.
template <ProxKind kKind, class A>
FUSEDREG_HD A prox(A z, A w_old, const Metric<A>& metric, const ProxConstants<A>& c) {
  if constexpr (kKind == ProxKind::kNone) return z;
  A x;
  if constexpr (is_in_metric(kKind)) {
    // The floor keeps a weight that never saw a gradient (d = eps) from vanishing at once: the penalty moves no
    // weight by more than 2 * tau a step. With a factor above 1/2 the elastic net's solutions are no longer exact.
    const A floor = A(0.5) * (c.l1 + c.l2 * absolute(w_old));
    const A d = max_keeping_nan(metric.d, floor * metric.floor_ratio);
    x = soft_threshold(d * z, c.tau * c.l1) / (d + c.tau * c.l2);
  } else {
    x = soft_threshold(z, c.tau * c.l1) * c.shrink;
  }
  if constexpr (has_stages(kKind)) x = further_stages(x, z, w_old, c);
  return x;
}

FUSEDREG_HD ProxKind prox_kind(const CommonHyperparameters& common, const Penalties& penalties, bool rule_has_metric) {
  const bool shrinks = penalties.any() && penalties.mode() != PenaltyMode::kSubgradient;
  const bool in_metric = shrinks && rule_has_metric && penalties.mode() == PenaltyMode::kProximal;
  if (common.lr == 0) return ProxKind::kNone;
  if (penalties.has_stages()) return in_metric ? ProxKind::kMetricStages : ProxKind::kUniformStages;
  if (!shrinks) return ProxKind::kNone;
  return in_metric ? ProxKind::kMetric : ProxKind::kUniform;
}

// `tau` is the rule's.
template <class A>
FUSEDREG_HD void fill_prox(ProxConstants<A>& c, const CommonHyperparameters& common, const Penalties& penalties,
                           double tau) {
  if (penalties.mode() == PenaltyMode::kDecoupled) tau = common.lr;
  const bool shrinks = penalties.mode() != PenaltyMode::kSubgradient;
  const double l1 = shrinks ? penalties.l1 : 0, l2 = shrinks ? penalties.l2 : 0;
  c.tau = static_cast<A>(tau);
  c.l1 = static_cast<A>(l1);
  c.l2 = static_cast<A>(l2);
  c.shrink = static_cast<A>(1 / (1 + tau * l2));  // one division a step, not one an element
  c.freezes = static_cast<A>(penalties.freeze_zeros);
}

}  // namespace fusedreg
