// Averaged stochastic gradient descent, as torch.optim.ASGD defines it. Polyak and Juditsky, "Acceleration of
// stochastic approximation by averaging", SIAM Journal on Control and Optimization 30, 1992.
#pragma once

#include "../maths/update.h"

namespace fusedreg {

struct Asgd {
  static constexpr const char* kName = "asgd";
  static constexpr std::array kStates = {"ax"};
  static constexpr std::array kScalarStates = {"step", "eta", "mu"};
  static constexpr std::array<StateMask, 1> kVariants = {0b1};
  static constexpr bool kHasMetric = false;

  struct Hyperparameters {
    double lambd = 0, alpha = 0, t0 = 0;

    template <class Bind>
    FUSEDREG_HD void bind(Bind&& bind) {
      bind("lambd", lambd);
      bind("alpha", alpha);
      bind("t0", t0);
    }
  };

  template <class A>
  struct Constants {
    A step_size, shrink, share;
  };

  // The step size and the average's share are those that the step before has left.
  template <class A>
  FUSEDREG_HD static double fill(Constants<A>& c, double, const Hyperparameters& h, const double* before,
                                 const double*) {
    const double eta = before[1];
    c.step_size = static_cast<A>(eta);
    c.shrink = static_cast<A>(1 - h.lambd * eta);
    c.share = static_cast<A>(before[2]);
    return eta;
  }

  template <class AsStored>
  FUSEDREG_HD static void next(double lr, const Hyperparameters& h, double* scalar_states, AsStored&& as_stored) {
    const double t = as_stored(0, scalar_states[0] + 1);
    const double steps_averaged = t - h.t0;
    scalar_states[0] = t;
    // torch makes both in its default dtype, as the count of steps is, also where they are stored in a wider one.
    scalar_states[1] = as_stored(0, lr / pow(1 + h.lambd * lr * t, h.alpha));
    scalar_states[2] = as_stored(0, 1 / (steps_averaged > 1 ? steps_averaged : 1));
  }

  template <StateMask, class A>
  FUSEDREG_HD static Metric<A> step(A& w, A g, A*, const Constants<A>& c) {
    w = w * c.shrink - c.step_size * g;
    return no_metric<A>();
  }

  // The average is one of weights as the prox has left them.
  template <StateMask, class A>
  FUSEDREG_HD static void finish(A w, A, A* state, const Constants<A>& c) {
    A& ax = state[0];
    ax = c.share == A(1) ? w : ax + c.share * (w - ax);
  }
};

}  // namespace fusedreg
