// Emulates a GPU on the CPU: the launches of csrc/cuda/kernels.h without one. It runs csrc/cuda/block.h for every
// block, thread by thread. Blocks go backwards: nothing may rest on their order.
#pragma once

#include "cuda/block.h"
#include "cuda/kernels.h"
#include "cuda/units.h"

namespace fusedreg::cuda {

struct EmulatedBlock {
  std::int64_t index, count;

  template <class Visitor>
  void each_thread(Visitor&& visitor) const {
    for (int i = 0; i < kThreads; ++i) visitor(index % 2 == 0 ? i : kThreads - 1 - i);
  }

  template <class Visitor>
  bool any_thread(Visitor&& visitor) const {
    bool any = false;
    each_thread([&](int thread) { any |= visitor(thread); });
    return any;
  }
};

template <class Kernel>
void each_block(std::int64_t blocks, Kernel&& kernel) {
  for (std::int64_t block = blocks - 1; block >= 0; --block) kernel(EmulatedBlock{block, blocks});
}

// Shared memory before anything was written to it: NaN.
template <class Shared>
Shared unwritten() {
  Shared shared;
  std::memset(static_cast<void*>(&shared), 0xff, sizeof(Shared));
  return shared;
}

template <class Rule_, std::size_t... kI>
void emulate_update(DType dtype, StateMask states, const UpdateArgs& args, std::index_sequence<kI...>) {
  visit_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    const auto run_if = [&](auto mask) {
      constexpr StateMask kMask = decltype(mask)::value;
      if (kMask != states) return;
      each_block(args.chunks.count, [&](const EmulatedBlock& block) {
        auto shared = unwritten<UpdateShared<Rule_, ArithmeticOf<T>>>();
        update_block<Rule_, kMask, T>(block, args, shared);
      });
    };
    (run_if(std::integral_constant<StateMask, Rule_::kVariants[kI]>{}), ...);
  });
}

template <class Rule_, std::size_t... kI>
void emulate_units(DType dtype, StateMask states, const UnitsArgs& args, std::index_sequence<kI...>) {
  visit_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    const auto run_if = [&](auto mask) {
      constexpr StateMask kMask = decltype(mask)::value;
      if (kMask != states) return;
      each_block(args.item_count, [&](const EmulatedBlock& block) {
        auto shared = unwritten<UnitsShared<Rule_, ArithmeticOf<T>>>();
        units_block<Rule_, states_of_metric<Rule_>(kMask), T>(block, args, shared);
      });
    };
    (run_if(std::integral_constant<StateMask, Rule_::kVariants[kI]>{}), ...);
  });
}

// As in csrc/cuda/rule.h.
template <class Rule_>
Rule make_rule() {
  Rule rule;
  rule.info = make_rule_info<Rule_>();
  rule.prepared_size = sizeof(Prepared<Rule_>);
  rule.prepare = [](const PrepareArgs& args, void*) -> int {
    each_block(args.set_count, [&](const EmulatedBlock& block) {
      auto shared = unwritten<PrepareShared<Rule_>>();
      prepare_block<Rule_>(block, args, shared);
    });
    return 0;
  };
  rule.update = [](DType dtype, StateMask states, const UpdateArgs& args, void*) -> int {
    emulate_update<Rule_>(dtype, states, args, std::make_index_sequence<kVariantsOf<Rule_>>{});
    return 0;
  };
  rule.units = [](DType dtype, StateMask states, const UnitsArgs& args, void*) -> int {
    emulate_units<Rule_>(dtype, states, args, std::make_index_sequence<kVariantsOf<Rule_>>{});
    return 0;
  };
  return rule;
}

}  // namespace fusedreg::cuda
