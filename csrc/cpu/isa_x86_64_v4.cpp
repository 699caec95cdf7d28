// x86-64-v4: AVX-512.
#include "x86_64.h"
#if defined(FUSEDREG_X86_64_LEVELS)
#define FUSEDREG_ISA x86_64_v4
#define FUSEDREG_TARGET __attribute__((target("arch=x86-64-v4")))
#include "loop.h"

namespace fusedreg::cpu {
InstructionSet x86_64_v4_kernels() {
  return {"x86-64-v4", [] { return __builtin_cpu_supports("x86-64-v4") != 0; }, x86_64_v4::update_kernel,
          x86_64_v4::squares_kernel};
}
}  // namespace fusedreg::cpu
#endif
