// Lion: the sign of a momentum. Chen et al., "Symbolic Discovery of Optimization Algorithms",
// https://arxiv.org/abs/2302.06675
#pragma once

#include "../maths/update.h"

namespace fusedreg {

struct Lion {
  static constexpr const char* kName = "lion";
  static constexpr std::array kStates = {"exp_avg"};
  static constexpr std::array<const char*, 0> kScalarStates = {};
  static constexpr std::array<StateMask, 1> kVariants = {0b1};
  static constexpr bool kHasMetric = false;

  struct Hyperparameters {
    double beta1 = 0, beta2 = 0;

    template <class Bind>
    FUSEDREG_HD void bind(Bind&& bind) {
      bind("beta1", beta1);
      bind("beta2", beta2);
    }
  };

  template <class A>
  struct Constants {
    A step_size, beta1, one_minus_beta1, beta2, one_minus_beta2;
  };

  template <class A>
  FUSEDREG_HD static double fill(Constants<A>& c, double lr, const Hyperparameters& h, const double*, const double*) {
    c.step_size = static_cast<A>(lr);
    c.beta1 = static_cast<A>(h.beta1);
    c.one_minus_beta1 = static_cast<A>(1 - h.beta1);
    c.beta2 = static_cast<A>(h.beta2);
    c.one_minus_beta2 = static_cast<A>(1 - h.beta2);
    return lr;
  }

  template <class AsStored>
  FUSEDREG_HD static void next(double, const Hyperparameters&, double*, AsStored&&) {}

  template <StateMask, class A>
  FUSEDREG_HD static Metric<A> step(A& w, A g, A* state, const Constants<A>& c) {
    A& exp_avg = state[0];
    const A mixed = lerp(exp_avg, g, c.one_minus_beta1, c.beta1);
    const A direction = mixed > A(0) ? A(1) : mixed < A(0) ? A(-1) : mixed;  // a NaN is to be seen
    exp_avg = lerp(exp_avg, g, c.one_minus_beta2, c.beta2);
    w = w - c.step_size * direction;
    return no_metric<A>();
  }
};

}  // namespace fusedreg
