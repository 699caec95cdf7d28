// Stages 1 to 4 of a step: what happens to a gradient before a rule sees it.
#pragma once

#include "hyper.h"

namespace fusedreg {

// 1. AMP's unscaling and maximize (the sign of inv_grad_scale), 2. value clip. The norm is taken over what this
// returns.
template <class A>
FUSEDREG_HD A clip_gradient_value(A g, const Hyper<A>& h) {
  return clamp_symmetric(g * h.inv_grad_scale, h.clip_value);
}

// 3. norm clip, 4. the penalties that enter through the gradient: coupled decay and l1_mode="subgradient".
// Neither is added where it is zero: 0 * w would turn an infinite weight into a NaN.
template <bool kPenalized, class A>
FUSEDREG_HD A transform_gradient(A g, A w, const Hyper<A>& h) {
  g = clip_gradient_value(g, h) * h.clip_coef;
  if constexpr (kPenalized) g = g + (h.l2_gradient != A(0) ? h.l2_gradient * w : A(0)) + h.l1_gradient * sign(w);
  return g;
}

FUSEDREG_HD bool penalizes_gradient(const Group& group) {
  const bool coupled = group.weight_decay != 0 && group.decoupled_weight_decay == 0;
  const bool subgradient = group.mode() == L1Mode::kSubgradient && (group.l1 != 0 || group.l2 != 0);
  return coupled || subgradient;
}

FUSEDREG_HD void fill_gradient_hyper(Hyper<double>& h, const Group& group, double inv_grad_scale, double clip_coef) {
  const bool subgradient = group.mode() == L1Mode::kSubgradient;
  const bool decoupled = group.decoupled_weight_decay != 0;
  h.inv_grad_scale = group.maximize != 0 ? -inv_grad_scale : inv_grad_scale;
  h.clip_value = group.clip_value;
  h.clip_coef = clip_coef;
  h.l1_gradient = subgradient ? group.l1 : 0;
  h.l2_gradient = (subgradient ? group.l2 : 0) + (decoupled ? 0 : group.weight_decay);
  h.w_scale = decoupled ? 1 - group.lr * group.weight_decay : 1;
}

}  // namespace fusedreg
