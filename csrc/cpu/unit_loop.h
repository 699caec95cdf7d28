// Loops over the weights of one unit. Included once per instruction set, by each_isa.h, behind update_loop.h.
namespace fusedreg::cpu::FUSEDREG_ISA {

// A vector that the instruction set has registers for: wider ones, and arrays of lanes, gcc keeps in memory.
template <class A, int kBytes = FUSEDREG_VECTOR_BYTES>
struct VectorOf {
  typedef A Type __attribute__((vector_size(kBytes)));
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
  return larger(x, -x);
}

// Sums in a fixed number of lanes, each in double over blocks: the same to the bit for any number of threads, and as
// right as sums in double. And, of values >= 0, the largest.
constexpr int kUnitLanes = 16, kUnitBlock = 8 * kUnitLanes;

template <class A, int kSums, int kLargest = 0>
struct LaneSums {
  using Doubles = Vector<double>;
  static constexpr int kWidth = sizeof(Vector<A>) / sizeof(A), kVectors = kUnitLanes / kWidth;
  static constexpr int kDoubles = kWidth * sizeof(double) / sizeof(Doubles);  // to a vector of A

  Doubles sums[kSums][kVectors][kDoubles] = {};
  A largest[kLargest + 1][kUnitLanes] = {};

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
        for (int v = 0; v < kVectors; ++v) add_in_double(sums[sum][v], block[v][sum]);
      }
    }
    for (int which = 0; which < kLargest; ++which) {
      for (int v = 0; v < kVectors; ++v) {
        std::memcpy(&largest[which][v * kWidth], &largest_of_lanes[v][which], sizeof(Vector<A>));
      }
    }
    for (int lane = 0; i < count; ++lane, ++i) {
      A terms[kSums] = {}, largest_of_lane[kLargest + 1] = {};
      body(i, A(), terms, largest_of_lane);
      for (int sum = 0; sum < kSums; ++sum) lanes(sum)[lane] += terms[sum];
      for (int which = 0; which < kLargest; ++which) {
        largest[which][lane] = larger(largest[which][lane], largest_of_lane[which]);
      }
    }
  }

  FUSEDREG_HD double total(int sum) {
    return down_to_one(lanes(sum), [](double a, double b) { return a + b; });
  }
  FUSEDREG_HD A largest_of(int which) {
    return down_to_one(largest[which], [](A a, A b) { return larger(a, b); });
  }

 private:
  FUSEDREG_HD double* lanes(int sum) { return reinterpret_cast<double*>(&sums[sum]); }

  FUSEDREG_HD static void add_in_double(Doubles (&to)[kDoubles], Vector<A> vector) {
    using Part = typename VectorOf<A, sizeof(Vector<A>) / kDoubles>::Type;
    Part parts[kDoubles];
    std::memcpy(parts, &vector, sizeof(vector));
    for (int i = 0; i < kDoubles; ++i) to[i] += __builtin_convertvector(parts[i], Doubles);
  }

  template <class T, class Join>
  FUSEDREG_HD static T down_to_one(T* of_lanes, const Join& join) {
    for (int width = kUnitLanes / 2; width > 0; width /= 2) {
      for (int lane = 0; lane < width; ++lane) of_lanes[lane] = join(of_lanes[lane], of_lanes[lane + width]);
    }
    return of_lanes[0];
  }
};

// Of squares of A that were added up in A: whether none that counts left the range.
template <class A>
inline bool is_in_range(double sum_of_squares) {
  return sum_of_squares > static_cast<double>(std::numeric_limits<A>::min()) * 0x1p64 && sum_of_squares < INFINITY;
}

template <class A>
FUSEDREG_TARGET void squares(const void* weights, std::int64_t count, double* sums) {
  const A* y = static_cast<const A*>(weights);
  LaneSums<A, 1> lanes;
  lanes.add(count, [&](std::int64_t i, auto kind, auto* sum, auto*) __attribute__((always_inline)) {
    const auto y_i = load_vector<decltype(kind)>(y + i);
    sum[0] += y_i * y_i;
  });
  sums[0] = lanes.total(0);
  if (sizeof(A) == sizeof(double) || is_in_range<A>(sums[0])) return;
  sums[0] = 0;
  for (std::int64_t i = 0; i < count; ++i) sums[0] += static_cast<double>(y[i]) * y[i];
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
  if (sizeof(A) == sizeof(double) || (is_in_range<A>(sums[0]) && is_in_range<A>(sums[1]))) return;
  sums[0] = sums[1] = 0;
  for (std::int64_t i = 0; i < count; ++i) add_first_sums<double, double>(y[i], e[i], sums[0], sums[1]);
}

template <class A, bool kFloors>
FUSEDREG_HD void series_sums(const A* y, const A* e, const A* f, A* inverse, std::int64_t count, double* sums) {
  LaneSums<A, kUnitSums, 2> lanes;
  lanes.add(count, [&](std::int64_t i, auto kind, auto* sum, auto* largest) __attribute__((always_inline)) {
    using V = decltype(kind);
    const V y_i = load_vector<V>(y + i), inverse_i = 1 / load_vector<V>(e + i), moved = y_i * inverse_i;
    std::memcpy(inverse + i, &inverse_i, sizeof(V));
    add_series_sums(y_i, moved, sum[0], sum[1], sum[2]);
    V size = size_of(moved);
    if constexpr (kFloors) size = size * load_vector<V>(f + i);
    largest[0] = larger(largest[0], inverse_i);
    largest[1] = larger(largest[1], size);
  });
  for (int sum = 0; sum < kUnitSums; ++sum) sums[sum] = lanes.total(sum);
  for (int which = 0; which < 2; ++which) sums[kUnitSums + which] = lanes.largest_of(which);
}

template <class A>
FUSEDREG_TARGET void series(const void* weights, const void* ridges, const void* floor_ratios, void* inverses,
                            std::int64_t count, double* sums) {
  const A *y = static_cast<const A*>(weights), *e = static_cast<const A*>(ridges);
  const A* f = static_cast<const A*>(floor_ratios);
  A* inverse = static_cast<A*>(inverses);
  f == nullptr ? series_sums<A, false>(y, e, f, inverse, count, sums)
               : series_sums<A, true>(y, e, f, inverse, count, sums);
  if (sizeof(A) < sizeof(double) && !std::all_of(sums, sums + kUnitSums, is_in_range<A>)) sums[0] = NAN;
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
  sums[kUnitSums] = lanes.largest_of(0);
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
FUSEDREG_TARGET void scale(void* weights, std::int64_t count, double lost) {
  A* y = static_cast<A*>(weights);
  // Of what loses little, the loss is rounded, not the share that is kept: it would be the same for all.
  const bool is_little = lost <= 0.5;
  const A kept = is_little ? A(1) : A(0), taken = static_cast<A>(is_little ? lost : lost - 1);
  for (std::int64_t i = 0; i < count; ++i) y[i] = (kept * y[i] - taken * y[i]) + A(0);  // zeros are +0.0
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
  return {squares<A>,      first_sums<A>, series<A>,    newton<A>,       norm_of_result<A>, apply_root<A>,
          apply_series<A>, scale<A>,      add_ridge<A>, load_weights<A>, store_weights<A>};
}

inline UnitLoops unit_loops(DType arithmetic) {
  return arithmetic == DType::kFloat64 ? unit_loops_in<double>() : unit_loops_in<float>();
}

}  // namespace fusedreg::cpu::FUSEDREG_ISA
