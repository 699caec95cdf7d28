// What Python sees of the CUDA driver.
#include "plan.h"

namespace py = pybind11;

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  namespace cuda = fusedreg::cuda;
  module.doc() = "fusedreg's CUDA kernels. Use the optimizers in fusedreg; this is their CUDA backend.";

  py::class_<cuda::Step>(module, "Step")
      .def(py::init<>())
      .def_readwrite("stream", &cuda::Step::stream)
      .def_readwrite("capturing", &cuda::Step::capturing)
      .def_readwrite("inv_grad_scale", &cuda::Step::inv_grad_scale)
      .def_readwrite("grad_scale", &cuda::Step::grad_scale)
      .def_readwrite("found_inf", &cuda::Step::found_inf);

  py::class_<cuda::Plan>(module, "Plan")
      .def(py::init<const std::string&, const py::list&, const std::vector<int>&, const py::list&, const py::list&,
                    const py::dict&, bool>(),
           py::arg("rule"), py::arg("params"), py::arg("groups"), py::arg("states"), py::arg("clocks"),
           py::arg("optimizer_state"), py::arg("host_clocks"))
      .def("set_groups", &cuda::Plan::set_groups)
      .def("refresh", &cuda::Plan::refresh)
      .def("sum_of_squares", &cuda::Plan::sum_of_squares)
      .def("update", &cuda::Plan::update);

  module.def("scalar_names",
             [](const std::string& rule) { return fusedreg::scalar_names(fusedreg::rule_index(rule)); });
}
