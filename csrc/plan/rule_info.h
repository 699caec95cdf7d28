// A rule as the plans see it, without its type: its names, its fields' defaults, and how its scalar states move on.
#pragma once

#include <stdexcept>
#include <string>
#include <vector>

#include "../maths/update.h"

namespace fusedreg {

struct RuleInfo {
  std::string name;
  std::vector<std::string> states, scalar_states;
  std::vector<std::string> fields;  // what a group says to the rule, in the order of Group<Rule>::bind
  std::vector<double> defaults;     // of the fields
  std::vector<StateMask> variants;
  // Moves scalar states on, to values as they are stored: in float32 where `singles` has their bit.
  void (*next)(const double* fields, double* scalar_states, unsigned singles);
};

template <class Rule>
RuleInfo make_rule_info() {
  static_assert(kStatesOf<Rule> <= kMaxStates && kScalarStatesOf<Rule> <= kMaxScalarStates);
  RuleInfo info;
  info.name = Rule::kName;
  info.states.assign(Rule::kStates.begin(), Rule::kStates.end());
  info.scalar_states.assign(Rule::kScalarStates.begin(), Rule::kScalarStates.end());
  info.variants.assign(Rule::kVariants.begin(), Rule::kVariants.end());
  Group<Rule>{}.bind([&](const char* name, double field) {
    info.fields.emplace_back(name);
    info.defaults.push_back(field);
  });
  info.next = [](const double* fields, double* scalar_states, unsigned singles) {
    const Group<Rule> group = make_group<Rule>(fields);
    const auto as_stored = [&](std::size_t i, double number) {
      return (singles >> i & 1) != 0 ? static_cast<double>(static_cast<float>(number)) : number;
    };
    Rule::next(group.common.lr, group.rule, scalar_states, as_stored);
    for (std::size_t i = 0; i < Rule::kScalarStates.size(); ++i) scalar_states[i] = as_stored(i, scalar_states[i]);
  };
  return info;
}

// Finds a rule among those of an extension. Throws std::invalid_argument for one that it does not have.
template <class RuleOfBackend>
const RuleOfBackend& find_rule(const std::vector<const RuleOfBackend*>& rules, const std::string& name) {
  for (const RuleOfBackend* rule : rules) {
    if (rule->info.name == name) return *rule;
  }
  throw std::invalid_argument("there is no kernel for the rule '" + name + "'");
}

}  // namespace fusedreg
