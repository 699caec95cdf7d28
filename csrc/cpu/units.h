// Stage 7 on the CPU: the penalties on units of a parameter, whatever its layout in memory.
#pragma once

#include <cstdint>
#include <vector>

#include "../maths/units.h"
#include "kernels.h"

namespace fusedreg::cpu {

// How a parameter's units lie in memory: `outer` times all of them one after the other, `run` elements of each.
struct UnitLayout {
  std::int64_t count = 1, outer = 1, run = 0;
  std::int64_t size() const { return outer * run; }  // elements of a unit
};

// Of a dense tensor. `unit`: so many rows, 0 for the whole tensor, -1 for a column.
UnitLayout unit_layout(const std::vector<std::int64_t>& sizes, const std::vector<std::int64_t>& strides, int unit);

// A parameter, and what its units go through.
struct UnitWork {
  Pointers at;
  DTypes dtypes;
  DType arithmetic = DType::kFloat32;
  UnitLayout layout;
  UnitConstants constants;
  const void* step_constants = nullptr;
  UpdateKernel update = nullptr;  // stages 1 to 6, where they are still to be taken
  MetricKernel metric = nullptr;
  bool has_floor_ratio = false;
  UnitLoops loops;
};

// Memory that grows to what is needed: of one thread, and of units that are solved together.
using UnitScratch = std::vector<double>;

struct UnitSolution {
  std::vector<UnitRoot> roots;
  std::vector<double> sums;
};

struct UnitMemory {
  UnitScratch scratch;
  UnitSolution solution;
};

// A unit of so many elements is worked on in a cache; a larger one in passes over memory, by all threads.
constexpr std::int64_t kUnitElements = 16 * 1024;

// So many elements go through stage 6 before stage 7 looks at them: what was written is still in the nearest cache.
constexpr std::int64_t kUnitTile = 1024;

// The units [first, first + count), which are of at most kUnitElements elements together, or one.
void prox_of_units(const UnitWork& work, std::int64_t first, std::int64_t count, UnitMemory& memory);

// All units, by all threads.
void prox_of_all_units(const UnitWork& work);

}  // namespace fusedreg::cpu
