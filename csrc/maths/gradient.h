// Stages 1 to 4 of a step: what happens to a gradient before a rule sees it.
#pragma once

#include "hyperparameters.h"

namespace fusedreg {

template <class A>
struct GradientConstants {
  A inv_grad_scale, clip_value, clip_coef, l1_gradient, l2_gradient, w_scale;
};

// 1. AMP's unscaling and maximize (the sign of inv_grad_scale), 2. value clip. The norm is taken over what this
// returns.
template <class A>
FUSEDREG_HD A clip_gradient_value(A g, A inv_grad_scale, A clip_value) {
  return clamp(g * inv_grad_scale, -clip_value, clip_value);
}

// 1 to 3, the norm clip.
template <class A>
FUSEDREG_HD A clip_gradient(A g, const GradientConstants<A>& c) {
  return clip_gradient_value(g, c.inv_grad_scale, c.clip_value) * c.clip_coef;
}

// 4. the penalties that enter through the gradient: coupled decay and penalty_mode="subgradient". Neither is added
// where it is zero: 0 * w would turn an infinite weight into a NaN. kByL1: whether L1 may be one.
template <bool kByL1, class A>
FUSEDREG_HD A penalize_gradient(A g, A w, const GradientConstants<A>& c) {
  const A l2 = fetch(c.l2_gradient);
  g = g + (l2 != A(0) ? l2 * w : A(0));
  if constexpr (kByL1) g = g + fetch(c.l1_gradient) * sign(w);
  return g;
}

FUSEDREG_HD bool penalizes_gradient(const CommonHyperparameters& common, const Penalties& penalties) {
  const bool coupled = common.weight_decay != 0 && common.decoupled_weight_decay == 0;
  return coupled || (penalties.mode() == PenaltyMode::kSubgradient && penalties.any());
}

FUSEDREG_HD double signed_inv_grad_scale(const CommonHyperparameters& common, double inv_grad_scale) {
  return common.maximize != 0 ? -inv_grad_scale : inv_grad_scale;
}

template <class A>
FUSEDREG_HD void fill_gradient(GradientConstants<A>& c, const CommonHyperparameters& common, const Penalties& penalties,
                               double inv_grad_scale, double clip_coef) {
  const bool subgradient = penalties.mode() == PenaltyMode::kSubgradient;
  const bool decoupled = common.decoupled_weight_decay != 0;
  c.inv_grad_scale = static_cast<A>(signed_inv_grad_scale(common, inv_grad_scale));
  c.clip_value = static_cast<A>(common.clip_value);
  c.clip_coef = static_cast<A>(clip_coef);
  c.l1_gradient = static_cast<A>(subgradient ? penalties.l1 : 0);
  c.l2_gradient = static_cast<A>((subgradient ? penalties.l2 : 0) + (decoupled ? 0 : common.weight_decay));
  c.w_scale = static_cast<A>(decoupled ? 1 - common.lr * common.weight_decay : 1);
}

}  // namespace fusedreg
