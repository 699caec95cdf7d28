// What Python sees of the CUDA kernels: their launches, with addresses as numbers. fusedreg/backends/device_plan.py
// makes the tables, and holds the memory. It knows nothing of torch, so that it builds in seconds.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>

#include "../maths/units.h"
#include "../plan/describe.h"
#include "kernels.h"

namespace py = pybind11;

namespace fusedreg::cuda {

namespace {

const std::vector<const Rule*>& rules() {
#define FUSEDREG_RULE(header, Struct) &rule_##header(),
  static const std::vector<const Rule*> all = {FUSEDREG_RULES(FUSEDREG_RULE)};
#undef FUSEDREG_RULE
  return all;
}

using Address = std::uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

using Numbers = const std::int64_t;

// Launches, unless somebody else's error is there: then nothing of this call was done.
template <class Launch>
void launch(Launch&& launch) {
  const int earlier = take_earlier_error();
  if (earlier != 0) {
    throw std::runtime_error(std::string("a CUDA call before fusedreg's has failed, and nobody has looked: ") +
                             error_string(earlier));
  }
  const int error = launch();
  if (error != 0) throw std::runtime_error(std::string("fusedreg: a CUDA launch failed: ") + error_string(error));
}

Scalars scalars_of(const RuleInfo& rule, Address scalars) {
  return {at<Numbers>(scalars), static_cast<int>(rule.fields.size())};
}

void squares(const std::string& rule, int dtype, bool aligned, Address rows, std::int64_t row_count, Address chunks,
             std::int64_t chunk_count, Address sets, Address scalars, Address partial_sums, int blocks,
             Address stream) {
  const RuleInfo& info = find_rule(rules(), rule).info;
  SquaresArgs args;
  args.rows = {at<Numbers>(rows), row_count};
  args.chunks = {at<Numbers>(chunks), chunk_count, aligned};
  args.sets = at<Numbers>(sets);
  args.scalars = scalars_of(info, scalars);
  const auto clip_value = std::find(info.fields.begin(), info.fields.end(), "clip_value");
  args.clip_value = static_cast<int>(clip_value - info.fields.begin());
  args.partial_sums = at<double>(partial_sums);
  launch([&] { return launch_squares(static_cast<DType>(dtype), args, blocks, at<void>(stream)); });
}

void prepare(const std::string& rule, Address sets, std::int64_t set_count, Address scalars, Address constants,
             Address squares, std::int64_t square_count, Address norm, Address stream) {
  const Rule& kernels = find_rule(rules(), rule);
  PrepareArgs args;
  args.sets = at<Numbers>(sets);
  args.set_count = set_count;
  args.scalars = scalars_of(kernels.info, scalars);
  args.prepared = at<void>(constants);
  args.squares = at<const double>(squares);
  args.square_count = square_count;
  args.norm = at<double>(norm);
  launch([&] { return kernels.prepare(args, at<void>(stream)); });
}

const Rule& find_rule_with(const std::string& rule, StateMask states) {
  const Rule& kernels = find_rule(rules(), rule);
  const std::vector<StateMask>& variants = kernels.info.variants;
  if (std::find(variants.begin(), variants.end(), states) == variants.end()) {
    throw std::invalid_argument("the rule '" + rule + "' has no kernel for these states together");
  }
  return kernels;
}

void update(const std::string& rule, int dtype, StateMask states, bool aligned, Address rows, std::int64_t row_count,
            Address chunks, std::int64_t chunk_count, Address constants, Address stream) {
  const Rule& kernels = find_rule_with(rule, states);
  UpdateArgs args;
  args.rows = {at<Numbers>(rows), row_count};
  args.chunks = {at<Numbers>(chunks), chunk_count, aligned};
  args.prepared = at<const void>(constants);
  launch([&] { return kernels.update(static_cast<DType>(dtype), states, args, at<void>(stream)); });
}

void units(const std::string& rule, int dtype, StateMask states, Address rows, std::int64_t row_count,
           Address constants, Address layouts, Address items, std::int64_t item_count, Address scratch, int pass,
           Address stream) {
  const Rule& kernels = find_rule_with(rule, states);
  UnitsArgs args;
  args.rows = {at<Numbers>(rows), row_count};
  args.prepared = at<const void>(constants);
  args.layouts = at<Numbers>(layouts);
  args.items = at<Numbers>(items);
  args.item_count = item_count;
  args.scratch = at<double>(scratch);
  args.pass = pass;
  launch([&] { return kernels.units(static_cast<DType>(dtype), states, args, at<void>(stream)); });
}

py::dict numbers(std::initializer_list<std::pair<const char*, std::int64_t>> pairs) {
  py::dict dict;
  for (const auto& [name, number] : pairs) dict[name] = number;
  return dict;
}

}  // namespace

}  // namespace fusedreg::cuda

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  using namespace fusedreg;
  using namespace fusedreg::cuda;
  module.doc() = "fusedreg's CUDA kernels. Use the optimizers in fusedreg; this is their CUDA backend.";

  module.def("squares", &squares);
  module.def("prepare", &prepare);
  module.def("update", &update);
  module.def("units", &units);
  module.def("constants_width", [](const std::string& rule) {  // float64 numbers
    return find_rule(rules(), rule).prepared_size / static_cast<int>(sizeof(double));
  });

  module.def("rules", [] { return py::reinterpret_steal<py::object>(describe(rules()).release()); });

  // As `squares`, `update` and `units` take them.
  module.attr("DTYPES") = numbers({{"float32", static_cast<int>(DType::kFloat32)},
                                   {"float64", static_cast<int>(DType::kFloat64)},
                                   {"bfloat16", static_cast<int>(DType::kBFloat16)},
                                   {"float16", static_cast<int>(DType::kFloat16)}});

  // The format of the tables, by its names in fusedreg/backends: a test compares.
  module.attr("FORMAT") = numbers({{"VALUE", kValue},
                                   {"FLOAT32_AT", kFloat32At},
                                   {"FLOAT64_AT", kFloat64At},
                                   {"FLOAT32_VALUE", kFloat32Value},
                                   {"W", kW},
                                   {"G", kG},
                                   {"STATE", kState},
                                   {"NUMEL", kNumel},
                                   {"SET", kSet},
                                   {"ROW_COLUMNS", kRowColumns},
                                   {"SET_WIDTH", kSetWidth},
                                   {"GRAD_SCALE", kGradScale},
                                   {"FOUND_INF", kFoundInf},
                                   {"MAX_GRAD_NORM", kMaxGradNorm},
                                   {"STEP_SCALARS", kStepScalars},
                                   {"CHUNK", kChunkElements},
                                   {"SUMS_PER_MULTIPROCESSOR", kSquaresPerMultiprocessor},
                                   {"LAYOUT_WIDTH", kUnitLayoutWidth},
                                   {"ITEM_WIDTH", kUnitItemWidth},
                                   {"UNIT_SUMS", kUnitSums},
                                   {"ROOT_WIDTH", kUnitRootWidth},
                                   {"WHOLE", kUnitsWhole},
                                   {"PASSES", kUnitPasses},
                                   {"THREADS", kThreads}});
}
