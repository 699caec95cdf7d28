// A rule's kernels. The units that setup.py writes include it, one for each rule.
#pragma once

#include "device.h"
#include "kernels.h"
#include "units.h"

namespace fusedreg::cuda {

// How many blocks are to share a multiprocessor sets the registers that a thread may take. Left alone, ptxas spills to
// fit more. `streams` are those that the kernel has in registers at once.
template <class T>
constexpr int blocks_per_multiprocessor(int streams) {
  if (sizeof(T) == 2) return streams > 4 ? 2 : 3;
  if (sizeof(T) != 4) return 2;  // 128 registers: a pack has more elements, or larger ones
  return streams > 4 ? 3 : 4;    // 80, 64
}

// Two blocks a multiprocessor: left alone, ptxas spills to fit more.
template <class Rule_>
__global__ void __launch_bounds__(kThreads, 2) prepare_kernel(const __grid_constant__ PrepareArgs args) {
  __shared__ PrepareShared<Rule_> shared;
  prepare_block<Rule_>(DeviceBlock(), args, shared);
}

template <class Rule_, StateMask kMask, class T>
__global__ void __launch_bounds__(kThreads, blocks_per_multiprocessor<T>(2 + states_in<kMask>().size()))
    update_kernel(const __grid_constant__ UpdateArgs args) {
  __shared__ UpdateShared<Rule_, ArithmeticOf<T>> shared;
  update_block<Rule_, kMask, T>(DeviceBlock(), args, shared);
}

template <class Rule_, StateMask kMask, class T>
__global__ void __launch_bounds__(kThreads, 2) units_kernel(const __grid_constant__ UnitsArgs args) {
  __shared__ UnitsShared<Rule_, ArithmeticOf<T>> shared;
  units_block<Rule_, kMask, T>(DeviceBlock(), args, shared);
}

template <class Rule_, std::size_t... kI>
int launch_update(DType dtype, StateMask states, const UpdateArgs& args, void* stream, std::index_sequence<kI...>) {
  const auto blocks = static_cast<unsigned>(args.chunks.count);
  visit_dtype(dtype, [&](auto element) {
    const auto launch_if = [&](auto mask) {
      constexpr StateMask kMask = decltype(mask)::value;
      if (kMask != states) return;
      update_kernel<Rule_, kMask, decltype(element)><<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(args);
    };
    (launch_if(std::integral_constant<StateMask, Rule_::kVariants[kI]>{}), ...);
  });
  return cudaGetLastError();
}

template <class Rule_, std::size_t... kI>
int launch_units(DType dtype, StateMask states, const UnitsArgs& args, void* stream, std::index_sequence<kI...>) {
  const auto blocks = static_cast<unsigned>(args.item_count);
  visit_dtype(dtype, [&](auto element) {
    const auto launch_if = [&](auto mask) {
      constexpr StateMask kMask = decltype(mask)::value;
      if (kMask != states) return;
      constexpr StateMask kRead = states_of_metric<Rule_>(kMask);
      units_kernel<Rule_, kRead, decltype(element)><<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(args);
    };
    (launch_if(std::integral_constant<StateMask, Rule_::kVariants[kI]>{}), ...);
  });
  return cudaGetLastError();
}

template <class Rule_>
Rule make_rule() {
  Rule rule;
  rule.info = make_rule_info<Rule_>();
  rule.prepared_size = sizeof(Prepared<Rule_>);
  rule.prepare = [](const PrepareArgs& args, void* stream) -> int {
    const auto blocks = static_cast<unsigned>(args.set_count);
    prepare_kernel<Rule_><<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(args);
    return cudaGetLastError();
  };
  rule.update = [](DType dtype, StateMask states, const UpdateArgs& args, void* stream) -> int {
    return launch_update<Rule_>(dtype, states, args, stream, std::make_index_sequence<kVariantsOf<Rule_>>{});
  };
  rule.units = [](DType dtype, StateMask states, const UnitsArgs& args, void* stream) -> int {
    return launch_units<Rule_>(dtype, states, args, stream, std::make_index_sequence<kVariantsOf<Rule_>>{});
  };
  return rule;
}

}  // namespace fusedreg::cuda
