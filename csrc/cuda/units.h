// Stage 7 in a block of threads: the penalties on units, behind the stages of update_block; the maths is that of
// maths/units.h.
//
// Units next to each other in memory make a panel. A block finds the roots of all units of a panel together: each unit
// has as many of its threads, and neighbouring threads read neighbouring weights, whether a unit is contiguous or not.
// A panel's weights come from memory once; while its roots are sought, they are read again from a cache. A panel that
// is too large for one block is cut into parts, a block for each, and each pass over it is a launch of its own: a pass
// takes the sums that the one before it has left, and leaves the next. What kUnitPasses have not found, one block
// finishes. All sums are in double and in a fixed order: the same bits in every run.
#pragma once

#include "block.h"

namespace fusedreg::cuda {

// The states that a rule's metric may read.
template <class Rule>
constexpr StateMask states_of_metric(StateMask mask) {
  return Rule::kHasMetric ? mask : 0;
}

template <class Rule, class A>
struct UnitsShared {
  typename Rule::template Constants<A> constants;
  double sums[kUnitSums][kThreads];
  double roots[kThreads][kUnitRootWidth];  // a UnitRoot each: its constructor is nothing that shared memory has

  FUSEDREG_HD UnitRoot& root(int unit) { return *reinterpret_cast<UnitRoot*>(roots[unit]); }
};

// A panel, or a part of it.
struct UnitPanel {
  static_assert(sizeof(UnitRoot) <= kUnitRootWidth * sizeof(double));

  std::int64_t count, outer, run;  // as UnitLayout of the CPU's units.h has them
  std::int64_t first, units;       // of the panel
  std::int64_t slice_begin, slice_end, run_begin, run_end;
  std::int64_t part, parts;
  int together, along;  // units and, within a run, threads side by side; the other threads take other slices
  double* scratch;

  FUSEDREG_HD int unit_of(int thread) const { return thread / along % together; }

  // Of the units' roots, and of what the parts add up to. There are two of each: one is read, one written.
  FUSEDREG_HD UnitRoot& stored_root(int buffer, int unit) const {
    return *reinterpret_cast<UnitRoot*>(scratch + (buffer * together + unit) * kUnitRootWidth);
  }
  FUSEDREG_HD double* partial_sums(int buffer, std::int64_t of_part, int unit) const {
    double* const sums = scratch + 2 * together * kUnitRootWidth;
    return sums + ((buffer * parts + of_part) * together + unit) * kUnitSums;
  }
};

// The weights of one unit that a thread takes of a panel.
struct UnitWalk {
  std::int64_t slice, slice_end, slice_step, place, place_begin, place_end, place_step;
  std::int64_t of_slice, origin;  // in memory, in elements

  FUSEDREG_HD UnitWalk(const UnitPanel& panel, int thread) {
    const int unit = panel.unit_of(thread), side_by_side = panel.together * panel.along;
    slice_step = kThreads / side_by_side;
    slice = panel.slice_begin + thread / side_by_side;
    place_step = panel.along;
    place = place_begin = panel.run_begin + thread % panel.along;
    place_end = panel.run_end;
    of_slice = panel.count * panel.run;
    origin = (panel.first + unit) * panel.run;
    slice_end = unit < panel.units && place < place_end ? panel.slice_end : slice;
  }

  FUSEDREG_HD bool is_on() const { return slice < slice_end; }
  FUSEDREG_HD std::int64_t element() const { return slice * of_slice + origin + place; }
  FUSEDREG_HD void move() {
    place += place_step;
    if (place < place_end) return;
    place = place_begin;
    slice += slice_step;
  }
};

template <class A>
struct UnitWeight {
  A y, e, floor_ratio;
};

// A parameter's weights, with their ridges.
template <class Rule, StateMask kMask, class T>
class UnitStreams {
 public:
  using A = ArithmeticOf<T>;
  using Constants = typename Rule::template Constants<A>;

  FUSEDREG_HD UnitStreams(const Rows& rows, std::int64_t row, const UnitConstants& c, const Constants& constants)
      : UnitStreams(rows, row, c, constants, states_in<kMask>()) {}

  FUSEDREG_HD UnitWeight<A> load(std::int64_t i) const { return load(i, states_in<kMask>()); }
  FUSEDREG_HD void store(std::int64_t i, A x) const { fusedreg::store(w_[i], x); }
  FUSEDREG_HD A furthest(const UnitWeight<A>& weight) const { return unit_furthest(furthest_, weight.floor_ratio); }

  // Calls visitor(element, its weight) for a thread's weights. Several loads are on their way at once.
  template <class Visitor>
  FUSEDREG_HD void for_each(UnitWalk walk, Visitor&& visitor) const {
    constexpr int kAtOnce = sizeof(A) == sizeof(double) ? 2 : 4;
#pragma unroll 1
    while (walk.is_on()) {
      UnitWeight<A> weights[kAtOnce] = {};
      std::int64_t elements[kAtOnce] = {};
      bool is_there[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        is_there[i] = walk.is_on();
        if (!is_there[i]) continue;
        elements[i] = walk.element();
        weights[i] = load(elements[i]);
        walk.move();
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (is_there[i]) visitor(elements[i], weights[i]);
      }
    }
  }

 private:
  template <std::size_t... kI>
  FUSEDREG_HD UnitStreams(const Rows& rows, std::int64_t row, const UnitConstants& c, const Constants& constants,
                          std::index_sequence<kI...>)
      : constants_(constants), in_metric_(c.in_metric) {
    const auto column = [&](int i) { return rows.columns[i * rows.count + row]; };
    w_ = address<T>(column(kW));
    ((state_[kI] = address<const T>(column(kState + kI))), ...);
    ridge_ = static_cast<A>(in_metric_ ? c.ridge : 1 + c.ridge);
    furthest_ = static_cast<A>(c.furthest);
  }

  template <std::size_t... kI>
  FUSEDREG_HD UnitWeight<A> load(std::int64_t i, std::index_sequence<kI...>) const {
    UnitWeight<A> weight = {static_cast<A>(fusedreg::load(w_[i])), ridge_, A(-1)};  // without a metric, no floor
    if constexpr (Rule::kHasMetric) {
      if (in_metric_) {
        A values[kMaxStates] = {};
        ((values[kI] = fusedreg::load(state_[kI][i])), ...);
        const Metric<A> metric = Rule::template metric<kMask>(values, constants_);
        weight.e = metric.d + ridge_;
        weight.floor_ratio = metric.floor_ratio;
      }
    }
    return weight;
  }

  T* w_;
  [[maybe_unused]] const T* state_[kMaxStates] = {};
  [[maybe_unused]] const Constants& constants_;
  A ridge_, furthest_;
  bool in_metric_;
};

// Adds up the sums of the threads of each unit, a tree each: what unit u has, thread u * along has at last.
template <class Block, class Shared>
FUSEDREG_HD void sum_up_units(const Block& block, int together, int along, Shared& shared) {
  const auto add = [&](int to, int from) {
#pragma unroll
    for (int i = 0; i < kUnitSums; ++i) shared.sums[i][to] += shared.sums[i][from];
  };
#pragma unroll 1
  for (int half = along / 2; half > 0; half /= 2) {
    block.each_thread([&](int thread) {
      if (thread % along < half) add(thread, thread + half);
    });
  }
  const int side_by_side = together * along;
#pragma unroll 1
  for (int half = kThreads / side_by_side / 2; half > 0; half /= 2) {
    block.each_thread([&](int thread) {
      if (thread / side_by_side < half && thread % along == 0) add(thread, thread + half * side_by_side);
    });
  }
}

// What a root wants of a thread's weights.
template <class Streams, class Shared>
FUSEDREG_HD void add_up_units(const Streams& streams, const UnitPanel& panel, int thread, Shared& shared) {
  using A = typename Streams::A;
  const UnitRoot& root = shared.root(panel.unit_of(thread) < panel.units ? panel.unit_of(thread) : 0);
  const UnitRoot::Wants wants = root.wants;
  const A r = static_cast<A>(root.r), m = static_cast<A>(root.m);
  double sum = 0, second = 0, third = 0;
  if (wants != UnitRoot::Wants::kNothing) {
    streams.for_each(UnitWalk(panel, thread), [&](std::int64_t, const UnitWeight<A>& weight) {
      if (wants == UnitRoot::Wants::kFirst) {
        add_first_sums(weight.y, weight.e, sum, second);
      } else if (wants == UnitRoot::Wants::kSums) {
        add_newton_sums(weight.y, weight.e, r, m, sum, second, third);
      } else {
        add_norm_sums(weight.y, weight.e, streams.furthest(weight), r, m, sum);
      }
    });
  }
  shared.sums[0][thread] = sum;
  shared.sums[1][thread] = second;
  shared.sums[2][thread] = third;
}

// Adds up what the parts of a panel have left in the pass before, for thread u what unit u has.
template <class Block, class Shared>
FUSEDREG_HD void add_up_parts(const Block& block, const UnitPanel& panel, int buffer, Shared& shared) {
  block.each_thread([&](int thread) {
    double sums[kUnitSums] = {};
    const int unit = thread % panel.together, step = kThreads / panel.together;
    for (std::int64_t part = thread / panel.together; part < panel.parts; part += step) {
      const double* const of_part = panel.partial_sums(buffer, part, unit);
#pragma unroll
      for (int i = 0; i < kUnitSums; ++i) sums[i] += of_part[i];
    }
#pragma unroll
    for (int i = 0; i < kUnitSums; ++i) shared.sums[i][thread] = sums[i];
  });
  sum_up_units(block, panel.together, 1, shared);
}

template <class Block, class Streams, class Shared>
FUSEDREG_HD void solve_panel(const Block& block, const Streams& streams, const UnitConstants& c, const UnitPanel& panel,
                             int pass, Shared& shared) {
  using A = typename Streams::A;
  const bool is_whole = pass == kUnitsWhole, is_one_pass = !is_whole && pass < kUnitsFinish;
  const int read = (pass + 1) % 2, written = pass % 2;
  block.each_thread([&](int thread) {
    if (thread < panel.units) shared.root(thread) = pass <= 0 ? UnitRoot() : panel.stored_root(read, thread);
  });
  int of_unit = 1;  // threads; the first of them has the sums
  bool has_sums = 0 < pass && pass <= kUnitsFinish;
  if (has_sums) add_up_parts(block, panel, read, shared);
#pragma unroll 1
  while (pass != kUnitsApply) {
    if (has_sums) {
      block.each_thread([&](int thread) {
        const int at = thread * of_unit;
        if (thread >= panel.units) return;
        shared.root(thread).take(c, unit_precision<A>(), shared.sums[0][at], shared.sums[1][at], shared.sums[2][at]);
      });
    }
    const auto wants_something = [&](int thread) {
      return thread < panel.units && shared.root(thread).wants != UnitRoot::Wants::kNothing;
    };
    if (!block.any_thread(wants_something)) break;
    block.each_thread([&](int thread) { add_up_units(streams, panel, thread, shared); });
    sum_up_units(block, panel.together, panel.along, shared);
    of_unit = panel.along;
    has_sums = true;
    if (is_one_pass) break;
  }
  block.each_thread([&](int thread) {
    if (!is_whole && pass != kUnitsApply) {
      if (thread >= panel.units) return;
      double* const sums = panel.partial_sums(written, panel.part, thread);
      for (int i = 0; is_one_pass && i < kUnitSums; ++i) sums[i] = shared.sums[i][thread * panel.along];
      if (panel.part == 0) panel.stored_root(written, thread) = shared.root(thread);
      return;
    }
    const int unit = panel.unit_of(thread);
    if (unit >= panel.units || shared.root(unit).is_identity) return;
    const UnitRoot& root = shared.root(unit);
    const A r = static_cast<A>(root.r), m = static_cast<A>(root.m);
    const bool is_guarded = root.is_guarded;
    streams.for_each(UnitWalk(panel, thread), [&](std::int64_t i, const UnitWeight<A>& weight) {
      streams.store(i, unit_prox(weight.y, weight.e, is_guarded ? streams.furthest(weight) : A(INFINITY), r, m));
    });
  });
}

// An item of a launch: some panels as a whole, or a part of one.
template <class Rule, StateMask kMask, class T, class Block>
FUSEDREG_HD void units_block(const Block& block, const UnitsArgs& args, UnitsShared<Rule, ArithmeticOf<T>>& shared) {
  const std::int64_t* const item = args.items + kUnitItemWidth * block.index;
  const std::int64_t* const layout = args.layouts + kUnitLayoutWidth * item[kItemLayout];
  const std::int64_t row = layout[kLayoutRow], set = args.rows.columns[kSet * args.rows.count + row];
  const auto& prepared = static_cast<const Prepared<Rule>*>(args.prepared)[set];
  if (prepared.skips != 0 || prepared.has_units == 0) return;
  if (args.pass == kUnitsFinish && item[kItemPart] != 0) return;

  UnitPanel panel;
  panel.count = layout[kLayoutCount];
  panel.outer = layout[kLayoutOuter];
  panel.run = layout[kLayoutRun];
  panel.together = static_cast<int>(layout[kLayoutTogether]);
  panel.along = static_cast<int>(layout[kLayoutAlong]);
  panel.part = item[kItemPart];
  panel.parts = layout[kLayoutParts];
  panel.scratch = args.scratch + item[kItemScratch];
  panel.slice_begin = panel.run_begin = 0;
  panel.slice_end = panel.outer;
  panel.run_end = panel.run;
  if (args.pass != kUnitsWhole && args.pass != kUnitsFinish) {
    const std::int64_t slices = layout[kLayoutSlicesOfPart], places = layout[kLayoutRunOfPart];
    const std::int64_t in_run = (panel.run - 1) / places + 1;
    panel.slice_begin = panel.part / in_run * slices;
    panel.run_begin = panel.part % in_run * places;
    panel.slice_end = panel.outer < panel.slice_begin + slices ? panel.outer : panel.slice_begin + slices;
    panel.run_end = panel.run < panel.run_begin + places ? panel.run : panel.run_begin + places;
  }
  block.each_thread([&](int thread) {
    if (thread == 0) shared.constants = constants_for<T>(prepared).rule;
  });
  const UnitStreams<Rule, kMask, T> streams(args.rows, row, prepared.units, shared.constants);
#pragma unroll 1
  for (std::int64_t i = 0; i < layout[kLayoutPanels]; ++i) {
    panel.first = item[kItemFirst] + i * panel.together;
    if (panel.first >= panel.count) return;
    panel.units = panel.count - panel.first < panel.together ? panel.count - panel.first : panel.together;
    solve_panel(block, streams, prepared.units, panel, args.pass, shared);
  }
}

}  // namespace fusedreg::cuda
