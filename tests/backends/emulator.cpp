// The norm's launch, emulated.
#include <utility>

#include "emulator.h"

// A test sets it.
extern "C" int fusedreg_left_behind;
int fusedreg_left_behind = 0;

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

int take_earlier_error() { return std::exchange(fusedreg_left_behind, 0); }

const char* error_string(int error) { return error != 0 ? "an emulated error" : "none: the CPU emulates the GPU"; }

}  // namespace fusedreg::cuda
