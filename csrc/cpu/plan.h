// A plan holds what does not change from step to step: the parameters, their state, the work list, the groups' scalars.
// It checks in every step that this still is so, and says when it is not: then Python, which knows how to create state
// and how to complain, makes a new one.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/utils/pybind.h>

#include <array>
#include <memory>
#include <string>
#include <vector>

#include "driver.h"

namespace fusedreg::cpu {

namespace py = pybind11;

// hidden, as pybind11 and all that holds its objects
class __attribute__((visibility("hidden"))) Plan {
 public:
  // One entry a parameter, with or without a gradient; `states[i]` is opt.state[params[i]], or None where the parameter
  // has no gradient. `clocks[i]` is the 0-dim tensor with the rule's clock, or None where the rule keeps none.
  Plan(const std::string& rule, py::list params, std::vector<int> groups, py::list states, py::list clocks);
  Plan(const Plan&) = delete;
  ~Plan();

  // Takes the groups' scalars, in the order of scalar_names(rule). False: another number of state tensors is needed.
  bool set_groups(const std::vector<std::vector<double>>& groups);

  // Reads the gradients. False: something that the plan rests on has changed, nothing was touched.
  bool refresh();

  // Sum of squares of the gradients after stages 1 and 2, in a fixed order.
  double sum_of_squares(double inv_grad_scale);

  // Stages 1 to 6 for every parameter with a gradient.
  void update(double inv_grad_scale, double clip_coef);

 private:
  struct Staged;
  struct Entry {
    at::Tensor param;
    int group;
    DType dtype;
    bool active;  // has a gradient
    int states;
    // What it looked like when the plan was made: another place or layout in memory needs Python's checks again.
    const void* data;
    std::vector<std::int64_t> strides;
    // opt.state[param], and what it held under watched_keys_: looked up in every step, in case it was replaced.
    py::object state_dict;
    std::array<PyObject*, kMaxStates + 1> watched;
    at::Tensor state[kMaxStates];
    at::Tensor clock;
    // of the current step
    Pointers pointers;
    UpdateKernel update_kernel;
    SquaresKernel squares_kernel;
    int hyper;
    std::unique_ptr<Staged> staged;
  };

  // Contiguous copies of what is not laid out as the kernels need it.
  struct Staged {
    at::Tensor param, grad, state[kMaxStates];
  };

  bool is_current(const Entry& entry) const;
  void bind(Entry& entry);
  void stage(Entry& entry, const at::Tensor& grad);
  void unstage(Entry& entry);
  void prefetch(std::size_t entry) const;

  int rule_;
  std::vector<py::object> watched_keys_;  // the rule's state names, and "step"
  std::vector<Entry> entries_;
  std::vector<Group> groups_;
  std::vector<Hyper<double>> hypers_;
  std::vector<double> partial_sums_;
  WorkList work_;
};

int rule_index(const std::string& name);
std::vector<std::string> state_names(int rule);
std::vector<std::string> scalar_names(int rule);

}  // namespace fusedreg::cpu
