// The metric of a tile of weights. Included once per instruction set, by each_isa.h, behind update_loop.h.
namespace fusedreg::cpu::FUSEDREG_ISA {

template <class Rule, StateMask kStates, class A, std::size_t... kI>
FUSEDREG_TARGET void metric_of_streams(const Pointers& at, const DTypes& dtypes, std::int64_t begin, std::int64_t count,
                                       const void* constants, A* d, A* floor_ratio, std::index_sequence<kI...> states) {
  A tiles[1 + kMaxStates][kTileElements];
  const A* state[kMaxStates] = {};
  ((state[kI] = open_state(at, dtypes, kI, tiles[kI], begin, count)), ...);
  const auto c = static_cast<const StepConstants<Rule, A>*>(constants)->rule;  // a copy, which no store can be to
  metric_of_elements<Rule, kStates>(state, count, c, d, floor_ratio, states);
}

template <class Rule, StateMask kStates, class A>
void metric_tile(const Pointers& at, const DTypes& dtypes, std::int64_t begin, std::int64_t count,
                 const void* constants, void* d, void* floor_ratio) {
  metric_of_streams<Rule, kStates>(at, dtypes, begin, count, constants, static_cast<A*>(d),
                                   static_cast<A*>(floor_ratio), states_in<kStates>());
}

template <class Rule, class A, std::size_t... kI>
MetricKernel metric_kernel(StateMask states, std::index_sequence<kI...>) {
  MetricKernel kernel = nullptr;
  if constexpr (Rule::kHasMetric) {
    ((states == Rule::kVariants[kI] ? void(kernel = metric_tile<Rule, Rule::kVariants[kI], A>) : void()), ...);
  }
  return kernel;
}

template <class Rule, class A>
MetricKernel metric_kernel(StateMask states) {
  return metric_kernel<Rule, A>(states, std::make_index_sequence<kVariantsOf<Rule>>{});
}

}  // namespace fusedreg::cpu::FUSEDREG_ISA
