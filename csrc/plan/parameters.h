// What the plans of all backends share: the parameters with their gradients and state, bound to memory, and the groups'
// hyperparameters. Knows nothing of how a step is carried out.
#pragma once

#include <memory>
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
    double read() const;
    void write(double value) const;
    bool is_single() const { return tensor.is_there() && tensor.element() != Element::kFloat64; }
  };

  // Those of a parameter on the host, found in memory once for reading and writing.
  struct Scalars {
    double values[kMaxScalarStates] = {};
    void* at[kMaxScalarStates] = {};
    unsigned singles = 0;  // those that are kept in float32, as a mask
  };

  struct Entry {
    // The object, not the tensor behind it: torch.utils.swap_tensors exchanges that, where nobody else holds it.
    PyObject* param_object;
    bool sharded;
    PyObject* param() const { return sharded ? local_of(param_object) : param_object; }
    int group;
    Element element = Element::kOther;
    DType dtype = DType::kFloat32;
    DType state_dtypes[kMaxStates];      // which a backend may want to be the same
    DType grad_dtype = DType::kFloat32;  // of the current step, likewise
    bool active;                         // has a gradient
    bool rounds_stochastically = false;
    std::uint32_t number = 0;  // where it does, as its position and the whole's strides
    std::int64_t first_position = 0;
    std::vector<std::int64_t> position_strides;
    StateMask needed = 0;  // which states the rule needs; the others are not there, and null pointers
    PyObject *state_objects[kMaxStates] = {}, *scale_objects[kMaxStates] = {};
    Tensor state[kMaxStates], scales[kMaxStates];
    ScalarState scalar_states[kMaxScalarStates];
    // What it looked like when the plan was made: another place or layout in memory needs Python's checks again.
    Pointers data;  // but the gradient
    std::vector<std::int64_t> sizes, strides;
    std::int64_t numel = 0;  // as the kernels count: a complex number is two real ones, as in torch's own optimizers
    std::int64_t device = 0;
    bool is_dense = false;
    bool has_inference = false;  // a tensor that torch lets nobody write outside of InferenceMode
    // opt.state[param], and its items when the plan was made: walked in every step, in case one was replaced.
    PyObject* state_dict;
    Items state_items;
    // of the current step; the gradient is held, as another thread may set p.grad meanwhile
    Gradient grad;
    Pointers pointers;
    std::unique_ptr<Staged> staged;

    bool is_copied() const { return staged && staged->param; }  // and contiguous
    bool has_codes() const;
  };

  // False: something that the plan rests on has changed, nothing was touched.
  // `gradients`: a plain tensor or None for each parameter, in place of its own gradient; or None, which reads those,
  // and of DTensors those that are spread over processes as their parameters are.
  bool refresh_gradients(PyObject* gradients);

  // Takes the groups' hyperparameters, in the order of `field_names`.
  void take_groups(const std::vector<std::vector<double>>& groups);

  void read_scalar_states(const Entry& entry, Scalars& scalars) const;
  void write_scalar_states(const Scalars& scalars, const double* values) const;
  unsigned singles(const Entry& entry) const;

  // After the kernels: copies back what was staged, and tells autograd of the in-place changes.
  void finish_update();

  // Between two steps a training loop has driven the entries out of the caches; asking ahead overlaps the misses.
  void prefetch(std::size_t entry) const;

  const RuleInfo& rule_;
  const std::size_t scalar_state_count_;
  std::vector<Entry> entries_;
  std::vector<std::vector<double>> groups_;  // the rule's fields, in its order

 private:
  // The part of a DTensor that this process holds.
  static PyObject* local_of(PyObject* dtensor);

  // False: a DTensor's gradient is spread over processes otherwise than it is.
  static bool read_gradient(Entry& entry);

  // False: the entry is not what it was, or not as the kernels need it.
  bool bind(Entry& entry);
  bool takes(Element gradient, const Entry& entry) const;
  void stage(Entry& entry);
  void stage_gradient(Entry& entry);
  void unstage(Entry& entry);

  std::vector<int> place_of_field_;  // in what take_groups gets; -1 for a default
  std::size_t given_fields_;
  const bool takes_other_gradients_;
  PyObject* const written_;
  PyObject* const optimizer_state_;
  Items optimizer_state_items_;
  bool has_inference_ = false;
};

}  // namespace fusedreg
