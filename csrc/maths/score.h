// What target sparsity ranks weights by: the smallest scores become zeros.
#pragma once

#include "states.h"
#include "storage.h"
#include "update.h"

namespace fusedreg {

// A score as an unsigned number of the same order: of a nonnegative float, that is its bits. A NaN comes last.
template <class A>
using KeyOf = std::conditional_t<sizeof(A) == sizeof(double), std::uint64_t, std::uint32_t>;

// sqrt(d) * |w|: the l0 prox in the metric d zeroes the weights of which it is below one number. |w| where there is no
// metric. A weight that is zero has the key 0, and no other weight has, even where its score underflows.
template <class Rule, StateMask kStates, bool kInMetric, class A>
FUSEDREG_HD KeyOf<A> score_key(A w, const A* state, const typename Rule::template Constants<A>& c) {
  A score = absolute(w);
  if constexpr (kInMetric) score = absolute(square_root(Rule::template metric<kStates>(state, c).d) * score);
  const KeyOf<A> key = bit_cast<KeyOf<A>>(score);
  const KeyOf<A> at_least_one = key != 0 ? key : 1;
  return w != A(0) ? at_least_one : 0;
}

}  // namespace fusedreg
