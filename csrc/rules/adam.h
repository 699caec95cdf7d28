// Adam and AdamW (they differ in stage 4 alone), with and without amsgrad.
// Kingma and Ba, https://arxiv.org/abs/1412.6980; Reddi et al., https://openreview.net/forum?id=ryQu7f-RZ
#pragma once

#include "../maths/update.h"
#include "betas.h"
#include "step_count.h"

namespace fusedreg {

struct Adam : StepCount {
  static constexpr const char* kName = "adam";
  static constexpr std::array kStates = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"};
  static constexpr StateMask kPlain = 0b011, kAmsgrad = 0b111;
  static constexpr std::array kVariants = {kPlain, kAmsgrad};
  static constexpr bool kHasMetric = true;

  using Hyperparameters = Betas;

  template <class A>
  struct Constants {
    A step_size, beta1, one_minus_beta1, beta2, one_minus_beta2, inv_sqrt_bias_correction2, eps;
  };

  template <class A>
  FUSEDREG_HD static double fill(Constants<A>& c, double lr, const Hyperparameters& h, const double*,
                                 const double* after) {
    const double t = after[0];
    c.step_size = static_cast<A>(lr / (1 - pow(h.beta1, t)));
    c.beta1 = static_cast<A>(h.beta1);
    c.one_minus_beta1 = static_cast<A>(1 - h.beta1);
    c.beta2 = static_cast<A>(h.beta2);
    c.one_minus_beta2 = static_cast<A>(1 - h.beta2);
    c.inv_sqrt_bias_correction2 = static_cast<A>(1 / sqrt(1 - pow(h.beta2, t)));
    c.eps = static_cast<A>(h.eps);
    return lr;  // over d, in the prox: m_hat is unbiased already, so without its bias correction
  }

  template <StateMask kMask, class A>
  FUSEDREG_HD static Metric<A> metric(const A* state, const Constants<A>& c) {
    const A second_moment = state[kMask == kAmsgrad ? 2 : 1];
    return {square_root(second_moment) * c.inv_sqrt_bias_correction2 + c.eps};
  }

  template <StateMask kMask, class A>
  FUSEDREG_HD static Quotient<A> step(A&, A g, A* state, const Constants<A>& c) {
    A& exp_avg = state[0];
    A& exp_avg_sq = state[1];
    exp_avg = lerp(exp_avg, g, c.one_minus_beta1, c.beta1);
    exp_avg_sq = c.beta2 * exp_avg_sq + c.one_minus_beta2 * g * g;
    if constexpr (kMask == kAmsgrad) state[2] = max_keeping_nan(exp_avg_sq, state[2]);
    return {c.step_size * exp_avg, metric<kMask>(state, c)};
  }
};

}  // namespace fusedreg
