// One element's step: the only place that composes the stages.
//
// A rule (rules/) is a struct with
//   kName, kStates, kScalarStates   its name, its state tensors, and its scalars that are kept for each parameter
//   kVariants                       the masks of states that it can be run with
//   kHasMetric                      whether its step is taken in a metric, element by element
//   Hyperparameters                 what it reads of a group beside CommonHyperparameters, in double
//   Constants<A>                    what it needs for every element
//   next(lr, hyperparameters, scalar states, as_stored)    moves the scalar states on; as_stored(i, number) is a number
//                                                          in the precision that scalar state i is stored in
//   fill(constants, lr, hyperparameters, scalar states before the step, and after it as they are stored)
//                                                          returns the prox's step size tau
//   step<mask>(w, g, state, constants)                     moves w and the states, returns the metric; or moves the
//                                                          states alone and returns a Quotient that w is to move by
//   metric<mask>(state, constants)                         where kHasMetric: the metric, of the states that it is of;
//                                                          target sparsity calls it, too. It reads of the constants
//                                                          what depends on the scalar states after the step alone
//   kHasFloorRatio<mask>                                   if it has one, and where it is true: floor_ratio is not
//                                                          always 1
//   finish<mask>(w, z, state, constants)                   if it has one: moves states that go by the weight as the
//                                                          prox has left it; z is what the prox was given
#pragma once

#include <type_traits>

#include "gradient.h"
#include "prox.h"
#include "states.h"

namespace fusedreg {

// The scalars that all elements of a parameter share in a step; filled in double, read in the arithmetic type A.
template <class Rule, class A>
struct StepConstants {
  GradientConstants<A> gradient;
  typename Rule::template Constants<A> rule;
  ProxConstants<A> prox;
};

// Returns the rule's tau.
template <class Rule, class A>
FUSEDREG_HD double fill_constants(StepConstants<Rule, A>& c, const Group<Rule>& group, const double* before,
                                  const double* after, double inv_grad_scale, double clip_coef) {
  fill_gradient(c.gradient, group.common, group.penalties, inv_grad_scale, clip_coef);
  const double tau = Rule::fill(c.rule, group.common.lr, group.rule, before, after);
  fill_prox(c.prox, group.common, group.penalties, Rule::kHasMetric, tau);
  return tau;
}

template <class Rule, StateMask kStates>
constexpr auto has_floor_ratio(int) -> decltype(bool(Rule::template kHasFloorRatio<kStates>)) {
  return Rule::template kHasFloorRatio<kStates>;
}

template <class Rule, StateMask kStates>
constexpr bool has_floor_ratio(long) {
  return false;
}

template <class Rule, StateMask kStates>
constexpr auto has_finish(int)
    -> decltype(Rule::template finish<kStates>(0.f, 0.f, static_cast<float*>(nullptr),
                                               std::declval<const typename Rule::template Constants<float>&>()),
                true) {
  return true;
}

template <class Rule, StateMask kStates>
constexpr bool has_finish(long) {
  return false;
}

template <class Rule, StateMask kStates, class A>
FUSEDREG_HD auto finish(A w, A z, A* state, const typename Rule::template Constants<A>& c, int)
    -> decltype(Rule::template finish<kStates>(w, z, state, c)) {
  Rule::template finish<kStates>(w, z, state, c);
}

template <class Rule, StateMask kStates, class A>
FUSEDREG_HD void finish(A, A, A*, const typename Rule::template Constants<A>&, long) {}

template <class Rule_, StateMask kStates_, ProxStages kProx_, bool kInMetric_, bool kPenalized>
struct Update {
  using Rule = Rule_;
  static constexpr StateMask kStates = kStates_;
  static constexpr ProxStages kProx = kProx_;
  static constexpr bool kInMetric = kInMetric_;
  // L1 enters through the gradient in a mode in which no penalty acts in the prox.
  static constexpr bool kByL1 = kProx != ProxStages::kShrinkAndSelect && kProx != ProxStages::kFade;

  // What the rule says of a step: a Quotient that w is still to move by, or a Metric, and w has moved.
  template <class A>
  using Step = decltype(Rule::template step<kStates_>(std::declval<A&>(), A(), static_cast<A*>(nullptr),
                                                      std::declval<const typename Rule::template Constants<A>&>()));
  template <class A>
  static constexpr bool kIsQuotient = std::is_same_v<Step<A>, Quotient<A>>;

  // Whether the stages are better taken one after the other, for some elements at a time.
  template <class A>
  static constexpr bool kIsLong =
      Rule::kHasMetric ? kInMetric && kIsQuotient<A> : kProx > ProxStages::kShrink && !has_finish<Rule, kStates_>(0);

  // w, g after the stages 1 to 3, and state[0 .. kStatesOf<Rule>), those of the mask, in the arithmetic type A.
  template <class A>
  FUSEDREG_HD static void apply(A& w, A g, A* state, const StepConstants<Rule, A>& c) {
    A z = w;
    const Step<A> its_step = step(z, g, state, c);
    if constexpr (kIsQuotient<A>) {
      w = move(w, its_step, c);
    } else {
      w = take_prox(z, w, its_step, c);
      finish<Rule, kStates_>(w, z, state, c.rule, 0);
    }
  }

  // Stages 4 and 5.
  template <class A>
  FUSEDREG_HD static Step<A> step(A& w, A g, A* state, const StepConstants<Rule, A>& c) {
    if constexpr (kPenalized) g = penalize_gradient<kByL1>(g, w, c.gradient);
    w = w * c.gradient.w_scale;  // decoupled decay
    return Rule::template step<kStates_>(w, g, state, c.rule);
  }

  // Stage 6: of z, where the step has moved w to.
  template <Further kFurther = Further::kAll, class A>
  FUSEDREG_HD static A take_prox(A z, A w, const Metric<A>& metric, const StepConstants<Rule, A>& c) {
    return prox<kProx, kInMetric, kFurther>(z, w, metric, c.prox);
  }

  // What a quotient leaves to do, and stage 6. Without l2, some are done by the inverse of a metric.
  static constexpr bool kHasInverse = kInMetric && shrinks(kProx) && !has_floor_ratio<Rule, kStates_>(0);
  template <Further kFurther = Further::kAll, bool kL2 = true, class A>
  FUSEDREG_HD static A move(A w, const Quotient<A>& by, const StepConstants<Rule, A>& c) {
    const A decayed = w * c.gradient.w_scale;
    if constexpr (kHasInverse && !kL2) return prox_by_inverse<kProx, kFurther>(decayed, by, w, c.prox);
    return prox_of_quotient<kProx, kInMetric, kFurther>(decayed, by, w, c.prox);
  }
};

// What a group's switches select among the instances of Update.
struct UpdateChoice {
  ProxKind kind;
  bool penalized;
};

// Whether eps, which no metric is below, is so small that products of two metrics and a weight may vanish. The one
// division of a step and its prox takes them where the floor acts: for weights above 2 eps / l2, or 2 tau.
template <class Hyperparameters>
FUSEDREG_HD auto has_tiny_metric(const Hyperparameters& h, int) -> decltype(h.eps, bool()) {
  return h.eps < 1e-12;
}

template <class Hyperparameters>
FUSEDREG_HD bool has_tiny_metric(const Hyperparameters&, long) {
  return false;
}

// Whether these products may overflow, or tau * l1: an infinite threshold is not below an infinite weight, and its zero
// would hide that the step was an infinity over another.
FUSEDREG_HD bool has_huge_strength(double lr, double l1, double l2) { return lr > 1e6 || l1 > 1e6 || l2 > 1e6; }

template <class Rule>
FUSEDREG_HD UpdateChoice choose_update(const Group<Rule>& group) {
  ProxKind kind = prox_kind(group.common, group.penalties, Rule::kHasMetric);
  // Its kernel does what the others do, and divides twice.
  const bool leaves_range =
      has_tiny_metric(group.rule, 0) || has_huge_strength(group.common.lr, group.penalties.l1, group.penalties.l2);
  if (kind.in_metric && leaves_range) kind.stages = ProxStages::kFade;
  // A penalty in the gradient that is zero adds nothing, so that with the further stages one kernel does for both.
  return {kind, kind.stages > ProxStages::kShrink || penalizes_gradient(group.common, group.penalties)};
}

// Calls visitor(Update<...>{}) with the one instance that a choice and the states select; false if there is none.
template <class Rule, class Visitor, std::size_t... kI>
FUSEDREG_HD bool visit_update(const UpdateChoice& choice, StateMask states, Visitor&& visitor,
                              std::index_sequence<kI...>) {
  const ProxKind kind = choice.kind;
  const auto with = [&](auto mask, auto is_penalized, auto is_in_metric) {
    constexpr StateMask kMask = decltype(mask)::value;
    constexpr bool kPenalized = decltype(is_penalized)::value, kInMetric = decltype(is_in_metric)::value;
    if constexpr (!kInMetric) {
      if (kind.stages == ProxStages::kNone) visitor(Update<Rule, kMask, ProxStages::kNone, false, kPenalized>{});
    }
    if (kind.stages == ProxStages::kShrink) visitor(Update<Rule, kMask, ProxStages::kShrink, kInMetric, kPenalized>{});
    if constexpr (kPenalized) {
      if (kind.stages == ProxStages::kSelect) visitor(Update<Rule, kMask, ProxStages::kSelect, kInMetric, true>{});
      if (kind.stages == ProxStages::kShrinkAndSelect) {
        visitor(Update<Rule, kMask, ProxStages::kShrinkAndSelect, kInMetric, true>{});
      }
      if (kind.stages == ProxStages::kFade) visitor(Update<Rule, kMask, ProxStages::kFade, kInMetric, true>{});
    }
  };
  const auto with_metric = [&](auto mask, auto is_penalized) {
    if constexpr (Rule::kHasMetric) {
      if (kind.in_metric) return with(mask, is_penalized, std::true_type{});
    }
    with(mask, is_penalized, std::false_type{});
  };
  const auto with_states = [&](auto mask) {
    choice.penalized ? with_metric(mask, std::true_type{}) : with_metric(mask, std::false_type{});
    return true;
  };
  return ((states == Rule::kVariants[kI] && with_states(std::integral_constant<StateMask, Rule::kVariants[kI]>{})) ||
          ...);
}

template <class Rule, class Visitor>
FUSEDREG_HD bool visit_update(const UpdateChoice& choice, StateMask states, Visitor&& visitor) {
  return visit_update<Rule>(choice, states, visitor, std::make_index_sequence<kVariantsOf<Rule>>{});
}

template <class Rule, class Visitor>
FUSEDREG_HD bool visit_update(const Group<Rule>& group, StateMask states, Visitor&& visitor) {
  return visit_update<Rule>(choose_update(group), states, visitor);
}

}  // namespace fusedreg
