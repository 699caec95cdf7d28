// What target sparsity ranks weights by: the smallest scores become zeros.
#pragma once

#include "states.h"
#include "storage.h"
#include "update.h"

namespace fusedreg {

// A score as an unsigned number of the same order: of a nonnegative float, that is its bits. A NaN comes last.
template <class A>
using KeyOf = std::conditional_t<sizeof(A) == sizeof(double), std::uint64_t, std::uint32_t>;

// d * w^2, in the order of sqrt(d) * |w|: the l0 prox in the metric d zeroes the weights of which that is below one
// number. Where no step has said what d is, it is 1; |w| for a rule that has no metric. A weight that is zero has the
// key 0, and no other weight has, even where its score underflows.
template <class Rule, StateMask kStates, bool kInMetric, class A>
FUSEDREG_HD KeyOf<A> score_key(A w, const A* state, const typename Rule::template Constants<A>& c) {
  A score = absolute(w);
  if constexpr (kInMetric) {
    score = absolute(Rule::template metric<kStates>(state, c).d * score * score);
  } else if constexpr (Rule::kHasMetric) {
    score = score * score;
  }
  const KeyOf<A> key = bit_cast<KeyOf<A>>(score);
  const KeyOf<A> at_least_one = key != 0 ? key : 1;
  return w != A(0) ? at_least_one : 0;
}

}  // namespace fusedreg
