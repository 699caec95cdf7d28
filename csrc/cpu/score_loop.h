// The loop that scores a tile of weights. Included once per instruction set, by each_isa.h, behind update_loop.h.
namespace fusedreg::cpu::FUSEDREG_ISA {

// T is what w and the states are in. A state that the metric does not look at is not loaded.
template <class Rule, StateMask kStates, bool kInMetric, class A, class T, std::size_t... kI>
FUSEDREG_HD void score_elements(const T* w, const T* const (&state)[kMaxStates], std::int64_t count,
                                const typename Rule::template Constants<A>& constants, KeyOf<A>* keys,
                                std::index_sequence<kI...>) {
  const auto c = constants;  // a copy, which no store can be to
  [[maybe_unused]] const T* s[kMaxStates] = {};
  ((s[kI] = state[kI]), ...);
#pragma GCC ivdep
  for (std::int64_t i = 0; i < count; ++i) {
    A values[kMaxStates] = {};
    ((values[kI] = static_cast<A>(load(s[kI][i]))), ...);
    keys[i] = score_key<Rule, kStates, kInMetric>(static_cast<A>(load(w[i])), values, c);
  }
}

template <class Rule, StateMask kStates, bool kInMetric, class A, std::size_t... kI>
FUSEDREG_TARGET void score_streams(const Pointers& at, const DTypes& dtypes, std::int64_t begin, std::int64_t count,
                                   const void* constants, void* key_tile, std::index_sequence<kI...> states) {
  const auto& c = static_cast<const StepConstants<Rule, A>*>(constants)->rule;
  KeyOf<A>* const keys = static_cast<KeyOf<A>*>(key_tile);
  // Converted where they are used: a loop of its own would convert states that the metric does not look at.
  if constexpr (sizeof(A) == sizeof(float)) {
    if (dtypes.w == DType::kBFloat16 && (true && ... && (dtypes.state[kI] == DType::kBFloat16))) {
      const BFloat16* state[kMaxStates] = {};
      ((state[kI] = static_cast<const BFloat16*>(at.state[kI]) + begin), ...);
      const BFloat16* const w = static_cast<const BFloat16*>(at.w) + begin;
      return score_elements<Rule, kStates, kInMetric, A>(w, state, count, c, keys, states);
    }
  }
  alignas(64) A tiles[1 + kMaxStates][kTileElements];
  const auto open = [&](const void* stream, DType dtype, A* tile) -> const A* {
    if (dtype == dtype_of<A>()) return static_cast<const A*>(stream) + begin;
    load_tile(tile, stream, dtype, begin, count);
    return tile;
  };
  const A* state[kMaxStates] = {};
  ((state[kI] = open_state(at, dtypes, kI, tiles[1 + kI], begin, count)), ...);
  score_elements<Rule, kStates, kInMetric, A>(open(at.w, dtypes.w, tiles[0]), state, count, c, keys, states);
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
