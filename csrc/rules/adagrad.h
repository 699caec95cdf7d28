// Adagrad, as torch.optim.Adagrad defines it. Duchi et al., https://jmlr.org/papers/v12/duchi11a.html
#pragma once

#include "../maths/update.h"
#include "step_count.h"

namespace fusedreg {

struct Adagrad : StepCount {
  static constexpr const char* kName = "adagrad";
  static constexpr std::array kStates = {"sum"};
  static constexpr std::array<StateMask, 1> kVariants = {0b1};
  static constexpr bool kHasMetric = true;

  struct Hyperparameters {
    double lr_decay = 0, eps = 0;

    template <class Bind>
    FUSEDREG_HD void bind(Bind&& bind) {
      bind("lr_decay", lr_decay);
      bind("eps", eps);
    }
  };

  template <class A>
  struct Constants {
    A step_size, eps;
  };

  template <class A>
  FUSEDREG_HD static double fill(Constants<A>& c, double lr, const Hyperparameters& h, const double* before,
                                 const double*) {
    const double decayed_lr = lr / (1 + before[0] * h.lr_decay);  // the state is t - 1
    c.step_size = static_cast<A>(decayed_lr);
    c.eps = static_cast<A>(h.eps);
    return decayed_lr;
  }

  template <StateMask, class A>
  FUSEDREG_HD static Metric<A> metric(const A* state, const Constants<A>& c) {
    return {square_root(state[0]) + c.eps};
  }

  template <StateMask kMask, class A>
  FUSEDREG_HD static Quotient<A> step(A&, A g, A* state, const Constants<A>& c) {
    A& sum = state[0];
    sum = sum + g * g;
    return {c.step_size * g, metric<kMask>(state, c)};
  }
};

}  // namespace fusedreg
