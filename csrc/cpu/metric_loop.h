// The metric of a tile of weights. Included once per instruction set, by each_isa.h, behind update_loop.h.
namespace fusedreg::cpu::FUSEDREG_ISA {

template <class Rule, StateMask kStates, class A, std::size_t... kI>
FUSEDREG_TARGET void metric_of_streams(const Pointers& at, const DTypes& dtypes, std::int64_t begin, std::int64_t count,
                                       const void* constants, A* d, [[maybe_unused]] A* floor_ratio,
                                       std::index_sequence<kI...>) {
  A tiles[1 + kMaxStates][kTileElements];
  [[maybe_unused]] const A* s[kMaxStates] = {};
  ((s[kI] = open_state(at, dtypes, kI, tiles[kI], begin, count)), ...);
  const auto c = static_cast<const StepConstants<Rule, A>*>(constants)->rule;  // a copy, which no store can be to
#pragma GCC ivdep
  for (std::int64_t i = 0; i < count; ++i) {
    A values[kMaxStates] = {};
    ((values[kI] = s[kI][i]), ...);
    const Metric<A> metric = Rule::template metric<kStates>(values, c);
    d[i] = metric.d;
    if constexpr (has_floor_ratio<Rule, kStates>(0)) floor_ratio[i] = metric.floor_ratio;
  }
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
