// Adamax, as torch.optim.Adamax defines it: Adam with an infinity norm. Kingma and Ba, section 7.1,
// https://arxiv.org/abs/1412.6980
#pragma once

#include "../maths/update.h"
#include "betas.h"
#include "step_count.h"

namespace fusedreg {

struct Adamax : StepCount {
  static constexpr const char* kName = "adamax";
  static constexpr std::array kStates = {"exp_avg", "exp_inf"};
  static constexpr std::array<StateMask, 1> kVariants = {0b11};
  static constexpr bool kHasMetric = true;

  using Hyperparameters = Betas;

  template <class A>
  struct Constants {
    A step_size, beta1, one_minus_beta1, beta2, eps;
  };

  template <class A>
  FUSEDREG_HD static double fill(Constants<A>& c, double lr, const Hyperparameters& h, const double*,
                                 const double* after) {
    c.step_size = static_cast<A>(lr / (1 - pow(h.beta1, after[0])));
    c.beta1 = static_cast<A>(h.beta1);
    c.one_minus_beta1 = static_cast<A>(1 - h.beta1);
    c.beta2 = static_cast<A>(h.beta2);
    c.eps = static_cast<A>(h.eps);
    return lr;
  }

  template <StateMask, class A>
  FUSEDREG_HD static Metric<A> metric(const A* state, const Constants<A>&) {
    return {state[1]};
  }

  template <StateMask kMask, class A>
  FUSEDREG_HD static Quotient<A> step(A&, A g, A* state, const Constants<A>& c) {
    A& exp_avg = state[0];
    A& exp_inf = state[1];
    exp_avg = lerp(exp_avg, g, c.one_minus_beta1, c.beta1);
    exp_inf = max_keeping_nan(c.beta2 * exp_inf, absolute(g) + c.eps);
    return {c.step_size * exp_avg, metric<kMask>(state, c)};
  }
};

}  // namespace fusedreg
