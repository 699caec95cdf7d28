// What Python sees of the compiled code.
#include "cpu/plan.h"
#include "cpu/selection.h"
#include "plan/describe.h"
#include "plan/tables.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, module) {
  using fusedreg::Columns;
  using fusedreg::Tables;
  namespace cpu = fusedreg::cpu;
  module.doc() = "fusedreg's compiled kernels. Use the optimizers in fusedreg; this is their CPU backend.";

  py::class_<Columns>(module, "Columns")
      .def(py::init([](std::vector<std::string> field_names, py::list params, std::vector<int> groups,
                       py::list state_dicts, py::list states, py::list scalar_states, py::list positions,
                       py::dict optimizer_state, bool sharded) {
             return Columns{std::move(field_names), std::move(params),          std::move(groups),
                            std::move(state_dicts), std::move(states),          std::move(scalar_states),
                            std::move(positions),   std::move(optimizer_state), sharded};
           }),
           py::arg("field_names"), py::arg("params"), py::arg("groups"), py::arg("state_dicts"), py::arg("states"),
           py::arg("scalar_states"), py::arg("positions"), py::arg("optimizer_state"), py::arg("sharded"));

  py::class_<cpu::Plan>(module, "Plan")
      .def(py::init<const std::string&, const Columns&>(), py::arg("rule"), py::arg("columns"))
      .def("set_groups", &cpu::Plan::set_groups)
      .def("refresh", &cpu::Plan::refresh, py::arg("gradients") = py::none())
      .def("sum_of_squares", &cpu::Plan::sum_of_squares)
      .def("update", &cpu::Plan::update);

  py::class_<cpu::Selection>(module, "Selection")
      .def(py::init<const std::string&, const py::list&, bool>(), py::arg("rule"), py::arg("parameters"),
           py::arg("wide"))
      .def("count", &cpu::Selection::count)
      .def("count_positions", &cpu::Selection::count_positions)
      .def("largest", &cpu::Selection::largest)
      .def("zero", &cpu::Selection::zero);

  py::class_<Tables>(module, "Tables")
      .def(py::init([](const std::string& rule, const Columns& columns, bool scalars_on_host) {
             return std::make_unique<Tables>(fusedreg::find_rule(cpu::rules(), rule).info, columns, scalars_on_host);
           }),
           py::arg("rule"), py::arg("columns"), py::arg("scalars_on_host"))
      .def("set_groups", &Tables::set_groups)
      .def("refresh", &Tables::refresh, py::arg("gradients") = py::none())
      .def("tables", &Tables::tables)
      .def("move_scalar_states", &Tables::move_scalar_states)
      .def("finish_update", &Tables::finish_update);

  module.def("rules", [] { return fusedreg::describe(cpu::rules()); });

  module.def("instruction_sets", [] {
    std::vector<std::string> names;
    for (const auto& set : cpu::instruction_sets()) names.emplace_back(set.name);
    return names;
  });
  module.def("instruction_set", [] { return std::string(cpu::instruction_set().name); });
  module.def("use_instruction_set", [](const std::string& name) {
    if (!cpu::use_instruction_set(name)) throw std::invalid_argument("not usable here: " + name);
  });
}
