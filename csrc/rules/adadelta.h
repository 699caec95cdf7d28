// Adadelta, as torch.optim.Adadelta defines it. Zeiler, https://arxiv.org/abs/1212.5701
#pragma once

#include "../maths/update.h"
#include "step_count.h"

namespace fusedreg {

struct Adadelta : StepCount {
  static constexpr const char* kName = "adadelta";
  static constexpr std::array kStates = {"square_avg", "acc_delta"};
  static constexpr std::array<StateMask, 1> kVariants = {0b11};
  static constexpr bool kHasMetric = true;
  template <StateMask>
  static constexpr bool kHasFloorRatio = true;

  // Where eps is 0 nothing has moved yet and nothing will, and the metric would be infinite: a prox that moves nothing.
  static constexpr double kLargestMetric = 1e18;

  struct Hyperparameters {
    double rho = 0, eps = 0;

    template <class Bind>
    FUSEDREG_HD void bind(Bind&& bind) {
      bind("rho", rho);
      bind("eps", eps);
    }
  };

  template <class A>
  struct Constants {
    A step_size, rho, one_minus_rho, eps;
  };

  template <class A>
  FUSEDREG_HD static double fill(Constants<A>& c, double lr, const Hyperparameters& h, const double*, const double*) {
    c.step_size = static_cast<A>(lr);
    c.rho = static_cast<A>(h.rho);
    c.one_minus_rho = static_cast<A>(1 - h.rho);
    c.eps = static_cast<A>(h.eps);
    return lr;
  }

  template <StateMask, class A>
  FUSEDREG_HD static Metric<A> metric(const A* state, const Constants<A>& c) {
    const A of_gradients = square_root(state[0] + c.eps), of_steps = square_root(state[1] + c.eps);
    A d = divide(of_gradients, of_steps);
    d = d > A(kLargestMetric) ? A(kLargestMetric) : d;
    return {d, divide(d, of_gradients)};  // the floor is a gradient, and d is a gradient over a step
  }

  template <StateMask kMask, class A>
  FUSEDREG_HD static Metric<A> step(A& w, A g, A* state, const Constants<A>& c) {
    A& square_avg = state[0];
    A& acc_delta = state[1];
    square_avg = c.rho * square_avg + c.one_minus_rho * g * g;
    const A seen[] = {square_avg, acc_delta};  // by the metric: the steps before this one
    const A delta = divide(square_root(acc_delta + c.eps), square_root(square_avg + c.eps)) * g;
    acc_delta = c.rho * acc_delta + c.one_minus_rho * delta * delta;
    w = w - c.step_size * delta;
    return metric<kMask>(seen, c);
  }
};

}  // namespace fusedreg
