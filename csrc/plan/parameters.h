// What the plans of all backends share: the parameters with their gradients and state, bound to memory, and the groups'
// hyperparameters. Knows nothing of how a step is carried out.
#pragma once

#include <cstddef>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "../maths/codes.h"
#include "../maths/states.h"
#include "items.h"
#include "rule_info.h"
#include "tensors.h"

namespace fusedreg {

// Whether no two elements share memory, and there is nothing between them.
bool is_dense(const View& view);

// What a plan is made from: one item a parameter, with or without a gradient. `state_dicts[i]` is opt.state[params[i]],
// or None where the parameter has no gradient. `states[i]` and `scalar_states[i]` are the tensors that the rule needs
// under the group's options, in the rule's order, with None for those that it does not need. `scales[i]`: those of
// states in 8 bits, likewise. `sharded`: parameters and states are DTensors, and the plan works on the part of them
// that this process holds. `positions[i]` is None, or what stochastic rounding knows elements by: the parameter's
// number, the position of its first element here in the whole parameter, and the strides of that. `written`: a tuple of
// the tensors that a step writes, but for scalar states. All of these objects, opt.state and its items too, are
// borrowed: the caller holds them as long as the plan lives. A reference from here is one that Python's garbage
// collector cannot see, and would keep a cycle for ever.
struct Columns {
  // Of a tuple of them, in this order.
  explicit Columns(PyObject* columns);

  std::vector<std::string> field_names;  // of the numbers that take_groups gets; other fields keep their defaults
  PyObject* params;
  std::vector<int> groups;
  PyObject *state_dicts, *states, *scales, *scalar_states, *positions, *optimizer_state;
  bool sharded;
  PyObject* written;
};

// It holds what does not change from step to step, checks in every step that this still is so, and says when it is not:
// then Python, which knows how to create state and how to complain, makes a new plan.
class Parameters {
 public:
  // `takes_other_gradients`: also in 32 and 16 bits beside parameters that have such, in another dtype.
  Parameters(const RuleInfo& rule, const Columns& columns, bool takes_other_gradients = false);
  Parameters(const Parameters&) = delete;
  ~Parameters();

 protected:
  // Contiguous copies of what is not laid out as the kernels need it. Of the gradient alone, laid out as its parameter,
  // where states are in 8 bits and all else is as it should be: blocks of them are counted in memory.
  struct Staged {
    Object param, grad, state[kMaxStates];
  };

  // A 0-dim tensor on the host, as its one number; 0 where the rule needs none.
  struct ScalarState {
    Tensor tensor;
    double read() const { return tensor.is_there() ? read_number(tensor.read(), is_single()) : 0; }
    void write(double value) const {
      if (tensor.is_there()) write_number(tensor.write(), is_single(), value);
    }
    bool is_single() const { return tensor.is_there() && !tensor.is_double(); }
  };
  static double read_number(const void* at, bool is_single) {
    return is_single ? *static_cast<const float*>(at) : *static_cast<const double*>(at);
  }
  static void write_number(void* at, bool is_single, double value) {
    if (is_single) {
      *static_cast<float*>(at) = static_cast<float>(value);
    } else {
      *static_cast<double*>(at) = value;
    }
  }

  // Those of a parameter on the host, found in memory once for reading and writing.
  struct Scalars {
    double values[kMaxScalarStates] = {};
    void* at[kMaxScalarStates] = {};
    unsigned singles = 0;  // those that are kept in float32, as a mask
  };

  // What every step looks at of an entry, side by side: most of a step on many small tensors is waiting for memory.
  struct Watched {
    // The object, not the tensor behind it: torch.utils.swap_tensors exchanges that, where nobody else holds it.
    PyObject* param = nullptr;
    // opt.state[param], and its items when the plan was made: in case one was replaced.
    PyObject* state_dict = nullptr;
    Unchanged state_items;
    // Of the parameter when the plan was made: another layout needs Python's checks again. Shared by those that have
    // it.
    const Layout* layout = nullptr;
    StateMask needed = 0;   // which states the rule needs; the others are not there, and null pointers
    bool is_known = false;  // whether the fields are those of tensors that the kernels take as they are
    // Of the current step. It is held, as another thread may set p.grad meanwhile.
    Gradient grad;
    Tensor state[kMaxStates];
    Fields fields, state_fields[kMaxStates];
    // Where all that was in the last step.
    const void* place_of_grad = nullptr;
    Place place, grad_place, state_places[kMaxStates];

    void prefetch() const {
      __builtin_prefetch(param);
      if (!is_known) return;
      __builtin_prefetch(state_dict);
      __builtin_prefetch(place_of_grad);
      place.prefetch();
      grad_place.prefetch();
      for_each_state(needed, [&](std::size_t k) { state_places[k].prefetch(); });
    }
    // But for the gradient.
    bool is_as_before() {
      bool is = state_items.is(state_dict) && fields.are_of(param, *layout);
      for_each_state(needed, [&](std::size_t k) { is = is && state_fields[k].are_of(state[k], *layout); });
      return is;
    }
  };

  struct Entry {
    int group;
    ScalarState scalar_states[kMaxScalarStates];
    Place scalar_places[kMaxScalarStates];
    bool active;  // has a gradient
    bool sharded;
    bool is_dense = false;
    bool has_inference = false;  // a tensor that torch lets nobody write outside of InferenceMode
    bool rounds_stochastically = false;
    StateMask needed = 0;  // as in Watched
    Element element = Element::kOther;
    DType dtype = DType::kFloat32;
    DType grad_dtype = DType::kFloat32;  // of the current step: a backend may want it to be the parameter's
    DType state_dtypes[kMaxStates];      // likewise
    Pointers pointers;                   // of the current step
    std::unique_ptr<Staged> staged;
    Pointers data;  // when the plan was made: another place in memory needs Python's checks again. But the gradient's
    const Layout* layout = nullptr;
    PyObject* param_object;
    PyObject *state_objects[kMaxStates] = {}, *scale_objects[kMaxStates] = {};
    Tensor scales[kMaxStates];
    std::int64_t numel = 0;  // as the kernels count: a complex number is two real ones, as in torch's own optimizers
    std::int64_t device = 0;
    std::uint32_t number = 0;  // where it rounds stochastically, as its position and the whole's strides
    std::int64_t first_position = 0;
    std::vector<std::int64_t> position_strides;

    PyObject* param() const { return sharded ? local_of(param_object) : param_object; }
    bool is_copied() const { return staged && staged->param; }  // and contiguous
    bool has_codes() const;
  };

  // False: something that the plan rests on has changed, nothing was touched.
  // `gradients`: a plain tensor or None for each parameter, in place of its own gradient; or None, which reads those,
  // and of DTensors those that are spread over processes as their parameters are.
  // `then(i, g)`: for each entry as soon as it is bound. `g`: where the gradient is, if that is all that may be new,
  // and then not yet among its pointers; else null.
  template <class Then>
  bool refresh_gradients(PyObject* gradients, const Then& then) {
    if (!can_refresh(gradients)) return false;
    for (std::size_t i = 0; i < entries_.size(); ++i) {
      // Between two steps a training loop has driven all this out of the caches; asking ahead overlaps the misses.
      if (i + kAhead < entries_.size()) watched_[i + kAhead].prefetch();
      Watched& watched = watched_[i];
      // First, as holding the gradient waits for all that was asked for and lets nothing pass.
      const bool is_as_before = watched.is_known && watched.is_as_before();
      if (gradients != Py_None) {
        watched.grad = Gradient::of(item(gradients, i));
      } else if (sharded_) {
        if (!read_sharded_gradient(watched)) return false;
      } else {
        watched.grad = Gradient::of_parameter(watched.param);
      }
      const void* g = nullptr;
      if (is_as_before && watched.grad.is_there()) {
        watched.grad_place = Place(watched.grad);
        g = watched.fields.find(watched.grad, *watched.layout);
      }
      if (g == nullptr && !bind(i)) return false;
      then(i, g);
    }
    return true;
  }

  // Takes the groups' hyperparameters, in the order of `field_names`.
  void take_groups(const std::vector<std::vector<double>>& groups);

  void read_scalar_states(const Entry& entry, Scalars& scalars) const;
  void write_scalar_states(const Scalars& scalars, const double* values) const;

  // After the kernels: copies back what was staged, and tells autograd of the in-place changes.
  void finish_update();

  static constexpr std::size_t kAhead = 4;
  void prefetch_scalars(std::size_t i) const {
    if (i + kAhead >= entries_.size()) return;
    for (std::size_t k = 0; k < scalar_state_count_; ++k) entries_[i + kAhead].scalar_places[k].prefetch();
  }

  const RuleInfo& rule_;
  const std::size_t scalar_state_count_;
  std::vector<Entry> entries_;
  std::vector<Watched> watched_;             // of the entries
  std::vector<std::vector<double>> groups_;  // the rule's fields, in its order

 private:
  // The part of a DTensor that this process holds.
  static PyObject* local_of(PyObject* dtensor);

  // What concerns no single entry of what the plan rests on.
  bool can_refresh(PyObject* gradients);

  // False: a DTensor's gradient is spread over processes otherwise than it is.
  static bool read_sharded_gradient(Watched& watched);

  // False: the entry is not what it was, or not as the kernels need it.
  bool bind(std::size_t i);
  bool takes(Element gradient, const Entry& entry) const;
  static void stage(Entry& entry, const Gradient& grad);
  static void stage_gradient(Entry& entry, const Gradient& grad);
  static void unstage(Entry& entry);

  const bool sharded_;
  std::set<Layout> layouts_;
  std::vector<int> place_of_field_;  // in what take_groups gets; -1 for a default
  std::size_t given_fields_;
  const bool takes_other_gradients_;
  PyObject* const written_;
  PyObject* const optimizer_state_;
  Unchanged optimizer_state_items_;
  bool has_inference_ = false;
};

}  // namespace fusedreg
