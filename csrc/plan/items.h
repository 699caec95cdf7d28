// What a dict held, by identity: the same objects are found again without a hash or a comparison.
#pragma once

#include <utility>
#include <vector>

#include "python.h"

namespace fusedreg {

// Keys and values, borrowed.
using Items = std::vector<std::pair<PyObject*, PyObject*>>;

inline Items items_of(PyObject* dict) {
  Items items;
  PyObject *key, *value;
  for (Py_ssize_t position = 0; PyDict_Next(dict, &position, &key, &value) != 0;) items.emplace_back(key, value);
  return items;
}

// Whether a dict holds these very objects, in this order.
inline bool holds(PyObject* dict, const Items& items) {
  if (PyDict_Size(dict) != static_cast<Py_ssize_t>(items.size())) return false;
  PyObject *key, *value;
  Py_ssize_t position = 0;
  for (auto item = items.begin(); PyDict_Next(dict, &position, &key, &value) != 0; ++item) {
    if (key != item->first || value != item->second) return false;
  }
  return true;
}

}  // namespace fusedreg
