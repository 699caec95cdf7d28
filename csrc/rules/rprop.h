// Rprop, resilient propagation, as torch.optim.Rprop defines it. Riedmiller and Braun, "A direct adaptive method for
// faster backpropagation learning: the RPROP algorithm", 1993.
#pragma once

#include "../maths/update.h"
#include "step_count.h"

namespace fusedreg {

struct Rprop : StepCount {
  static constexpr const char* kName = "rprop";
  static constexpr std::array kStates = {"prev", "step_size"};
  static constexpr std::array<StateMask, 1> kVariants = {0b11};
  static constexpr bool kHasMetric = false;

  struct Hyperparameters {
    double etaminus = 0, etaplus = 0, step_size_min = 0, step_size_max = 0;

    template <class Bind>
    FUSEDREG_HD void bind(Bind&& bind) {
      bind("etaminus", etaminus);
      bind("etaplus", etaplus);
      bind("step_size_min", step_size_min);
      bind("step_size_max", step_size_max);
    }
  };

  template <class A>
  struct Constants {
    A etaminus, etaplus, smallest, largest;
  };

  template <class A>
  FUSEDREG_HD static double fill(Constants<A>& c, double lr, const Hyperparameters& h, const double*, const double*) {
    c.etaminus = static_cast<A>(h.etaminus);
    c.etaplus = static_cast<A>(h.etaplus);
    c.smallest = static_cast<A>(h.step_size_min);
    c.largest = static_cast<A>(h.step_size_max);
    return lr;
  }

  template <StateMask, class A>
  FUSEDREG_HD static Metric<A> step(A& w, A g, A* state, const Constants<A>& c) {
    A& prev = state[0];
    A& step_size = state[1];
    const A product = g * prev;
    const bool turns = product < A(0);
    A size = step_size * (product > A(0) ? c.etaplus : turns ? c.etaminus : A(1));
    size = size < c.smallest ? c.smallest : size;
    size = size > c.largest ? c.largest : size;
    g = turns ? A(0) : g;                                     // after a turn, the next step is taken whatever its sign
    w = w - size * (g > A(0) ? A(1) : g < A(0) ? A(-1) : g);  // a NaN is to be seen
    prev = g;
    step_size = size;
    return no_metric<A>();
  }
};

}  // namespace fusedreg
