// The parameters as tables of numbers, for kernels that are not compiled with this extension: fusedreg/triton.
#pragma once

#include <array>

#include "parameters.h"

namespace fusedreg {

// What fusedreg/triton/parameters.py does in Python, in a twentieth of the time. A test compares the tables, bit for
// bit.
class __attribute__((visibility("hidden"))) Tables : public Parameters {
 public:
  // `host_clocks`: clocks in the CPU's memory are read and moved here; else they stay where they are.
  Tables(const std::string& rule, const py::list& params, const std::vector<int>& groups, const py::list& states,
         const py::list& clocks, const py::dict& optimizer_state, bool host_clocks);

  bool set_groups(const std::vector<std::vector<double>>& groups) { return take_groups(groups); }
  bool refresh() { return refresh_gradients(); }

  // Of this step: `rows` and `slots`, as fusedreg/triton/kernels.py describes them.
  std::pair<py::bytes, py::bytes> tables();

  // Those that the host keeps.
  void move_clocks();
  using Parameters::finish_update;

 private:
  using Slot = std::array<std::int64_t, 3>;  // group, and the clock as fusedreg/triton/scalars.py reads it

  bool host_keeps_clock(const Entry& entry) const;
  Slot slot_of(const Entry& entry) const;
  void assign_slots();

  bool host_clocks_;
  std::vector<std::size_t> order_;  // the entry of each row: those with a gradient
  std::vector<Slot> slot_of_row_, slots_;
  std::vector<std::int64_t> slot_index_, rows_;
};

}  // namespace fusedreg
