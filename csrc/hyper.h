// The scalars of a step. `Group` is what the Python side hands over, `Hyper` is what a kernel reads.
#pragma once

#include "math.h"

namespace fusedreg {

// l1_mode, in the order of L1_MODES in fusedreg/groups.py.
enum class L1Mode { kProximal = 0, kDecoupled = 1, kSubgradient = 2 };

// The scalars of a param group that every rule has, then those of each rule. Python passes one flat array of doubles
// in this order; bindings.cpp publishes the names, and a test compares them with Python's.
// clang-format off
#define FUSEDREG_COMMON_SCALARS(X) \
  X(lr) X(weight_decay) X(maximize) X(decoupled_weight_decay) X(l1) X(l2) X(l1_mode) X(clip_value)
#define FUSEDREG_ADAM_SCALARS(X) X(beta1) X(beta2) X(eps) X(amsgrad)
#define FUSEDREG_SGD_SCALARS(X) X(momentum) X(dampening) X(nesterov)
#define FUSEDREG_ALL_SCALARS(X) FUSEDREG_COMMON_SCALARS(X) FUSEDREG_ADAM_SCALARS(X) FUSEDREG_SGD_SCALARS(X)
// clang-format on

struct Group {
#define FUSEDREG_FIELD(name) double name = 0;
  FUSEDREG_ALL_SCALARS(FUSEDREG_FIELD)
#undef FUSEDREG_FIELD

  FUSEDREG_HD L1Mode mode() const { return static_cast<L1Mode>(static_cast<int>(l1_mode)); }
};

#define FUSEDREG_COUNT(name) +1
static_assert(sizeof(Group) == sizeof(double) * (FUSEDREG_ALL_SCALARS(FUSEDREG_COUNT)), "Group is an array of doubles");
#undef FUSEDREG_COUNT

// One parameter's scalars in one step: filled on the host in double, read by a kernel in the arithmetic type A.
// clang-format off
#define FUSEDREG_HYPER_FIELDS(X)                                                         \
  /* stages 1 to 4: clip.h */                                                            \
  X(inv_grad_scale) X(clip_value) X(clip_coef) X(l1_gradient) X(l2_gradient) X(w_scale)  \
  /* stage 5: rules/ */                                                                  \
  X(step_size) X(beta1) X(one_minus_beta1) X(beta2) X(one_minus_beta2)                            \
  X(inv_sqrt_bias_correction2) X(eps)                                                    \
  X(momentum) X(one_minus_dampening) X(nesterov)                                         \
  /* stage 6: prox.h */                                                                  \
  X(tau) X(l1) X(l2) X(shrink)
// clang-format on

template <class A>
struct Hyper {
#define FUSEDREG_FIELD(name) A name = 0;
  FUSEDREG_HYPER_FIELDS(FUSEDREG_FIELD)
#undef FUSEDREG_FIELD

  template <class B>
  FUSEDREG_HD Hyper<B> as() const {
    Hyper<B> to;
#define FUSEDREG_FIELD(name) to.name = static_cast<B>(name);
    FUSEDREG_HYPER_FIELDS(FUSEDREG_FIELD)
#undef FUSEDREG_FIELD
    return to;
  }
};

}  // namespace fusedreg
