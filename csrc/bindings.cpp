// What Python sees of the compiled code.
#include "cpu/plan.h"
#include "plan/tables.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, module) {
  namespace cpu = fusedreg::cpu;
  module.doc() = "fusedreg's compiled kernels. Use the optimizers in fusedreg; this is their CPU backend.";

  py::class_<cpu::Plan>(module, "Plan")
      .def(py::init<const std::string&, const py::list&, const std::vector<int>&, const py::list&, const py::list&,
                    const py::dict&>(),
           py::arg("rule"), py::arg("params"), py::arg("groups"), py::arg("states"), py::arg("clocks"),
           py::arg("optimizer_state"))
      .def("set_groups", &cpu::Plan::set_groups)
      .def("refresh", &cpu::Plan::refresh)
      .def("sum_of_squares", &cpu::Plan::sum_of_squares)
      .def("update", &cpu::Plan::update);

  py::class_<fusedreg::Tables>(module, "Tables")
      .def(py::init<const std::string&, const py::list&, const std::vector<int>&, const py::list&, const py::list&,
                    const py::dict&, bool>(),
           py::arg("rule"), py::arg("params"), py::arg("groups"), py::arg("states"), py::arg("clocks"),
           py::arg("optimizer_state"), py::arg("host_clocks"))
      .def("set_groups", &fusedreg::Tables::set_groups)
      .def("refresh", &fusedreg::Tables::refresh)
      .def("tables", &fusedreg::Tables::tables)
      .def("move_clocks", &fusedreg::Tables::move_clocks)
      .def("finish_update", &fusedreg::Tables::finish_update);

  module.def("rules", [] {
    py::dict rules;
    for (int i = 0; i < fusedreg::Rules::kSize; ++i) {
      fusedreg::Rules::visit(i, [&](auto host) {
        py::dict rule;
        rule["state_names"] = fusedreg::state_names(i);
        rule["scalars"] = fusedreg::scalar_names(i);
        rules[decltype(host)::kName] = rule;
      });
    }
    return rules;
  });

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
