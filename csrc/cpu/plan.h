// The CPU backend's plan: a parameter list with its work cut into chunks, and a kernel for each parameter.
#pragma once

#include <optional>

#include "../plan/parameters.h"
#include "parallel.h"
#include "units.h"

namespace fusedreg::cpu {

class Plan : public Parameters {
 public:
  Plan(const std::string& rule, const Columns& columns);

  void set_groups(const std::vector<std::vector<double>>& groups);

  // Reads the gradients. False: something that the plan rests on has changed, nothing was touched.
  bool refresh(PyObject* gradients);

  // Sum of squares of the gradients after stages 1 and 2, in a fixed order.
  double sum_of_squares(double inv_grad_scale);

  // Stages 1 to 7 for every parameter with a gradient. `rounding_keys`: of the groups, for this step's stochastic
  // rounding; empty where nobody rounds so. `next_seeds`: groups and what their seeds then are, set in here so that no
  // signal comes between.
  void update(double inv_grad_scale, double clip_coef, const std::vector<std::uint32_t>& rounding_keys,
              const Items& next_seeds);

 private:
  struct Work {  // of one entry
    UpdateKernel update = nullptr;
    SquaresKernel squares = nullptr;
    DTypes dtypes;
    const void* constants = nullptr;
    bool has_units = false;
    std::int64_t whole = 1;  // elements that no chunk cuts: a unit's, where it is one run in memory and small
    double tau = 0;
    Rounding rounding;
    std::optional<bool> places_as_stored;  // whether rounding.positions are those of the parameter's layout, if of any
  };

  // Long enough for other threads to run Python meanwhile: to let them costs more than a few small tensors.
  bool takes_long() const { return work_list_.elements() > kSerialElements; }

  // Says what the streams' dtypes are.
  void take_dtypes(std::size_t entry);

  // Chooses the kernel of the norm, which reads the gradient.
  void choose_squares(std::size_t entry);

  // Cuts the parameters into chunks.
  void make_work_list();

  UnitLayout layout_of_units(const Entry& entry) const;
  UnitWork unit_work(std::size_t entry) const;

  // Stages 1 to 6 of a chunk, and stage 7 where its units are in it whole, a cache's worth at a time.
  void update_chunk(const Chunk& chunk, UnitMemory& memory) const;

  // Fills the constants of every parameter with a gradient, and moves its scalar states on.
  void prepare(double inv_grad_scale, double clip_coef);

  void prepare_rounding(const std::vector<std::uint32_t>& keys);

  const Rule& kernels_;
  WorkList work_list_{kChunkElements};
  std::vector<Work> work_;
  std::vector<CommonHyperparameters> common_;  // of the groups
  std::vector<Penalties> penalties_;           // likewise
  std::size_t constants_stride_;
  std::vector<std::max_align_t> constants_;  // a scalar set after the other
  std::vector<double> partial_sums_;
  bool has_read_gradients_ = false;      // since the last update
  std::vector<UnitMemory> unit_memory_;  // of the threads
};

}  // namespace fusedreg::cpu
