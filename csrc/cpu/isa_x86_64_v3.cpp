// x86-64-v3: AVX2 and FMA.
#include "x86_64.h"
#if defined(FUSEDREG_X86_64_LEVELS)
#define FUSEDREG_ISA x86_64_v3
#define FUSEDREG_TARGET __attribute__((target("arch=x86-64-v3")))
#include "loop.h"

namespace fusedreg::cpu {
InstructionSet x86_64_v3_kernels() {
  return {"x86-64-v3", [] { return __builtin_cpu_supports("x86-64-v3") != 0; }, x86_64_v3::update_kernel,
          x86_64_v3::squares_kernel};
}
}  // namespace fusedreg::cpu
#endif
