// What a param group says to every rule. A rule has Hyperparameters of its own beside these.
//
// A struct of hyperparameters lists its fields by name in `bind`: so Python's values find their places, and the device
// reads them one by one. The names are those of fusedreg/hyperparameters.py and fusedreg/penalties.
#pragma once

#include "math.h"

namespace fusedreg {

struct CommonHyperparameters {
  double lr = 0, weight_decay = 0, maximize = 0, decoupled_weight_decay = 0, clip_value = INFINITY;

  template <class Bind>
  FUSEDREG_HD void bind(Bind&& bind) {
    bind("lr", lr);
    bind("weight_decay", weight_decay);
    bind("maximize", maximize);
    bind("decoupled_weight_decay", decoupled_weight_decay);
    bind("clip_value", clip_value);
  }
};

// penalty_mode, in the order of PENALTY_MODES in fusedreg/penalties/spec.py.
enum class PenaltyMode { kProximal = 0, kDecoupled = 1, kSubgradient = 2 };

struct Penalties {
  double penalty_mode = 0, l1 = 0, l2 = 0, mcp_gamma = INFINITY, lower = -INFINITY, upper = INFINITY, l0 = 0;
  double freeze_zeros = 0, group_l1 = 0, max_unit_norm = INFINITY;
  double unit = 1;  // of the last two: so many rows, 0 for the whole tensor, -1 for a column

  template <class Bind>
  FUSEDREG_HD void bind(Bind&& bind) {
    bind("penalty_mode", penalty_mode);
    bind("l1", l1);
    bind("l2", l2);
    bind("mcp_gamma", mcp_gamma);
    bind("lower", lower);
    bind("upper", upper);
    bind("l0", l0);
    bind("freeze_zeros", freeze_zeros);
    bind("group_l1", group_l1);
    bind("max_unit_norm", max_unit_norm);
    bind("unit", unit);
  }

  FUSEDREG_HD PenaltyMode mode() const { return static_cast<PenaltyMode>(static_cast<int>(penalty_mode)); }
  FUSEDREG_HD bool shrinks() const { return l1 != 0 || l2 != 0; }
  FUSEDREG_HD bool any() const { return shrinks() || l0 != 0; }
  FUSEDREG_HD bool fades() const { return l1 != 0 && mcp_gamma != INFINITY; }
  FUSEDREG_HD bool is_boxed() const { return lower != -INFINITY || upper != INFINITY; }
};

// A param group under one rule.
template <class Rule>
struct Group {
  CommonHyperparameters common;
  Penalties penalties;
  typename Rule::Hyperparameters rule;

  template <class Bind>
  FUSEDREG_HD void bind(Bind&& bind) {
    common.bind(bind);
    penalties.bind(bind);
    rule.bind(bind);
  }
};

// From its fields, in the order of `bind`.
template <class Rule>
FUSEDREG_HD Group<Rule> make_group(const double* fields) {
  Group<Rule> group;
  group.bind([&](const char*, double& field) { field = *fields++; });
  return group;
}

}  // namespace fusedreg
