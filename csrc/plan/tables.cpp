#include "tables.h"

#include <cstring>
#include <map>
#include <set>
#include <utility>

namespace fusedreg {

namespace {

std::int64_t address(const void* at) { return static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(at)); }

template <class Number>
Object as_bytes(const std::vector<Number>& numbers) {
  return bytes(numbers.data(), numbers.size() * sizeof(Number));
}

template <class Number>
bool is_made_of(PyObject* bytes, const std::vector<Number>& numbers) {
  const auto size = static_cast<std::size_t>(PyBytes_Size(bytes));
  return size == numbers.size() * sizeof(Number) && std::memcmp(PyBytes_AsString(bytes), numbers.data(), size) == 0;
}

}  // namespace

Tables::Tables(const RuleInfo& rule, const Columns& columns, bool scalars_on_host)
    : Parameters(rule, columns), scalars_on_host_(scalars_on_host) {
  for (std::size_t i = 0; i < entries_.size(); ++i) {
    if (entries_[i].active) order_.push_back(i);
  }
  rows_.assign(kRowColumns * order_.size(), 0);
  for (std::size_t row = 0; row < order_.size(); ++row) {
    rows_[kNumel * order_.size() + row] = entries_[order_[row]].numel;
  }
}

Tables::ScalarSet Tables::set_of(const Entry& entry) const {
  ScalarSet set = {entry.group};
  for (std::size_t k = 0; k < rule_.scalar_states.size(); ++k) {
    const ScalarState& scalar = entry.scalar_states[k];
    const bool on_host = is_on_host(scalar);
    const bool is_single = scalar.is_single();
    set[1 + kScalarWidth * k] = on_host ? (is_single ? kFloat32Value : kValue) : is_single ? kFloat32At : kFloat64At;
    set[2 + kScalarWidth * k] = on_host ? bit_cast<std::int64_t>(scalar.read()) : address(scalar.tensor.write());
  }
  return set;
}

bool Tables::refresh(PyObject* gradients) {
  std::swap(sets_, last_sets_);
  sets_.clear();
  share_as_before_ = true;
  std::size_t row = 0;
  return refresh_gradients(gradients, [&](std::size_t i, const void* g) {
    prefetch_scalars(i);
    if (entries_[i].active) take(row++, entries_[i], g);
  });
}

void Tables::take(std::size_t row, const Entry& entry, const void* g) {
  const std::size_t count = order_.size();
  std::int64_t* const column = rows_.data() + row;
  const auto put = [&](std::size_t which, std::int64_t number) {
    has_new_rows_ |= std::exchange(column[which * count], number) != number;
  };
  put(kG, address(g != nullptr ? g : entry.pointers.g));
  if (g == nullptr) {
    put(kW, address(entry.pointers.w));
    for (int k = 0; k < kMaxStates; ++k) put(kState + k, address(entry.pointers.state[k]));
  }
  // Rows that shared a set in the last step most often do so in this one.
  if (!share_as_before_) return;
  const auto shared = static_cast<std::size_t>(column[kSet * count]);
  const ScalarSet set = set_of(entry);
  if (shared == sets_.size()) {
    sets_.push_back(set);
  } else {
    share_as_before_ = shared < sets_.size() && set == sets_[shared];
  }
}

void Tables::share_sets() {
  if (share_as_before_) {
    // Nor may two sets have become one.
    share_as_before_ = sets_ == last_sets_ || std::set<ScalarSet>(sets_.begin(), sets_.end()).size() == sets_.size();
  }
  if (share_as_before_) return;
  sets_.clear();
  std::map<ScalarSet, std::int64_t> index_of;
  std::int64_t* const index = rows_.data() + kSet * order_.size();
  for (std::size_t row = 0; row < order_.size(); ++row) {
    const ScalarSet set = set_of(entries_[order_[row]]);
    const auto [found, is_new] = index_of.try_emplace(set, static_cast<std::int64_t>(index_of.size()));
    if (is_new) sets_.push_back(set);
    has_new_rows_ |= std::exchange(index[row], found->second) != found->second;
  }
  share_as_before_ = true;
}

std::pair<Object, Object> Tables::tables() {
  share_sets();
  if (has_new_rows_ || !rows_made_) rows_made_ = as_bytes(rows_);
  has_new_rows_ = false;
  if (!sets_made_ || !is_made_of(sets_made_.get(), sets_)) sets_made_ = as_bytes(sets_);
  return {Object::share(rows_made_.get()), Object::share(sets_made_.get())};
}

void Tables::move_scalar_states() {
  const std::size_t count = order_.size();
  // By the numbers of the sets, which are those of this step: once for each set.
  std::vector<std::array<double, kMaxScalarStates>> moved(sets_.size());
  for (std::size_t i = 0; i < sets_.size(); ++i) {
    unsigned singles = 0;
    for (std::size_t k = 0; k < rule_.scalar_states.size(); ++k) {
      const std::int64_t kind = sets_[i][1 + kScalarWidth * k], number = sets_[i][2 + kScalarWidth * k];
      singles |= kind == kFloat32Value || kind == kFloat32At ? 1u << k : 0u;
      moved[i][k] = kind == kValue || kind == kFloat32Value ? bit_cast<double>(number) : 0;
    }
    rule_.next(groups_[sets_[i][0]].data(), moved[i].data(), singles);
  }
  for (std::size_t row = 0; row < count; ++row) {
    prefetch_scalars(order_[row]);
    const Entry& entry = entries_[order_[row]];
    const auto& values = moved[rows_[kSet * count + row]];
    for (std::size_t k = 0; k < rule_.scalar_states.size(); ++k) {
      if (is_on_host(entry.scalar_states[k])) entry.scalar_states[k].write(values[k]);
    }
  }
}

}  // namespace fusedreg
