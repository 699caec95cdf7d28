// What the plans of all drivers share: the parameters with their gradients and state, and the groups' scalars. Knows
// torch, and nothing of how a step is carried out.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "../chunks.h"

namespace fusedreg {

namespace py = pybind11;

int rule_index(const std::string& name);
std::vector<std::string> state_names(int rule);
std::vector<std::string> scalar_names(int rule);

// Group is an array of doubles with names: the place of one of them.
int group_field(const std::string& scalar);

// It holds what does not change from step to step, checks in every step that this still is so, and says when it is not:
// then Python, which knows how to create state and how to complain, makes a new plan.
class __attribute__((visibility("hidden"))) Parameters {  // hidden, as pybind11 and all that holds its objects
 public:
  // One entry a parameter, with or without a gradient; `states[i]` is opt.state[params[i]], or None where the parameter
  // has no gradient. `clocks[i]` is the 0-dim tensor with the rule's clock, or None where the rule keeps none.
  // All of these objects, opt.state and its items too, are borrowed: the caller holds them as long as the plan lives. A
  // reference from here is one that Python's garbage collector cannot see, and would keep a cycle for ever.
  Parameters(const std::string& rule, const py::list& params, const std::vector<int>& groups, const py::list& states,
             const py::list& clocks, const py::dict& optimizer_state);
  Parameters(const Parameters&) = delete;
  ~Parameters();

 protected:
  // Contiguous copies of what is not laid out as the kernels need it.
  struct Staged {
    at::Tensor param, grad, state[kMaxStates];
  };

  // A 0-dim tensor on the host, as its one number.
  struct Clock {
    at::Tensor tensor;
    double read() const;
    void write(double value) const;
  };

  using Items = std::vector<std::pair<PyObject*, PyObject*>>;

  struct Entry {
    // The object, not the tensor behind it: torch.utils.swap_tensors exchanges that, where nobody else holds it.
    PyObject* param_object;
    const at::Tensor& param() const { return THPVariable_Unpack(param_object); }
    int group;
    DType dtype;
    bool active;    // has a gradient
    int states;     // that opt.state[param] has
    int used = -1;  // that the group's options need
    at::Tensor state[kMaxStates];
    Clock clock;
    // What it looked like when the plan was made: another place or layout in memory needs Python's checks again.
    Pointers data;  // but the gradient
    std::vector<std::int64_t> sizes, strides;
    bool is_dense;
    // opt.state[param], and its items when the plan was made: walked in every step, in case one was replaced.
    PyObject* state_dict;
    Items state_items;
    // of the current step; the gradient is held, as another thread may set p.grad meanwhile
    at::Tensor grad;
    Pointers pointers;
    std::unique_ptr<Staged> staged;
  };

  // False: something that the plan rests on has changed, nothing was touched.
  bool refresh_gradients();

  // Takes the groups' scalars, in the order of scalar_names(rule). False: another number of state tensors is needed.
  bool take_groups(const std::vector<std::vector<double>>& groups);

  // After the kernels: copies back what was staged, and tells autograd of the in-place changes.
  void finish_update();

  // Elements as the kernels count them: a complex number is two real ones, as in torch's own optimizers.
  static std::int64_t real_numel(const at::Tensor& tensor) { return tensor.numel() * (tensor.is_complex() ? 2 : 1); }

  // Between two steps a training loop has driven the entries out of the caches; asking ahead overlaps the misses.
  void prefetch(std::size_t entry) const;

  const int rule_;
  std::vector<Entry> entries_;
  std::vector<Group> groups_;

 private:
  // False: the entry is not what it was, or not as the kernels need it.
  bool bind(Entry& entry, bool may_write_inference);
  void stage(Entry& entry, const at::Tensor& grad);
  void unstage(Entry& entry);

  std::vector<std::string> scalar_names_;
  PyObject* const optimizer_state_;
  Items optimizer_state_items_;
};

}  // namespace fusedreg
