#include "tables.h"

#include <ATen/ATen.h>

#include <map>

namespace fusedreg {

namespace {

enum ScalarKind : std::int64_t { kValue, kFloat32At, kFloat64At };  // fusedreg/triton/scalars.py

std::int64_t address(const void* at) { return static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(at)); }

template <class Number>
py::bytes as_bytes(const std::vector<Number>& numbers) {
  return {reinterpret_cast<const char*>(numbers.data()), numbers.size() * sizeof(Number)};
}

}  // namespace

Tables::Tables(const std::string& rule, const py::list& params, const std::vector<int>& groups, const py::list& states,
               const py::list& clocks, const py::dict& optimizer_state, bool host_clocks)
    : Parameters(rule, params, groups, states, clocks, optimizer_state), host_clocks_(host_clocks) {
  for (std::size_t i = 0; i < entries_.size(); ++i) {
    if (entries_[i].active) order_.push_back(i);
  }
}

bool Tables::host_keeps_clock(const Entry& entry) const {
  const at::Tensor& clock = entry.clock.tensor;
  return host_clocks_ && clock.defined() && clock.is_cpu();
}

Tables::Slot Tables::slot_of(const Entry& entry) const {
  const at::Tensor& clock = entry.clock.tensor;
  if (!clock.defined() || host_keeps_clock(entry)) {
    return {entry.group, kValue, bit_cast<std::int64_t>(entry.clock.read())};
  }
  return {entry.group, clock.scalar_type() == at::kDouble ? kFloat64At : kFloat32At, address(clock.const_data_ptr())};
}

void Tables::assign_slots() {
  std::vector<Slot> slot_of_row;
  slot_of_row.reserve(order_.size());
  for (const std::size_t i : order_) slot_of_row.push_back(slot_of(entries_[i]));
  if (slot_of_row == slot_of_row_) return;
  slot_of_row_ = std::move(slot_of_row);
  slots_.clear();
  slot_index_.clear();
  std::map<Slot, std::int64_t> index_of;
  for (const Slot& slot : slot_of_row_) {
    if (!slot_index_.empty() && slot == slots_[slot_index_.back()]) {
      slot_index_.push_back(slot_index_.back());
      continue;
    }
    const auto [found, is_new] = index_of.try_emplace(slot, static_cast<std::int64_t>(slots_.size()));
    if (is_new) slots_.push_back(slot);
    slot_index_.push_back(found->second);
  }
}

std::pair<py::bytes, py::bytes> Tables::tables() {
  assign_slots();
  const std::size_t count = order_.size();
  rows_.assign((2 + kMaxStates + 2) * count, 0);
  for (std::size_t row = 0; row < count; ++row) {
    const Entry& entry = entries_[order_[row]];
    std::int64_t* column = rows_.data() + row;
    column[0] = address(entry.pointers.w);
    column[count] = address(entry.pointers.g);
    for (int k = 0; k < entry.used; ++k) column[(2 + k) * count] = address(entry.pointers.state[k]);
    column[(2 + kMaxStates) * count] = real_numel(entry.param());
    column[(3 + kMaxStates) * count] = slot_index_[row];
  }
  return {as_bytes(rows_), as_bytes(slots_)};
}

void Tables::move_clocks() {
  for (const std::size_t i : order_) {
    const Entry& entry = entries_[i];
    if (!host_keeps_clock(entry)) continue;
    Rules::visit(rule_, [&](auto host) {
      entry.clock.write(decltype(host)::next_clock(groups_[entry.group], entry.clock.read()));
    });
  }
}

}  // namespace fusedreg
