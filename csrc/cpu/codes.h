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
  // Of blocks; the scale is 0 where all are zeros, and a NaN where a number is not finite or has no root.
  void (*set_scales)(float* scales, const void* from, std::int64_t count);
  // To the nearest, with scales that are set.
  void (*store)(void* codes, const float* scales, const void* from, std::int64_t count);
  // A part of a block whose scale is above 0, stochastically: positions are `position`, `position + stride`, ...
  void (*store_run)(void* codes, const void* from, std::int64_t count, float scale, std::uint32_t position,
                    std::uint32_t stride, std::uint32_t key);
  std::int64_t width;  // of the arithmetic type
};

// The elements [begin, begin + count) of a state, to a tile.
void load_codes(const CodeLoops& loops, void* to, const void* codes, const float* scales, std::int64_t begin,
                std::int64_t count);

// And back, where begin is a multiple of kBlockOfCodes, and so is count but at the state's end. First the scales, of
// all states: what comes of one waits long for it. To the nearest where `rounding` is null.
void set_scales(const CodeLoops& loops, float* scales, const void* from, std::int64_t begin, std::int64_t count);
void store_codes(const CodeLoops& loops, void* codes, const float* scales, const void* from, std::int64_t begin,
                 std::int64_t count, const Rounding* rounding, int stream);

}  // namespace fusedreg::cpu
