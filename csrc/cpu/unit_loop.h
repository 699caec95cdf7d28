// Loops over the weights of one unit. Included once per instruction set, by each_isa.h, behind update_loop.h.
namespace fusedreg::cpu::FUSEDREG_ISA {

// A vector that the instruction set has registers for: wider ones, and arrays of lanes, gcc keeps in memory.
template <class A>
struct VectorOf {
  typedef A Type __attribute__((vector_size(FUSEDREG_VECTOR_BYTES)));
};
template <class A>
using Vector = typename VectorOf<A>::Type;

template <class V, class A>
FUSEDREG_HD V load_vector(const A* from) {
  V to;
  std::memcpy(&to, from, sizeof(V));
  return to;
}

template <class A>
FUSEDREG_HD A larger(A a, A b) {
  return a > b ? a : b;
}

// |x|, of vectors too.
template <class A>
FUSEDREG_HD A size_of(A x) {
  return x < 0 ? -x : x;
}

// Sums in a fixed number of lanes, each in double over blocks: the same to the bit for any number of threads, and as
// right as sums in double. And, of values >= 0, the largest.
constexpr int kUnitLanes = 16, kUnitBlock = 8 * kUnitLanes;

template <class A, int kSums, int kLargest = 0>
struct LaneSums {
  static constexpr int kWidth = sizeof(Vector<A>) / sizeof(A), kVectors = kUnitLanes / kWidth;

  double sums[kSums][kUnitLanes] = {};
  A largest[kLargest + 1] = {};

  // Calls body(i, A or a vector of A, sums, largest) for each element or vector of elements, which adds to sums[0] to
  // sums[kSums - 1]. The type is told by a value of it.
  template <class Body>
  FUSEDREG_HD void add(std::int64_t count, const Body& body) {
    std::int64_t i = 0;
    Vector<A> largest_of_lanes[kVectors][kLargest + 1] = {};
    while (i + kUnitLanes <= count) {
      Vector<A> block[kVectors][kSums] = {};
      for (const std::int64_t end = i + kUnitBlock; i < end && i + kUnitLanes <= count; i += kUnitLanes) {
        for (int v = 0; v < kVectors; ++v) body(i + v * kWidth, Vector<A>{}, block[v], largest_of_lanes[v]);
      }
      for (int sum = 0; sum < kSums; ++sum) {
        for (int lane = 0; lane < kUnitLanes; ++lane) sums[sum][lane] += block[lane / kWidth][sum][lane % kWidth];
      }
    }
    for (int lane = 0; i < count; ++lane, ++i) {
      A terms[kSums] = {};
      body(i, A(), terms, largest);
      for (int sum = 0; sum < kSums; ++sum) sums[sum][lane] += terms[sum];
    }
    for (int which = 0; which < kLargest; ++which) {
      for (int lane = 0; lane < kUnitLanes; ++lane) {
        largest[which] = larger(largest[which], largest_of_lanes[lane / kWidth][which][lane % kWidth]);
      }
    }
  }

  FUSEDREG_HD double total(int sum) {
    double* const lanes = sums[sum];
    for (int width = kUnitLanes / 2; width > 0; width /= 2) {
      for (int lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
    }
    return lanes[0];
  }
};

// Of squares of A that were added up in A: whether none that counts left the range.
template <class A>
inline bool is_in_range(double sum_of_squares) {
  return sum_of_squares > static_cast<double>(std::numeric_limits<A>::min()) * 0x1p64 && sum_of_squares < INFINITY;
}

// Where they did: one after the other, in double.
template <class A>
inline void first_sums_in_double(const A* y, const A* e, std::int64_t count, double* sums) {
  sums[0] = sums[1] = 0;
  for (std::int64_t i = 0; i < count; ++i) add_first_sums<double, double>(y[i], e[i], sums[0], sums[1]);
}

template <class A>
FUSEDREG_TARGET void first_sums(const void* weights, const void* ridges, std::int64_t count, double* sums) {
  const A *y = static_cast<const A*>(weights), *e = static_cast<const A*>(ridges);
  LaneSums<A, 2> lanes;
  lanes.add(count, [&](std::int64_t i, auto kind, auto* sum, auto*) __attribute__((always_inline)) {
    using V = decltype(kind);
    add_first_sums(load_vector<V>(y + i), load_vector<V>(e + i), sum[0], sum[1]);
  });
  for (int sum = 0; sum < 2; ++sum) sums[sum] = lanes.total(sum);
  if (sizeof(A) < sizeof(double) && !(is_in_range<A>(sums[0]) && is_in_range<A>(sums[1]))) {
    first_sums_in_double(y, e, count, sums);
  }
}

template <class A, bool kFloors>
FUSEDREG_HD void first_sums_and_inverse(const A* y, const A* e, const A* f, A* inverse, std::int64_t count,
                                        double* sums) {
  LaneSums<A, 4, 2> lanes;
  lanes.add(count, [&](std::int64_t i, auto kind, auto* sum, auto* largest) __attribute__((always_inline)) {
    using V = decltype(kind);
    const V y_i = load_vector<V>(y + i), e_i = load_vector<V>(e + i);
    add_first_sums(y_i, e_i, sum[0], sum[1]);
    const V inverse_i = add_series_sums(y_i, e_i, sum[2], sum[3]);
    std::memcpy(inverse + i, &inverse_i, sizeof(V));
    V moved = size_of(y_i) * inverse_i;
    if constexpr (kFloors) moved = moved * load_vector<V>(f + i);
    largest[0] = larger(largest[0], inverse_i);
    largest[1] = larger(largest[1], moved);
  });
  for (int sum = 0; sum < 4; ++sum) sums[sum] = lanes.total(sum);
  for (int which = 0; which < 2; ++which) sums[4 + which] = lanes.largest[which];
}

template <class A>
FUSEDREG_TARGET void first_and_inverse(const void* weights, const void* ridges, const void* floor_ratios,
                                       void* inverses, std::int64_t count, double* sums) {
  const A *y = static_cast<const A*>(weights), *e = static_cast<const A*>(ridges);
  const A* f = static_cast<const A*>(floor_ratios);
  A* inverse = static_cast<A*>(inverses);
  f == nullptr ? first_sums_and_inverse<A, false>(y, e, f, inverse, count, sums)
               : first_sums_and_inverse<A, true>(y, e, f, inverse, count, sums);
  if (sizeof(A) < sizeof(double) && !(is_in_range<A>(sums[0]) && is_in_range<A>(sums[1]))) {
    first_sums_in_double(y, e, count, sums);
  }
}

template <class A, bool kFloors>
FUSEDREG_HD void newton_sums(const A* y, const A* e, const A* f, std::int64_t count, A r, A m, double* sums) {
  LaneSums<A, kUnitSums, 1> lanes;
  lanes.add(count, [&](std::int64_t i, auto kind, auto* sum, auto* largest) __attribute__((always_inline)) {
    using V = decltype(kind);
    const V y_i = load_vector<V>(y + i), e_i = load_vector<V>(e + i);
    V moved = size_of(y_i) * (m * add_newton_sums(y_i, e_i, r, m, sum[0], sum[1], sum[2]));
    if constexpr (kFloors) moved = moved * load_vector<V>(f + i);
    largest[0] = larger(largest[0], moved);
  });
  for (int sum = 0; sum < kUnitSums; ++sum) sums[sum] = lanes.total(sum);
  sums[kUnitSums] = lanes.largest[0];
}

template <class A>
FUSEDREG_TARGET void newton(const void* weights, const void* ridges, const void* floor_ratios, std::int64_t count,
                            const UnitRoot& root, double* sums) {
  const A *y = static_cast<const A*>(weights), *e = static_cast<const A*>(ridges);
  const A* f = static_cast<const A*>(floor_ratios);
  const A r = static_cast<A>(root.r), m = static_cast<A>(root.m);
  f == nullptr ? newton_sums<A, false>(y, e, f, count, r, m, sums) : newton_sums<A, true>(y, e, f, count, r, m, sums);
  if (sizeof(A) == sizeof(double) || std::all_of(sums, sums + kUnitSums, is_in_range<A>)) return;
  std::fill_n(sums, kUnitSums, 0.0);
  for (std::int64_t i = 0; i < count; ++i) add_newton_sums(y[i], e[i], r, m, sums[0], sums[1], sums[2]);
}

template <class A>
FUSEDREG_HD A furthest_at(const A* f, std::int64_t i, A furthest) {
  return f == nullptr ? furthest : unit_furthest(furthest, f[i]);
}

template <class A>
FUSEDREG_TARGET void norm_of_result(const void* weights, const void* ridges, const void* floor_ratios,
                                    std::int64_t count, const UnitRoot& root, double most, double* sums) {
  const A *y = static_cast<const A*>(weights), *e = static_cast<const A*>(ridges);
  const A* f = static_cast<const A*>(floor_ratios);
  const A r = static_cast<A>(root.r), m = static_cast<A>(root.m), furthest = static_cast<A>(most);
  double lanes[kUnitLanes] = {};
  for (std::int64_t i = 0; i < count; ++i) {
    add_norm_sums(y[i], e[i], furthest_at(f, i, furthest), r, m, lanes[i % kUnitLanes]);
  }
  sums[0] = std::accumulate(std::begin(lanes), std::end(lanes), 0.0);
}

template <class A>
FUSEDREG_TARGET void apply_root(void* weights, const void* ridges, const void* floor_ratios, std::int64_t count,
                                const UnitRoot& root, double most) {
  A* y = static_cast<A*>(weights);
  const A *e = static_cast<const A*>(ridges), *f = static_cast<const A*>(floor_ratios);
  const A r = static_cast<A>(root.r), m = static_cast<A>(root.m);
  const A furthest = root.is_guarded ? static_cast<A>(most) : A(INFINITY);
  if (root.is_guarded && f != nullptr) {
#pragma GCC ivdep
    for (std::int64_t i = 0; i < count; ++i) y[i] = unit_prox(y[i], e[i], unit_furthest(furthest, f[i]), r, m);
  } else {
#pragma GCC ivdep
    for (std::int64_t i = 0; i < count; ++i) y[i] = unit_prox(y[i], e[i], furthest, r, m);
  }
}

template <class A>
FUSEDREG_TARGET void apply_series(void* weights, const void* inverses, std::int64_t count, const UnitRoot& root) {
  A* y = static_cast<A*>(weights);
  const A* inverse = static_cast<const A*>(inverses);
  const A strength = static_cast<A>(root.m / root.r);
#pragma GCC ivdep
  for (std::int64_t i = 0; i < count; ++i) y[i] = unit_series(y[i], inverse[i], strength);
}

template <class A>
FUSEDREG_TARGET void add_ridge(void* d, std::int64_t count, double ridge) {
  A* e = static_cast<A*>(d);
  const A added = static_cast<A>(ridge);
  for (std::int64_t i = 0; i < count; ++i) e[i] = e[i] + added;
}

template <class A>
FUSEDREG_TARGET void load_weights(void* to, const void* from, DType dtype, std::int64_t begin, std::int64_t count) {
  load_tile(static_cast<A*>(to), from, dtype, begin, count);
}

template <class A>
FUSEDREG_TARGET void store_weights(void* to, DType dtype, const void* from, std::int64_t begin, std::int64_t count) {
  store_tile(to, dtype, static_cast<const A*>(from), begin, count);
}

template <class A>
UnitLoops unit_loops_in() {
  return {first_sums<A>,   first_and_inverse<A>, newton<A>,       norm_of_result<A>, apply_root<A>,
          apply_series<A>, add_ridge<A>,         load_weights<A>, store_weights<A>};
}

inline UnitLoops unit_loops(DType arithmetic) {
  return arithmetic == DType::kFloat64 ? unit_loops_in<double>() : unit_loops_in<float>();
}

}  // namespace fusedreg::cpu::FUSEDREG_ISA
