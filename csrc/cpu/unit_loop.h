// Loops over the weights of one unit. Included once per instruction set, by each_isa.h, behind update_loop.h.
namespace fusedreg::cpu::FUSEDREG_ISA {

// Sums in a fixed number of lanes, each in double over blocks: the same to the bit for any number of threads, and as
// right as sums in double.
constexpr int kUnitLanes = 16, kUnitBlock = 8 * kUnitLanes;

template <class Sum, int kSums>
struct LaneSums {
  double sums[kSums][kUnitLanes] = {};

  // Calls body(i, its lane, block) for each element, which adds it to block[0][lane] to block[kSums - 1][lane].
  template <class Body>
  FUSEDREG_HD void add(std::int64_t count, const Body& body) {
    for (std::int64_t i = 0; i < count;) {
      Sum block[kSums][kUnitLanes] = {};
      for (const std::int64_t end = i + kUnitBlock; i < end && i + kUnitLanes <= count; i += kUnitLanes) {
        for (int lane = 0; lane < kUnitLanes; ++lane) body(i + lane, lane, block);
      }
      if (count - i < kUnitLanes) {
        for (int lane = 0; i < count; ++lane, ++i) body(i, lane, block);
      }
      for (int sum = 0; sum < kSums; ++sum) {
        for (int lane = 0; lane < kUnitLanes; ++lane) sums[sum][lane] += block[sum][lane];
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

template <class A, class Sum>
FUSEDREG_HD void first_sums_in(const A* y, const A* e, std::int64_t count, double* sums) {
  LaneSums<Sum, 2> lanes;
  lanes.add(count, [&](std::int64_t i, int lane, auto& block)
                       __attribute__((always_inline)) { add_first_sums(y[i], e[i], block[0][lane], block[1][lane]); });
  for (int sum = 0; sum < 2; ++sum) sums[sum] = lanes.total(sum);
}

template <class A>
FUSEDREG_TARGET void first_sums(const void* weights, const void* ridges, std::int64_t count, double* sums) {
  const A *y = static_cast<const A*>(weights), *e = static_cast<const A*>(ridges);
  first_sums_in<A, A>(y, e, count, sums);
  if (sizeof(A) < sizeof(double) && !(is_in_range<A>(sums[0]) && is_in_range<A>(sums[1]))) {
    first_sums_in<A, double>(y, e, count, sums);
  }
}

template <class A, class Sum>
FUSEDREG_HD void newton_sums_in(const A* y, const A* e, const A* f, std::int64_t count, A r, A m, double* sums) {
  LaneSums<Sum, kUnitSums> lanes;
  A furthest[kUnitLanes] = {};
  lanes.add(count, [&](std::int64_t i, int lane, auto& block) __attribute__((always_inline)) {
    const A t = add_newton_sums(y[i], e[i], r, m, block[0][lane], block[1][lane], block[2][lane]);
    const A moved = absolute(y[i]) * (m * t) * f[i];
    furthest[lane] = moved > furthest[lane] ? moved : furthest[lane];
  });
  for (int sum = 0; sum < kUnitSums; ++sum) sums[sum] = lanes.total(sum);
  sums[kUnitSums] = *std::max_element(std::begin(furthest), std::end(furthest));
}

template <class A>
FUSEDREG_TARGET void newton_sums(const void* weights, const void* ridges, const void* floor_ratios, std::int64_t count,
                                 const UnitRoot& root, double* sums) {
  const A *y = static_cast<const A*>(weights), *e = static_cast<const A*>(ridges);
  const A* f = static_cast<const A*>(floor_ratios);
  const A r = static_cast<A>(root.r), m = static_cast<A>(root.m);
  newton_sums_in<A, A>(y, e, f, count, r, m, sums);
  if (sizeof(A) < sizeof(double) && !std::all_of(sums, sums + kUnitSums, is_in_range<A>)) {
    newton_sums_in<A, double>(y, e, f, count, r, m, sums);
  }
}

template <class A>
FUSEDREG_TARGET void norm_of_result(const void* weights, const void* ridges, const void* floor_ratios,
                                    std::int64_t count, const UnitRoot& root, double most, double* sums) {
  const A *y = static_cast<const A*>(weights), *e = static_cast<const A*>(ridges);
  const A* f = static_cast<const A*>(floor_ratios);
  const A r = static_cast<A>(root.r), m = static_cast<A>(root.m), furthest = static_cast<A>(most);
  LaneSums<double, 1> lanes;
  lanes.add(count, [&](std::int64_t i, int lane, auto& block) __attribute__((always_inline)) {
    add_norm_sums(y[i], e[i], unit_furthest(furthest, f[i]), r, m, block[0][lane]);
  });
  sums[0] = lanes.total(0);
}

template <class A>
FUSEDREG_TARGET void apply_root(void* weights, const void* ridges, const void* floor_ratios, std::int64_t count,
                                const UnitRoot& root, double most) {
  A* y = static_cast<A*>(weights);
  const A *e = static_cast<const A*>(ridges), *f = static_cast<const A*>(floor_ratios);
  const A r = static_cast<A>(root.r), m = static_cast<A>(root.m), furthest = static_cast<A>(most);
  if (root.is_guarded) {
#pragma GCC ivdep
    for (std::int64_t i = 0; i < count; ++i) y[i] = unit_prox(y[i], e[i], unit_furthest(furthest, f[i]), r, m);
  } else {
#pragma GCC ivdep
    for (std::int64_t i = 0; i < count; ++i) y[i] = unit_prox(y[i], e[i], A(INFINITY), r, m);
  }
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

inline UnitLoops unit_loops(DType arithmetic) {
  if (arithmetic == DType::kFloat64) {
    return {first_sums<double>, newton_sums<double>,  norm_of_result<double>, apply_root<double>,
            add_ridge<double>,  load_weights<double>, store_weights<double>};
  }
  return {first_sums<float>, newton_sums<float>,  norm_of_result<float>, apply_root<float>,
          add_ridge<float>,  load_weights<float>, store_weights<float>};
}

}  // namespace fusedreg::cpu::FUSEDREG_ISA
