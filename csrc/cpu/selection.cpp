#include "selection.h"

#include <algorithm>
#include <stdexcept>

namespace fusedreg::cpu {

namespace {

// Neighbours often fall into one bin; counted in turn in several tables, an addition need not wait for the last one.
constexpr std::int64_t kTables = 4;
constexpr std::int64_t kBlocksInChunk = kChunkElements / kKeysInBlock;
using Count = std::uint32_t;
constexpr std::int64_t kMostElements = std::int64_t{1} << 33;  // that a table can count, whoever counts them

// Where they are: int64, one a bin, on the CPU.
std::int64_t* counts_in(PyObject* counts) {
  View view;
  if (!is_tensor(counts) || !look(counts, view) || view.element != Element::kInt64 || view.dim != 1 ||
      view.numel() != kBins || view.strides[0] != 1) {
    throw std::invalid_argument("counts are int64, one a bin");
  }
  return static_cast<std::int64_t*>(view.data);
}

}  // namespace

Selection::Selection(const std::string& rule, PyObject* parameters, bool wide) : wide_(wide) {
  const Rule& kernels = find_rule(rules(), rule);
  for (std::size_t i = 0; i < length(parameters); ++i) {
    PyObject* const items = item(parameters, i);
    Parameter& parameter = parameters_.emplace_back();
    parameter.w = Object::share(tuple_item(items, 0));
    const std::vector<double> fields = to_vector(tuple_item(items, 2), to_double);
    const std::vector<double> scalar_states = to_vector(tuple_item(items, 3), to_double);
    const bool in_metric = to_bool(tuple_item(items, 4));
    parameter.first_position = to_int(tuple_item(items, 5));
    parameter.dims = to_vector(tuple_item(items, 6), [](PyObject* dim) {
      return std::pair(to_int(tuple_item(dim, 0)), to_int(tuple_item(dim, 1)));
    });
    View w;
    if (!is_tensor(parameter.w.get()) || !look(parameter.w.get(), w) || !is_dense(w) || !is_supported(w.element) ||
        is_complex(w.element) || (w.element == Element::kFloat64 && !wide) ||
        fields.size() != kernels.info.fields.size() || scalar_states.size() != kernels.info.scalar_states.size()) {
      throw std::invalid_argument("a selection does not take this parameter");
    }
    const DType dtype = dtype_of(w.element);
    const DType arithmetic = dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
    parameter.numel = w.numel();
    parameter.at.w = w.data;
    parameter.dtypes.w = dtype;
    StateMask mask = 0;
    PyObject* const states = tuple_item(items, 1);
    if (tuple_length(states) != kernels.info.states.size()) {
      throw std::invalid_argument("a parameter comes with another number of states than its rule has");
    }
    for (std::size_t k = 0; k < kernels.info.states.size(); ++k) {
      PyObject* const state = tuple_item(states, k);
      if (state == Py_None) continue;
      View seen;
      if (!is_tensor(state) || !look(state, seen) || !is_supported_state(seen.element) || seen.dim != w.dim ||
          !std::equal(w.sizes, w.sizes + w.dim, seen.sizes) ||
          !std::equal(w.strides, w.strides + w.dim, seen.strides)) {
        throw std::invalid_argument("a state is not laid out as its parameter");
      }
      parameter.states.push_back(Object::share(state));
      parameter.at.state[k] = seen.data;
      parameter.dtypes.state[k] = dtype_of(seen.element);
      parameter.dtypes.codes[k] = instruction_set().codes(parameter.dtypes.state[k], arithmetic);
      if (parameter.dtypes.codes[k] != nullptr) {
        PyObject* const scales = tuple_item(tuple_item(items, 7), k);
        View scale;
        if (!is_tensor(scales) || !look(scales, scale) || scale.element != Element::kFloat32 ||
            scale.numel() != scale_count(parameter.numel) || scale.dim != 1 || scale.strides[0] != 1) {
          throw std::invalid_argument("a state in 8 bits does not come with its scales");
        }
        parameter.states.push_back(Object::share(scales));
        parameter.at.scales[k] = static_cast<float*>(scale.data);
      }
      mask |= StateMask{1} << k;
    }
    parameter.score = kernels.score(instruction_set().isa, arithmetic, mask, in_metric);
    parameter.constants.resize((kernels.constants_size - 1) / sizeof(std::max_align_t) + 1);
    // No metric looks at what was before the step, which nobody keeps.
    kernels.fill(parameter.constants.data(), arithmetic, fields.data(), scalar_states.data(), scalar_states.data(), 1,
                 1);
    work_list_.add_tensor(static_cast<std::int32_t>(parameters_.size() - 1), parameter.numel);
  }
  work_list_.finish();
  if (work_list_.elements() > kMostElements) throw std::invalid_argument("a selection has too many elements");
}

std::int64_t Selection::Parameter::position(std::int64_t place) const {
  std::int64_t position = first_position;
  for (std::size_t i = dims.size(); i-- > 0;) {
    const auto& [size, stride] = dims[i];
    position += place % size * stride;
    place /= size;
  }
  return position;
}

template <class Body>
void Selection::for_each_tile(const Chunk& chunk, const Body& body) const {
  for (std::int64_t done = 0; done < chunk.count; done += kTileElements) {
    score(parameters_[chunk.tensor], chunk.begin + done, std::min(kTileElements, chunk.count - done), body);
  }
}

template <class Body>
void Selection::score(const Parameter& parameter, std::int64_t begin, std::int64_t count, const Body& body) const {
  const bool is_double = parameter.dtypes.w == DType::kFloat64;
  std::uint32_t narrow[kTileElements];
  std::uint64_t wide[kTileElements];
  ScoredTile tile;
  void* const keys = is_double ? static_cast<void*>(wide) : static_cast<void*>(narrow);
  parameter.score(parameter.at, parameter.dtypes, begin, count, parameter.constants.data(), keys, tile);
  if (!wide_) return body(narrow, begin, count, tile);
  if (!is_double) {
    const auto widen = [](std::uint64_t key) {
      return bit_cast<std::uint64_t>(static_cast<double>(bit_cast<float>(static_cast<std::uint32_t>(key))));
    };
    for (std::int64_t i = 0; i < count; ++i) wide[i] = widen(narrow[i]);
    for (std::int64_t block = 0; block * kKeysInBlock < count; ++block) {
      std::uint64_t& least = tile.least[block];
      least = least == ~std::uint64_t{0} ? least : widen(least);
    }
    tile.largest = widen(tile.largest);
  }
  body(wide, begin, count, tile);
}

namespace {

// Calls body(first, end) for the blocks of a tile that have keys up to `last` but 0.
template <class Body>
void for_each_block(std::uint64_t last, std::int64_t count, const ScoredTile& tile, const Body& body) {
  for (std::int64_t first = 0; first < count; first += kKeysInBlock) {
    if (tile.least[first / kKeysInBlock] <= last) body(first, std::min(first + kKeysInBlock, count));
  }
}

}  // namespace

// Counts numbers below `bins` in tables of its own for each worker.
class Selection::Tables {
 public:
  explicit Tables(std::int64_t bins) : bins_(bins), counts_(thread_count() * kTables * bins) {}

  Count* of(std::int64_t worker) { return counts_.data() + worker * kTables * bins_; }

  void count(Count* of, const std::uint32_t* numbers, std::int64_t count) const {
    std::int64_t i = 0;
    for (; i + kTables <= count; i += kTables) {
      for (std::int64_t table = 0; table < kTables; ++table) ++of[table * bins_ + numbers[i + table]];
    }
    for (; i < count; ++i) ++of[numbers[i]];
  }

  void add_to(std::int64_t* sums) const {
    for (std::size_t i = 0; i < counts_.size(); i += bins_) {
      for (std::int64_t bin = 0; bin < bins_; ++bin) sums[bin] += counts_[i + bin];
    }
  }

 private:
  std::int64_t bins_;
  std::vector<Count> counts_;
};

template <class Body>
std::vector<std::uint64_t> Selection::count_tiles(std::int64_t bins, PyObject* counts, const Body& body) {
  std::int64_t* const sums = counts_in(counts);
  std::vector<std::uint64_t> of_chunks(work_list_.chunks().size()), of_parameters(parameters_.size());
  const WithoutGil no_gil;
  Tables tables(bins);
  least_.resize(of_chunks.size() * kBlocksInChunk);
  for_each_chunk_of_worker(work_list_, Order::kForward, [&](std::int64_t i, std::int64_t worker) {
    const Chunk& chunk = work_list_.chunks()[i];
    Count* const its_tables = tables.of(worker);
    std::uint64_t largest = 0;
    for_each_tile(chunk, [&](const auto* keys, std::int64_t begin, std::int64_t count, const ScoredTile& tile) {
      std::uint32_t numbers[kTileElements];
      tables.count(its_tables, numbers, body(keys, begin, count, tile, parameters_[chunk.tensor], its_tables, numbers));
      largest = std::max(largest, tile.largest);
      std::uint32_t* least = &least_[i * kBlocksInChunk + (begin - chunk.begin) / kKeysInBlock];
      for (std::int64_t k = 0; k * kKeysInBlock < count; ++k) *least++ = leading_bits(tile.least[k]);
    });
    of_chunks[i] = largest;
  });
  tables.add_to(sums);
  for (std::size_t i = 0; i < of_chunks.size(); ++i) {
    std::uint64_t& largest = of_parameters[work_list_.chunks()[i].tensor];
    largest = std::max(largest, of_chunks[i]);
  }
  return of_parameters;
}

std::vector<std::uint64_t> Selection::count(int shift, std::uint64_t prefix, std::int64_t end, PyObject* counts) {
  if (end < 0 || end > kBins) throw std::invalid_argument("there is no such digit");
  const std::uint64_t first = prefix << 16 << shift, last = first + (static_cast<std::uint64_t>(end) << shift) - 1;
  // Without the keys that are 0, which are counted already.
  const std::uint64_t from = std::max<std::uint64_t>(first, 1);
  return count_tiles(end, counts,
                     [&](const auto* keys, std::int64_t, std::int64_t count, const ScoredTile& tile, const Parameter&,
                         Count* table, std::uint32_t* digits) {
                       using Key = std::decay_t<decltype(*keys)>;
                       if (first == 0 && end > 0) table[0] += static_cast<Count>(tile.zeros);
                       std::int64_t found = 0;
                       if (end == 0 || from > last) return found;
                       const Key lowest = static_cast<Key>(from), width = static_cast<Key>(last - from);  // less 1
                       for_each_block(last, count, tile, [&](std::int64_t i, std::int64_t block_end) {
                         for (; i < block_end; ++i) {  // without a branch, which nothing could foretell
                           digits[found] = static_cast<std::uint32_t>(keys[i] >> shift) & (kBins - 1);
                           found += static_cast<Key>(keys[i] - lowest) <= width ? 1 : 0;
                         }
                       });
                       return found;
                     });
}

void Selection::count_positions(std::uint64_t key, int shift, std::uint64_t prefix, PyObject* counts) {
  count_tiles(kBins, counts,
              [&](const auto* keys, std::int64_t begin, std::int64_t count, const ScoredTile& tile,
                  const Parameter& parameter, Count*, std::uint32_t* digits) {
                std::int64_t found = 0;
                for_each_block(key, count, tile, [&](std::int64_t i, std::int64_t end) {
                  for (; i < end; ++i) {
                    if (keys[i] != key) continue;
                    const std::uint64_t leading = static_cast<std::uint64_t>(parameter.position(begin + i)) >> shift;
                    if (leading >> 16 == prefix) digits[found++] = leading & (kBins - 1);
                  }
                });
                return found;
              });
}

std::vector<std::tuple<std::uint64_t, std::int64_t, std::int64_t>> Selection::largest() const {
  struct Found {
    std::uint64_t key = 0;
    std::int64_t position = -1, place = -1;

    void update(const Found& other) {
      if (position < 0 || other.key > key || (other.key == key && other.position > position)) *this = other;
    }
  };
  std::vector<Found> of_chunks(work_list_.chunks().size()), of_parameters(parameters_.size());
  {
    const WithoutGil no_gil;
    for_each_chunk(work_list_, [&](std::int64_t i) {
      const Chunk& chunk = work_list_.chunks()[i];
      Found& found = of_chunks[i];
      for_each_tile(chunk, [&](const auto* keys, std::int64_t begin, std::int64_t count, const ScoredTile& tile) {
        if (found.position >= 0 && tile.largest < found.key) return;
        for (std::int64_t k = 0; k < count; ++k) {
          if (keys[k] != tile.largest) continue;
          found.update({tile.largest, parameters_[chunk.tensor].position(begin + k), begin + k});
        }
      });
    });
  }
  for (std::size_t i = 0; i < of_chunks.size(); ++i) of_parameters[work_list_.chunks()[i].tensor].update(of_chunks[i]);
  std::vector<std::tuple<std::uint64_t, std::int64_t, std::int64_t>> result;
  for (const Found& found : of_parameters) result.emplace_back(found.key, found.position, found.place);
  return result;
}

void Selection::zero(std::uint64_t key, std::int64_t position, const std::vector<std::int64_t>& kept) {
  if (kept.size() != parameters_.size()) throw std::invalid_argument("not one kept place a parameter");
  if (least_.empty()) throw std::logic_error("nothing was counted");
  {
    const WithoutGil no_gil;
    for_each_chunk(work_list_, [&](std::int64_t c) {
      const Chunk& chunk = work_list_.chunks()[c];
      const std::uint32_t* const least = &least_[c * kBlocksInChunk];
      for (std::int64_t done = 0; done < chunk.count; done += kKeysInBlock) {
        if (least[done / kKeysInBlock] > leading_bits(key)) continue;  // as most are
        zero_block(parameters_[chunk.tensor], chunk.begin + done, std::min(kKeysInBlock, chunk.count - done), key,
                   position, kept[chunk.tensor]);
      }
    });
  }
  Versions versions;
  for (const Parameter& parameter : parameters_) versions.change(parameter.w.get());
  versions.tell();
}

void Selection::zero_block(const Parameter& parameter, std::int64_t begin, std::int64_t count, std::uint64_t key,
                           std::int64_t position, std::int64_t kept) const {
  score(parameter, begin, count, [&](const auto* keys, std::int64_t, std::int64_t, const ScoredTile&) {
    visit_dtype(parameter.dtypes.w, [&](auto element) {
      using T = decltype(element);
      T* const w = static_cast<T*>(parameter.at.w) + begin;
      for (std::int64_t i = 0; i < count; ++i) {
        bool goes = keys[i] < key;
        if (keys[i] == key && position > 0) goes = parameter.position(begin + i) < position;
        if (goes && begin + i != kept) w[i] = T{};
      }
    });
  });
}

}  // namespace fusedreg::cpu
