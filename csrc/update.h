// One element's step: the only place that composes the stages.
#pragma once

#include <type_traits>

#include "clip.h"
#include "prox.h"
#include "rules/registry.h"

namespace fusedreg {

template <class Rule_, ProxKind kProx_, bool kPenalized_>
struct Update {
  using Rule = Rule_;
  static constexpr ProxKind kProx = kProx_;
  static constexpr bool kPenalized = kPenalized_;

  // w, g and state[0 .. Rule::kStates) in the arithmetic type A.
  template <class A>
  FUSEDREG_HD static void apply(A& w, A g, A* state, const Hyper<A>& h) {
    const A w_old = w;
    g = transform_gradient<kPenalized>(g, w, h);  // stages 1 to 4
    w = w * h.w_scale;                            // 4, decoupled decay
    const A d = Rule::step(w, g, state, h);       // 5
    w = prox<kProx>(w, w_old, d, h);              // 6
  }
};

// Calls visitor(Update<...>{}) with the one instance that a group's switches select. What it can reach is compiled.
template <class RuleHost, class Visitor>
FUSEDREG_HD void visit_update(const Group& group, Visitor&& visitor) {
  RuleHost::visit(group, [&](auto rule) {
    using Rule = decltype(rule);
    const ProxKind prox = prox_kind(group, Rule::kHasMetric);
    const auto with_prox = [&](auto penalized) {
      constexpr bool kPenalized = decltype(penalized)::value;
      if (prox == ProxKind::kNone) return visitor(Update<Rule, ProxKind::kNone, kPenalized>{});
      if (prox == ProxKind::kUniform) return visitor(Update<Rule, ProxKind::kUniform, kPenalized>{});
      if constexpr (Rule::kHasMetric) return visitor(Update<Rule, ProxKind::kMetric, kPenalized>{});
    };
    penalizes_gradient(group) ? with_prox(std::true_type{}) : with_prox(std::false_type{});
  });
}

// One parameter's scalars for one step; `clock` is the rule's clock before it.
template <class RuleHost>
FUSEDREG_HD Hyper<double> make_hyper(const Group& group, double inv_grad_scale, double clip_coef, double clock) {
  Hyper<double> h;
  fill_gradient_hyper(h, group, inv_grad_scale, clip_coef);
  RuleHost::fill(h, group, clock);
  fill_prox_hyper(h, group);
  return h;
}

}  // namespace fusedreg
