// Loops over the weights of one unit. Included once per instruction set, by each_isa.h, behind update_loop.h.
namespace fusedreg::cpu::FUSEDREG_ISA {

// Sums in a fixed number of lanes, each in double over blocks: the same to the bit for any number of threads, and as
// right as sums in double.
constexpr int kUnitLanes = 16, kUnitBlock = 8 * kUnitLanes;

template <class A, int kSums>
struct LaneSums {
  double sums[kSums][kUnitLanes] = {};

  // Calls body(i, its lane, terms) for each element, which fills the terms that are added up.
  template <class Body>
  FUSEDREG_HD void add(std::int64_t count, const Body& body) {
    std::int64_t i = 0;
    while (i < count) {
      A block[kSums][kUnitLanes] = {};
      for (const std::int64_t end = i + kUnitBlock; i < end && i + kUnitLanes <= count; i += kUnitLanes) {
        for (int lane = 0; lane < kUnitLanes; ++lane) {
          A terms[kSums];
          body(i + lane, lane, terms);
          for (int sum = 0; sum < kSums; ++sum) block[sum][lane] += terms[sum];
        }
      }
      if (count - i < kUnitLanes) {
        for (int lane = 0; i < count; ++lane, ++i) {
          A terms[kSums];
          body(i, lane, terms);
          for (int sum = 0; sum < kSums; ++sum) block[sum][lane] += terms[sum];
        }
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

// Squares of A that are added up in A: whether none of them that counts left the range.
template <class A>
FUSEDREG_HD bool is_in_range(double sum_of_squares) {
  return sum_of_squares > double(std::numeric_limits<A>::min()) * 0x1p64 && sum_of_squares < INFINITY;
}

template <class A, class Sum>
FUSEDREG_HD void add_up_first(const A* y, const A* e, std::int64_t count, double* sums) {
  LaneSums<Sum, 2> lanes;
  lanes.add(count, [&](std::int64_t i, int, Sum* terms) __attribute__((always_inline)) {
    const Sum weight = y[i], scaled = weight * static_cast<Sum>(e[i]);
    terms[0] = weight * weight;
    terms[1] = scaled * scaled;
  });
  sums[0] = lanes.total(0);
  sums[1] = lanes.total(1);
}

template <class A>
FUSEDREG_TARGET void first_sums(const void* weights, const void* ridges, std::int64_t count, double* sums) {
  const A *y = static_cast<const A*>(weights), *e = static_cast<const A*>(ridges);
  add_up_first<A, A>(y, e, count, sums);
  if (sizeof(A) < sizeof(double) && !(is_in_range<A>(sums[0]) && is_in_range<A>(sums[1]))) {
    add_up_first<A, double>(y, e, count, sums);
  }
}

template <class A>
FUSEDREG_TARGET void newton_sums(const void* weights, const void* ridges, const void* floor_ratios, std::int64_t count,
                                 const UnitRoot& root, double* sums) {
  const A *y = static_cast<const A*>(weights), *e = static_cast<const A*>(ridges);
  const A* f = static_cast<const A*>(floor_ratios);
  const A r = static_cast<A>(root.r), m = static_cast<A>(root.m);
  LaneSums<A, 3> lanes;
  A furthest[kUnitLanes] = {};
  lanes.add(count, [&](std::int64_t i, int lane, A* terms) __attribute__((always_inline)) {
    const A t = A(1) / (e[i] * r + m), share = e[i] * t, q = y[i] * share;
    terms[0] = q * q;
    terms[1] = terms[0] * share;
    terms[2] = terms[0] * t;
    const A moved = absolute(y[i]) * (m * t) * f[i];
    furthest[lane] = moved > furthest[lane] ? moved : furthest[lane];
  });
  for (int sum = 0; sum < 3; ++sum) sums[sum] = lanes.total(sum);
  sums[3] = *std::max_element(std::begin(furthest), std::end(furthest));
}

template <class A>
FUSEDREG_TARGET void norm_of_result(const void* weights, const void* ridges, const void* floor_ratios,
                                    std::int64_t count, const UnitRoot& root, double most, double* sums) {
  const A *y = static_cast<const A*>(weights), *e = static_cast<const A*>(ridges);
  const A* f = static_cast<const A*>(floor_ratios);
  const A r = static_cast<A>(root.r), m = static_cast<A>(root.m), furthest = static_cast<A>(most);
  LaneSums<double, 1> lanes;
  lanes.add(count, [&](std::int64_t i, int, double* terms) __attribute__((always_inline)) {
    const double x = guarded_unit_prox(y[i], e[i], furthest, f[i], r, m);
    terms[0] = x * x;
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
    for (std::int64_t i = 0; i < count; ++i) y[i] = guarded_unit_prox(y[i], e[i], furthest, f[i], r, m);
  } else {
#pragma GCC ivdep
    for (std::int64_t i = 0; i < count; ++i) y[i] = unit_prox(y[i], e[i], r, m);
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
