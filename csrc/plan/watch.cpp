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

bool list_holds(PyObject* list, const std::vector<PyObject*>& items) {
  if (PyList_Size(list) != static_cast<Py_ssize_t>(items.size())) return false;
  for (std::size_t i = 0; i < items.size(); ++i) {
    if (PyList_GetItem(list, static_cast<Py_ssize_t>(i)) != items[i]) return false;
  }
  return true;
}

}  // namespace

Watch::Watch(PyObject* attributes, PyObject* empty)
    : attributes_(items_of(attributes)), groups_(find(attributes, "param_groups")) {
  for (std::size_t i = 0; i < tuple_length(empty); ++i) empty_.push_back(tuple_item(empty, i));
  for (std::size_t i = 0; i < length(groups_); ++i) {
    PyObject* const dict = item(groups_, i);
    Group& group = its_groups_.emplace_back(Group{dict, items_of(dict), nullptr, find(dict, "params"), 0, {}});
    for (std::size_t k = 0; k < length(group.params); ++k) group.its_params.push_back(item(group.params, k));
    for (const auto& [key, value] : group.items) {
      if (PyFloat_CheckExact(value) && PyUnicode_Check(key) && PyUnicode_CompareWithASCIIString(key, "lr") == 0) {
        group.lr_key = key;
        group.lr = bits_of(to_double(value));
      }
    }
  }
}

Watch::Seen Watch::look(Group& group) const {
  if (PyDict_Size(group.dict) != static_cast<Py_ssize_t>(group.items.size())) return kOther;
  Seen seen = kSame;
  PyObject *key, *value;
  Py_ssize_t position = 0;
  for (auto item = group.items.begin(); PyDict_Next(group.dict, &position, &key, &value) != 0; ++item) {
    if (key != item->first) return kOther;
    if (key == group.lr_key) {
      // By value: a scheduler's are new objects, which nobody holds for us.
      if (!PyFloat_CheckExact(value)) return kOther;
      const std::uint64_t lr = bits_of(PyFloat_AsDouble(value));
      if (lr != std::exchange(group.lr, lr)) seen = kOtherRates;
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
    if (of_group == kOtherRates) seen = kOtherRates;
  }
  return seen;
}

}  // namespace fusedreg
