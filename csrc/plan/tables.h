// The parameters of a plan as tables of numbers, for both GPU backends.
#pragma once

#include <array>

#include "parameters.h"
#include "table_format.h"

namespace fusedreg {

// What fusedreg/backends/tables.py does in Python, slowly, where there is no compiled extension. A test compares the
// tables, bit for bit.
class Tables : public Parameters {
 public:
  // `scalars_on_host`: scalar states in the CPU's memory are read and moved here. False only where the CPU emulates a
  // device: then they stay where they are, and the kernels move them.
  Tables(const RuleInfo& rule, const Columns& columns, bool scalars_on_host);

  // With zeros for what only the device knows: nothing that a scalar state is moved by may be there.
  void set_groups(const std::vector<std::vector<double>>& groups) { take_groups(groups); }
  bool refresh(PyObject* gradients);

  // Of this step, in new objects where they are not what they were. `rows`: kRowColumns columns, with an item for each
  // parameter that has a gradient. `sets`: the scalar sets, of kSetWidth numbers each; parameters of the same group
  // with the same scalar states share one.
  std::pair<Object, Object> tables();

  // Those that the host keeps.
  void move_scalar_states();
  using Parameters::finish_update;

 private:
  using ScalarSet = std::array<std::int64_t, kSetWidth>;

  bool is_on_host(const ScalarState& scalar) const {
    return !scalar.tensor.is_there() || (scalars_on_host_ && scalar.tensor.is_on_cpu());
  }
  ScalarSet set_of(const Entry& entry) const;
  void take(std::size_t row, const Entry& entry, const void* g);
  void share_sets();

  bool scalars_on_host_;
  std::vector<std::size_t> order_;  // the entry of each row: those with a gradient
  std::vector<std::int64_t> rows_;
  std::vector<ScalarSet> sets_, last_sets_;  // in the order of the first row of each
  bool share_as_before_ = false;             // rows a set, as in the last step
  bool has_new_rows_ = true;
  Object rows_made_, sets_made_;
};

}  // namespace fusedreg
