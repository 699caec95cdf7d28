// States in 8 bits, to and from tiles of the arithmetic type.
#pragma once

#include "../maths/codes.h"
#include "rounding.h"

namespace fusedreg::cpu {

// Loops over the elements of a tile, of one dtype of codes and one arithmetic type. What is stored begins with a block,
// and ends with one or at the state's end.
struct CodeLoops {
  // The elements [begin, begin + count) of a state.
  void (*load)(void* to, const void* codes, const float* scales, std::int64_t begin, std::int64_t count);
  // To the nearest. The first block's codes and scale are at `codes` and `scales`.
  void (*store)(void* codes, float* scales, const void* from, std::int64_t count);
  void (*set_scales)(float* scales, const void* from, std::int64_t count);
  // A part of a block whose scale is above 0, stochastically: positions are `position`, `position + stride`, ...
  void (*store_run)(void* codes, const void* from, std::int64_t count, float scale, std::uint32_t position,
                    std::uint32_t stride, std::uint32_t key);
  std::int64_t width;  // of the arithmetic type
};

// The elements [begin, begin + count) of a state, to a tile.
void load_codes(const CodeLoops& loops, void* to, const void* codes, const float* scales, std::int64_t begin,
                std::int64_t count);

// And back, where begin is a multiple of kBlockOfCodes, and so is count but at the state's end. To the nearest where
// `rounding` is null.
void store_codes(const CodeLoops& loops, void* codes, float* scales, const void* from, std::int64_t begin,
                 std::int64_t count, const Rounding* rounding, int stream);

}  // namespace fusedreg::cpu
