// The tables that the kernels of both GPU backends walk in device memory: columns of 64-bit numbers.
// fusedreg/backends/device_plan.py uploads them; a test compares their format in Python with what is said here.
#pragma once

#include <cstdint>

#include "../maths/states.h"

namespace fusedreg {

// How a scalar stands in a table: two numbers, its kind and its value's bits or its address. So a kernel takes a number
// from the host and one that only the device knows alike. kFloat32Value: a value that the host keeps in float32.
enum ScalarKind : std::int64_t { kValue, kFloat32At, kFloat64At, kFloat32Value };
constexpr int kScalarWidth = 2;

// The columns of `rows`, with an item for each parameter; from kState on, the states.
enum RowColumn { kW, kG, kState, kNumel = kState + kMaxStates, kSet, kRowColumns };

// A scalar set in `sets`: a group, and its scalar states.
constexpr int kSetWidth = 1 + kScalarWidth * kMaxScalarStates;

// The step's own scalars, at the head of `scalars`. Then come those of each group.
enum StepScalar { kGradScale, kFoundInf, kMaxGradNorm, kStepScalars };

}  // namespace fusedreg
