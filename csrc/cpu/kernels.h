// The CPU kernels: loops over a chunk, compiled once for each instruction set and chosen at run time.
#pragma once

#include <string>
#include <vector>

#include "../chunks.h"
#include "../update.h"

namespace fusedreg::cpu {

// Both work on the elements [begin, begin + count).
using UpdateKernel = void (*)(const Pointers&, std::int64_t begin, std::int64_t count, const Hyper<double>&);
using SquaresKernel = double (*)(const void* g, std::int64_t begin, std::int64_t count, const Hyper<double>&);

struct InstructionSet {
  const char* name;
  bool (*is_supported)();
  UpdateKernel (*update)(int rule, const Group&, DType);
  SquaresKernel (*sum_of_squares)(const Group&, DType);
};

// The instruction sets that this build has and this processor supports, the best first.
const std::vector<InstructionSet>& instruction_sets();

// The one in use: the best, or what use_instruction_set chose.
const InstructionSet& instruction_set();
bool use_instruction_set(const std::string& name);

}  // namespace fusedreg::cpu
