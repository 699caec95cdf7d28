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
  for (const auto& item : items) {
    if (PyDict_Next(dict, &position, &key, &value) == 0 || key != item.first || value != item.second) return false;
  }
  return true;
}

// A number that no dict has had before, after each change of one: PEP 509. 0 where this Python has none.
inline std::uint64_t version_of([[maybe_unused]] PyObject* dict) {
#if !defined(Py_LIMITED_API) && !defined(Py_GIL_DISABLED) && PY_VERSION_HEX < 0x030E0000
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"  // it goes with Python 3.14
  return reinterpret_cast<PyDictObject*>(dict)->ma_version_tag;
#pragma GCC diagnostic pop
#else
  return 0;
#endif
}

// A dict that is looked at again and again: whether it holds what it held.
class Unchanged {
 public:
  Unchanged() = default;
  explicit Unchanged(PyObject* dict) : version_(version_of(dict)), items_(items_of(dict)) {}

  bool is(PyObject* dict) {
    const std::uint64_t version = version_of(dict);
    if (version != 0 && version == version_) return true;
    if (!holds(dict, items_)) return false;
    version_ = version;
    return true;
  }

 private:
  std::uint64_t version_ = 0;
  Items items_;
};

}  // namespace fusedreg
