// What a step asks of its optimizer before anything else: whether all is as it was in the last step, or all but
// learning rates. Looked at by identity, in one call: in a training loop Python's own code and objects are seldom in
// the cache.
#pragma once

#include <cstdint>

#include "items.h"

namespace fusedreg {

// It owns nothing. What is compared by identity alone may have been freed, and another object stand in its place; so
// whoever asks holds the values of hyperparameters, and the parameters. Other values mean nothing to a step.
class Watch {
 public:
  // `attributes`: the optimizer's __dict__. `empty`: a tuple of dicts that are empty, hooks for instance, of which
  // those that are the optimizer's are among its attributes, and the others live as long as the process.
  Watch(PyObject* attributes, PyObject* empty);

  enum Seen { kOther, kSame, kOtherRates };

  // What it was given, as it is now. Other learning rates are taken for the next time.
  Seen look(PyObject* attributes);

 private:
  struct Group {
    PyObject* dict;
    Items items;
    PyObject *lr_key, *params;
    std::uint64_t lr;  // as bits
    std::vector<PyObject*> its_params;
  };

  Seen look(Group& group) const;

  Items attributes_;
  PyObject* groups_;
  std::vector<Group> its_groups_;
  std::vector<PyObject*> empty_;
};

}  // namespace fusedreg
