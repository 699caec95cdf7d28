// Chooses the instruction set. The kernels of the norm, of stage 7, of stochastic rounding and of keys are here; a
// rule's are in a unit of its own.
#include <algorithm>
#include <cstring>
#include <limits>
#include <numeric>

#include "bfloat16.h"
#include "kernels.h"
#include "prefetch.h"

#define FUSEDREG_LOOPS "squares_loop.h"
#include "each_isa.h"
#undef FUSEDREG_LOOPS
#define FUSEDREG_LOOPS "update_loop.h"
#include "each_isa.h"
#undef FUSEDREG_LOOPS
#define FUSEDREG_LOOPS "unit_loop.h"
#include "each_isa.h"
#undef FUSEDREG_LOOPS
#define FUSEDREG_LOOPS "key_loop.h"
#include "each_isa.h"
#undef FUSEDREG_LOOPS
#define FUSEDREG_LOOPS "rounding_loop.h"
#include "each_isa.h"
#undef FUSEDREG_LOOPS
#define FUSEDREG_LOOPS "codes_loop.h"
#include "each_isa.h"
#undef FUSEDREG_LOOPS

namespace fusedreg::cpu {

const std::vector<const Rule*>& rules() {
#define FUSEDREG_RULE(header, Struct) &rule_##header(),
  static const std::vector<const Rule*> all = {FUSEDREG_RULES(FUSEDREG_RULE)};
#undef FUSEDREG_RULE
  return all;
}

const std::vector<InstructionSet>& instruction_sets() {
  static const std::vector<InstructionSet> usable = [] {
    const InstructionSet built[] = {
#if defined(FUSEDREG_X86_64_LEVELS)
        {kX8664V4, "x86-64-v4", [] { return __builtin_cpu_supports("x86-64-v4") != 0; }, x86_64_v4::squares_kernel,
         x86_64_v4::unit_loops, x86_64_v4::store_run, x86_64_v4::code_loops, x86_64_v4::key_loops},
        {kX8664V3, "x86-64-v3", [] { return __builtin_cpu_supports("x86-64-v3") != 0; }, x86_64_v3::squares_kernel,
         x86_64_v3::unit_loops, x86_64_v3::store_run, x86_64_v3::code_loops, x86_64_v3::key_loops},
#endif
        {kBaseline, "baseline", [] { return true; }, baseline::squares_kernel, baseline::unit_loops,
         baseline::store_run, baseline::code_loops, baseline::key_loops},
    };
    std::vector<InstructionSet> supported;
    for (const InstructionSet& set : built) {
      if (set.is_supported()) supported.push_back(set);
    }
    return supported;
  }();
  return usable;
}

namespace {
std::size_t chosen = 0;
}

const InstructionSet& instruction_set() { return instruction_sets()[chosen]; }

bool use_instruction_set(const std::string& name) {
  for (std::size_t i = 0; i < instruction_sets().size(); ++i) {
    if (instruction_sets()[i].name == name) {
      chosen = i;
      return true;
    }
  }
  return false;
}

}  // namespace fusedreg::cpu
