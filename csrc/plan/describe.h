// What a compiled extension knows of each rule, for Python to compare with what it declares.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "rule_info.h"

namespace fusedreg {

template <class RuleOfBackend>
pybind11::dict describe(const std::vector<const RuleOfBackend*>& rules) {
  pybind11::dict known;
  for (const RuleOfBackend* rule : rules) {
    pybind11::dict its;
    its["states"] = rule->info.states;
    its["scalar_states"] = rule->info.scalar_states;
    its["fields"] = rule->info.fields;
    its["variants"] = rule->info.variants;
    known[rule->info.name.c_str()] = its;
  }
  return known;
}

}  // namespace fusedreg
