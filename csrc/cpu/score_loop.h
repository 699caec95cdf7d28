// The loop that scores a tile of weights. Included once per instruction set, by each_isa.h, behind update_loop.h.
namespace fusedreg::cpu::FUSEDREG_ISA {

template <class Rule, StateMask kStates, bool kInMetric, class A, std::size_t... kI>
FUSEDREG_HD void score_elements(const A* w, const A* const (&state)[kMaxStates], std::int64_t count,
                                const typename Rule::template Constants<A>& constants, KeyOf<A>* keys,
                                std::index_sequence<kI...>) {
  const auto c = constants;  // a copy, which no store can be to
  [[maybe_unused]] const A* s[kMaxStates] = {};
  ((s[kI] = state[kI]), ...);
#pragma GCC ivdep
  for (std::int64_t i = 0; i < count; ++i) {
    A values[kMaxStates] = {};
    ((values[kI] = s[kI][i]), ...);
    keys[i] = score_key<Rule, kStates, kInMetric>(w[i], values, c);
  }
}

template <class Rule, StateMask kStates, bool kInMetric, class A, std::size_t... kI>
FUSEDREG_TARGET void score_streams(const Pointers& at, const DTypes& dtypes, std::int64_t begin, std::int64_t count,
                                   const void* constants, void* keys, std::index_sequence<kI...> states) {
  A tiles[1 + kMaxStates][kTileElements];
  const auto open = [&](const void* stream, DType dtype, A* tile) -> const A* {
    if (dtype == dtype_of<A>()) return static_cast<const A*>(stream) + begin;
    load_tile(tile, stream, dtype, begin, count);
    return tile;
  };
  const A* state[kMaxStates] = {};
  ((state[kI] = open_state(at, dtypes, kI, tiles[1 + kI], begin, count)), ...);
  const auto& c = static_cast<const StepConstants<Rule, A>*>(constants)->rule;
  score_elements<Rule, kStates, kInMetric>(open(at.w, dtypes.w, tiles[0]), state, count, c,
                                           static_cast<KeyOf<A>*>(keys), states);
}

template <class Rule, StateMask kStates, bool kInMetric, class A>
void score_tile(const Pointers& at, const DTypes& dtypes, std::int64_t begin, std::int64_t count, const void* constants,
                void* keys) {
  constexpr auto kRead = states_in<kInMetric ? kStates : 0>();
  score_streams<Rule, kStates, kInMetric, A>(at, dtypes, begin, count, constants, keys, kRead);
}

template <class Rule, class A, std::size_t... kI>
ScoreKernel score_kernel(StateMask states, std::index_sequence<kI...>) {
  ScoreKernel kernel = score_tile<Rule, 0, false, A>;
  if constexpr (Rule::kHasMetric) {
    ((states == Rule::kVariants[kI] ? void(kernel = score_tile<Rule, Rule::kVariants[kI], true, A>) : void()), ...);
  }
  return kernel;
}

template <class Rule, class A>
ScoreKernel score_kernel(StateMask states, bool in_metric) {
  if (!in_metric) return score_tile<Rule, 0, false, A>;
  return score_kernel<Rule, A>(states, std::make_index_sequence<kVariantsOf<Rule>>{});
}

}  // namespace fusedreg::cpu::FUSEDREG_ISA
