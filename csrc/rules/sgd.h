// Stochastic gradient descent, with and without (Nesterov) momentum, as torch.optim.SGD defines it.
#pragma once

#include "../hyper.h"

namespace fusedreg {

template <bool kMomentum>
struct Sgd {
  static constexpr int kStates = kMomentum ? 1 : 0;  // momentum_buffer
  static constexpr bool kHasMetric = false;

  template <class A>
  FUSEDREG_HD static A step(A& w, A g, A* state, const Hyper<A>& h) {
    A direction = g;
    if constexpr (kMomentum) {
      A& momentum_buffer = state[0];
      momentum_buffer = h.momentum * momentum_buffer + h.one_minus_dampening * g;
      direction = h.nesterov != A(0) ? g + h.nesterov * momentum_buffer : momentum_buffer;
    }
    w = w - h.step_size * direction;
    return A(1);
  }
};

struct SgdHost {
  static constexpr const char* kName = "sgd";
  static constexpr const char* kStateNames[] = {"momentum_buffer"};
#define FUSEDREG_NAME(name) #name,
  static constexpr const char* kScalarNames[] = {FUSEDREG_SGD_SCALARS(FUSEDREG_NAME)};
#undef FUSEDREG_NAME

  static int state_count(const Group& group) { return group.momentum != 0 ? 1 : 0; }

  template <class Visitor>
  FUSEDREG_HD static void visit(const Group& group, Visitor&& visitor) {
    group.momentum != 0 ? visitor(Sgd<true>{}) : visitor(Sgd<false>{});
  }

  // The clock is the momentum's gain: what its recurrence, run on a constant 1, has come to. `clock` is the gain before
  // this step: 0 before the first, and NaN where nobody counted (a buffer out of a plain torch checkpoint), which takes
  // the stationary gain.
  FUSEDREG_HD static double next_clock(const Group& group, double clock) {
    if (group.momentum == 0) return clock;  // a buffer out of an earlier step waits, and its gain with it
    if (clock == 0) return 1;
    if (clock == clock) {
      const double gain = group.momentum * clock + 1 - group.dampening;
      return gain != 0 ? gain : 5e-324;  // 0 is before the first step; dampening can bring the gain there
    }
    return group.momentum < 1 ? (1 - group.dampening) / (1 - group.momentum) : 1;
  }

  // A step moves w by lr * gain times a constant gradient, so lr * gain is the prox's step size too.
  FUSEDREG_HD static void fill(Hyper<double>& h, const Group& group, double clock) {
    const bool first = clock == 0;
    h.step_size = group.lr;
    h.momentum = first ? 0 : group.momentum;  // the first buffer is the gradient itself, undamped
    h.one_minus_dampening = first ? 1 : 1 - group.dampening;
    h.nesterov = group.nesterov != 0 ? group.momentum : 0;
    const double gain = group.momentum != 0 ? next_clock(group, clock) : 1;
    const double step_gain = group.nesterov != 0 ? 1 + group.momentum * gain : gain;
    h.tau = group.lr * (step_gain > 0 ? step_gain : 0);  // with dampening above 1 it can be negative
  }
};

}  // namespace fusedreg
