// Which of its state tensors a rule needs under a group's options: a mask, a bit for each. Python decides it.
#pragma once

#include <array>
#include <cstddef>
#include <tuple>
#include <utility>

namespace fusedreg {

using StateMask = unsigned;

constexpr bool has_state(StateMask mask, std::size_t i) { return (mask >> i & 1) != 0; }

// The most that any rule has.
constexpr int kMaxStates = 3;
constexpr int kMaxScalarStates = 3;

// Where a parameter's elements are: its own, its gradient's and its state's, dense and in the same order.
struct Pointers {
  void* w = nullptr;
  const void* g = nullptr;
  void* state[kMaxStates] = {};
  float* scales[kMaxStates] = {};  // of states in 8 bits
};

template <class Rule>
inline constexpr int kStatesOf = static_cast<int>(std::tuple_size_v<decltype(Rule::kStates)>);
template <class Rule>
inline constexpr int kScalarStatesOf = static_cast<int>(std::tuple_size_v<decltype(Rule::kScalarStates)>);
template <class Rule>
inline constexpr std::size_t kVariantsOf = std::tuple_size_v<decltype(Rule::kVariants)>;

// Calls visit(place) for each state of a mask that only the run knows.
template <class Visitor>
void for_each_state(StateMask mask, Visitor&& visit) {
  for (std::size_t i = 0; mask != 0; ++i, mask >>= 1) {
    if ((mask & 1) != 0) visit(i);
  }
}

// The places of a mask's bits, as a pack to fold a loop's loads and stores over.
template <StateMask kMask, std::size_t kPlace = 0, std::size_t... kFound>
constexpr auto states_in() {
  if constexpr ((kMask >> kPlace) == 0) {
    return std::index_sequence<kFound...>{};
  } else if constexpr (has_state(kMask, kPlace)) {
    return states_in<kMask, kPlace + 1, kFound..., kPlace>();
  } else {
    return states_in<kMask, kPlace + 1, kFound...>();
  }
}

}  // namespace fusedreg
