// Target sparsity on the CPU: counts the scores of weights, and zeroes the weights with the smallest. It makes no
// tensor.
//
// A weight's rank is its key (maths/score.h) and, among equal keys, its position: the number of the element in the
// whole model, whichever process holds it and however it lies in memory. fusedreg/sparsity/selection.py finds the rank
// below which weights go, 16 bits at a time, from what is counted here.
#pragma once

#include "../plan/parameters.h"
#include "parallel.h"

namespace fusedreg::cpu {

// All 16 bits of one digit.
constexpr std::int64_t kBins = 1 << 16;

class Selection {
 public:
  // A parameter is a tuple of
  //   the tensor, dense; its states, in the rule's order, None for those that it does not have; the group's fields; its
  //   scalar states after the last step; whether there was one, and it has a metric;
  //   the position of its first element, and its dimensions in the order of memory, the outermost first: for each its
  //   size and how far apart the positions of its elements are;
  //   the scales of its states, as they come, where these are in 8 bits.
  // `wide`: keys have 64 bits, as some parameter is float64; otherwise 32.
  Selection(const std::string& rule, PyObject* parameters, bool wide);

  // Adds to counts[digit] the keys whose bits above the digit are `prefix` and whose digit is below `end`; `shift` bits
  // are below the digit. int64, kBins. A small `end` is fast. Returns the largest key of each parameter, 0 where there
  // is none.
  std::vector<std::uint64_t> count(int shift, std::uint64_t prefix, std::int64_t end, PyObject* counts);

  // Likewise of the positions of the weights whose key is `key`.
  void count_positions(std::uint64_t key, int shift, std::uint64_t prefix, PyObject* counts);

  // For each parameter the largest key, and of the weights that have it the last one's position and its place in
  // memory; -1 where there are no weights.
  std::vector<std::tuple<std::uint64_t, std::int64_t, std::int64_t>> largest() const;

  // Zeroes the weights with a smaller key, and those with the same key and a smaller position; in each parameter but
  // the one at the place `kept`, if that is not -1. After a count.
  void zero(std::uint64_t key, std::int64_t position, const std::vector<std::int64_t>& kept);

 private:
  struct Parameter {
    Object w;
    std::vector<Object> states;
    std::int64_t numel;
    Pointers at;
    DTypes dtypes;
    std::int64_t first_position;
    std::vector<std::pair<std::int64_t, std::int64_t>> dims;
    ScoreKernel score;
    std::vector<std::max_align_t> constants;

    std::int64_t position(std::int64_t place) const;
  };

  class Tables;

  // Calls body(keys, place of the first, count, what is in them) for at most kTileElements weights; keys have 32 bits,
  // or 64.
  template <class Body>
  void score(const Parameter& parameter, std::int64_t begin, std::int64_t count, const Body& body) const;

  // Likewise for each tile of a chunk.
  template <class Body>
  void for_each_tile(const Chunk& chunk, const Body& body) const;

  // Counts the numbers below `bins` that body(keys, place of the first, count, what is in them, parameter, a table of
  // counts, numbers) finds in each tile: it writes them and returns how many. Returns the largest keys.
  template <class Body>
  std::vector<std::uint64_t> count_tiles(std::int64_t bins, PyObject* counts, const Body& body);

  void zero_block(const Parameter& parameter, std::int64_t begin, std::int64_t count, std::uint64_t key,
                  std::int64_t position, std::int64_t kept) const;

  std::uint32_t leading_bits(std::uint64_t key) const { return static_cast<std::uint32_t>(wide_ ? key >> 32 : key); }

  bool wide_;
  WorkList work_list_{kChunkElements};
  std::vector<Parameter> parameters_;
  // The leading bits of the least key but 0 in each block of kKeysInBlock weights of a chunk: few blocks have one that
  // goes, and the others need no second look.
  std::vector<std::uint32_t> least_;
};

}  // namespace fusedreg::cpu
