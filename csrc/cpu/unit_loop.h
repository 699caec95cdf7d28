// Loops over the weights of one unit. Included once per instruction set, by each_isa.h, behind update_loop.h.
namespace fusedreg::cpu::FUSEDREG_ISA {

// Sums in double, in a fixed number of lanes: the same to the bit for any number of threads.
constexpr int kUnitLanes = 16;

FUSEDREG_HD double sum_of_lanes(double* lanes) {
  for (int width = kUnitLanes / 2; width > 0; width /= 2) {
    for (int lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
  }
  return lanes[0];
}

template <class Body>
FUSEDREG_HD void for_each_lane(std::int64_t count, const Body& body) {
  std::int64_t i = 0;
  for (; i + kUnitLanes <= count; i += kUnitLanes) {
    for (int lane = 0; lane < kUnitLanes; ++lane) body(i + lane, lane);
  }
  for (int lane = 0; i + lane < count; ++lane) body(i + lane, lane);
}

template <class A>
FUSEDREG_TARGET void first_sums(const void* weights, const void* ridges, std::int64_t count, double* sums) {
  const A *y = static_cast<const A*>(weights), *e = static_cast<const A*>(ridges);
  double squares[kUnitLanes] = {}, scaled_squares[kUnitLanes] = {};
  for_each_lane(count, [&](std::int64_t i, int lane) __attribute__((always_inline)) {
    add_first_sums(y[i], e[i], squares[lane], scaled_squares[lane]);
  });
  sums[0] = sum_of_lanes(squares);
  sums[1] = sum_of_lanes(scaled_squares);
}

template <class A>
FUSEDREG_TARGET void newton_sums(const void* weights, const void* ridges, std::int64_t count, const UnitRoot& root,
                                 double* sums) {
  const A *y = static_cast<const A*>(weights), *e = static_cast<const A*>(ridges);
  const A r = static_cast<A>(root.r), m = static_cast<A>(root.m);
  double squares[kUnitLanes] = {}, by_r[kUnitLanes] = {}, by_m[kUnitLanes] = {};
  for_each_lane(count, [&](std::int64_t i, int lane) __attribute__((always_inline)) {
    add_newton_sums(y[i], e[i], r, m, squares[lane], by_r[lane], by_m[lane]);
  });
  sums[0] = sum_of_lanes(squares);
  sums[1] = sum_of_lanes(by_r);
  sums[2] = sum_of_lanes(by_m);
}

template <class A>
FUSEDREG_TARGET void norm_of_result(const void* weights, const void* ridges, const void* furthest, std::int64_t count,
                                    const UnitRoot& root, double* sums) {
  const A *y = static_cast<const A*>(weights), *e = static_cast<const A*>(ridges);
  const A* f = static_cast<const A*>(furthest);
  const A r = static_cast<A>(root.r), m = static_cast<A>(root.m);
  double squares[kUnitLanes] = {};
  for_each_lane(count, [&](std::int64_t i, int lane)
                           __attribute__((always_inline)) { add_norm_sums(y[i], e[i], f[i], r, m, squares[lane]); });
  sums[0] = sum_of_lanes(squares);
}

template <class A>
FUSEDREG_TARGET void apply_root(void* weights, const void* ridges, const void* furthest, std::int64_t count,
                                const UnitRoot& root) {
  A* y = static_cast<A*>(weights);
  const A *e = static_cast<const A*>(ridges), *f = static_cast<const A*>(furthest);
  const A r = static_cast<A>(root.r), m = static_cast<A>(root.m);
  if (root.is_guarded) {
#pragma GCC ivdep
    for (std::int64_t i = 0; i < count; ++i) y[i] = unit_prox(y[i], e[i], f[i], r, m);
  } else {
#pragma GCC ivdep
    for (std::int64_t i = 0; i < count; ++i) y[i] = unit_prox(y[i], e[i], A(INFINITY), r, m);
  }
}

// What the solver works on: the ridge and the safeguard of a tile, from its metric, in place.
template <class A>
FUSEDREG_TARGET void ridge_of_tile(void* d, void* floor_ratio, std::int64_t count, const UnitConstants& c) {
  A *e = static_cast<A*>(d), *f = static_cast<A*>(floor_ratio);
  const A ridge = static_cast<A>(c.ridge), furthest = static_cast<A>(c.furthest);
  for (std::int64_t i = 0; i < count; ++i) {
    e[i] = e[i] + ridge;
    f[i] = unit_furthest(furthest, f[i]);
  }
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
    return {first_sums<double>,    newton_sums<double>,  norm_of_result<double>, apply_root<double>,
            ridge_of_tile<double>, load_weights<double>, store_weights<double>};
  }
  return {first_sums<float>,    newton_sums<float>,  norm_of_result<float>, apply_root<float>,
          ridge_of_tile<float>, load_weights<float>, store_weights<float>};
}

}  // namespace fusedreg::cpu::FUSEDREG_ISA
