#include "units.h"

#include <algorithm>

#include "threads.h"

namespace fusedreg::cpu {

UnitLayout unit_layout(const std::vector<std::int64_t>& sizes, const std::vector<std::int64_t>& strides, int unit) {
  std::int64_t numel = 1;
  for (const std::int64_t size : sizes) numel *= size;
  UnitLayout layout;
  layout.run = numel;
  const std::size_t dim = unit < 0 ? 1 : 0;
  if (unit == 0 || dim >= sizes.size() || sizes[dim] <= 1) return layout;  // a stride of a size of 1 says nothing
  const std::int64_t rows = unit < 0 ? 1 : unit;
  layout.count = sizes[dim] / rows;
  layout.run = strides[dim] * rows;
  layout.outer = layout.run > 0 ? numel / (layout.count * layout.run) : 0;
  return layout;
}

namespace {

// Units next to each other, solved together: each line of memory is read once for all of them. Their weights are worked
// on in pieces of at most kUnitElements; with more than one piece, they are read anew in every pass.
class Panel {
 public:
  Panel(const UnitWork& work, std::int64_t first, std::int64_t count, UnitSolution& solution)
      : work_(work),
        first_(first),
        count_(count),
        size_(work.layout.size()),
        keeps_(count * size_ <= kUnitElements),
        roots_(solution.roots),
        partial_(solution.sums) {
    const std::int64_t most = std::max<std::int64_t>(kUnitElements / count, 1), run = work.layout.run;
    piece_ = count > 1 ? std::max<std::int64_t>(most / run, 1) * run : most;  // of several units, runs are not cut
    if (work.update != nullptr && count == 1) piece_ = kUnitTile;
    piece_ = std::min(piece_, std::max<std::int64_t>(size_, 1));
    roots_.assign(count, UnitRoot());
    partial_.resize(pieces() * count * kSums);
  }

  std::int64_t pieces() const { return (size_ + piece_ - 1) / piece_; }

  // `for_each_piece(body)` calls body(piece, scratch), for all pieces.
  template <class ForEachPiece>
  void solve(const ForEachPiece& for_each_piece) {
    int pass = 0;
    for (; std::any_of(roots_.begin(), roots_.end(), wants_something); ++pass) {
      for_each_piece([&](std::int64_t piece, UnitScratch& scratch) {
        prepare(piece, pass, scratch);
        add_up(piece, pass, scratch);
      });
      take_sums(pass);
    }
    if (std::all_of(roots_.begin(), roots_.end(), [](const UnitRoot& root) { return root.is_identity; })) return;
    for_each_piece([&](std::int64_t piece, UnitScratch& scratch) {
      if (!keeps_) prepare(piece, pass, scratch);
      apply(piece, scratch);
    });
  }

 private:
  static constexpr int kSums = kUnitLoopSums;
  enum Stream { kWeights, kRidges, kInverses, kFloorRatios, kStreams };
  static bool wants_something(const UnitRoot& root) { return root.wants != UnitRoot::Wants::kNothing; }

  bool in_metric() const { return work_.constants.in_metric; }
  bool shrinks() const { return work_.constants.threshold != 0; }
  bool has_floor_ratio() const { return in_metric() && work_.has_floor_ratio; }

  // Whether stages 1 to 6 leave the ridges of a piece behind, for the first pass, in the place of the first piece: what
  // is written again and again stays in the nearest cache.
  bool leaves_ridges() const {
    return work_.update != nullptr && in_metric() && shrinks() && is_in_place() &&
           work_.dtypes.converted == Converted::kNone;
  }

  // The first pass whose ridges stay, or are read at all. Most units are done before, where it looks at norms alone or
  // at what is left behind.
  int first_with_ridges() const { return shrinks() && !(leaves_ridges() && pieces() > 1) ? 0 : 1; }

  // The inverses are kept for what is applied in the end, so only where they stay.
  bool wants_series() const { return in_metric() && shrinks() && keeps_; }

  std::size_t width() const { return work_.arithmetic == DType::kFloat64 ? sizeof(double) : sizeof(float); }
  std::int64_t begin_of(std::int64_t piece) const { return piece * piece_; }
  std::int64_t size_of(std::int64_t piece) const { return std::min(piece_, size_ - begin_of(piece)); }

  // Where the units are one after the other, and nothing has to be converted, they are worked on in memory.
  bool is_in_place() const { return work_.layout.outer == 1 && work_.dtypes.w == work_.arithmetic; }

  // Where a unit's part of a piece is. What is kept is kept for all pieces.
  char* at(UnitScratch& scratch, Stream stream, std::int64_t unit, std::int64_t piece) const {
    if (stream == kFloorRatios && !has_floor_ratio()) return nullptr;
    if (stream == kWeights && is_in_place()) {
      return static_cast<char*>(work_.at.w) + ((first_ + unit) * size_ + begin_of(piece)) * width();
    }
    const std::int64_t place =
        keeps_ ? (stream * count_ + unit) * size_ + begin_of(piece) : stream * count_ * piece_ + unit * size_of(piece);
    return reinterpret_cast<char*>(scratch.data()) + place * width();
  }

  // Calls body(first element in memory, how many, where the first is in a unit's part of the piece) for what lies
  // together of all the units of the panel.
  template <class Body>
  void for_each_segment(std::int64_t piece, const Body& body) const {
    const UnitLayout& layout = work_.layout;
    const std::int64_t begin = begin_of(piece), end = begin + size_of(piece);
    for (std::int64_t i = begin; i < end;) {
      const std::int64_t in_run = i % layout.run, together = std::min(layout.run - in_run, end - i);
      body((i / layout.run * layout.count + first_) * layout.run + in_run, together * count_, i - begin);
      i += together;
    }
  }

  // Takes stages 1 to 6, where they are still to be taken, and sees to it that weights and ridges are where `at` says.
  void prepare(std::int64_t piece, int pass, UnitScratch& scratch) const {
    const std::size_t most = kStreams * count_ * (keeps_ ? size_ : piece_);
    if (scratch.size() < most) scratch.resize(most);
    if (pass == 0 && work_.update != nullptr) {
      update(piece, scratch);
      if (leaves_ridges()) return;
    }
    const bool wants_ridges = in_metric() && (keeps_ ? pass == first_with_ridges() : pass >= first_with_ridges());
    if (pass == 0 || !keeps_ || wants_ridges) gather(piece, wants_ridges, scratch);
  }

  void update(std::int64_t piece, UnitScratch& scratch) const {
    const std::int64_t begin = first_ * size_ + begin_of(piece), count = count_ * size_of(piece);
    void* const ridges = leaves_ridges() ? at(scratch, kRidges, 0, 0) : nullptr;
    void* const floor_ratios = leaves_ridges() ? at(scratch, kFloorRatios, 0, 0) : nullptr;
    work_.update(work_.at, work_.dtypes, begin, count, work_.step_constants, ridges, floor_ratios);
    if (leaves_ridges()) add_ridge(ridges, count);
  }

  void gather(std::int64_t piece, bool wants_ridges, UnitScratch& scratch) const {
    if (is_in_place()) {
      if (!wants_ridges) return;
      const std::int64_t from = first_ * size_ + begin_of(piece), count = count_ * size_of(piece);
      char *ridges = at(scratch, kRidges, 0, piece), *floor_ratios = at(scratch, kFloorRatios, 0, piece);
      for (std::int64_t done = 0; done < count; done += kTileElements) {
        void* const ratios = floor_ratios == nullptr ? nullptr : floor_ratios + done * width();
        take_metric(from + done, std::min(kTileElements, count - done), ridges + done * width(), ratios);
      }
      return;
    }
    alignas(64) double weights[kTileElements], ridges[kTileElements], floor_ratios[kTileElements];
    for_each_segment(piece, [&](std::int64_t from, std::int64_t count, std::int64_t to) {
      for (std::int64_t done = 0; done < count; done += kTileElements) {
        const std::int64_t tile = std::min(kTileElements, count - done);
        work_.loops.load(weights, work_.at.w, work_.dtypes.w, from + done, tile);
        if (wants_ridges) take_metric(from + done, tile, ridges, floor_ratios);
        spread(done, tile, [&](std::int64_t unit, std::int64_t place, std::int64_t in_tile, std::int64_t length) {
          const auto put = [&](Stream stream, const void* tile) {
            std::memcpy(at(scratch, stream, unit, piece) + (to + place) * width(),
                        static_cast<const char*>(tile) + in_tile * width(), length * width());
          };
          put(kWeights, weights);
          if (wants_ridges) put(kRidges, ridges);
          if (wants_ridges && has_floor_ratio()) put(kFloorRatios, floor_ratios);
        });
      }
    });
  }

  // Ridges and floor_ratios of a tile.
  void take_metric(std::int64_t from, std::int64_t count, void* ridges, void* floor_ratios) const {
    work_.metric(work_.at, work_.dtypes, from, count, work_.step_constants, ridges, floor_ratios);
    add_ridge(ridges, count);
  }

  void add_ridge(void* metric, std::int64_t count) const {
    if (work_.constants.ridge != 0) work_.loops.add_ridge(metric, count, work_.constants.ridge);
  }

  void scatter(std::int64_t piece, UnitScratch& scratch) const {
    if (is_in_place()) return;
    alignas(64) double weights[kTileElements];
    for_each_segment(piece, [&](std::int64_t to, std::int64_t count, std::int64_t from) {
      for (std::int64_t done = 0; done < count; done += kTileElements) {
        const std::int64_t tile = std::min(kTileElements, count - done);
        spread(done, tile, [&](std::int64_t unit, std::int64_t place, std::int64_t in_tile, std::int64_t length) {
          std::memcpy(reinterpret_cast<char*>(weights) + in_tile * width(),
                      at(scratch, kWeights, unit, piece) + (from + place) * width(), length * width());
        });
        if (work_.dtypes.rounding != nullptr && work_.dtypes.w == DType::kBFloat16) {
          work_.dtypes.rounding->store(work_.at.w, weights, to + done, tile, Rounding::kWeightsOfUnits);
        } else {
          work_.loops.store(work_.at.w, work_.dtypes.w, weights, to + done, tile);
        }
      }
    });
  }

  // Calls body(unit, place, place in the tile, how many) for what a tile has of each unit, where the tile begins `done`
  // elements into a segment.
  template <class Body>
  void spread(std::int64_t done, std::int64_t tile, const Body& body) const {
    if (count_ == 1) return body(0, done, 0, tile);
    const std::int64_t run = work_.layout.run;
    for (std::int64_t i = 0; i < tile;) {
      const std::int64_t in_run = (done + i) % run, length = std::min(run - in_run, tile - i);
      body((done + i) / run, in_run, i, length);
      i += length;
    }
  }

  void add_up(std::int64_t piece, int pass, UnitScratch& scratch) {
    const std::int64_t size = size_of(piece), with_ridges = pass == 0 && leaves_ridges() ? 0 : piece;
    for (std::int64_t unit = 0; unit < count_; ++unit) {
      const void *y = at(scratch, kWeights, unit, piece), *e = at(scratch, kRidges, unit, with_ridges);
      const void* f = at(scratch, kFloorRatios, unit, with_ridges);
      const UnitRoot& root = roots_[unit];
      double* const sums = &partial_[(piece * count_ + unit) * kSums];
      if (pass == 0 && !(in_metric() && shrinks())) {
        work_.loops.squares(y, size, sums);
      } else if (pass == 0 && wants_series()) {
        work_.loops.series(y, e, f, at(scratch, kInverses, unit, piece), size, sums);
      } else if (root.wants == UnitRoot::Wants::kFirst) {
        work_.loops.first(y, e, size, sums);
      } else if (root.wants == UnitRoot::Wants::kSums) {
        work_.loops.newton(y, e, f, size, root, sums);
      } else if (root.wants == UnitRoot::Wants::kNorm) {
        work_.loops.norm(y, e, f, size, root, work_.constants.furthest, sums);
      }
    }
  }

  void take_sums(int pass) {
    const UnitConstants& c = work_.constants;
    const bool is_double = work_.arithmetic == DType::kFloat64;
    const double precision = is_double ? unit_precision<double>() : unit_precision<float>();
    const double limit = is_double ? unit_series_limit<double>() : unit_series_limit<float>();
    for (std::int64_t unit = 0; unit < count_; ++unit) {
      UnitRoot& root = roots_[unit];
      double sums[kSums] = {};
      for (std::int64_t piece = 0; piece < pieces(); ++piece) {
        const double* const partial = &partial_[(piece * count_ + unit) * kSums];
        for (int i = 0; i < kUnitSums; ++i) sums[i] += partial[i];
        for (int i = kUnitSums; i < kSums; ++i) sums[i] = std::max(sums[i], partial[i]);
      }
      if (pass == 0 && !in_metric()) {
        root.take_norm(c, sums[0]);
      } else if (pass == 0 && !shrinks()) {
        root.take_norm_alone(c, sums[0]);
      } else if (pass == 0 && wants_series()) {
        root.take_series(c, limit, sums[0], sums[1], sums[2], sums[kUnitSums], sums[kUnitSums + 1]);
      } else {
        root.take(c, precision, sums[0], sums[1], sums[2], sums[kUnitSums]);
      }
    }
  }

  void apply(std::int64_t piece, UnitScratch& scratch) const {
    const std::int64_t size = size_of(piece);
    for (std::int64_t unit = 0; unit < count_; ++unit) {
      const UnitRoot& root = roots_[unit];
      void* const y = at(scratch, kWeights, unit, piece);
      if (root.is_identity) continue;
      if (!in_metric()) {
        work_.loops.scale(y, size, root.lost(1 + work_.constants.ridge));
      } else if (root.is_series) {
        work_.loops.apply_series(y, at(scratch, kInverses, unit, piece), size, root);
      } else {
        work_.loops.apply(y, at(scratch, kRidges, unit, piece), at(scratch, kFloorRatios, unit, piece), size, root,
                          work_.constants.furthest);
      }
    }
    scatter(piece, scratch);
  }

  const UnitWork& work_;
  const std::int64_t first_, count_, size_;
  const bool keeps_;  // what was gathered, and the inverses, stay where they are
  std::int64_t piece_;
  std::vector<UnitRoot>& roots_;
  std::vector<double>& partial_;
};

}  // namespace

void prox_of_units(const UnitWork& work, std::int64_t first, std::int64_t count, UnitMemory& memory) {
  Panel panel(work, first, count, memory.solution);
  panel.solve([&](const auto& body) {
    for (std::int64_t piece = 0; piece < panel.pieces(); ++piece) body(piece, memory.scratch);
  });
}

void prox_of_all_units(const UnitWork& work) {
  const UnitLayout& layout = work.layout;
  if (layout.size() == 0 || layout.count == 0) return;
  if (layout.size() <= kUnitElements) {
    const std::int64_t together = std::max<std::int64_t>(kUnitElements / layout.size(), 1);
    const std::int64_t panels = (layout.count + together - 1) / together;
    parallel_for(panels, [&](std::int64_t begin, std::int64_t end) {
      UnitMemory memory;
      for (std::int64_t i = begin; i < end; ++i) {
        prox_of_units(work, i * together, std::min(together, layout.count - i * together), memory);
      }
    });
    return;
  }
  // Units next to each other share lines of memory: as many as fill one are solved together.
  const std::int64_t together = std::min(std::max<std::int64_t>(16 / layout.run, 1), layout.count);
  UnitSolution solution;
  for (std::int64_t first = 0; first < layout.count; first += together) {
    Panel panel(work, first, std::min(together, layout.count - first), solution);
    panel.solve([&](const auto& body) {
      parallel_for(panel.pieces(), [&](std::int64_t begin, std::int64_t end) {
        UnitScratch scratch;
        for (std::int64_t piece = begin; piece < end; ++piece) body(piece, scratch);
      });
    });
  }
}

}  // namespace fusedreg::cpu
