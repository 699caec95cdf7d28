// The gain of momentum: what its recurrence, run on a constant 1, has come to. A step moves a weight by lr * gain times
// a constant gradient, so lr * gain is the prox's step size too.
#pragma once

#include "../maths/math.h"

namespace fusedreg {

// The gain after a step. `before` is 0 before the first one, and NaN where nobody counted (a buffer out of a plain
// torch checkpoint), which takes the stationary gain.
FUSEDREG_HD double next_momentum_gain(double before, double momentum, double dampening) {
  if (before == 0) return 1;
  if (before == before) {
    const double gain = momentum * before + 1 - dampening;
    return gain != 0 ? gain : 5e-324;  // 0 is before the first step; dampening can bring the gain there
  }
  return momentum < 1 ? (1 - dampening) / (1 - momentum) : 1;
}

}  // namespace fusedreg
