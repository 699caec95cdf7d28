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

// Stage 7, in `units`: first a layout for each parameter whose group has penalties on units, then the items that the
// blocks of a launch take. fusedreg/backends/device_units.py makes them, and says what each number is.
enum UnitLayoutField {
  kLayoutRow,
  kLayoutCount,
  kLayoutOuter,
  kLayoutRun,
  kLayoutTogether,
  kLayoutAlong,
  kLayoutPanels,
  kLayoutSlicesOfPart,
  kLayoutRunOfPart,
  kLayoutParts,
  kUnitLayoutWidth
};
enum UnitItemField { kItemLayout, kItemFirst, kItemPart, kItemScratch, kUnitItemWidth };

// Of a panel in parts: its passes before one block finishes what is left of it; and a root in scratch, in numbers.
constexpr int kUnitPasses = 12;
constexpr int kUnitRootWidth = 8;

}  // namespace fusedreg
