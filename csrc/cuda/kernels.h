// The CUDA kernels as the bindings see them: functions that launch on the current device, each returning a cudaError_t.
#pragma once

#include <vector>

#include "../maths/storage.h"
#include "../plan/rule_info.h"
#include "../rules/registry.h"
#include "args.h"

namespace fusedreg::cuda {

// A rule with its kernels; each is a translation unit of its own.
struct Rule {
  RuleInfo info;
  int prepared_size;  // bytes that `prepare` leaves for a scalar set
  int (*prepare)(const PrepareArgs& args, void* stream);
  int (*update)(DType dtype, StateMask states, const UpdateArgs& args, void* stream);
  int (*units)(DType dtype, StateMask states, const UnitsArgs& args, void* stream);
};

// Defined by the units that setup.py writes, from rules/registry.h.
#define FUSEDREG_DECLARE(header, Struct) const Rule& rule_##header();
FUSEDREG_RULES(FUSEDREG_DECLARE)
#undef FUSEDREG_DECLARE

int launch_squares(DType dtype, const SquaresArgs& args, int blocks, void* stream);

const char* error_string(int error);

// Takes the error that an earlier call of this thread's, by whomever, has left behind; 0 where there is none. A launch
// that found it would report it as its own.
int take_earlier_error();

}  // namespace fusedreg::cuda
