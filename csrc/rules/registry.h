// Every rule, once. Adding one is its header here, its scalars in ../hyper.h, and a line in this list.
#pragma once

#include "adam.h"
#include "sgd.h"

namespace fusedreg {

template <class... RuleHosts>
struct RuleList {
  static constexpr int kSize = sizeof...(RuleHosts);

  // Calls visitor(RuleHost{}) for the rule of that index.
  template <class Visitor>
  static void visit(int index, Visitor&& visitor) {
    int i = 0;
    ((i++ == index ? visitor(RuleHosts{}) : void()), ...);
  }
};

using Rules = RuleList<AdamHost, SgdHost>;

constexpr int kMaxStates = 3;

}  // namespace fusedreg
