// Loops over a tile of keys. Included once per instruction set, by each_isa.h, behind unit_loop.h.
namespace fusedreg::cpu::FUSEDREG_ISA {

constexpr std::int64_t kKeysInBlock = 32;  // a bit for each fits either kind of key

// Which lanes are less than `end`: a bit for each.
#if FUSEDREG_VECTOR_BYTES == 64
FUSEDREG_TARGET FUSEDREG_HD std::uint32_t lanes_below(std::uint32_t end, Vector<std::uint32_t> lanes) {
  return _mm512_cmplt_epu32_mask((__m512i)lanes, _mm512_set1_epi32(static_cast<int>(end)));
}
FUSEDREG_TARGET FUSEDREG_HD std::uint32_t lanes_below(std::uint64_t end, Vector<std::uint64_t> lanes) {
  return _mm512_cmplt_epu64_mask((__m512i)lanes, _mm512_set1_epi64(static_cast<long long>(end)));
}
#elif FUSEDREG_VECTOR_BYTES == 32
FUSEDREG_TARGET FUSEDREG_HD std::uint32_t lanes_below(std::uint32_t end, Vector<std::uint32_t> lanes) {
  return static_cast<std::uint32_t>(_mm256_movemask_ps((__m256)(lanes < end)));
}
FUSEDREG_TARGET FUSEDREG_HD std::uint32_t lanes_below(std::uint64_t end, Vector<std::uint64_t> lanes) {
  return static_cast<std::uint32_t>(_mm256_movemask_pd((__m256d)(lanes < end)));
}
#else
template <class Key, class V>
FUSEDREG_HD std::uint32_t lanes_below(Key end, V lanes) {
  std::uint32_t bits = 0;
  for (std::size_t lane = 0; lane < sizeof(V) / sizeof(Key); ++lane) bits |= lanes[lane] < end ? 1u << lane : 0;
  return bits;
}
#endif

// Which keys of a block are up to `last`, and not 0: a bit for each. Adds to `zeros` those that are 0.
template <class Key>
FUSEDREG_TARGET FUSEDREG_HD std::uint32_t bits_up_to(const Key* keys, Key last, Vector<Key>& zeros) {
  constexpr int kWidth = sizeof(Vector<Key>) / sizeof(Key);
  std::uint32_t bits = 0;
  for (int i = 0; i < kKeysInBlock; i += kWidth) {
    const auto some = load_vector<Vector<Key>>(keys + i);
    bits |= lanes_below(last, some - 1) << i;
    zeros -= (Vector<Key>)(some == 0);
  }
  return bits;
}

// Few blocks have any, and which ones nothing can foretell: they are gathered without a branch.
template <class A>
FUSEDREG_TARGET void find_keys(const void* tile, std::int64_t count, std::uint64_t last_key, std::int64_t first_place,
                               FoundKeys& found) {
  using Key = KeyOf<A>;
  const Key *const keys = static_cast<const Key*>(tile), last = static_cast<Key>(last_key);
  Vector<Key> zeros = {};
  std::int64_t blocks[kTileElements / kKeysInBlock + 1], gathered = 0, i = 0;
  std::uint32_t bits_of_block[kTileElements / kKeysInBlock + 1];
  for (; i + kKeysInBlock <= count; i += kKeysInBlock) {
    blocks[gathered] = i;
    bits_of_block[gathered] = bits_up_to(keys + i, last, zeros);
    gathered += bits_of_block[gathered] != 0 ? 1 : 0;
  }
  std::int64_t n = found.count;
  const auto take = [&](std::int64_t place, bool is_one) __attribute__((always_inline)) {
    found.keys[n] = keys[place];
    found.places[n] = static_cast<std::uint16_t>(first_place + place);
    n += is_one ? 1 : 0;
  };
  for (std::int64_t block = 0; block < gathered; ++block) {
    std::uint64_t bits = bits_of_block[block];
    do {
      // As most blocks have no more than three, the branch can be foretold.
      for (int some = 0; some < 3; ++some) {
        constexpr std::uint64_t kGuard = std::uint64_t{1} << (kKeysInBlock - 1);  // of a 0 no bit is the first
        take(blocks[block] + __builtin_ctzll(bits | kGuard), bits != 0);
        bits &= bits - 1;
      }
    } while (bits != 0);
  }
  for (std::size_t lane = 0; lane < sizeof(zeros) / sizeof(Key); ++lane) found.zeros += zeros[lane];
  for (; i < count; ++i) {
    take(i, static_cast<Key>(keys[i] - 1) < last);
    found.zeros += keys[i] == 0 ? 1 : 0;
  }
  found.count = n;
}

// Of scores in double, or a vector of them: their squares, of which none but that of 0 is 0.
template <class D>
FUSEDREG_HD D squares_of(D scores) {
  const D squares = scores * scores, least = D{} + std::numeric_limits<double>::denorm_min();
  return (squares == 0) & (scores > 0) ? least : squares;
}

template <class A, bool kSquared>
FUSEDREG_HD double score_of(KeyOf<A> key) {
  const double score = bit_cast<A>(key);
  return kSquared ? squares_of(score) : score;
}

// As many as a vector of doubles has.
template <class A>
struct ScoresOf {
  typedef A Type __attribute__((vector_size(FUSEDREG_VECTOR_BYTES / sizeof(double) * sizeof(A))));
};

// In a fixed number of lanes: the same to the bit on any instruction set.
template <class A, bool kSquared>
FUSEDREG_HD double sum_of_scores(const KeyOf<A>* keys, std::int64_t count) {
  constexpr int kWidth = sizeof(Vector<double>) / sizeof(double), kVectors = kUnitLanes / kWidth;
  using Scores = typename ScoresOf<A>::Type;
  Vector<double> sums[kVectors] = {};
  std::int64_t i = 0;
  for (; i + kUnitLanes <= count; i += kUnitLanes) {
    for (int v = 0; v < kVectors; ++v) {
      const auto scores = __builtin_convertvector(load_vector<Scores>(keys + i + v * kWidth), Vector<double>);
      sums[v] += kSquared ? squares_of(scores) : scores;
    }
  }
  double lanes[kUnitLanes];
  std::memcpy(lanes, sums, sizeof(lanes));
  for (int lane = 0; i < count; ++lane, ++i) lanes[lane] += score_of<A, kSquared>(keys[i]);
  for (int width = kUnitLanes / 2; width > 0; width /= 2) {
    for (int lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
  }
  return lanes[0];
}

template <class A, bool kSquared>
FUSEDREG_HD void add_up_scores(const KeyOf<A>* keys, std::int64_t count, std::int64_t run, std::int64_t in_run,
                               double* sums) {
  if (run == 1) {
    for (std::int64_t i = 0; i < count; ++i) sums[i] += score_of<A, kSquared>(keys[i]);
    return;
  }
  for (std::int64_t i = 0, length; i < count; i += length, in_run = 0) {
    length = std::min(run - in_run, count - i);
    *sums++ += sum_of_scores<A, kSquared>(keys + i, length);
  }
}

template <class A>
FUSEDREG_TARGET void add_up_keys(const void* tile, std::int64_t count, bool squared, std::int64_t run,
                                 std::int64_t in_run, double* sums) {
  const KeyOf<A>* const keys = static_cast<const KeyOf<A>*>(tile);
  squared ? add_up_scores<A, true>(keys, count, run, in_run, sums)
          : add_up_scores<A, false>(keys, count, run, in_run, sums);
}

inline KeyLoops key_loops(DType arithmetic) {
  if (arithmetic == DType::kFloat64) return {find_keys<double>, add_up_keys<double>};
  return {find_keys<float>, add_up_keys<float>};
}

}  // namespace fusedreg::cpu::FUSEDREG_ISA
