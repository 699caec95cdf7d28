// NAdam, as torch.optim.NAdam defines it: Adam with Nesterov's momentum, by a schedule.
// Dozat, https://openreview.net/forum?id=OM0jvwB8jIp57ZJjtNEZ
#pragma once

#include "../maths/update.h"
#include "betas.h"

namespace fusedreg {

struct NAdam {
  static constexpr const char* kName = "nadam";
  static constexpr std::array kStates = {"exp_avg", "exp_avg_sq"};
  static constexpr std::array kScalarStates = {"step", "mu_product"};
  static constexpr std::array<StateMask, 1> kVariants = {0b11};
  static constexpr bool kHasMetric = true;

  struct Hyperparameters : Betas {
    double momentum_decay = 0;

    template <class Bind>
    FUSEDREG_HD void bind(Bind&& bind) {
      Betas::bind(bind);
      bind("momentum_decay", momentum_decay);
    }

    FUSEDREG_HD double mu(double t) const { return beta1 * (1 - 0.5 * pow(0.96, t * momentum_decay)); }
  };

  template <class A>
  struct Constants {
    A share_of_g, share_of_m, beta1, one_minus_beta1, beta2, one_minus_beta2, inv_bias_correction2, eps;
  };

  template <class A>
  FUSEDREG_HD static double fill(Constants<A>& c, double lr, const Hyperparameters& h, const double*,
                                 const double* after) {
    const double t = after[0], mu_product = after[1], next_mu = h.mu(t + 1);
    const double share_of_g = lr * (1 - h.mu(t)) / (1 - mu_product);
    const double share_of_m = lr * next_mu / (1 - mu_product * next_mu);
    c.share_of_g = static_cast<A>(share_of_g);
    c.share_of_m = static_cast<A>(share_of_m);
    c.beta1 = static_cast<A>(h.beta1);
    c.one_minus_beta1 = static_cast<A>(1 - h.beta1);
    c.beta2 = static_cast<A>(h.beta2);
    c.one_minus_beta2 = static_cast<A>(1 - h.beta2);
    c.inv_bias_correction2 = static_cast<A>(1 / (1 - pow(h.beta2, t)));
    c.eps = static_cast<A>(h.eps);
    return share_of_g + share_of_m * (1 - pow(h.beta1, t));  // what a constant gradient of 1 moves, times d
  }

  template <class AsStored>
  FUSEDREG_HD static void next(double, const Hyperparameters& h, double* scalar_states, AsStored&& as_stored) {
    scalar_states[0] += 1;
    scalar_states[1] *= as_stored(1, h.mu(scalar_states[0]));  // torch rounds the factor, too
  }

  template <StateMask, class A>
  FUSEDREG_HD static Metric<A> metric(const A* state, const Constants<A>& c) {
    return {square_root(state[1] * fetch(c.inv_bias_correction2)) + fetch(c.eps)};
  }

  template <StateMask kMask, class A>
  FUSEDREG_HD static Quotient<A> step(A&, A g, A* state, const Constants<A>& c) {
    A& exp_avg = state[0];
    A& exp_avg_sq = state[1];
    exp_avg = lerp(exp_avg, g, c.one_minus_beta1, c.beta1);
    exp_avg_sq = c.beta2 * exp_avg_sq + c.one_minus_beta2 * g * g;
    return {fetch(c.share_of_g) * g + fetch(c.share_of_m) * exp_avg, metric<kMask>(state, c)};
  }
};

}  // namespace fusedreg
