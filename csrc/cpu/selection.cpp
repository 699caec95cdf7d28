#include "selection.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <stdexcept>

#include "../maths/rounding.h"
#include "units.h"

namespace fusedreg::cpu {

namespace {

// Of a chunk's weights, what was found is kept if it is not more.
constexpr std::int64_t kMostKept = FoundKeys::kMostKept;

// A sample has the weights of a line of memory in so many.
constexpr std::int64_t kSampled = 16, kSampledOf = 8192;

constexpr std::uint64_t kEveryKey = ~std::uint64_t{0};

// So many stores ahead is asked for the line of a weight that becomes zero.
constexpr std::int64_t kAhead = 16;

// Where they are: int64, one a bin, on the CPU.
std::int64_t* counts_in(PyObject* counts, std::int64_t bins) {
  View view;
  if (!is_tensor(counts) || !look(counts, view) || view.element != Element::kInt64 || view.dim != 1 ||
      view.numel() != bins || (bins > 1 && view.strides[0] != 1)) {
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
    parameter.sizes.assign(w.sizes, w.sizes + w.dim);
    parameter.strides.assign(w.strides, w.strides + w.dim);
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
    parameter.loops = instruction_set().keys(arithmetic);
    parameter.scores_are_roots = !kernels.has_metric;
    parameter.is_widened = wide && arithmetic == DType::kFloat32;
    parameter.constants.resize((kernels.constants_size - 1) / sizeof(std::max_align_t) + 1);
    // No metric looks at what was before the step, which nobody keeps.
    kernels.fill(parameter.constants.data(), arithmetic, fields.data(), scalar_states.data(), scalar_states.data(), 1,
                 1);
    work_list_.add_tensor(static_cast<std::int32_t>(parameters_.size() - 1), parameter.numel);
  }
  work_list_.finish();
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

namespace {

// The key, among those of float64, of a float32 score.
std::uint64_t widen(std::uint64_t key) {
  return bit_cast<std::uint64_t>(static_cast<double>(bit_cast<float>(static_cast<std::uint32_t>(key))));
}

// The last key of a float32 score that is widened to one up to `last`; or a later one.
std::uint64_t narrow(std::uint64_t last) {
  const double score = bit_cast<double>(last);
  if (!(score <= std::numeric_limits<float>::max())) return kEveryKey;
  const float nearest = static_cast<float>(score);
  return bit_cast<std::uint32_t>(nearest) - (static_cast<double>(nearest) > score ? 1 : 0);
}

}  // namespace

void Selection::find_in_tile(const Parameter& parameter, std::int64_t begin, std::int64_t count, std::uint64_t last,
                             std::int64_t place, FoundKeys& found) const {
  alignas(64) std::uint64_t keys[kTileElements];
  parameter.score(parameter.at, parameter.dtypes, begin, count, parameter.constants.data(), keys);
  std::int64_t kept = found.count;
  parameter.loops.find(keys, count, parameter.is_widened ? narrow(last) : last, place, found);
  if (!parameter.is_widened) return;
  for (std::int64_t i = kept; i < found.count; ++i) {
    const std::uint64_t key = widen(found.keys[i]);
    found.keys[kept] = key;
    found.places[kept] = found.places[i];
    kept += key <= last ? 1 : 0;
  }
  found.count = kept;
}

template <class Body>
void Selection::for_each_tile(const Chunk& chunk, FoundKeys& found, const Body& body) const {
  for (std::int64_t done = 0; done < chunk.count; done += kTileElements) {
    find_in_tile(parameters_[chunk.tensor], chunk.begin + done, std::min(kTileElements, chunk.count - done), last_,
                 done, found);
    body();
  }
}

void Selection::find_in_chunk(std::int64_t i) {
  FoundKeys keys;
  std::int64_t dropped = 0;
  for_each_tile(work_list_.chunks()[i], keys, [&] {
    if (dropped + keys.count <= kMostKept) return;
    dropped += keys.count;
    keys.count = 0;
  });
  Found& found = found_[i];
  found.zeros = keys.zeros;
  found.count = dropped + keys.count;
  if (dropped > 0) return;
  found.keys.assign(keys.keys, keys.keys + keys.count);
  found.places.assign(keys.places, keys.places + keys.count);
}

template <class Body>
void Selection::for_each_list(std::int64_t i, const Body& body) const {
  const Found& found = found_[i];
  if (found.count <= kMostKept) return body(found.keys.data(), found.places.data(), found.count);
  FoundKeys keys;
  for_each_tile(work_list_.chunks()[i], keys, [&] {
    body(keys.keys, keys.places, keys.count);
    keys.count = 0;
  });
}

template <class Body>
void Selection::for_each_found(std::int64_t i, const Body& body) const {
  const std::int64_t begin = work_list_.chunks()[i].begin;
  for_each_list(i, [&](const std::uint64_t* keys, const std::uint16_t* places, std::int64_t count) {
    for (std::int64_t k = 0; k < count; ++k) body(keys[k], begin + places[k]);
  });
}

template <class Body>
void Selection::count_chunks(std::int64_t bins, PyObject* counts, const Body& body) const {
  std::int64_t* const sums = counts_in(counts, bins);
  const WithoutGil no_gil;
  std::vector<std::int64_t> tables(thread_count() * bins);  // each worker has its own
  for_each_chunk_of_worker(work_list_, Order::kForward,
                           [&](std::int64_t i, std::int64_t worker) { body(i, &tables[worker * bins]); });
  for (std::size_t first = 0; first < tables.size(); first += bins) {
    for (std::int64_t bin = 0; bin < bins; ++bin) sums[bin] += tables[first + bin];
  }
}

void Selection::ask_for(const Parameter& parameter, std::int64_t place) {
  const auto ask = [&](const void* stream, DType dtype) {
    __builtin_prefetch(static_cast<const char*>(stream) + place * element_size(dtype));
  };
  ask(parameter.at.w, parameter.dtypes.w);
  for (int k = 0; k < kMaxStates; ++k) {
    if (parameter.at.state[k] != nullptr) ask(parameter.at.state[k], parameter.dtypes.state[k]);
  }
}

void Selection::sample(PyObject* counts) const {
  const int shift = wide_ ? 48 : 16;
  count_chunks(kLeadingBins, counts, [&](std::int64_t i, std::int64_t* table) {
    const Chunk& chunk = work_list_.chunks()[i];
    const Parameter& parameter = parameters_[chunk.tensor];
    std::int64_t lines[kChunkElements / kSampledOf], count = 0;
    for (std::int64_t of = 0; of < chunk.count; of += kSampledOf) {
      // Anywhere in them, or all could be of one column.
      const std::uint32_t line = random_bits(static_cast<std::uint32_t>(chunk.begin + of), chunk.tensor);
      const std::int64_t begin = of + line % (kSampledOf / kSampled) * kSampled;
      if (begin >= chunk.count) continue;
      ask_for(parameter, chunk.begin + begin);
      lines[count++] = begin;
    }
    FoundKeys found;
    for (std::int64_t i = 0; i < count; ++i) {
      find_in_tile(parameter, chunk.begin + lines[i], std::min(kSampled, chunk.count - lines[i]), kEveryKey, lines[i],
                   found);
    }
    table[0] += found.zeros;
    for (std::int64_t k = 0; k < found.count; ++k) ++table[found.keys[k] >> shift];
  });
}

void Selection::count(int shift, std::uint64_t prefix, std::int64_t end, PyObject* counts) {
  if (end <= 0 || end > kBins) throw std::invalid_argument("there is no such digit");
  const std::uint64_t first = prefix << 16 << shift, last = first + (static_cast<std::uint64_t>(end) << shift) - 1;
  const bool is_beyond = !has_found_ || last > last_;
  if (is_beyond) {
    has_found_ = false;
    last_ = last;
    found_.assign(work_list_.chunks().size(), {});
  }
  count_chunks(end, counts, [&](std::int64_t i, std::int64_t* table) {
    if (is_beyond) find_in_chunk(i);
    if (first == 0) table[0] += found_[i].zeros;
    for_each_found(i, [&](std::uint64_t key, std::int64_t) {
      if (key - first <= last - first) ++table[(key - first) >> shift];
    });
  });
  has_found_ = true;
}

void Selection::count_positions(std::uint64_t key, int shift, std::uint64_t prefix, PyObject* counts) const {
  check_found(key);
  count_chunks(kBins, counts, [&](std::int64_t i, std::int64_t* table) {
    const Parameter& parameter = parameters_[work_list_.chunks()[i].tensor];
    for_each_found(i, [&](std::uint64_t its_key, std::int64_t place) {
      if (its_key != key) return;
      const std::uint64_t leading = static_cast<std::uint64_t>(parameter.position(place)) >> shift;
      if (leading >> 16 == prefix) ++table[leading & (kBins - 1)];
    });
  });
}

std::vector<std::tuple<std::uint64_t, std::int64_t, std::int64_t>> Selection::largest() const {
  struct Largest {
    std::uint64_t key = 0;
    std::int64_t position = -1, place = -1;

    void update(const Largest& other) {
      if (other.key > key || (other.key == key && other.position > position)) *this = other;
    }
  };
  check_found(0);
  std::vector<std::int64_t> beyond(parameters_.size());
  for (std::size_t i = 0; i < found_.size(); ++i) {
    const Chunk& chunk = work_list_.chunks()[i];
    beyond[chunk.tensor] += chunk.count - found_[i].zeros - found_[i].count;
  }
  std::vector<Largest> of_chunks(found_.size()), of_parameters(parameters_.size());
  {
    const WithoutGil no_gil;
    for_each_chunk(work_list_, [&](std::int64_t i) {
      const std::int32_t tensor = work_list_.chunks()[i].tensor;
      if (beyond[tensor] > 0) return;
      for_each_found(i, [&](std::uint64_t key, std::int64_t place) {
        if (key >= of_chunks[i].key) of_chunks[i].update({key, parameters_[tensor].position(place), place});
      });
    });
  }
  for (std::size_t i = 0; i < of_chunks.size(); ++i) of_parameters[work_list_.chunks()[i].tensor].update(of_chunks[i]);
  std::vector<std::tuple<std::uint64_t, std::int64_t, std::int64_t>> result;
  for (std::size_t i = 0; i < parameters_.size(); ++i) {
    const Largest& found = of_parameters[i];
    result.emplace_back(beyond[i] > 0 ? kBeyond : found.key, found.position, found.place);
  }
  return result;
}

void Selection::zero(std::uint64_t key, std::int64_t position, const std::vector<std::int64_t>& kept) {
  if (kept.size() != parameters_.size()) throw std::invalid_argument("not one kept place a parameter");
  check_found(position > 0 || key == 0 ? key : key - 1);
  {
    const WithoutGil no_gil;
    for_each_chunk(work_list_, [&](std::int64_t i) {
      const std::int32_t tensor = work_list_.chunks()[i].tensor;
      const std::int64_t begin = work_list_.chunks()[i].begin;
      const Parameter& parameter = parameters_[tensor];
      visit_dtype(parameter.dtypes.w, [&](auto element) {
        using T = decltype(element);
        T* const w = static_cast<T*>(parameter.at.w) + begin;
        for_each_list(i, [&](const std::uint64_t* keys, const std::uint16_t* places, std::int64_t count) {
          // First those that go, without a branch, as nothing can foretell them; each is in a line of its own, perhaps.
          std::uint16_t going[kMostKept + kAhead] = {};
          std::int64_t n = 0;
          for (std::int64_t k = 0; k < count; ++k) {
            going[n] = places[k];
            bool goes = keys[k] < key;
            if (keys[k] == key && position > 0) goes = parameter.position(begin + places[k]) < position;
            n += goes & (begin + places[k] != kept[tensor]) ? 1 : 0;
          }
          for (std::int64_t k = 0; k < n; ++k) {
            __builtin_prefetch(w + going[k + kAhead], 1);
            w[going[k]] = T{};
          }
        });
      });
    });
  }
  Versions versions;
  for (const Parameter& parameter : parameters_) versions.change(parameter.w.get());
  versions.tell();
}

void Selection::check_found(std::uint64_t key) const {
  if (!has_found_ || key > last_) throw std::logic_error("keys up to this one were not counted");
}

namespace {

// A part of a parameter: of the sweeps over all units [sweep, sweep_end), the units [unit, unit_end), and of their runs
// the elements [in_run, in_run_end).
struct Part {
  std::int64_t sweep, sweep_end, unit, unit_end, in_run, in_run_end;
};

}  // namespace

void Selection::add_up(int unit, PyObject* sums) const {
  if (length(sums) != parameters_.size()) throw std::invalid_argument("not one tensor of sums a parameter");
  for (std::size_t i = 0; i < parameters_.size(); ++i) {
    const Parameter& parameter = parameters_[i];
    if (parameter.numel == 0) continue;
    const UnitLayout layout = unit_layout(parameter.sizes, parameter.strides, unit);
    PyObject* const its_sums = item(sums, i);
    View view;
    if (!is_tensor(its_sums) || !look(its_sums, view) || view.element != Element::kFloat64 || view.dim != 1 ||
        view.numel() != layout.count || (layout.count > 1 && view.strides[0] != 1)) {
      throw std::invalid_argument("sums are float64, one a unit");
    }
    add_up(parameter, layout, static_cast<double*>(view.data));
  }
}

void Selection::add_up(const Parameter& parameter, const UnitLayout& layout, double* sums) const {
  // About a chunk each, whoever takes it; where the units lie side by side, of many sweeps, so that there are few sums.
  const auto in_bounds = [](std::int64_t number, std::int64_t most) {
    return std::min(std::max<std::int64_t>(number, 1), most);
  };
  const std::int64_t in_row = layout.outer > 1 ? kTileElements : kChunkElements;
  const std::int64_t run = in_bounds(kChunkElements, layout.run), units = in_bounds(in_row / run, layout.count);
  const std::int64_t sweeps = in_bounds(kChunkElements / (units * run), layout.outer);
  std::vector<Part> parts;
  for (std::int64_t sweep = 0; sweep < layout.outer; sweep += sweeps) {
    for (std::int64_t in_run = 0; in_run < layout.run; in_run += run) {
      for (std::int64_t first = 0; first < layout.count; first += units) {
        parts.push_back({sweep, std::min(sweep + sweeps, layout.outer), first, std::min(first + units, layout.count),
                         in_run, std::min(in_run + run, layout.run)});
      }
    }
  }
  const std::int64_t rows = (layout.outer + sweeps - 1) / sweeps * ((layout.run + run - 1) / run);
  const std::int64_t in_one_row = static_cast<std::int64_t>(parts.size()) / rows;
  const WithoutGil no_gil;
  std::vector<double> partial(rows * layout.count);
  const auto add_up_part = [&](std::int64_t i) {
    const Part& part = parts[i];
    double* const its_sums = &partial[i / in_one_row * layout.count + part.unit];
    const bool is_whole = part.unit == 0 && part.unit_end == layout.count && run == layout.run;
    // Of whole sweeps, all that follow each other lie together.
    const std::int64_t in_sweep = (part.unit_end - part.unit - 1) * layout.run + part.in_run_end - part.in_run;
    const std::int64_t together = is_whole ? part.sweep_end - part.sweep : 1;
    for (std::int64_t sweep = part.sweep; sweep < part.sweep_end; sweep += together) {
      const std::int64_t begin = (sweep * layout.count + part.unit) * layout.run + part.in_run;
      add_up_together(parameter, begin, together * in_sweep, in_sweep, std::min(run, layout.run), its_sums);
    }
  };
  const std::int64_t count = static_cast<std::int64_t>(parts.size());
  if (parameter.numel <= kSerialElements) {
    for (std::int64_t i = 0; i < count; ++i) add_up_part(i);
  } else {
    parallel_for(count, [&](std::int64_t i, std::int64_t end) {
      for (; i < end; ++i) add_up_part(i);
    });
  }
  for (std::int64_t row = 0; row < rows; ++row) {
    for (std::int64_t i = 0; i < layout.count; ++i) sums[i] += partial[row * layout.count + i];
  }
}

void Selection::add_up_together(const Parameter& parameter, std::int64_t begin, std::int64_t count,
                                std::int64_t in_sweep, std::int64_t run, double* sums) const {
  alignas(64) std::uint64_t keys[kTileElements];
  const std::int64_t width = parameter.dtypes.w == DType::kFloat64 ? sizeof(double) : sizeof(float);
  for (std::int64_t done = 0, tile; done < count; done += tile) {
    tile = std::min(kTileElements, count - done);
    parameter.score(parameter.at, parameter.dtypes, begin + done, tile, parameter.constants.data(), keys);
    for (std::int64_t i = 0, some; i < tile; i += some) {
      const std::int64_t in_this = (done + i) % in_sweep;
      some = std::min(in_sweep - in_this, tile - i);
      parameter.loops.add_up(reinterpret_cast<const char*>(keys) + i * width, some, parameter.scores_are_roots, run,
                             in_this % run, sums + in_this / run);
    }
  }
}

}  // namespace fusedreg::cpu
