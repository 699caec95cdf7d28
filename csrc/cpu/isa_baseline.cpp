// What every processor of the build's architecture runs.
#define FUSEDREG_ISA baseline
#define FUSEDREG_TARGET
#include "loop.h"

namespace fusedreg::cpu {
InstructionSet baseline_kernels() {
  return {"baseline", [] { return true; }, baseline::update_kernel, baseline::squares_kernel};
}
}  // namespace fusedreg::cpu
