// The norm's launch, emulated.
#include "emulator.h"

namespace fusedreg::cuda {

int launch_squares(DType dtype, const SquaresArgs& args, int blocks, void*) {
  visit_dtype(dtype, [&](auto element) {
    each_block(blocks, [&](const EmulatedBlock& block) {
      auto shared = unwritten<SquaresShared>();
      squares_block<decltype(element)>(block, args, shared);
    });
  });
  return 0;
}

const char* error_string(int) { return "none: the CPU emulates the GPU"; }

}  // namespace fusedreg::cuda
