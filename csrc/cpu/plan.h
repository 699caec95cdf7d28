// The CPU driver's plan: a parameter list with its work cut into chunks, and a kernel for each parameter.
#pragma once

#include "../plan/parameters.h"
#include "driver.h"

namespace fusedreg::cpu {

class __attribute__((visibility("hidden"))) Plan : public Parameters {
 public:
  Plan(const std::string& rule, const py::list& params, const std::vector<int>& groups, const py::list& states,
       const py::list& clocks, const py::dict& optimizer_state);

  // Takes the groups' scalars, in the order of scalar_names(rule). False: another number of state tensors is needed.
  bool set_groups(const std::vector<std::vector<double>>& groups);

  // Reads the gradients. False: something that the plan rests on has changed, nothing was touched.
  bool refresh() { return refresh_gradients(); }

  // Sum of squares of the gradients after stages 1 and 2, in a fixed order.
  double sum_of_squares(double inv_grad_scale);

  // Stages 1 to 6 for every parameter with a gradient.
  void update(double inv_grad_scale, double clip_coef);

 private:
  struct Kernels {  // of one entry
    UpdateKernel update = nullptr;
    SquaresKernel squares = nullptr;
    int hyper = 0;
  };

  WorkList work_{kChunkElements};
  std::vector<Kernels> kernels_;
  std::vector<Hyper<double>> hypers_;
  std::vector<double> partial_sums_;
};

}  // namespace fusedreg::cpu
