#include "watch.h"

#include <cstring>
#include <stdexcept>
#include <utility>

#include "tensors.h"

namespace fusedreg {

namespace {

PyObject* find(PyObject* dict, const char* name) {
  PyObject* const found = PyDict_GetItemString(dict, name);
  if (found == nullptr) throw std::invalid_argument(std::string("an optimizer without ") + name);
  return found;
}

std::uint64_t bits_of(double number) {
  std::uint64_t bits;
  std::memcpy(&bits, &number, sizeof(bits));
  return bits;
}

// The floats of a tuple, or the one that `value` is. False: there are others, or none.
template <class Visit>
bool for_each_float(PyObject* value, bool is_tuple, const Visit& visit) {
  const Py_ssize_t count = is_tuple ? PyTuple_Size(value) : 1;
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* const number = is_tuple ? PyTuple_GetItem(value, i) : value;
    if (!PyFloat_CheckExact(number)) return false;
    visit(static_cast<std::size_t>(i), bits_of(PyFloat_AsDouble(number)));
  }
  return count > 0;
}

bool is_one_of(PyObject* names, PyObject* key) {
  for (std::size_t i = 0; i < tuple_length(names); ++i) {
    if (PyUnicode_Check(key) && PyUnicode_Compare(key, tuple_item(names, i)) == 0) return true;
  }
  check_error();
  return false;
}

bool list_holds(PyObject* list, const std::vector<PyObject*>& items) {
  if (PyList_Size(list) != static_cast<Py_ssize_t>(items.size())) return false;
  for (std::size_t i = 0; i < items.size(); ++i) {
    if (PyList_GetItem(list, static_cast<Py_ssize_t>(i)) != items[i]) return false;
  }
  return true;
}

}  // namespace

Watch::Watch(PyObject* attributes, PyObject* empty, PyObject* followed)
    : attributes_(items_of(attributes)), groups_(find(attributes, "param_groups")) {
  for (std::size_t i = 0; i < tuple_length(empty); ++i) empty_.push_back(tuple_item(empty, i));
  for (std::size_t i = 0; i < length(groups_); ++i) {
    PyObject* const dict = item(groups_, i);
    Group& group = its_groups_.emplace_back(Group{dict, items_of(dict), {}, find(dict, "params"), {}});
    for (std::size_t k = 0; k < length(group.params); ++k) group.its_params.push_back(item(group.params, k));
    for (const auto& [key, value] : group.items) {
      if (!is_one_of(followed, key)) continue;
      Followed its{key, PyTuple_CheckExact(value) != 0, {}};
      const bool are_floats = for_each_float(value, its.is_tuple,
                                             [&](std::size_t, std::uint64_t number) { its.numbers.push_back(number); });
      if (are_floats) group.followed.push_back(std::move(its));
    }
  }
}

Watch::Seen Watch::look(Followed& followed, PyObject* value) {
  if (followed.is_tuple &&
      (!PyTuple_CheckExact(value) || PyTuple_Size(value) != static_cast<Py_ssize_t>(followed.numbers.size()))) {
    return kOther;
  }
  Seen seen = kSame;
  const bool are_floats = for_each_float(value, followed.is_tuple, [&](std::size_t i, std::uint64_t number) {
    if (number != std::exchange(followed.numbers[i], number)) seen = kOtherNumbers;
  });
  return are_floats ? seen : kOther;
}

Watch::Seen Watch::look(Group& group) {
  if (PyDict_Size(group.dict) != static_cast<Py_ssize_t>(group.items.size())) return kOther;
  Seen seen = kSame;
  PyObject *key, *value;
  Py_ssize_t position = 0;
  auto followed = group.followed.begin();
  for (auto item = group.items.begin(); PyDict_Next(group.dict, &position, &key, &value) != 0; ++item) {
    if (key != item->first) return kOther;
    if (followed != group.followed.end() && key == followed->key) {
      const Seen of_numbers = look(*followed++, value);
      if (of_numbers == kOther) return kOther;
      if (of_numbers == kOtherNumbers) seen = kOtherNumbers;
    } else if (value != item->second) {
      return kOther;
    }
  }
  return list_holds(group.params, group.its_params) ? seen : kOther;
}

Watch::Seen Watch::look(PyObject* attributes) {
  // Only what was found to be there is looked into.
  if (is_observed() || !holds(attributes, attributes_)) return kOther;
  for (PyObject* const dict : empty_) {
    if (PyDict_Size(dict) != 0) return kOther;
  }
  if (PyList_Size(groups_) != static_cast<Py_ssize_t>(its_groups_.size())) return kOther;
  Seen seen = kSame;
  for (std::size_t i = 0; i < its_groups_.size(); ++i) {
    Group& group = its_groups_[i];
    if (item(groups_, i) != group.dict) return kOther;
    const Seen of_group = look(group);
    if (of_group == kOther) return kOther;
    if (of_group == kOtherNumbers) seen = kOtherNumbers;
  }
  return seen;
}

}  // namespace fusedreg
