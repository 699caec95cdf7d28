// Stage 6: the proximal operator of l1 * |w| + (l2 / 2) * w^2.
#pragma once

#include "hyper.h"

namespace fusedreg {

enum class ProxKind {
  kNone,     // no penalty, or one that enters through the gradient
  kMetric,   // tau = lr / d, element by element: the metric of an adaptive step
  kUniform,  // one tau: SGD's step, and l1_mode="decoupled"
};

// soft(z, tau * l1) / (1 + tau * l2). In a metric d, tau = lr / d, it is multiplied out: one division, not two.
template <ProxKind kKind, class A>
FUSEDREG_HD A prox(A z, A w_old, A d, const Hyper<A>& h) {
  if constexpr (kKind == ProxKind::kNone) {
    return z;
  } else if constexpr (kKind == ProxKind::kUniform) {
    return soft_threshold(z, h.tau * h.l1) * h.shrink;
  } else {
    // The floor keeps a weight that never saw a gradient (d = eps) from vanishing at once: the penalty moves no
    // weight by more than 2 * lr a step. With a factor above 1/2 the elastic net's solutions are no longer exact.
    const A d_prox = max_keeping_nan(d, A(0.5) * (h.l1 + h.l2 * absolute(w_old)));
    return soft_threshold(d_prox * z, h.tau * h.l1) / (d_prox + h.tau * h.l2);
  }
}

FUSEDREG_HD ProxKind prox_kind(const Group& group, bool rule_has_metric) {
  const bool no_penalty = group.lr == 0 || (group.l1 == 0 && group.l2 == 0);
  if (no_penalty || group.mode() == L1Mode::kSubgradient) return ProxKind::kNone;
  return rule_has_metric && group.mode() == L1Mode::kProximal ? ProxKind::kMetric : ProxKind::kUniform;
}

FUSEDREG_HD void fill_prox_hyper(Hyper<double>& h, const Group& group) {
  if (group.mode() == L1Mode::kDecoupled) h.tau = group.lr;
  h.l1 = group.l1;
  h.l2 = group.l2;
  h.shrink = 1 / (1 + h.tau * h.l2);  // one division a step, not one an element
}

}  // namespace fusedreg
