// What Python sees of the compiled code: types and functions of positional arguments, in Python's limited C API.
#include <memory>
#include <new>

#include "cpu/plan.h"
#include "cpu/selection.h"
#include "plan/describe.h"
#include "plan/tables.h"
#include "plan/watch.h"

namespace fusedreg {

namespace {

// Runs body, which returns a new reference; an exception becomes Python's.
template <class Body>
PyObject* guarded(const Body& body) noexcept {
  try {
    return body().release();
  } catch (const PythonError&) {
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::out_of_range& error) {
    PyErr_SetString(PyExc_IndexError, error.what());
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

Object none() { return Object::share(Py_None); }

class Arguments {
 public:
  Arguments(PyObject* const* items, Py_ssize_t count, std::size_t wanted) : items_(items) {
    if (count == static_cast<Py_ssize_t>(wanted)) return;
    PyErr_Format(PyExc_TypeError, "%zd arguments where there are %zd", count, static_cast<Py_ssize_t>(wanted));
    throw PythonError();
  }
  PyObject* operator[](std::size_t i) const { return items_[i]; }

 private:
  PyObject* const* items_;
};

template <std::size_t kArguments, Object (*kBody)(const Arguments&)>
PyObject* function(PyObject*, PyObject* const* items, Py_ssize_t count) noexcept {
  return guarded([&] { return kBody(Arguments(items, count, kArguments)); });
}

// A Python object that owns one of ours.
template <class T>
struct Owner {
  PyObject_HEAD T* object;
};

template <class T, std::size_t kArguments, Object (*kBody)(T&, const Arguments&)>
PyObject* method(PyObject* self, PyObject* const* items, Py_ssize_t count) noexcept {
  return guarded(
      [&] { return kBody(*reinterpret_cast<Owner<T>*>(self)->object, Arguments(items, count, kArguments)); });
}

template <class T, std::unique_ptr<T> (*kMake)(PyObject* arguments)>
PyObject* make(PyTypeObject* type, PyObject* arguments, PyObject*) noexcept {
  return guarded([&] {
    std::unique_ptr<T> object = kMake(arguments);
    const auto allocate = reinterpret_cast<allocfunc>(PyType_GetSlot(type, Py_tp_alloc));
    Object owner = Object::own(allocate(type, 0));
    reinterpret_cast<Owner<T>*>(owner.get())->object = object.release();
    return owner;
  });
}

template <class T>
void destroy(PyObject* self) noexcept {
  PyTypeObject* const type = Py_TYPE(self);
  delete reinterpret_cast<Owner<T>*>(self)->object;
  reinterpret_cast<freefunc>(PyType_GetSlot(type, Py_tp_free))(self);
  Py_DECREF(reinterpret_cast<PyObject*>(type));
}

using Call = PyObject* (*)(PyObject*, PyObject* const*, Py_ssize_t);

PyMethodDef entry(const char* name, Call call) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(call)), METH_FASTCALL, nullptr};
}

template <class T, std::unique_ptr<T> (*kMake)(PyObject*)>
void add_type(PyObject* module, const char* full_name, const char* name, PyMethodDef* methods) {
  PyType_Slot slots[] = {{Py_tp_new, reinterpret_cast<void*>(make<T, kMake>)},
                         {Py_tp_dealloc, reinterpret_cast<void*>(destroy<T>)},
                         {Py_tp_methods, methods},
                         {0, nullptr}};
  PyType_Spec spec = {full_name, sizeof(Owner<T>), 0, Py_TPFLAGS_DEFAULT, slots};
  Object type = Object::own(PyType_FromSpec(&spec));
  if (PyModule_AddObject(module, name, type.get()) != 0) throw PythonError();
  type.release();
}

const RuleInfo& rule_info(PyObject* name) { return find_rule(cpu::rules(), to_string(name)).info; }

std::vector<std::vector<double>> groups_of(PyObject* groups) {
  return to_vector(groups, [](PyObject* fields) { return to_vector(fields, to_double); });
}

Object pair(Object first, Object second) { return Object::own(PyTuple_Pack(2, first.get(), second.get())); }

// Plan(rule, columns)

std::unique_ptr<cpu::Plan> make_plan(PyObject* arguments) {
  return std::make_unique<cpu::Plan>(to_string(tuple_item(arguments, 0)), Columns(tuple_item(arguments, 1)));
}

// Of a plan and of tables.
template <class T>
Object set_groups(T& self, const Arguments& arguments) {
  self.set_groups(groups_of(arguments[0]));
  return none();
}

template <class T>
Object refresh(T& self, const Arguments& arguments) {
  return to_python(self.refresh(arguments[0]));
}

Object sum_of_squares(cpu::Plan& self, const Arguments& arguments) {
  return to_python(self.sum_of_squares(to_double(arguments[0])));
}

Object update(cpu::Plan& self, const Arguments& arguments) {
  const auto to_key = [](PyObject* key) { return static_cast<std::uint32_t>(to_unsigned(key)); };
  const auto to_items = [](PyObject* two) { return std::make_pair(tuple_item(two, 0), tuple_item(two, 1)); };
  self.update(to_double(arguments[0]), to_double(arguments[1]), to_vector(arguments[2], to_key),
              to_vector(arguments[3], to_items));
  return none();
}

// Selection(rule, parameters, wide)

std::unique_ptr<cpu::Selection> make_selection(PyObject* arguments) {
  return std::make_unique<cpu::Selection>(to_string(tuple_item(arguments, 0)), tuple_item(arguments, 1),
                                          to_bool(tuple_item(arguments, 2)));
}

Object sample(cpu::Selection& self, const Arguments& arguments) {
  self.sample(arguments[0]);
  return none();
}

Object count(cpu::Selection& self, const Arguments& arguments) {
  self.count(static_cast<int>(to_int(arguments[0])), to_unsigned(arguments[1]), to_int(arguments[2]), arguments[3]);
  return none();
}

Object count_positions(cpu::Selection& self, const Arguments& arguments) {
  self.count_positions(to_unsigned(arguments[0]), static_cast<int>(to_int(arguments[1])), to_unsigned(arguments[2]),
                       arguments[3]);
  return none();
}

Object largest(cpu::Selection& self, const Arguments&) {
  Object found = Object::own(PyList_New(0));
  for (const auto& [key, position, place] : self.largest()) {
    const Object one =
        Object::own(PyTuple_Pack(3, to_python(key).get(), to_python(position).get(), to_python(place).get()));
    if (PyList_Append(found.get(), one.get()) != 0) throw PythonError();
  }
  return found;
}

Object zero(cpu::Selection& self, const Arguments& arguments) {
  self.zero(to_unsigned(arguments[0]), to_int(arguments[1]), to_vector(arguments[2], to_int));
  return none();
}

Object add_up(cpu::Selection& self, const Arguments& arguments) {
  self.add_up(static_cast<int>(to_int(arguments[0])), arguments[1]);
  return none();
}

// Tables(rule, columns, scalars_on_host)

std::unique_ptr<Tables> make_tables(PyObject* arguments) {
  return std::make_unique<Tables>(rule_info(tuple_item(arguments, 0)), Columns(tuple_item(arguments, 1)),
                                  to_bool(tuple_item(arguments, 2)));
}

Object tables(Tables& self, const Arguments&) {
  auto [rows, sets] = self.tables();
  return pair(std::move(rows), std::move(sets));
}

Object move_scalar_states(Tables& self, const Arguments&) {
  self.move_scalar_states();
  return none();
}

Object finish_update(Tables& self, const Arguments&) {
  self.finish_update();
  return none();
}

// Watch(attributes, empty, followed)

std::unique_ptr<Watch> make_watch(PyObject* arguments) {
  return std::make_unique<Watch>(tuple_item(arguments, 0), tuple_item(arguments, 1), tuple_item(arguments, 2));
}

Object look(Watch& self, const Arguments& arguments) {
  return to_python(static_cast<std::int64_t>(self.look(arguments[0])));
}

// Functions

Object rules(const Arguments&) { return describe(cpu::rules()); }

Object instruction_sets(const Arguments&) {
  std::vector<std::string> names;
  for (const auto& set : cpu::instruction_sets()) names.emplace_back(set.name);
  return to_python(names);
}

Object instruction_set(const Arguments&) { return to_python(std::string(cpu::instruction_set().name)); }

Object use_instruction_set(const Arguments& arguments) {
  const std::string name = to_string(arguments[0]);
  if (!cpu::use_instruction_set(name)) throw std::invalid_argument("not usable here: " + name);
  return none();
}

constexpr PyMethodDef kEnd = {nullptr, nullptr, 0, nullptr};

Object make_module() {
  prepare_torch();
  static PyMethodDef functions[] = {entry("rules", function<0, rules>),
                                    entry("instruction_sets", function<0, instruction_sets>),
                                    entry("instruction_set", function<0, instruction_set>),
                                    entry("use_instruction_set", function<1, use_instruction_set>), kEnd};
  static PyMethodDef of_plan[] = {entry("set_groups", method<cpu::Plan, 1, set_groups<cpu::Plan>>),
                                  entry("refresh", method<cpu::Plan, 1, refresh<cpu::Plan>>),
                                  entry("sum_of_squares", method<cpu::Plan, 1, sum_of_squares>),
                                  entry("update", method<cpu::Plan, 4, update>), kEnd};
  static PyMethodDef of_selection[] = {entry("sample", method<cpu::Selection, 1, sample>),
                                       entry("count", method<cpu::Selection, 4, count>),
                                       entry("count_positions", method<cpu::Selection, 4, count_positions>),
                                       entry("largest", method<cpu::Selection, 0, largest>),
                                       entry("zero", method<cpu::Selection, 3, zero>),
                                       entry("add_up", method<cpu::Selection, 2, add_up>),
                                       kEnd};
  static PyMethodDef of_tables[] = {entry("set_groups", method<Tables, 1, set_groups<Tables>>),
                                    entry("refresh", method<Tables, 1, refresh<Tables>>),
                                    entry("tables", method<Tables, 0, tables>),
                                    entry("move_scalar_states", method<Tables, 0, move_scalar_states>),
                                    entry("finish_update", method<Tables, 0, finish_update>),
                                    kEnd};
  static PyMethodDef of_watch[] = {entry("look", method<Watch, 1, look>), kEnd};
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT,
      "_C",
      "fusedreg's compiled kernels. Use the optimizers in fusedreg; this is their CPU backend.",
      -1,
      functions,
      nullptr,
      nullptr,
      nullptr,
      nullptr};
  Object module = Object::own(PyModule_Create(&definition));
  add_type<cpu::Plan, make_plan>(module.get(), "fusedreg._C.Plan", "Plan", of_plan);
  add_type<cpu::Selection, make_selection>(module.get(), "fusedreg._C.Selection", "Selection", of_selection);
  add_type<Tables, make_tables>(module.get(), "fusedreg._C.Tables", "Tables", of_tables);
  add_type<Watch, make_watch>(module.get(), "fusedreg._C.Watch", "Watch", of_watch);
  return module;
}

}  // namespace

}  // namespace fusedreg

PyMODINIT_FUNC PyInit__C() { return fusedreg::guarded(fusedreg::make_module); }
