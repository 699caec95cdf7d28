// What a block does, thread by thread: everything of a kernel but its barriers and its reductions. Plain functions, so
// that a test can run them on the host for every thread of every block.
#pragma once

#include "args.h"

namespace fusedreg::cuda {

// 16 bytes of elements: one load or store instruction.
template <class T>
struct alignas(16) Pack {
  static constexpr int kSize = 16 / sizeof(T);
  T element[kSize];
};

// Tells the compiler what it cannot know of a pointer out of a table: without it, loads and stores are generic ones.
template <class T>
FUSEDREG_HD T* global(T* pointer) {
#if defined(__CUDA_ARCH__)
  __builtin_assume(__isGlobal(pointer));
#endif
  return pointer;
}

// Calls pack(first element) and single(element) for this thread's share of `count` elements: neighbouring threads take
// neighbouring packs. Where the memory is not aligned, and for the tail, element by element.
template <int kPack, class PackVisitor, class SingleVisitor>
FUSEDREG_HD void share_out(int count, bool aligned, int thread, int threads, PackVisitor&& pack,
                           SingleVisitor&& single) {
  const int packed = aligned ? count / kPack * kPack : 0;
  for (int i = thread * kPack; i < packed; i += threads * kPack) pack(i);
  for (int i = packed + thread; i < count; i += threads) single(i);
}

// The scalars of a slot, with those that only the device knows. On the device, `group` is shared memory: a local one,
// indexed like this, would live on the stack.
FUSEDREG_HD void resolve_group(const StepArgs& step, int slot, Group& group) {
  group = step.slots[slot].group;
  for (int i = 0; i < step.override_count; ++i) {
    const GroupOverride& override = step.overrides[i];
    if (override.slot == slot) reinterpret_cast<double*>(&group)[override.field] = override.value.read();
  }
}

FUSEDREG_HD double inv_grad_scale(const StepArgs& step) {
  return step.grad_scale ? 1 / step.grad_scale.read() : step.inv_grad_scale;
}

// Any nonzero value skips, NaN included: it is a sum over devices.
FUSEDREG_HD bool skips(const StepArgs& step) { return step.found_inf && !(step.found_inf.read() == 0); }

FUSEDREG_HD double read_clock(const StepArgs& step, const Tensor& tensor) {
  if (tensor.clock == nullptr) return step.slots[tensor.slot].clock;
  return DeviceScalar{tensor.clock, tensor.clock_is_double}.read();
}

FUSEDREG_HD double clip_coefficient(const UpdateArgs& args, double norm) {
  const double limit = args.max_grad_norm_on_device ? args.max_grad_norm_on_device.read() : args.max_grad_norm;
  if (limit == INFINITY) return 1;  // measures, also what is not finite
  const double coefficient = limit / (norm + 1e-6);
  return coefficient > 1 ? 1 : coefficient;  // a NaN stays
}

template <class RuleHost>
FUSEDREG_HD void move_clock(const StepArgs& step, const Tensor& tensor) {
  if (tensor.clock == nullptr) return;
  const double next = RuleHost::next_clock(step.slots[tensor.slot].group, read_clock(step, tensor));
  if (tensor.clock_is_double) {
    *static_cast<double*>(tensor.clock) = next;
  } else {
    *static_cast<float*>(tensor.clock) = static_cast<float>(next);
  }
}

// Stages 1 to 6 for this thread's share of a chunk.
template <class U, class T>
FUSEDREG_HD void update_share(const Tensor& tensor, const Chunk& chunk, const Hyper<ArithmeticOf<T>>& h, int thread,
                              int threads) {
  using A = ArithmeticOf<T>;
  constexpr int kStates = U::Rule::kStates;
  T* const w = global(static_cast<T*>(tensor.pointers.w)) + chunk.begin;
  const T* const g = global(static_cast<const T*>(tensor.pointers.g)) + chunk.begin;
  T* state[kMaxStates];
#pragma unroll
  for (int s = 0; s < kStates; ++s) state[s] = global(static_cast<T*>(tensor.pointers.state[s])) + chunk.begin;

  const auto update_element = [&h](T& weight, const T& gradient, T* const(&its_state)[kMaxStates], int i) {
    A w_now = load(weight);
    A state_now[kMaxStates] = {};
#pragma unroll
    for (int s = 0; s < kStates; ++s) state_now[s] = load(its_state[s][i]);
    U::apply(w_now, static_cast<A>(load(gradient)), state_now, h);
    store(weight, w_now);
#pragma unroll
    for (int s = 0; s < kStates; ++s) store(its_state[s][i], state_now[s]);
  };

  const auto update_pack = [&](int first) {
    Pack<T> w_pack = *reinterpret_cast<const Pack<T>*>(w + first);
    const Pack<T> g_pack = *reinterpret_cast<const Pack<T>*>(g + first);
    Pack<T> packs[kMaxStates];
    T* in_packs[kMaxStates];
#pragma unroll
    for (int s = 0; s < kStates; ++s) {
      packs[s] = *reinterpret_cast<const Pack<T>*>(state[s] + first);
      in_packs[s] = packs[s].element;
    }
#pragma unroll
    for (int i = 0; i < Pack<T>::kSize; ++i) update_element(w_pack.element[i], g_pack.element[i], in_packs, i);
    *reinterpret_cast<Pack<T>*>(w + first) = w_pack;
#pragma unroll
    for (int s = 0; s < kStates; ++s) *reinterpret_cast<Pack<T>*>(state[s] + first) = packs[s];
  };

  share_out<Pack<T>::kSize>(static_cast<int>(chunk.count), tensor.aligned, thread, threads, update_pack,
                            [&](int i) { update_element(w[i], g[i], state, i); });
}

// The sum of squares of this thread's share of a chunk's gradient, after stages 1 and 2.
template <class T>
FUSEDREG_HD double squares_of_share(const Tensor& tensor, const Chunk& chunk, const Hyper<ArithmeticOf<T>>& h,
                                    int thread, int threads) {
  const T* const g = global(static_cast<const T*>(tensor.pointers.g)) + chunk.begin;
  double sum = 0;
  const auto add = [&](const T& gradient) {
    const double value = clip_gradient_value(static_cast<ArithmeticOf<T>>(load(gradient)), h);
    sum += value * value;
  };
  const auto add_pack = [&](int first) {
    const Pack<T> pack = *reinterpret_cast<const Pack<T>*>(g + first);
#pragma unroll
    for (int i = 0; i < Pack<T>::kSize; ++i) add(pack.element[i]);
  };
  share_out<Pack<T>::kSize>(static_cast<int>(chunk.count), tensor.aligned, thread, threads, add_pack,
                            [&](int i) { add(g[i]); });
  return sum;
}

}  // namespace fusedreg::cuda
