// What a block of threads does: all of a kernel. `Block` is where it runs: a device's block (device.h), or one that a
// test emulates on the CPU. It has an `index` among the `count` blocks of the launch, and
//   each_thread(visitor)   calls visitor(thread) for each of its kThreads threads, and returns when all are done.
//   any_thread(visitor)    likewise; whether visitor(thread) is true for one of them, the same to all.
#pragma once

#include "../maths/storage.h"
#include "../maths/units.h"
#include "../maths/update.h"
#include "args.h"

namespace fusedreg::cuda {

// Tells the compiler what it cannot know of a pointer out of a table: without it, loads and stores are generic ones.
template <class T>
FUSEDREG_HD T* global(T* pointer) {
#if defined(__CUDA_ARCH__)
  __builtin_assume(__isGlobal(pointer));
#endif
  return pointer;
}

template <class T>
FUSEDREG_HD T* address(std::int64_t number) {
  return global(reinterpret_cast<T*>(number));
}

// -- the tables

FUSEDREG_HD double read_scalar(const std::int64_t* scalar) {
  const std::int64_t kind = scalar[0], value = scalar[1];
  if (kind == kValue || kind == kFloat32Value) return bit_cast<double>(value);
  return kind == kFloat64At ? *address<const double>(value) : static_cast<double>(*address<const float>(value));
}

// A number as the scalar keeps it, in its own precision.
FUSEDREG_HD double as_stored(const std::int64_t* scalar, double number) {
  const bool is_single = scalar[0] == kFloat32At || scalar[0] == kFloat32Value;
  return is_single ? static_cast<double>(static_cast<float>(number)) : number;
}

FUSEDREG_HD void write_scalar(const std::int64_t* scalar, double to) {
  const std::int64_t kind = scalar[0], value = scalar[1];
  if (kind == kFloat32At) *address<float>(value) = static_cast<float>(to);
  if (kind == kFloat64At) *address<double>(value) = to;
}

FUSEDREG_HD double read_scalar(const Scalars& scalars, std::int64_t group, int field) {
  return read_scalar(scalars.table + kScalarWidth * (kStepScalars + group * scalars.fields + field));
}

FUSEDREG_HD double read_scalar(const Scalars& scalars, StepScalar scalar) {
  return read_scalar(scalars.table + kScalarWidth * scalar);
}

FUSEDREG_HD std::int64_t group_of(const std::int64_t* set) { return set[0]; }
FUSEDREG_HD const std::int64_t* scalar_state(const std::int64_t* set, int i) { return set + 1 + kScalarWidth * i; }

// A chunk, with the row that it is of.
struct Share {
  Rows rows;
  std::int64_t row, begin;
  int count;

  FUSEDREG_HD Share(const Rows& all, const Chunks& chunks, std::int64_t chunk) : rows(all) {
    row = chunks.first[2 * chunk];
    begin = chunks.first[2 * chunk + 1];
    const std::int64_t rest = column(kNumel) - begin;
    count = static_cast<int>(rest < kChunkElements ? rest : kChunkElements);
  }

  FUSEDREG_HD std::int64_t column(int i) const { return rows.columns[i * rows.count + row]; }
  FUSEDREG_HD std::int64_t set() const { return column(kSet); }

  template <class T>
  FUSEDREG_HD T* stream(int i) const {
    return address<T>(column(i)) + begin;
  }
};

// -- elements in a chunk

// 16 bytes of elements: one load or store instruction.
template <class T>
struct alignas(16) Pack {
  static constexpr int kSize = 16 / sizeof(T);
  T element[kSize];

  FUSEDREG_HD static Pack load(const T* at) { return *reinterpret_cast<const Pack*>(at); }
  FUSEDREG_HD void store(T* at) const { *reinterpret_cast<Pack*>(at) = *this; }
};

// Calls pack(first element) and single(element) for a thread's share of `count` elements: neighbouring threads take
// neighbouring packs. Where the memory is not aligned, and for the tail, element by element.
template <int kPack, int kUnroll, class PackVisitor, class SingleVisitor>
FUSEDREG_HD void share_out(int count, bool aligned, int thread, PackVisitor&& pack, SingleVisitor&& single) {
  const int packed = aligned ? count / kPack * kPack : 0;
#pragma unroll kUnroll
  for (int i = thread * kPack; i < packed; i += kThreads * kPack) pack(i);
#pragma unroll 1
  for (int i = packed + thread; i < count; i += kThreads) single(i);
}

// The sum of a number that each thread has left, in a fixed order: a tree.
template <class Block>
FUSEDREG_HD void sum_up(const Block& block, double (&of_thread)[kThreads]) {
#pragma unroll 1
  for (int half = kThreads / 2; half > 0; half /= 2) {
    block.each_thread([&](int thread) {
      if (thread < half) of_thread[thread] += of_thread[thread + half];
    });
  }
}

// -- the norm

struct SquaresShared {
  double sums[kThreads];
};

// Adds up the squares of every gradient's elements after stages 1 and 2, a partial sum for each block.
template <class T, class Block>
FUSEDREG_HD void squares_block(const Block& block, const SquaresArgs& args, SquaresShared& shared) {
  using A = ArithmeticOf<T>;
  block.each_thread([&](int thread) {
    const A inv_grad_scale = static_cast<A>(1 / read_scalar(args.scalars, kGradScale));
    double sum = 0;
#pragma unroll 1
    for (std::int64_t i = block.index; i < args.chunks.count; i += block.count) {
      const Share share(args.rows, args.chunks, i);
      const std::int64_t group = group_of(args.sets + kSetWidth * share.set());
      const A clip_value = static_cast<A>(read_scalar(args.scalars, group, args.clip_value));
      const T* const g = share.stream<const T>(kG);
      const auto add = [&](const T& gradient) {
        const double value = clip_gradient_value(static_cast<A>(load(gradient)), inv_grad_scale, clip_value);
        sum += value * value;
      };
      const auto add_pack = [&](int first) {
        const Pack<T> pack = Pack<T>::load(g + first);
#pragma unroll
        for (int k = 0; k < Pack<T>::kSize; ++k) add(pack.element[k]);
      };
      // Four loads on their way: one at a time does not keep the memory busy.
      share_out<Pack<T>::kSize, 4>(share.count, args.chunks.aligned, thread, add_pack, [&](int k) { add(g[k]); });
    }
    shared.sums[thread] = sum;
  });
  sum_up(block, shared.sums);
  block.each_thread([&](int thread) {
    if (thread == 0) args.partial_sums[block.index] = shared.sums[0];
  });
}

// -- the constants of a scalar set

// What the update is given for a scalar set.
template <class Rule>
struct Prepared {
  StepConstants<Rule, float> in_float;
  StepConstants<Rule, double> in_double;
  Group<Rule> group;
  UnitConstants units;
  double has_units;
  double skips;  // found_inf: nothing moves
};

template <class Rule>
struct PrepareShared {
  double sums[kThreads];
  double fields[sizeof(Group<Rule>) / sizeof(double)];
  double step[kStepScalars];
  double before[kMaxScalarStates], after[kMaxScalarStates];  // scalar states
};

FUSEDREG_HD double clip_coefficient(double max_grad_norm, double norm) {
  if (max_grad_norm == INFINITY) return 1;  // measures, also what is not finite
  const double coefficient = max_grad_norm / (norm + 1e-6);
  return coefficient > 1 ? 1 : coefficient;  // a NaN stays
}

// Makes the constants of one scalar set, a block for each, and moves on its scalar states that are on the device.
template <class Rule, class Block>
FUSEDREG_HD void prepare_block(const Block& block, const PrepareArgs& args, PrepareShared<Rule>& shared) {
  const std::int64_t* const set = args.sets + kSetWidth * block.index;
  auto& prepared = static_cast<Prepared<Rule>*>(args.prepared)[block.index];
  constexpr int kScalarStates = kScalarStatesOf<Rule>;

  // Each by a thread of its own, all on their way at once.
  block.each_thread([&](int thread) {
    double sum = 0;
    for (std::int64_t i = thread; i < args.square_count; i += kThreads) sum += args.squares[i];
    shared.sums[thread] = sum;
    const int field = thread, step = thread - args.scalars.fields, state = step - kStepScalars;
    if (field < args.scalars.fields) {
      shared.fields[field] = read_scalar(args.scalars, group_of(set), field);
    } else if (step < kStepScalars) {
      shared.step[step] = read_scalar(args.scalars, static_cast<StepScalar>(step));
    } else if (state < kScalarStates) {
      shared.before[state] = read_scalar(scalar_state(set, state));
    }
  });
  block.each_thread([&](int thread) {
    if (thread != 0) return;
    const Group<Rule> group = make_group<Rule>(shared.fields);
    double after[kMaxScalarStates] = {};
    for (int i = 0; i < kScalarStates; ++i) after[i] = shared.before[i];
    const auto stored = [&](int i, double number) { return as_stored(scalar_state(set, i), number); };
    Rule::next(group.common.lr, group.rule, after, stored);
    for (int i = 0; i < kScalarStates; ++i) shared.after[i] = stored(i, after[i]);
  });
  if (args.squares != nullptr) sum_up(block, shared.sums);

  // Any nonzero value skips, NaN included: it is a sum over devices.
  const bool skips = !(shared.step[kFoundInf] == 0);
  const double inv_grad_scale = 1 / shared.step[kGradScale];
  // By threads of different warps: each is long, and alone.
  block.each_thread([&](int thread) {
    if (thread % 32 != 0 || thread > 64) return;
    const Group<Rule> group = make_group<Rule>(shared.fields);
    const double norm = args.squares != nullptr ? sqrt(shared.sums[0]) : 0;
    const double clip_coef = args.squares != nullptr ? clip_coefficient(shared.step[kMaxGradNorm], norm) : 1;
    if (thread == 0) {
      fill_constants(prepared.in_float, group, shared.before, shared.after, inv_grad_scale, clip_coef);
    } else if (thread == 32) {
      const double tau =
          fill_constants(prepared.in_double, group, shared.before, shared.after, inv_grad_scale, clip_coef);
      prepared.units = make_unit_constants(group.common, group.penalties, Rule::kHasMetric, tau);
      prepared.has_units = has_units(group.common, group.penalties);
    } else {
      prepared.group = group;
      prepared.skips = skips;
      if (skips) return;
      if (args.squares != nullptr && block.index == 0) *args.norm = norm;
      for (int i = 0; i < kScalarStates; ++i) write_scalar(scalar_state(set, i), shared.after[i]);
    }
  });
}

// -- the update

template <class U, class T, std::size_t... kI, class... State>
FUSEDREG_HD void update_element(T& w, const T& g, const StepConstants<typename U::Rule, ArithmeticOf<T>>& c,
                                std::index_sequence<kI...>, State&... state) {
  using A = ArithmeticOf<T>;
  A weight = load(w);
  A values[kMaxStates] = {};
  ((values[kI] = load(state)), ...);
  U::apply(weight, static_cast<A>(load(g)), values, c);
  store(w, weight);
  (store(state, values[kI]), ...);
}

// Stages 1 to 6 for a thread's share of a chunk.
template <class U, class T, std::size_t... kI>
FUSEDREG_HD void update_share(const Share& share, bool aligned,
                              const StepConstants<typename U::Rule, ArithmeticOf<T>>& c, int thread,
                              std::index_sequence<kI...> states) {
  T* const w = share.stream<T>(kW);
  const T* const g = share.stream<const T>(kG);
  [[maybe_unused]] T* state[kMaxStates] = {};
  ((state[kI] = share.stream<T>(kState + kI)), ...);

  const auto update_pack = [&](int first) {
    Pack<T> w_pack = Pack<T>::load(w + first);
    const Pack<T> g_pack = Pack<T>::load(g + first);
    [[maybe_unused]] Pack<T> packs[kMaxStates];
    ((packs[kI] = Pack<T>::load(state[kI] + first)), ...);
#pragma unroll
    for (int i = 0; i < Pack<T>::kSize; ++i) {
      update_element<U>(w_pack.element[i], g_pack.element[i], c, states, packs[kI].element[i]...);
    }
    w_pack.store(w + first);
    (packs[kI].store(state[kI] + first), ...);
  };
  share_out<Pack<T>::kSize, 1>(share.count, aligned, thread, update_pack,
                               [&](int i) { update_element<U>(w[i], g[i], c, states, state[kI][i]...); });
}

// The constants in the arithmetic of parameters of type T.
template <class T, class Rule>
FUSEDREG_HD const auto& constants_for(const Prepared<Rule>& prepared) {
  if constexpr (sizeof(ArithmeticOf<T>) == sizeof(double)) {
    return prepared.in_double;
  } else {
    return prepared.in_float;
  }
}

template <class Rule, class A>
struct UpdateShared {
  StepConstants<Rule, A> constants;
};

// Updates one chunk, a block for each.
template <class Rule, StateMask kMask, class T, class Block>
FUSEDREG_HD void update_block(const Block& block, const UpdateArgs& args, UpdateShared<Rule, ArithmeticOf<T>>& shared) {
  const Share share(args.rows, args.chunks, block.index);
  const auto& prepared = static_cast<const Prepared<Rule>*>(args.prepared)[share.set()];
  if (prepared.skips != 0) return;
  block.each_thread([&](int thread) {
    if (thread == 0) shared.constants = constants_for<T>(prepared);
  });
  block.each_thread([&](int thread) {
    visit_update(prepared.group, kMask, [&](auto update) {
      using U = decltype(update);
      if constexpr (U::kStates == kMask) {
        update_share<U, T>(share, args.chunks.aligned, shared.constants, thread, states_in<kMask>());
      }
    });
  });
}

}  // namespace fusedreg::cuda
