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

// A pointer out of a table. The compiler cannot know that it is into global memory: loads and stores would be generic.
template <class T>
FUSEDREG_HD T* address(std::int64_t number) {
#if defined(__CUDA_ARCH__)
  return static_cast<T*>(__cvta_global_to_generic(static_cast<std::size_t>(number)));
#else
  return reinterpret_cast<T*>(number);
#endif
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

  // Where memory is not aligned to 16 bytes, a pack's elements are as far apart as there are threads: neighbouring
  // threads then have neighbouring elements, and as much is on its way at once.
  FUSEDREG_HD static Pack gather(const T* at) {
    Pack pack;
#pragma unroll
    for (int i = 0; i < kSize; ++i) pack.element[i] = at[i * kThreads];
    return pack;
  }
  FUSEDREG_HD void scatter(T* at) const {
#pragma unroll
    for (int i = 0; i < kSize; ++i) at[i * kThreads] = element[i];
  }

  // 0 where each element is a zero, whatever its sign.
  FUSEDREG_HD std::uint32_t magnitude_bits() const {
    std::uint32_t words[4];
    std::memcpy(words, this, sizeof(words));
    return (words[0] | words[1] | words[2] | words[3]) & (sizeof(T) == 2 ? 0x7fff7fffu : 0x7fffffffu);
  }

  // Keeps it in four registers where two ways of loading it meet, and not in one for each element.
  FUSEDREG_HD void join() {
#if defined(__CUDA_ARCH__)
    std::uint32_t words[4];
    std::memcpy(words, this, sizeof(words));
    asm("" : "+r"(words[0]), "+r"(words[1]), "+r"(words[2]), "+r"(words[3]));
    std::memcpy(this, words, sizeof(words));
#endif
  }
};

// The same, which a compiler cannot know: it makes no loop for either answer.
FUSEDREG_HD bool opaque(bool answer) {
#if defined(__CUDA_ARCH__)
  int number;
  asm volatile("mov.s32 %0, %1;" : "=r"(number) : "r"(static_cast<int>(answer)));
  return number != 0;
#else
  return answer;
#endif
}

// Calls pack(first element) and single(element) for a thread's share of `count` elements, in packs of kPack. The tail
// is taken element by element.
template <int kPack, int kUnroll, class PackVisitor, class SingleVisitor>
FUSEDREG_HD void share_out(int count, bool aligned, int thread, PackVisitor&& pack, SingleVisitor&& single) {
  constexpr int kStep = kThreads * kPack;
  const int packed = aligned ? count / kPack * kPack : count / kStep * kStep;
#pragma unroll kUnroll
  for (int i = aligned ? thread * kPack : thread; i < packed; i += kStep) pack(i);
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

// A sum of numbers >= 0 in fp32 that keeps what its roundings lose (Knuth's two-sum): many GPUs have few units for
// double.
class CompensatedSum {
 public:
  FUSEDREG_HD void add(float x) {
    const float before = sum_;
    sum_ = before + x;
    const float added = sum_ - before;
    lost_ += (before - (sum_ - added)) + (x - added);
  }
  FUSEDREG_HD double total() const { return static_cast<double>(sum_) + static_cast<double>(lost_); }

  // Whether no square of a chunk's was too large for fp32, and none that counts was below its normal numbers.
  FUSEDREG_HD bool has_squares() const { return 0x1p-90f < sum_ && sum_ < INFINITY; }

 private:
  float sum_ = 0, lost_ = 0;
};

// A thread's share of a chunk of gradients, after stages 1 and 2. Of fp32 and less, without double: a pack's squares
// are added up in pairs, so that what comes is off by 5 * 2^-24 at the most, relative. Where fp32 has no room for a
// square, which is rare, once more in double.
template <class T>
FUSEDREG_HD double squares_of_share(const T* g, int count, bool aligned, int thread, ArithmeticOf<T> inv_grad_scale,
                                    ArithmeticOf<T> clip_value) {
  using A = ArithmeticOf<T>;
  constexpr int kPack = Pack<T>::kSize, kUnroll = 4;  // loads on their way: one does not keep the memory busy
  const auto value_of = [&](const T& gradient) {
    return clip_gradient_value(static_cast<A>(load(gradient)), inv_grad_scale, clip_value);
  };
  const auto pack_at = [&](int first) { return aligned ? Pack<T>::load(g + first) : Pack<T>::gather(g + first); };
  if constexpr (sizeof(A) == sizeof(float)) {
    CompensatedSum sum;
    std::uint32_t bits = 0;
    const auto add_pack = [&](int first) {
      const Pack<T> pack = pack_at(first);
      bits |= pack.magnitude_bits();
      float squares[kPack / 2];
#pragma unroll
      for (int k = 0; k < kPack / 2; ++k) {
        const float one = value_of(pack.element[2 * k]), other = value_of(pack.element[2 * k + 1]);
        squares[k] = one * one + other * other;
      }
#pragma unroll
      for (int half = kPack / 4; half > 0; half /= 2) {
#pragma unroll
        for (int k = 0; k < half; ++k) squares[k] += squares[k + half];
      }
      sum.add(squares[0]);
    };
    share_out<kPack, kUnroll>(count, aligned, thread, add_pack, [&](int k) {
      const float value = value_of(g[k]);
      bits |= bit_cast<std::uint32_t>(absolute(load(g[k])));
      sum.add(value * value);
    });
    if (sum.has_squares() || bits == 0) return sum.total();
  }
  double sum = 0;
  const auto add = [&](const T& gradient) {
    const double value = value_of(gradient);
    sum += value * value;
  };
  const auto add_pack = [&](int first) {
    const Pack<T> pack = pack_at(first);
#pragma unroll
    for (int k = 0; k < kPack; ++k) add(pack.element[k]);
  };
  share_out<kPack, kUnroll>(count, aligned, thread, add_pack, [&](int k) { add(g[k]); });
  return sum;
}

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
      sum += squares_of_share(g, share.count, args.chunks.aligned, thread, inv_grad_scale, clip_value);
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
  UpdateChoice choice;
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
  static_assert(sizeof(shared.fields) / sizeof(double) + kStepScalars + kMaxScalarStates <= kThreads);
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
  constexpr int kApart = kThreads / 4;
  block.each_thread([&](int thread) {
    if (thread % kApart != 0 || thread > 2 * kApart) return;
    const Group<Rule> group = make_group<Rule>(shared.fields);
    const double norm = args.squares != nullptr ? sqrt(shared.sums[0]) : 0;
    const double clip_coef = args.squares != nullptr ? clip_coefficient(shared.step[kMaxGradNorm], norm) : 1;
    if (thread == 0) {
      fill_constants(prepared.in_float, group, shared.before, shared.after, inv_grad_scale, clip_coef);
    } else if (thread == kApart) {
      const double tau =
          fill_constants(prepared.in_double, group, shared.before, shared.after, inv_grad_scale, clip_coef);
      prepared.units = make_unit_constants(group.common, group.penalties, Rule::kHasMetric, tau);
      prepared.has_units = has_units(group.common, group.penalties);
    } else {
      prepared.choice = choose_update(group);
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
  U::apply(weight, clip_gradient(static_cast<A>(load(g)), c.gradient), values, c);
  store(w, weight);
  (store(state, values[kI]), ...);
}

// What a block's threads read where they need it, rather than keep it in registers.
template <class Rule, class A>
struct UpdateShared {
  StepConstants<Rule, A> constants;
  std::int64_t streams[kState + kMaxStates];  // where the chunk begins in each
};

// Ends a basic block, as `count` is not negative, but the compiler does not know. It would mix the steps of all
// elements of a pack, and run out of registers.
FUSEDREG_HD void half_way(int count) {
#if defined(__CUDA_ARCH__)
  if (opaque(count < 0)) asm volatile("trap;");
#endif
}

// Stages 1 to 6 for a thread's share of a chunk.
template <class U, class T, std::size_t... kI>
FUSEDREG_HD void update_share(int count, bool aligned, const UpdateShared<typename U::Rule, ArithmeticOf<T>>& shared,
                              int thread, std::index_sequence<kI...> states) {
  const auto stream = [&](int i) { return address<T>(fetch(shared.streams[i])); };
  const auto update_pack = [&](int first) {
    Pack<T> w, g;
    [[maybe_unused]] Pack<T> state[kMaxStates];
    if (opaque(aligned)) {
      w = Pack<T>::load(stream(kW) + first);
      g = Pack<T>::load(stream(kG) + first);
      ((state[kI] = Pack<T>::load(stream(kState + kI) + first)), ...);
    } else {
      w = Pack<T>::gather(stream(kW) + first);
      g = Pack<T>::gather(stream(kG) + first);
      ((state[kI] = Pack<T>::gather(stream(kState + kI) + first)), ...);
    }
    w.join();
    g.join();
    (state[kI].join(), ...);
#pragma unroll
    for (int i = 0; i < Pack<T>::kSize; ++i) {
      if (i == 4) half_way(count);
      update_element<U>(w.element[i], g.element[i], shared.constants, states, state[kI].element[i]...);
    }
    w.join();
    (state[kI].join(), ...);
    if (opaque(aligned)) {
      w.store(stream(kW) + first);
      (state[kI].store(stream(kState + kI) + first), ...);
    } else {
      w.scatter(stream(kW) + first);
      (state[kI].scatter(stream(kState + kI) + first), ...);
    }
  };
  share_out<Pack<T>::kSize, 1>(count, aligned, thread, update_pack, [&](int i) {
    update_element<U>(stream(kW)[i], stream(kG)[i], shared.constants, states, stream(kState + kI)[i]...);
  });
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

// Asks for what a thread reads first, before the block has what it needs to read it.
template <class T, std::size_t... kI>
FUSEDREG_HD void prefetch(const Share& share, bool aligned, int thread, std::index_sequence<kI...>) {
#if defined(__CUDA_ARCH__)
  const int first = aligned ? thread * Pack<T>::kSize : thread;
  if (first >= share.count) return;
  const auto prefetch_stream = [&](int i) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(share.stream<const T>(i) + first)));
  };
  prefetch_stream(kW);
  prefetch_stream(kG);
  (prefetch_stream(kState + kI), ...);
#endif
}

// Copies what is made of numbers, each 4 bytes by a thread.
template <class T>
FUSEDREG_HD void copy_by_threads(T& to, const T& from, int thread) {
  static_assert(sizeof(T) % 4 == 0);
  for (int i = 4 * thread; i < static_cast<int>(sizeof(T)); i += 4 * kThreads) {
    std::memcpy(reinterpret_cast<char*>(&to) + i, reinterpret_cast<const char*>(&from) + i, 4);
  }
}

// Updates one chunk, a block for each. Backwards: the norm's pass has read the last chunks' gradients last, and they
// are still in the cache.
template <class Rule, StateMask kMask, class T, class Block>
FUSEDREG_HD void update_block(const Block& block, const UpdateArgs& args, UpdateShared<Rule, ArithmeticOf<T>>& shared) {
  const Share share(args.rows, args.chunks, block.count - 1 - block.index);
  const auto& prepared = static_cast<const Prepared<Rule>*>(args.prepared)[share.set()];
  block.each_thread([&](int thread) {
    prefetch<T>(share, args.chunks.aligned, thread, states_in<kMask>());
    copy_by_threads(shared.constants, constants_for<T>(prepared), thread);
    if (thread < kState + kMaxStates) {
      shared.streams[thread] = share.column(thread) + share.begin * static_cast<std::int64_t>(sizeof(T));
    }
  });
  if (prepared.skips != 0) return;
  block.each_thread([&](int thread) {
    visit_update<Rule>(prepared.choice, kMask, [&](auto update) {
      using U = decltype(update);
      if constexpr (U::kStates == kMask) {
        update_share<U, T>(share.count, args.chunks.aligned, shared, thread, states_in<kMask>());
      }
    });
  });
}

}  // namespace fusedreg::cuda
