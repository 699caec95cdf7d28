// The update's loop over a chunk. Included once per instruction set, by each_isa.h.
namespace fusedreg::cpu::FUSEDREG_ISA {

// Where a block's loops leave something for the next one.
template <class A>
struct Scratch {
  A *clipped, *left, *d, *floor_ratio;
};

// The stages 1 to 3. Most steps have neither a scale nor a value clip, and many no norm clip: a block's gradients are
// then where they are, and else in `clipped`.
template <class A>
FUSEDREG_HD const A* clip_block(const A* g, A* clipped, std::int64_t count, const GradientConstants<A>& c) {
  if (c.inv_grad_scale != A(1) || c.clip_value != A(INFINITY)) {
    for (std::int64_t i = 0; i < count; ++i) clipped[i] = clip_gradient(g[i], c);
  } else if (c.clip_coef != A(1)) {
    for (std::int64_t i = 0; i < count; ++i) clipped[i] = g[i] * c.clip_coef;
  } else {
    return g;
  }
  return clipped;
}

// The loop is left to the compiler's vectoriser. `ivdep`, not `restrict`: a gradient may share its parameter's memory
// element by element.
template <class U, class A, std::size_t... kI>
FUSEDREG_HD void update_elements(A* w, const A* g, A* const (&state)[kMaxStates], std::int64_t count,
                                 const StepConstants<typename U::Rule, A>& c, std::index_sequence<kI...>) {
  [[maybe_unused]] A* s[kMaxStates] = {};
  ((s[kI] = state[kI]), ...);
#pragma GCC ivdep
  for (std::int64_t i = 0; i < count; ++i) {
    A weight = w[i];
    A values[kMaxStates] = {};
    ((values[kI] = s[kI][i]), ...);
    U::apply(weight, g[i], values, c);
    w[i] = weight;
    ((s[kI][i] = values[kI]), ...);
  }
}

// What a step has left of weights, and their prox; `left` is the quotient's numerator, or where it has moved w to.
template <class U, Further kFurther, bool kL2, class A>
FUSEDREG_HD void finish_elements(A* w, const A* left, const A* d, [[maybe_unused]] const A* floor_ratio,
                                 std::int64_t count, const StepConstants<typename U::Rule, A>& c) {
  constexpr bool kHasFloorRatio = has_floor_ratio<typename U::Rule, U::kStates>(0);
#pragma GCC ivdep
  for (std::int64_t i = 0; i < count; ++i) {
    if constexpr (U::template kIsQuotient<A>) {
      const Quotient<A> quotient = {left[i], {d[i], kHasFloorRatio ? floor_ratio[i] : A(1)}};
      w[i] = U::template move<kFurther, kL2>(w[i], quotient, c);
    } else {
      w[i] = U::template take_prox<kFurther>(left[i], w[i], no_metric<A>(), c);
    }
  }
}

// Calls body(constant Further, constant l2): what a loop of U is to see to where `acting` is all that acts.
template <class U, class Body>
FUSEDREG_HD void with_acting([[maybe_unused]] const Acting& acting, const Body& body) {
  const auto with_further = [&](auto l2) __attribute__((always_inline)) {
    constexpr ProxStages kProx = U::kProx;
    if constexpr (kProx == ProxStages::kSelect || kProx == ProxStages::kShrinkAndSelect) {
      if (acting.further == Further::kBox) return body(std::integral_constant<Further, Further::kBox>(), l2);
      if (acting.further == Further::kL0) return body(std::integral_constant<Further, Further::kL0>(), l2);
      if (acting.further == Further::kFreeze) return body(std::integral_constant<Further, Further::kFreeze>(), l2);
    } else if constexpr (kProx == ProxStages::kFade) {
      if (acting.further == Further::kNone) return body(std::integral_constant<Further, Further::kNone>(), l2);
    }
    body(std::integral_constant<Further, Further::kAll>(), l2);
  };
  if constexpr (U::kHasInverse) {
    if (!acting.l2) return with_further(std::false_type());
  }
  with_further(std::true_type());
}

// The same for a block. The chain through a root, a metric, a division and what selects is long; the instructions that
// wait for it leave a processor no room to work on the elements behind. In two loops, there is.
template <class U, class A, std::size_t... kI>
FUSEDREG_HD void update_in_two_loops(A* w, const A* g, A* const (&state)[kMaxStates], std::int64_t count,
                                     const StepConstants<typename U::Rule, A>& c, const Acting& acting,
                                     const Scratch<A>& scratch, std::index_sequence<kI...>) {
  [[maybe_unused]] A* s[kMaxStates] = {};
  ((s[kI] = state[kI]), ...);
#pragma GCC ivdep
  for (std::int64_t i = 0; i < count; ++i) {
    A weight = w[i], values[kMaxStates] = {};
    ((values[kI] = s[kI][i]), ...);
    [[maybe_unused]] const auto step = U::step(weight, g[i], values, c);
    ((s[kI][i] = values[kI]), ...);
    if constexpr (U::template kIsQuotient<A>) {
      scratch.left[i] = step.numerator;
      scratch.d[i] = step.metric.d;
      if constexpr (has_floor_ratio<typename U::Rule, U::kStates>(0)) scratch.floor_ratio[i] = step.metric.floor_ratio;
    } else {
      scratch.left[i] = weight;
    }
  }
  with_acting<U>(acting, [&](auto further, auto l2) __attribute__((always_inline)) {
    finish_elements<U, decltype(further)::value, decltype(l2)::value>(w, scratch.left, scratch.d, scratch.floor_ratio,
                                                                      count, c);
  });
}

// Of weights that have made their step.
template <class Rule, StateMask kStates, class A, std::size_t... kI>
FUSEDREG_HD void metric_of_elements(const A* const (&state)[kMaxStates], std::int64_t count,
                                    const typename Rule::template Constants<A>& c, A* d,
                                    [[maybe_unused]] A* floor_ratio, std::index_sequence<kI...>) {
  [[maybe_unused]] const A* s[kMaxStates] = {};
  ((s[kI] = state[kI]), ...);
#pragma GCC ivdep
  for (std::int64_t i = 0; i < count; ++i) {
    A values[kMaxStates] = {};
    ((values[kI] = s[kI][i]), ...);
    const Metric<A> metric = Rule::template metric<kStates>(values, c);
    d[i] = metric.d;
    if constexpr (has_floor_ratio<Rule, kStates>(0)) floor_ratio[i] = metric.floor_ratio;
  }
}

// A long update leaves its metric in the scratch, another one where there is room for it.
template <class U, class A, std::size_t... kI>
FUSEDREG_HD void update_block(A* w, const A* g, A* const (&state)[kMaxStates], std::int64_t count,
                              const StepConstants<typename U::Rule, A>& c, [[maybe_unused]] const Acting& acting,
                              const Scratch<A>& scratch, std::index_sequence<kI...> states) {
  g = clip_block(g, scratch.clipped, count, c.gradient);
  if constexpr (U::template kIsLong<A>) {
    update_in_two_loops<U>(w, g, state, count, c, acting, scratch, states);
  } else {
    update_elements<U>(w, g, state, count, c, states);
    if constexpr (U::Rule::kHasMetric) {
      if (scratch.d == nullptr) return;
      const A* const moved[kMaxStates] = {state[0], state[1], state[2]};
      metric_of_elements<typename U::Rule, U::kStates>(moved, count, c.rule, scratch.d, scratch.floor_ratio, states);
    }
  }
}

// Elements of the arithmetic type, where they are. The metric is left in `d` and `floor_ratio`, but for long updates
// with kKeeps: a block's then stays in registers, 0.92 of the time of AdamW with L1 and L2.
template <class U, bool kKeeps, class A, std::size_t... kI>
FUSEDREG_TARGET void update_in_place(A* w, const A* g, A* const (&its_state)[kMaxStates], std::int64_t count,
                                     const StepConstants<typename U::Rule, A>& constants, [[maybe_unused]] A* d,
                                     [[maybe_unused]] A* floor_ratio, std::index_sequence<kI...> states) {
  constexpr std::int64_t kBlock = kBlockBytes / sizeof(A);
  const auto c = constants;  // a copy, which no store can be to
  const Acting acting = acting_in(c.prox);
  const bool prefetches = !looks_ahead_by_itself();
  A* state[kMaxStates] = {};
  ((state[kI] = its_state[kI]), ...);
  A clipped[kBlock], left[kBlock], own_d[kBlock], own_floor_ratio[kBlock];
  Scratch<A> scratch = {clipped, left, kKeeps ? own_d : d, kKeeps ? own_floor_ratio : floor_ratio};
  for (; count >= kBlock; count -= kBlock) {
    if (prefetches) {
      prefetch(w, kAheadBytes, kBlockBytes);
      prefetch(g, kAheadBytes, kBlockBytes);
      (prefetch(state[kI], kAheadBytes, kBlockBytes), ...);
    }
    update_block<U>(w, g, state, kBlock, c, acting, scratch, states);
    w += kBlock;
    g += kBlock;
    ((state[kI] += kBlock), ...);
    if constexpr (!kKeeps) {
      if (d != nullptr) scratch.d += kBlock;
      if (floor_ratio != nullptr) scratch.floor_ratio += kBlock;
    }
  }
  update_block<U>(w, g, state, count, c, acting, scratch, states);
}

template <class A>
FUSEDREG_TARGET void load_tile(A* to, const void* from, DType dtype, std::int64_t begin, std::int64_t count) {
  visit_dtype(dtype, [&](auto element) __attribute__((always_inline)) {
    using T = decltype(element);
    const T* at = static_cast<const T*>(from) + begin;
    if (!looks_ahead_by_itself()) prefetch(at, kAheadBytes, count * static_cast<std::int64_t>(sizeof(T)));
    for (std::int64_t i = 0; i < count; ++i) to[i] = static_cast<A>(load(at[i]));
  });
}

template <class A>
FUSEDREG_TARGET void store_tile(void* to, DType dtype, const A* from, std::int64_t begin, std::int64_t count) {
  visit_dtype(dtype, [&](auto element) __attribute__((always_inline)) {
    using T = decltype(element);
    T* at = static_cast<T*>(to) + begin;
#if FUSEDREG_VECTOR_BYTES == 64
    if constexpr (std::is_same_v<T, BFloat16> && std::is_same_v<A, float>) {
      if (rounds_to_bfloat16()) return store_all(at, from, count);
    }
#endif
    for (std::int64_t i = 0; i < count; ++i) store(at[i], static_cast<ArithmeticOf<T>>(from[i]));
  });
}

// A state's elements where they are, or in a tile.
template <class A>
FUSEDREG_HD A* open_state(const Pointers& at, const DTypes& dtypes, std::size_t k, A* tile, std::int64_t begin,
                          std::int64_t count) {
  if (dtypes.state[k] == dtype_of<A>()) return static_cast<A*>(at.state[k]) + begin;
  if (dtypes.codes[k] != nullptr) {
    load_codes(*dtypes.codes[k], tile, at.state[k], at.scales[k], begin, count);
  } else {
    load_tile(tile, at.state[k], dtypes.state[k], begin, count);
  }
  return tile;
}

template <class U, class A, std::size_t... kI>
FUSEDREG_TARGET void update_converted(const Pointers& at, const DTypes& dtypes, std::int64_t begin, std::int64_t count,
                                      const StepConstants<typename U::Rule, A>& c, std::index_sequence<kI...> states) {
  // Of whole lines: a vector that lies across two takes AdamW in bfloat16 to 1.4 of its time.
  alignas(64) A tiles[2 + kMaxStates][kTileElements];
  // Of many streams, shorter runs of each come faster from memory: AdamW in bfloat16 takes 0.92 of the time. Codes wait
  // for their blocks' scales, of more blocks less long.
  [[maybe_unused]] const bool has_codes = (false || ... || (dtypes.codes[kI] != nullptr));
  const std::int64_t most = sizeof...(kI) > 1 && !has_codes ? kTileElements / 2 : kTileElements;
  for (std::int64_t tile_count; count > 0; begin += tile_count, count -= tile_count) {
    tile_count = count < most ? count : most;
    const auto open = [&](void* stream, DType dtype, A* tile) {
      if (dtype == dtype_of<A>()) return static_cast<A*>(stream) + begin;
      load_tile(tile, stream, dtype, begin, tile_count);
      return tile;
    };
    const auto close = [&](void* stream, DType dtype, const A* tile, int number) {
      if (dtype == dtype_of<A>()) return;
      if (dtypes.rounding != nullptr && dtype == DType::kBFloat16) {
        return dtypes.rounding->store(stream, tile, begin, tile_count, number);
      }
      store_tile(stream, dtype, tile, begin, tile_count);
    };
    A* state[kMaxStates] = {};
    ((state[kI] = open_state(at, dtypes, kI, tiles[2 + kI], begin, tile_count)), ...);
    A* const w = open(at.w, dtypes.w, tiles[0]);
    const A* const g = open(const_cast<void*>(at.g), dtypes.g, tiles[1]);
    update_in_place<U, U::template kIsLong<A>, A>(w, g, state, tile_count, c, nullptr, nullptr, states);
    [[maybe_unused]] const auto set_scales_of_state = [&](std::size_t k) {
      if (dtypes.codes[k] != nullptr) set_scales(*dtypes.codes[k], at.scales[k], state[k], begin, tile_count);
    };
    (set_scales_of_state(kI), ...);
    close(at.w, dtypes.w, w, Rounding::kWeights);
    [[maybe_unused]] const auto close_state = [&](std::size_t k) {
      const int number = Rounding::kFirstState + static_cast<int>(k);
      if (dtypes.codes[k] == nullptr) return close(at.state[k], dtypes.state[k], state[k], number);
      store_codes(*dtypes.codes[k], at.state[k], at.scales[k], state[k], begin, tile_count, dtypes.rounding, number);
    };
    (close_state(kI), ...);
  }
}

// kCount elements of a stream where they are, or as numbers.
template <std::int64_t kCount>
FUSEDREG_TARGET FUSEDREG_HD float* open_block(void* stream, bool is_bfloat16, float* numbers, std::int64_t begin) {
  if (!is_bfloat16) return static_cast<float*>(stream) + begin;
  const BFloat16* const from = static_cast<const BFloat16*>(stream) + begin;
#if FUSEDREG_VECTOR_BYTES == 64
#pragma GCC unroll 8
  for (std::int64_t i = 0; i < kCount; i += 16) _mm512_store_ps(numbers + i, load_bfloat16(from + i));
#else
#pragma GCC ivdep
  for (std::int64_t i = 0; i < kCount; ++i) numbers[i] = load(from[i]);
#endif
  return numbers;
}

template <std::int64_t kCount>
FUSEDREG_TARGET FUSEDREG_HD void close_block(void* stream, bool is_bfloat16, const float* numbers, std::int64_t begin,
                                             [[maybe_unused]] bool has_instruction) {
  if (!is_bfloat16) return;
  BFloat16* const to = static_cast<BFloat16*>(stream) + begin;
#if FUSEDREG_VECTOR_BYTES == 64
  if (has_instruction) {
#pragma GCC unroll 4
    for (std::int64_t i = 0; i < kCount; i += 32) store_bfloat16(to + i, numbers + i);
    return;
  }
#endif
#pragma GCC ivdep
  for (std::int64_t i = 0; i < kCount; ++i) store(to[i], numbers[i]);
}

// The same where some streams are in bfloat16 and no other is converted: so few elements at a time that a processor
// converts some while the divisions of others last. AdamW with states in bfloat16 takes 0.73 of the time that it takes
// by tiles.
template <class U, std::size_t... kI>
FUSEDREG_TARGET void update_bfloat16(const Pointers& at, const DTypes& dtypes, std::int64_t begin, std::int64_t count,
                                     const StepConstants<typename U::Rule, float>& constants,
                                     std::index_sequence<kI...> states) {
  // As measured, of 32, 64, 128 and 256.
  constexpr std::int64_t kBlock = FUSEDREG_VECTOR_BYTES == 64 && sizeof...(kI) > 1 ? 64 : 128;
  const auto c = constants;
  const Acting acting = acting_in(c.prox);
  const bool prefetches = !looks_ahead_by_itself(), has_instruction = rounds_to_bfloat16();
  const bool w_is_bfloat16 = dtypes.w == DType::kBFloat16, g_is_bfloat16 = dtypes.g == DType::kBFloat16;
  [[maybe_unused]] bool state_is_bfloat16[kMaxStates] = {};
  ((state_is_bfloat16[kI] = dtypes.state[kI] == DType::kBFloat16), ...);
  const Pointers p = at;
  alignas(64) float numbers[2 + kMaxStates][kBlock];
  float clipped[kBlock], left[kBlock], d[kBlock], floor_ratio[kBlock];
  const Scratch<float> scratch = {clipped, left, U::template kIsLong<float> ? d : nullptr, floor_ratio};
  for (; count >= kBlock; begin += kBlock, count -= kBlock) {
    const auto open = [&](void* stream, bool is_bfloat16, float* tile) __attribute__((always_inline)) FUSEDREG_TARGET {
      // AMD's processors, which look ahead by themselves, fall behind with float32 streams beside bfloat16 ones: asked
      // for, 50M parameters under AdamW with states in bfloat16 take 0.84 of torch's step and not 0.96.
      if (prefetches || !is_bfloat16) {
        const std::int64_t width = is_bfloat16 ? sizeof(BFloat16) : sizeof(float);
        prefetch(static_cast<const char*>(stream) + begin * width, kAheadBytes, kBlock * width);
      }
      return open_block<kBlock>(stream, is_bfloat16, tile, begin);
    };
    float* state[kMaxStates] = {};
    ((state[kI] = open(p.state[kI], state_is_bfloat16[kI], numbers[2 + kI])), ...);
    float* const w = open(p.w, w_is_bfloat16, numbers[0]);
    const float* const g = open(const_cast<void*>(p.g), g_is_bfloat16, numbers[1]);
    update_block<U, float>(w, g, state, kBlock, c, acting, scratch, states);
    close_block<kBlock>(p.w, w_is_bfloat16, w, begin, has_instruction);
    (close_block<kBlock>(p.state[kI], state_is_bfloat16[kI], state[kI], begin, has_instruction), ...);
  }
  update_converted<U, float>(at, dtypes, begin, count, c, states);
}

template <class U, class A, std::size_t... kI>
FUSEDREG_HD void update_streams(const Pointers& at, const DTypes& dtypes, std::int64_t begin, std::int64_t count,
                                const StepConstants<typename U::Rule, A>& c, A* d, A* floor_ratio,
                                std::index_sequence<kI...> states) {
  if constexpr (std::is_same_v<A, float>) {
    if (dtypes.converted == Converted::kBFloat16 && dtypes.rounding == nullptr) {
      return update_bfloat16<U>(at, dtypes, begin, count, c, states);
    }
  }
  if (dtypes.converted != Converted::kNone) return update_converted<U>(at, dtypes, begin, count, c, states);
  A* const w = static_cast<A*>(at.w) + begin;
  const A* const g = static_cast<const A*>(at.g) + begin;
  A* state[kMaxStates] = {};
  ((state[kI] = static_cast<A*>(at.state[kI]) + begin), ...);
  constexpr bool kIsLong = U::template kIsLong<A>;
  if constexpr (kIsLong && U::Rule::kHasMetric) {
    if (d != nullptr) return update_in_place<U, false>(w, g, state, count, c, d, floor_ratio, states);
  }
  update_in_place<U, kIsLong>(w, g, state, count, c, d, floor_ratio, states);
}

template <class U, class A>
void update_chunk(const Pointers& at, const DTypes& dtypes, std::int64_t begin, std::int64_t count,
                  const void* constants, void* d, void* floor_ratio) {
  const auto& c = *static_cast<const StepConstants<typename U::Rule, A>*>(constants);
  update_streams<U>(at, dtypes, begin, count, c, static_cast<A*>(d), static_cast<A*>(floor_ratio),
                    states_in<U::kStates>());
}

template <class Rule, class A>
UpdateKernel update_kernel(const double* fields, StateMask states) {
  UpdateKernel kernel = nullptr;
  visit_update(make_group<Rule>(fields), states, [&](auto update) { kernel = update_chunk<decltype(update), A>; });
  return kernel;
}

}  // namespace fusedreg::cpu::FUSEDREG_ISA
