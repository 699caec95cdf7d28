// What a kernel is given: plain structs of addresses in device memory and of counts. They lead to tables, which
// fusedreg/backends/device_plan.py makes.
#pragma once

#include "../plan/table_format.h"

namespace fusedreg::cuda {

// 16 Ki elements of fp32 Adam move 448 KiB: long enough to hide what a block does before its first load, short enough
// that the last blocks of a launch do not keep the device waiting.
constexpr std::int64_t kChunkElements = 16 * 1024;
constexpr int kThreads = 256;  // of a block

// Blocks of the norm that share a multiprocessor: there are no more in a launch than are there at once.
constexpr int kSquaresPerMultiprocessor = 4;

// A table with a row for each parameter, column by column.
struct Rows {
  const std::int64_t* columns;
  std::int64_t count;
};

// Chunks that one kernel takes: of one dtype, set of states and alignment. A chunk is two numbers: a row, and its first
// element there.
struct Chunks {
  const std::int64_t* first;
  std::int64_t count;
  bool aligned;  // every address to 16 bytes
};

struct Scalars {
  const std::int64_t* table;
  int fields;  // of a group
};

struct SquaresArgs {
  Rows rows;
  Chunks chunks;
  const std::int64_t* sets;
  Scalars scalars;
  int clip_value;        // its place among a group's fields
  double* partial_sums;  // one for each block
};

struct PrepareArgs {
  const std::int64_t* sets;
  std::int64_t set_count;
  Scalars scalars;
  void* prepared;  // a Prepared<Rule> for each set
  // max_grad_norm: partial sums of the norm's square, and where the norm goes. Null where nothing is clipped.
  const double* squares;
  std::int64_t square_count;
  double* norm;
};

struct UpdateArgs {
  Rows rows;
  Chunks chunks;
  const void* prepared;
};

// Which launch of stage 7 it is: the one that takes panels as a whole, or of those in parts one of the passes 0 to
// kUnitPasses - 1, or what comes behind them.
constexpr int kUnitsWhole = -1, kUnitsFinish = kUnitPasses, kUnitsApply = kUnitPasses + 1;

struct UnitsArgs {
  Rows rows;
  const void* prepared;
  const std::int64_t* layouts;
  const std::int64_t* items;  // a block for each
  std::int64_t item_count;
  double* scratch;  // of panels in parts
  int pass;
};

}  // namespace fusedreg::cuda
