// Compiled, never run: every instance of the update, as the CUDA driver will use the maths headers.
#include "../../csrc/update.h"

using namespace fusedreg;

template <class U, class T>
__global__ void update_kernel(T* w, const T* g, T* s0, T* s1, T* s2, long long count, Hyper<double> hyper) {
  using A = ArithmeticOf<T>;
  const Hyper<A> h = hyper.as<A>();
  const long long i = blockIdx.x * static_cast<long long>(blockDim.x) + threadIdx.x;
  if (i >= count) return;
  T* const at[] = {s0, s1, s2};
  A weight = load(w[i]);
  A state[kMaxStates] = {};
#pragma unroll
  for (int s = 0; s < U::Rule::kStates; ++s) state[s] = load(at[s][i]);
  U::apply(weight, static_cast<A>(load(g[i])), state, h);
  store(w[i], weight);
#pragma unroll
  for (int s = 0; s < U::Rule::kStates; ++s) store(at[s][i], state[s]);
}

template <class T>
void instantiate(const Group& group) {
  for (int rule = 0; rule < Rules::kSize; ++rule) {
    Rules::visit(rule, [&](auto host) {
      visit_update<decltype(host)>(group, [&](auto update) {
        update_kernel<decltype(update), T><<<1, 1>>>(nullptr, nullptr, nullptr, nullptr, nullptr, 0, Hyper<double>{});
      });
    });
  }
}

void instantiate_all(const Group& group) {
  instantiate<float>(group);
  instantiate<double>(group);
  instantiate<BFloat16>(group);
  instantiate<Float16>(group);
}
