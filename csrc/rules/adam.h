// Adam and AdamW (they differ in stage 4 alone), with and without amsgrad.
// Kingma and Ba, https://arxiv.org/abs/1412.6980; Reddi et al., https://openreview.net/forum?id=ryQu7f-RZ
#pragma once

#include "../hyper.h"

namespace fusedreg {

template <bool kAmsgrad>
struct Adam {
  static constexpr int kStates = kAmsgrad ? 3 : 2;  // exp_avg, exp_avg_sq, max_exp_avg_sq
  static constexpr bool kHasMetric = true;

  // Moves w and the moments, and returns the metric d = sqrt(v_hat) + eps in which the step was taken.
  template <class A>
  FUSEDREG_HD static A step(A& w, A g, A* state, const Hyper<A>& h) {
    A& exp_avg = state[0];
    A& exp_avg_sq = state[1];
    // torch's lerp, from the nearer end: with a small beta1 a large exp_avg would swallow a small gradient.
    const A change = g - exp_avg;
    exp_avg = h.one_minus_beta1 < A(0.5) ? exp_avg + h.one_minus_beta1 * change : g - h.beta1 * change;
    exp_avg_sq = h.beta2 * exp_avg_sq + h.one_minus_beta2 * g * g;
    A second_moment = exp_avg_sq;
    if constexpr (kAmsgrad) second_moment = state[2] = max_keeping_nan(exp_avg_sq, state[2]);
    const A d = square_root(second_moment) * h.inv_sqrt_bias_correction2 + h.eps;
    w = w - h.step_size * (exp_avg / d);
    return d;
  }
};

struct AdamHost {
  static constexpr const char* kName = "adam";
  static constexpr const char* kStateNames[] = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"};
#define FUSEDREG_NAME(name) #name,
  static constexpr const char* kScalarNames[] = {FUSEDREG_ADAM_SCALARS(FUSEDREG_NAME)};
#undef FUSEDREG_NAME

  static int state_count(const Group& group) { return group.amsgrad != 0 ? 3 : 2; }

  template <class Visitor>
  FUSEDREG_HD static void visit(const Group& group, Visitor&& visitor) {
    group.amsgrad != 0 ? visitor(Adam<true>{}) : visitor(Adam<false>{});
  }

  // The clock counts the steps: `clock` is the number before this step.
  FUSEDREG_HD static double next_clock(const Group&, double clock) { return clock + 1; }

  FUSEDREG_HD static void fill(Hyper<double>& h, const Group& group, double clock) {
    const double t = next_clock(group, clock);
    h.beta1 = group.beta1;
    h.one_minus_beta1 = 1 - group.beta1;
    h.beta2 = group.beta2;
    h.one_minus_beta2 = 1 - group.beta2;
    h.inv_sqrt_bias_correction2 = 1 / sqrt(1 - pow(group.beta2, t));
    h.eps = group.eps;
    h.step_size = group.lr / (1 - pow(group.beta1, t));
    h.tau = group.lr;  // over d, in the prox: m_hat is unbiased already, so without its bias correction
  }
};

}  // namespace fusedreg
