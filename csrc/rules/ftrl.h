// FTRL-Proximal, dense. McMahan et al., "Ad click prediction: a view from the trenches", KDD 2013,
// https://doi.org/10.1145/2487575.2488200
//
// Where a weight is not zero, its closed form is Adagrad's step with a prox. Where it is zero, the form sums up its
// gradients until they outweigh what l1 has come to over the steps: held_back is that sum.
#pragma once

#include "../maths/update.h"

namespace fusedreg {

struct Ftrl {
  static constexpr const char* kName = "ftrl";
  static constexpr std::array kStates = {"held_back", "sum"};
  static constexpr std::array kScalarStates = {"l1_sum"};
  static constexpr std::array<StateMask, 1> kVariants = {0b11};
  static constexpr bool kHasMetric = true;
  template <StateMask>
  static constexpr bool kHasFloorRatio = true;

  struct Hyperparameters {
    double beta = 0, l1_of_step = 0;

    template <class Bind>
    FUSEDREG_HD void bind(Bind&& bind) {
      bind("beta", beta);
      bind("l1_of_step", l1_of_step);
    }
  };

  template <class A>
  struct Constants {
    A step_size, inv_step_size, beta, l1_before, l1_after;
  };

  template <class A>
  FUSEDREG_HD static double fill(Constants<A>& c, double lr, const Hyperparameters& h, const double* before,
                                 const double* after) {
    c.step_size = static_cast<A>(lr);
    c.inv_step_size = static_cast<A>(lr != 0 ? 1 / lr : 0);
    c.beta = static_cast<A>(h.beta);
    c.l1_before = static_cast<A>(before[0]);
    c.l1_after = static_cast<A>(after[0]);
    return lr;
  }

  template <class AsStored>
  FUSEDREG_HD static void next(double, const Hyperparameters& h, double* scalar_states, AsStored&&) {
    scalar_states[0] += h.l1_of_step;
  }

  template <StateMask, class A>
  FUSEDREG_HD static Metric<A> metric(const A* state, const Constants<A>& c) {
    return {square_root(state[1]) + c.beta, A(-1)};  // no floor: beta is what bounds the step of a prox
  }

  template <StateMask kMask, class A>
  FUSEDREG_HD static Metric<A> step(A& w, A g, A* state, const Constants<A>& c) {
    A& held_back = state[0];
    A& sum = state[1];
    sum = sum + g * g;
    const Metric<A> its_metric = metric<kMask>(state, c);
    const A moved = w - c.step_size * divide(g, its_metric.d);
    const bool was_zero = w == A(0);
    const A dual = was_zero ? held_back - g : its_metric.d * moved * c.inv_step_size + sign(w) * c.l1_before;
    // What crosses zero has to outweigh l1 on the other side, too.
    const bool waits = was_zero | (sign(w) * moved < A(0));
    w = waits ? c.step_size * divide(soft_threshold(dual, c.l1_before), its_metric.d) : moved;
    held_back = clamp(dual, -c.l1_after, c.l1_after);  // what else holds a weight at zero is not summed up
    return its_metric;
  }

  template <StateMask, class A>
  FUSEDREG_HD static void finish(A w, A, A* state, const Constants<A>&) {
    state[0] = w == A(0) ? state[0] : A(0);
  }
};

}  // namespace fusedreg
