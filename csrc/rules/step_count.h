// What most rules share: their one scalar state is the number of steps taken.
#pragma once

#include <array>

#include "../maths/math.h"

namespace fusedreg {

struct StepCount {
  static constexpr std::array kScalarStates = {"step"};

  template <class Hyperparameters, class AsStored>
  FUSEDREG_HD static void next(double, const Hyperparameters&, double* scalar_states, AsStored&&) {
    scalar_states[0] += 1;
  }
};

}  // namespace fusedreg
