// The hyperparameters of Adam and its kin.
#pragma once

#include "../maths/math.h"

namespace fusedreg {

struct Betas {
  double beta1 = 0, beta2 = 0, eps = 0;

  template <class Bind>
  FUSEDREG_HD void bind(Bind&& bind) {
    bind("beta1", beta1);
    bind("beta2", beta2);
    bind("eps", eps);
  }
};

}  // namespace fusedreg
