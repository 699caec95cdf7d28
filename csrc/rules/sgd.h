// Stochastic gradient descent, with and without (Nesterov) momentum, as torch.optim.SGD defines it.
#pragma once

#include "../maths/update.h"
#include "momentum_gain.h"

namespace fusedreg {

struct Sgd {
  static constexpr const char* kName = "sgd";
  static constexpr std::array kStates = {"momentum_buffer"};
  static constexpr std::array kScalarStates = {"momentum_gain"};
  static constexpr StateMask kPlain = 0, kMomentum = 0b1;
  static constexpr std::array kVariants = {kPlain, kMomentum};
  static constexpr bool kHasMetric = false;

  struct Hyperparameters {
    double momentum = 0, dampening = 0, nesterov = 0;

    template <class Bind>
    FUSEDREG_HD void bind(Bind&& bind) {
      bind("momentum", momentum);
      bind("dampening", dampening);
      bind("nesterov", nesterov);
    }
  };

  template <class A>
  struct Constants {
    A step_size, momentum, one_minus_dampening, nesterov;
  };

  template <class A>
  FUSEDREG_HD static double fill(Constants<A>& c, double lr, const Hyperparameters& h, const double* before,
                                 const double* after) {
    const bool first = before[0] == 0;
    c.step_size = static_cast<A>(lr);
    c.momentum = static_cast<A>(first ? 0 : h.momentum);  // the first buffer is the gradient itself, undamped
    c.one_minus_dampening = static_cast<A>(first ? 1 : 1 - h.dampening);
    c.nesterov = static_cast<A>(h.nesterov != 0 ? h.momentum : 0);
    const double gain = h.momentum != 0 ? after[0] : 1;
    const double step_gain = h.nesterov != 0 ? 1 + h.momentum * gain : gain;
    return lr * (step_gain > 0 ? step_gain : 0);  // with dampening above 1 it can be negative
  }

  template <class AsStored>
  FUSEDREG_HD static void next(double, const Hyperparameters& h, double* scalar_states, AsStored&&) {
    scalar_states[0] = next_momentum_gain(scalar_states[0], h.momentum, h.dampening);
  }

  template <StateMask kMask, class A>
  FUSEDREG_HD static Metric<A> step(A& w, A g, A* state, const Constants<A>& c) {
    A direction = g;
    if constexpr (kMask == kMomentum) {
      A& momentum_buffer = state[0];
      momentum_buffer = c.momentum * momentum_buffer + c.one_minus_dampening * g;
      direction = c.nesterov != A(0) ? g + c.nesterov * momentum_buffer : momentum_buffer;
    }
    w = w - c.step_size * direction;
    return no_metric<A>();
  }
};

}  // namespace fusedreg
