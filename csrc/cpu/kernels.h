// The CPU kernels: loops over a chunk, compiled once for each instruction set and chosen at run time.
#pragma once

#include <string>
#include <vector>

#include "../maths/score.h"
#include "../maths/states.h"
#include "../maths/storage.h"
#include "../maths/units.h"
#include "../plan/rule_info.h"
#include "../rules/registry.h"
#include "codes.h"
#include "rounding.h"

namespace fusedreg::cpu {

enum Isa { kBaseline, kX8664V3, kX8664V4 };

// Which of a parameter's streams are converted: none, those in bfloat16 and no other, or others too. Elements of the
// arithmetic type are worked on where they are.
enum class Converted : std::uint8_t { kNone, kBFloat16, kOthers };

// The dtypes of a parameter's streams.
struct DTypes {
  DType w = DType::kFloat32, g = DType::kFloat32, state[kMaxStates] = {};
  Converted converted = Converted::kNone;
  const Rounding* rounding = nullptr;       // of those in bfloat16 or codes, where it is not to the nearest
  const CodeLoops* codes[kMaxStates] = {};  // of states in 8 bits
};

// Bytes in memory.
constexpr std::int64_t element_size(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : is_code(dtype) ? 1 : 2;
}

// The tiles of a rule's streams fit the first-level cache together, and are long enough to pay for a call.
constexpr std::int64_t kTileElements = 512;
static_assert(kTileElements % kBlockOfCodes == 0);

// Works on the elements [begin, begin + count). `constants` are a StepConstants<Rule, A>. Where `d` is not nullptr, and
// nothing is converted, it also leaves what MetricKernel would say.
using UpdateKernel = void (*)(const Pointers&, const DTypes&, std::int64_t begin, std::int64_t count,
                              const void* constants, void* d, void* floor_ratio);

// The sum of squares of a gradient's elements after stages 1 and 2.
using SquaresKernel = double (*)(const void* g, std::int64_t begin, std::int64_t count, double inv_grad_scale,
                                 double clip_value);

// The keys (maths/score.h) of at most kTileElements weights, KeyOf<A> each. `constants` are a StepConstants<Rule, A>,
// and `at` needs no gradient.
using ScoreKernel = void (*)(const Pointers& at, const DTypes&, std::int64_t begin, std::int64_t count,
                             const void* constants, void* keys);

// What was looked for in some tiles of keys, in their order.
struct FoundKeys {
  // There are no more before another tile is looked through.
  static constexpr std::int64_t kMostKept = 2048;

  std::int64_t zeros = 0;  // keys that are 0, which are not among the others
  std::int64_t count = 0;
  // One more than there is room for: what is written there was not found.
  std::uint64_t keys[kMostKept + kTileElements + 1];
  std::uint16_t places[kMostKept + kTileElements + 1];
};

// Loops over keys, of the arithmetic type that the scores are of.
struct KeyLoops {
  // Finds those up to `last`, of at most kTileElements, the first of which is at `place`; behind what was found before.
  void (*find)(const void* keys, std::int64_t count, std::uint64_t last, std::int64_t place, FoundKeys& found);
  // Adds the scores of units, of which each has `run` in a row, to `sums`, or their squares; the first is that `in_run`
  // of its unit.
  void (*add_up)(const void* keys, std::int64_t count, bool squared, std::int64_t run, std::int64_t in_run,
                 double* sums);
};

// The metric of at most kTileElements weights, and its floor_ratio where the rule has one (else nullptr), in the
// arithmetic type, after a step.
using MetricKernel = void (*)(const Pointers& at, const DTypes&, std::int64_t begin, std::int64_t count,
                              const void* constants, void* d, void* floor_ratio);

// What a loop adds up over a unit's weights: UnitRoot's sums, and what is largest.
constexpr int kUnitLoopSums = kUnitSums + 2;

// Loops over the weights y of one unit, their ridges e and floor_ratios f, in the arithmetic type; see maths/units.h. f
// is nullptr where it is 1.
struct UnitLoops {
  void (*squares)(const void* y, std::int64_t count, double* sums);
  void (*first)(const void* y, const void* e, std::int64_t count, double* sums);
  // What the series wants, and the inverses of e. The first sum is a NaN where one left the range.
  void (*series)(const void* y, const void* e, const void* f, void* inverse, std::int64_t count, double* sums);
  void (*newton)(const void* y, const void* e, const void* f, std::int64_t count, const UnitRoot& root, double* sums);
  void (*norm)(const void* y, const void* e, const void* f, std::int64_t count, const UnitRoot& root, double furthest,
               double* sums);
  void (*apply)(void* y, const void* e, const void* f, std::int64_t count, const UnitRoot& root, double furthest);
  void (*apply_series)(void* y, const void* inverse, std::int64_t count, const UnitRoot& root);
  void (*scale)(void* y, std::int64_t count, double lost);
  // e of d, in place.
  void (*add_ridge)(void* d, std::int64_t count, double ridge);
  // Weights from memory and back, at most kTileElements.
  void (*load)(void* to, const void* from, DType dtype, std::int64_t begin, std::int64_t count);
  void (*store)(void* to, DType dtype, const void* from, std::int64_t begin, std::int64_t count);
};

// A rule with its kernels; each is a translation unit of its own.
struct Rule {
  RuleInfo info;
  bool has_metric;
  std::size_t constants_size;  // of StepConstants in either arithmetic type
  // Returns the rule's tau.
  double (*fill)(void* constants, DType arithmetic, const double* fields, const double* before, const double* after,
                 double inv_grad_scale, double clip_coef);
  UpdateKernel (*update)(Isa isa, DType arithmetic, const double* fields, StateMask states);
  ScoreKernel (*score)(Isa isa, DType arithmetic, StateMask states, bool in_metric);
  MetricKernel (*metric)(Isa isa, DType arithmetic, StateMask states);  // nullptr for a rule without one
  bool (*has_floor_ratio)(StateMask states);
};

// Defined by the units that setup.py writes, from rules/registry.h.
#define FUSEDREG_DECLARE(header, Struct) const Rule& rule_##header();
FUSEDREG_RULES(FUSEDREG_DECLARE)
#undef FUSEDREG_DECLARE

const std::vector<const Rule*>& rules();

struct InstructionSet {
  Isa isa;
  const char* name;
  bool (*is_supported)();
  SquaresKernel (*sum_of_squares)(DType dtype, bool clamps);
  UnitLoops (*units)(DType arithmetic);
  StoreRun (*store_run)(DType arithmetic);
  const CodeLoops* (*codes)(DType dtype, DType arithmetic);
  KeyLoops (*keys)(DType arithmetic);
};

// The instruction sets that this build has and this processor supports, the best first.
const std::vector<InstructionSet>& instruction_sets();

// The one in use: the best, or what use_instruction_set chose.
const InstructionSet& instruction_set();
bool use_instruction_set(const std::string& name);

}  // namespace fusedreg::cpu
