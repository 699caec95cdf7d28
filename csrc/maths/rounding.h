// Stochastic rounding to bfloat16: up with the probability of what is lost by rounding down, so that the mean of many
// roundings is the number itself. The random bits are a function of the element's position in its parameter and of a
// key, and so the same whoever computes them; fusedreg/rounding.py has the same function for the oracle.
#pragma once

#include "storage.h"

namespace fusedreg {

// lowbias32 of C. Wellons, "Prospecting for Hash Functions": a permutation of 32 bits in which each bit of x changes
// each bit of the result half of the time, but for 0.2 %. https://nullprogram.com/blog/2018/07/31/
FUSEDREG_HD std::uint32_t hash(std::uint32_t x) {
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  return x ^ (x >> 16);
}

// The key of a part of what `key` is of, by the part's number. Zeros, which the hash leaves as they are, make no key.
FUSEDREG_HD std::uint32_t key_of(std::uint32_t key, std::uint32_t part) { return hash((key ^ part) + 0x9e3779b9u); }

// 16 bits for an element. Positions that differ by a multiple of 2^32 have the same.
FUSEDREG_HD std::uint32_t random_bits(std::uint32_t position, std::uint32_t key) { return hash(position ^ key) >> 16; }

// `random` of 16 bits. What bfloat16 holds exactly stays, zeros too; NaN stays NaN; a finite number stays finite: where
// up is infinity, it is rounded down.
FUSEDREG_HD void store_stochastically(BFloat16& to, float x, std::uint32_t random) {
  const std::uint32_t bits = bit_cast<std::uint32_t>(x);
  const std::uint32_t largest = 0x7f7f0000u;  // of the finite ones in bfloat16
  const std::uint32_t up = bits + ((bits & 0x7fffffffu) < largest ? random : 0u);
  to.bits = static_cast<std::uint16_t>(x != x ? 0x7fc0u : up >> 16);
}

}  // namespace fusedreg
