// What a compiled extension knows of each rule, for Python to compare with what it declares.
#pragma once

#include "python.h"
#include "rule_info.h"

namespace fusedreg {

template <class RuleOfBackend>
Object describe(const std::vector<const RuleOfBackend*>& rules) {
  Object known = Object::own(PyDict_New());
  const auto set = [](const Object& dict, const std::string& name, const Object& value) {
    if (PyDict_SetItemString(dict.get(), name.c_str(), value.get()) != 0) throw PythonError();
  };
  for (const RuleOfBackend* rule : rules) {
    const Object its = Object::own(PyDict_New());
    set(its, "states", to_python(rule->info.states));
    set(its, "scalar_states", to_python(rule->info.scalar_states));
    set(its, "fields", to_python(rule->info.fields));
    set(its, "variants", to_python(rule->info.variants));
    set(known, rule->info.name, its);
  }
  return known;
}

}  // namespace fusedreg
