// What a step asks of its optimizer before anything else: whether all is as it was in the last step, or all but the
// numbers that schedulers change. Looked at by identity, in one call: in a training loop Python's own code and objects
// are seldom in the cache.
#pragma once

#include <cstdint>

#include "items.h"

namespace fusedreg {

// It owns nothing. What is compared by identity alone may have been freed, and another object stand in its place; so
// whoever asks holds the values of hyperparameters, and the parameters. Other values mean nothing to a step.
class Watch {
 public:
  // `attributes`: the optimizer's __dict__. `empty`: a tuple of dicts that are empty, hooks for instance, of which
  // those that are the optimizer's are among its attributes, and the others live as long as the process. `followed`:
  // a tuple of keys of groups, whose floats, or tuples of floats, may change.
  Watch(PyObject* attributes, PyObject* empty, PyObject* followed);

  enum Seen { kOther, kSame, kOtherNumbers };

  // What it was given, as it is now. Other numbers under the keys that are followed are taken for the next time.
  Seen look(PyObject* attributes);

 private:
  // By value: a scheduler's are new objects, which nobody holds for us.
  struct Followed {
    PyObject* key;
    bool is_tuple;
    std::vector<std::uint64_t> numbers;  // as bits
  };

  struct Group {
    PyObject* dict;
    Items items;
    std::vector<Followed> followed;  // in the order of the items
    PyObject* params;
    std::vector<PyObject*> its_params;
  };

  static Seen look(Followed& followed, PyObject* value);
  static Seen look(Group& group);

  Items attributes_;
  PyObject* groups_;
  std::vector<Group> its_groups_;
  std::vector<PyObject*> empty_;
};

}  // namespace fusedreg
