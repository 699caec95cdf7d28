// RAdam, as torch.optim.RAdam defines it: Adam that begins as gradient descent, and then with rectified steps.
// Liu et al., https://arxiv.org/abs/1908.03265
#pragma once

#include "../maths/update.h"
#include "betas.h"
#include "step_count.h"

namespace fusedreg {

struct RAdam : StepCount {
  static constexpr const char* kName = "radam";
  static constexpr std::array kStates = {"exp_avg", "exp_avg_sq"};
  static constexpr std::array<StateMask, 1> kVariants = {0b11};
  static constexpr bool kHasMetric = true;
  template <StateMask>
  static constexpr bool kHasFloorRatio = true;

  using Hyperparameters = Betas;

  template <class A>
  struct Constants {
    A step_size, beta1, one_minus_beta1, beta2, one_minus_beta2, inv_sqrt_bias_correction2, eps, is_rectified;
    A one;  // by which every kernel divides, or some would contract what others round
  };

  template <class A>
  FUSEDREG_HD static double fill(Constants<A>& c, double lr, const Hyperparameters& h, const double*,
                                 const double* after) {
    const double t = after[0], bias_correction2 = 1 - pow(h.beta2, t);
    // How many steps the average of squares stands for: in the limit, and now.
    const double longest = 2 / (1 - h.beta2) - 1;
    const double length = longest - 2 * t * pow(h.beta2, t) / bias_correction2;
    const bool is_rectified = length > 5;
    const double tau =
        !is_rectified ? lr
                      : lr * sqrt((length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length));
    c.step_size = static_cast<A>(tau / (1 - pow(h.beta1, t)));
    c.beta1 = static_cast<A>(h.beta1);
    c.one_minus_beta1 = static_cast<A>(1 - h.beta1);
    c.beta2 = static_cast<A>(h.beta2);
    c.one_minus_beta2 = static_cast<A>(1 - h.beta2);
    c.inv_sqrt_bias_correction2 = static_cast<A>(1 / sqrt(bias_correction2));
    c.eps = static_cast<A>(h.eps);
    c.is_rectified = static_cast<A>(is_rectified);
    c.one = A(1);
    return tau;
  }

  template <StateMask, class A>
  FUSEDREG_HD static Metric<A> metric(const A* state, const Constants<A>& c) {
    const bool is_rectified = c.is_rectified != A(0);
    const A d = (square_root(state[1]) + c.eps) * c.inv_sqrt_bias_correction2;
    // Without a metric there is no floor either: below zero, it never acts.
    return {choose(is_rectified, d, fetch(c.one)), choose(is_rectified, A(1), A(-1))};
  }

  template <StateMask kMask, class A>
  FUSEDREG_HD static Quotient<A> step(A&, A g, A* state, const Constants<A>& c) {
    A& exp_avg = state[0];
    A& exp_avg_sq = state[1];
    exp_avg = lerp(exp_avg, g, c.one_minus_beta1, c.beta1);
    exp_avg_sq = c.beta2 * exp_avg_sq + c.one_minus_beta2 * g * g;
    return {c.step_size * exp_avg, metric<kMask>(state, c)};
  }
};

}  // namespace fusedreg
