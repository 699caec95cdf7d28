// A rule's kernels for every instruction set. The units that setup.py writes include it, one for each rule.
#pragma once

#include <algorithm>

#include "bfloat16.h"
#include "kernels.h"
#include "prefetch.h"

#define FUSEDREG_LOOPS "update_loop.h"
#include "each_isa.h"
#undef FUSEDREG_LOOPS
#define FUSEDREG_LOOPS "score_loop.h"
#include "each_isa.h"
#undef FUSEDREG_LOOPS
#define FUSEDREG_LOOPS "metric_loop.h"
#include "each_isa.h"
#undef FUSEDREG_LOOPS

namespace fusedreg::cpu {

template <class Rule_, class A>
UpdateKernel update_kernel(Isa isa, const double* fields, StateMask states) {
#if defined(FUSEDREG_X86_64_LEVELS)
  if (isa == kX8664V4) return x86_64_v4::update_kernel<Rule_, A>(fields, states);
  if (isa == kX8664V3) return x86_64_v3::update_kernel<Rule_, A>(fields, states);
#endif
  return baseline::update_kernel<Rule_, A>(fields, states);
}

template <class Rule_, class A>
ScoreKernel score_kernel(Isa isa, StateMask states, bool in_metric) {
#if defined(FUSEDREG_X86_64_LEVELS)
  if (isa == kX8664V4) return x86_64_v4::score_kernel<Rule_, A>(states, in_metric);
  if (isa == kX8664V3) return x86_64_v3::score_kernel<Rule_, A>(states, in_metric);
#endif
  return baseline::score_kernel<Rule_, A>(states, in_metric);
}

template <class Rule_, class A>
MetricKernel metric_kernel(Isa isa, StateMask states) {
#if defined(FUSEDREG_X86_64_LEVELS)
  if (isa == kX8664V4) return x86_64_v4::metric_kernel<Rule_, A>(states);
  if (isa == kX8664V3) return x86_64_v3::metric_kernel<Rule_, A>(states);
#endif
  return baseline::metric_kernel<Rule_, A>(states);
}

template <class Rule_, std::size_t... kI>
bool variant_has_floor_ratio(StateMask states, std::index_sequence<kI...>) {
  return ((states == Rule_::kVariants[kI] && has_floor_ratio<Rule_, Rule_::kVariants[kI]>(0)) || ...);
}

template <class Rule_>
Rule make_rule() {
  Rule rule;
  rule.info = make_rule_info<Rule_>();
  rule.has_metric = Rule_::kHasMetric;
  rule.constants_size = std::max(sizeof(StepConstants<Rule_, float>), sizeof(StepConstants<Rule_, double>));
  rule.fill = [](void* constants, DType arithmetic, const double* fields, const double* before, const double* after,
                 double inv_grad_scale, double clip_coef) {
    const Group<Rule_> group = make_group<Rule_>(fields);
    if (arithmetic == DType::kFloat64) {
      auto& c = *static_cast<StepConstants<Rule_, double>*>(constants);
      return fill_constants(c, group, before, after, inv_grad_scale, clip_coef);
    } else {
      auto& c = *static_cast<StepConstants<Rule_, float>*>(constants);
      return fill_constants(c, group, before, after, inv_grad_scale, clip_coef);
    }
  };
  rule.update = [](Isa isa, DType arithmetic, const double* fields, StateMask states) {
    return arithmetic == DType::kFloat64 ? update_kernel<Rule_, double>(isa, fields, states)
                                         : update_kernel<Rule_, float>(isa, fields, states);
  };
  rule.score = [](Isa isa, DType arithmetic, StateMask states, bool in_metric) {
    return arithmetic == DType::kFloat64 ? score_kernel<Rule_, double>(isa, states, in_metric)
                                         : score_kernel<Rule_, float>(isa, states, in_metric);
  };
  rule.metric = [](Isa isa, DType arithmetic, StateMask states) {
    return arithmetic == DType::kFloat64 ? metric_kernel<Rule_, double>(isa, states)
                                         : metric_kernel<Rule_, float>(isa, states);
  };
  rule.has_floor_ratio = [](StateMask states) {
    return variant_has_floor_ratio<Rule_>(states, std::make_index_sequence<kVariantsOf<Rule_>>{});
  };
  return rule;
}

}  // namespace fusedreg::cpu
