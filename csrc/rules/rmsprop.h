// RMSprop, centered or not, with and without momentum, as torch.optim.RMSprop defines it.
// Hinton, http://www.cs.toronto.edu/~tijmen/csc321/slides/lecture_slides_lec6.pdf; centered: Graves,
// https://arxiv.org/abs/1308.0850
#pragma once

#include "../maths/update.h"
#include "momentum_gain.h"

namespace fusedreg {

struct RMSprop {
  static constexpr const char* kName = "rmsprop";
  static constexpr std::array kStates = {"square_avg", "momentum_buffer", "grad_avg"};
  static constexpr std::array kScalarStates = {"step", "momentum_gain"};
  static constexpr StateMask kPlain = 0b001, kMomentum = 0b010, kCentered = 0b100;
  static constexpr std::array kVariants = {kPlain, kPlain | kMomentum, kPlain | kCentered,
                                           kPlain | kMomentum | kCentered};
  static constexpr bool kHasMetric = true;
  template <StateMask kMask>
  static constexpr bool kHasFloorRatio = (kMask & kCentered) != 0;

  struct Hyperparameters {
    double alpha = 0, eps = 0, momentum = 0;

    template <class Bind>
    FUSEDREG_HD void bind(Bind&& bind) {
      bind("alpha", alpha);
      bind("eps", eps);
      bind("momentum", momentum);
    }
  };

  template <class A>
  struct Constants {
    A step_size, alpha, one_minus_alpha, eps, momentum;
  };

  template <class A>
  FUSEDREG_HD static double fill(Constants<A>& c, double lr, const Hyperparameters& h, const double*,
                                 const double* after) {
    c.step_size = static_cast<A>(lr);
    c.alpha = static_cast<A>(h.alpha);
    c.one_minus_alpha = static_cast<A>(1 - h.alpha);
    c.eps = static_cast<A>(h.eps);
    c.momentum = static_cast<A>(h.momentum);
    return lr * (h.momentum != 0 ? after[1] : 1);
  }

  template <class AsStored>
  FUSEDREG_HD static void next(double, const Hyperparameters& h, double* scalar_states, AsStored&&) {
    scalar_states[0] += 1;
    if (h.momentum != 0) scalar_states[1] = next_momentum_gain(scalar_states[1], h.momentum, 0);
  }

  template <StateMask kMask, class A>
  FUSEDREG_HD static Metric<A> metric(const A* state, const Constants<A>& c) {
    const A square_avg = state[0];
    const A uncentered = square_root(square_avg) + c.eps;
    if constexpr ((kMask & kCentered) == 0) {
      return {uncentered};
    } else {
      const A grad_avg = state[2];
      // A variance below zero is a rounding error; its root, a NaN, is what torch makes of it.
      const A d = square_root(max_keeping_nan(A(0), square_avg - grad_avg * grad_avg)) + c.eps;
      // At a solution the gradient stands still and the variance goes, and what the step moves grows with it: whether
      // the floor acts is for the uncentered moment to say, and then the floor goes as the metric does.
      return {d, divide(d, uncentered)};
    }
  }

  template <StateMask kMask, class A>
  FUSEDREG_HD static auto step([[maybe_unused]] A& w, A g, A* state, const Constants<A>& c) {
    A& square_avg = state[0];
    square_avg = c.alpha * square_avg + c.one_minus_alpha * g * g;
    if constexpr ((kMask & kCentered) != 0) {
      A& grad_avg = state[2];
      grad_avg = lerp(grad_avg, g, c.one_minus_alpha, c.alpha);
    }
    const Metric<A> its_metric = metric<kMask>(state, c);
    if constexpr ((kMask & kMomentum) == 0) {
      return Quotient<A>{c.step_size * g, its_metric};
    } else {
      state[1] = c.momentum * state[1] + divide(g, its_metric.d);
      w = w - c.step_size * state[1];
      return its_metric;
    }
  }
};

}  // namespace fusedreg
