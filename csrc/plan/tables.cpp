#include "tables.h"

#include <map>

namespace fusedreg {

namespace {

std::int64_t address(const void* at) { return static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(at)); }

Object as_bytes(const std::vector<std::int64_t>& numbers) {
  return bytes(numbers.data(), numbers.size() * sizeof(std::int64_t));
}

}  // namespace

Tables::Tables(const RuleInfo& rule, const Columns& columns, bool scalars_on_host)
    : Parameters(rule, columns), scalars_on_host_(scalars_on_host) {
  for (std::size_t i = 0; i < entries_.size(); ++i) {
    if (entries_[i].active) order_.push_back(i);
  }
}

bool Tables::is_on_host(const ScalarState& scalar) const {
  return !scalar.tensor.is_there() || (scalars_on_host_ && scalar.tensor.is_on_cpu());
}

Tables::ScalarSet Tables::set_of(const Entry& entry) const {
  ScalarSet set = {entry.group};
  for (std::size_t k = 0; k < rule_.scalar_states.size(); ++k) {
    const ScalarState& scalar = entry.scalar_states[k];
    const bool on_host = is_on_host(scalar);
    const bool is_single = scalar.is_single();
    set[1 + kScalarWidth * k] = on_host ? (is_single ? kFloat32Value : kValue) : is_single ? kFloat32At : kFloat64At;
    set[2 + kScalarWidth * k] = on_host ? bit_cast<std::int64_t>(scalar.read()) : address(scalar.tensor.read());
  }
  return set;
}

void Tables::assign_sets() {
  std::vector<ScalarSet> set_of_row;
  set_of_row.reserve(order_.size());
  for (const std::size_t i : order_) set_of_row.push_back(set_of(entries_[i]));
  if (set_of_row == set_of_row_) return;
  set_of_row_ = std::move(set_of_row);
  sets_.clear();
  set_index_.clear();
  std::map<ScalarSet, std::int64_t> index_of;
  for (std::size_t row = 0; row < set_of_row_.size(); ++row) {
    const ScalarSet& set = set_of_row_[row];
    if (row > 0 && set == set_of_row_[row - 1]) {  // by far the most common case
      set_index_.push_back(set_index_.back());
      continue;
    }
    const auto [found, is_new] = index_of.try_emplace(set, static_cast<std::int64_t>(index_of.size()));
    if (is_new) sets_.insert(sets_.end(), set.begin(), set.end());
    set_index_.push_back(found->second);
  }
}

std::pair<Object, Object> Tables::tables() {
  assign_sets();
  const std::size_t count = order_.size();
  rows_.assign(kRowColumns * count, 0);
  for (std::size_t row = 0; row < count; ++row) {
    const Entry& entry = entries_[order_[row]];
    std::int64_t* column = rows_.data() + row;
    column[kW * count] = address(entry.pointers.w);
    column[kG * count] = address(entry.pointers.g);
    for (int k = 0; k < kMaxStates; ++k) column[(kState + k) * count] = address(entry.pointers.state[k]);
    column[kNumel * count] = entry.numel;
    column[kSet * count] = set_index_[row];
  }
  return {as_bytes(rows_), as_bytes(sets_)};
}

void Tables::move_scalar_states() {
  for (const std::size_t i : order_) {
    const Entry& entry = entries_[i];
    double values[kMaxScalarStates] = {};
    for (std::size_t k = 0; k < rule_.scalar_states.size(); ++k) {
      if (is_on_host(entry.scalar_states[k])) values[k] = entry.scalar_states[k].read();
    }
    rule_.next(groups_[entry.group].data(), values, singles(entry));
    for (std::size_t k = 0; k < rule_.scalar_states.size(); ++k) {
      if (is_on_host(entry.scalar_states[k])) entry.scalar_states[k].write(values[k]);
    }
  }
}

}  // namespace fusedreg
