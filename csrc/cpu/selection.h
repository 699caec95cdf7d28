// Target sparsity on the CPU: counts the scores of weights, and zeroes the weights with the smallest; adds up those of
// units. It makes no tensor.
//
// A weight's rank is its key (maths/score.h) and, among equal keys, its position: the number of the element in the
// whole model, whichever process holds it and however it lies in memory. fusedreg/sparsity/selection.py finds the rank
// below which weights go, 16 bits at a time, from what is counted here.
#pragma once

#include <limits>

#include "../plan/parameters.h"
#include "parallel.h"
#include "units.h"

namespace fusedreg::cpu {

// All 16 bits of one digit. A leading one has no sign.
constexpr std::int64_t kBins = 1 << 16, kLeadingBins = kBins / 2;

// No key that was looked for is larger.
constexpr std::uint64_t kBeyond = ~std::uint64_t{0} >> 1;

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

  // Adds to counts[digit] the leading digits of the keys of some of the weights, one in 512, wherever they are. Counts
  // are int64, here kLeadingBins.
  void sample(PyObject* counts) const;

  // Likewise the keys of all whose bits above the digit are `prefix` and whose digit is below `end`, > 0, into as many
  // counts; `shift` bits are below the digit. The first count, of the leading digits, is a pass over all weights. Where
  // few are in it, those behind it, and what else is asked of the same weights, look at those alone.
  void count(int shift, std::uint64_t prefix, std::int64_t end, PyObject* counts);

  // Likewise of the positions of the weights whose key is `key`, which was counted; kBins.
  void count_positions(std::uint64_t key, int shift, std::uint64_t prefix, PyObject* counts) const;

  // For each parameter the largest key, and of the weights that have it the last one's position and its place in
  // memory; kBeyond, -1 and -1 where it has keys that were not counted, 0, -1 and -1 where it has none but 0.
  std::vector<std::tuple<std::uint64_t, std::int64_t, std::int64_t>> largest() const;

  // Zeroes the weights with a smaller key, and those with the same key and a smaller position; in each parameter but
  // the one at the place `kept`, if that is not -1. All of them were counted.
  void zero(std::uint64_t key, std::int64_t position, const std::vector<std::int64_t>& kept);

  // Adds the sum of d * w^2 over each unit, as unit_layout has them, to a tensor for each parameter: float64, one a
  // unit. The same for any number of threads.
  void add_up(int unit, PyObject* sums) const;

 private:
  struct Parameter {
    Object w;
    std::vector<Object> states;
    std::int64_t numel;
    std::vector<std::int64_t> sizes, strides;
    Pointers at;
    DTypes dtypes;
    std::int64_t first_position;
    std::vector<std::pair<std::int64_t, std::int64_t>> dims;
    ScoreKernel score;
    KeyLoops loops;
    bool scores_are_roots;  // of what is added up
    bool is_widened;        // its keys have 32 bits, and others 64
    std::vector<std::max_align_t> constants;

    std::int64_t position(std::int64_t place) const;
  };

  // Of one chunk, the weights with keys up to last_ but 0; keys and places in the chunk only if they are few.
  struct Found {
    std::int64_t zeros = 0, count = 0;
    std::vector<std::uint64_t> keys;
    std::vector<std::uint16_t> places;
  };
  static_assert(kChunkElements - 1 <= std::numeric_limits<std::uint16_t>::max());

  // Finds its keys up to last_.
  void find_in_chunk(std::int64_t i);
  void check_found(std::uint64_t key) const;

  // Prefetches a weight and its states.
  static void ask_for(const Parameter& parameter, std::int64_t place);

  // Of at most kTileElements weights, the first of which is at `place`; behind what was found before.
  void find_in_tile(const Parameter& parameter, std::int64_t begin, std::int64_t count, std::uint64_t last,
                    std::int64_t place, FoundKeys& found) const;

  // Looks for keys up to last_, and calls body() after each tile of a chunk; `found` has places in the chunk.
  template <class Body>
  void for_each_tile(const Chunk& chunk, FoundKeys& found, const Body& body) const;

  // Calls body(keys, places in the chunk, count), or several times, for those of a chunk up to last_ but 0; at most
  // FoundKeys::kMostKept at a time.
  template <class Body>
  void for_each_list(std::int64_t i, const Body& body) const;

  // Calls body(key, place in the parameter) for each of them.
  template <class Body>
  void for_each_found(std::int64_t i, const Body& body) const;

  // Adds up what body(chunk, a table of `bins` counts) counts.
  template <class Body>
  void count_chunks(std::int64_t bins, PyObject* counts, const Body& body) const;

  void add_up(const Parameter& parameter, const UnitLayout& layout, double* sums) const;

  // Of weights that lie together, from a unit's first on; after `in_sweep` of them it is the first unit's turn again.
  void add_up_together(const Parameter& parameter, std::int64_t begin, std::int64_t count, std::int64_t in_sweep,
                       std::int64_t run, double* sums) const;

  bool wide_;
  WorkList work_list_{kChunkElements};
  std::vector<Parameter> parameters_;
  bool has_found_ = false;
  std::uint64_t last_ = 0;
  std::vector<Found> found_;
};

}  // namespace fusedreg::cpu
