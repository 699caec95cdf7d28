// Chooses the instruction set.
#include "kernels.h"
#include "x86_64.h"

namespace fusedreg::cpu {

InstructionSet baseline_kernels();
#if defined(FUSEDREG_X86_64_LEVELS)
InstructionSet x86_64_v3_kernels();
InstructionSet x86_64_v4_kernels();
#endif

const std::vector<InstructionSet>& instruction_sets() {
  static const std::vector<InstructionSet> usable = [] {
    std::vector<InstructionSet> built;
#if defined(FUSEDREG_X86_64_LEVELS)
    built.push_back(x86_64_v4_kernels());
    built.push_back(x86_64_v3_kernels());
#endif
    built.push_back(baseline_kernels());
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
