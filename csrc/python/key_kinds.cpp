#include "key_kinds.h"

#include <structmember.h>

#include <cstring>
#include <string>
#include <unordered_map>

namespace py = pybind11;

namespace dlms {
namespace {

struct Types {
  PyTypeObject* module;
  PyTypeObject* tensor;
  std::unordered_map<PyTypeObject*, Kind> kinds; // under the GIL
  std::unordered_map<PyTypeObject*, std::vector<Member>> members;

  Types() {
    module = type("torch.nn", "Module");
    tensor = type("torch", "Tensor");
  }
  static PyTypeObject* type(const char* from, const char* name) {
    // Kept for the life of the process, like the module itself.
    return reinterpret_cast<PyTypeObject*>(
        py::object(py::module_::import(from).attr(name)).release().ptr());
  }
};

Types& types() {
  static Types* instance = new Types;
  return *instance;
}

bool starts_with(const std::string& text, const char* start) {
  return text.compare(0, std::strlen(start), start) == 0;
}

Kind look_at(PyTypeObject* type) {
  const Types& known = types();
  if (PyType_IsSubtype(type, known.tensor)) return Kind::kTensor;
  if (PyType_IsSubtype(type, known.module)) return Kind::kModule;
  if (type == &PyFunction_Type) return Kind::kFunction;
  if (type == &PyMethod_Type) return Kind::kMethod;
  // What follows every batch and reaches a graph as its inputs says so itself.
  if (py::hasattr(py::handle(reinterpret_cast<PyObject*>(type)), "_outside_graph_keys"))
    return Kind::kOpaque;
  const py::object module =
      py::getattr(py::handle(reinterpret_cast<PyObject*>(type)), "__module__", py::str(""));
  const std::string from = py::isinstance<py::str>(module) ? std::string(py::str(module)) : "";
  const std::string name = type->tp_name;
  if (type == &PySet_Type || type == &PyFrozenSet_Type || name == "collections.deque")
    return Kind::kUnordered;
  if (type->tp_as_buffer != nullptr && type->tp_as_buffer->bf_getbuffer != nullptr &&
      (type == &PyByteArray_Type || from == "array" || starts_with(from, "numpy")))
    return Kind::kBuffer;
  if (type == &PyComplex_Type || type == &PyRange_Type || type == &PySlice_Type)
    return Kind::kPlainObject; // by what they hold
  if (name == "torch.device") return Kind::kByText;
  if (name == "torch.dtype" || name == "torch.layout" || name == "torch.memory_format" ||
      from == "builtins" || PyType_IsSubtype(type, &PyType_Type))
    return Kind::kByAddress; // there is one of each, or it is a function or class
  // torch's own objects (hooks' handles, compiled code, locks) hold no settings of a network, but
  // some change in every call.
  if (from == "torch" || starts_with(from, "torch.") || starts_with(from, "_"))
    return Kind::kOpaque;
  return Kind::kPlainObject;
}

std::vector<Member> look_for_members(PyTypeObject* type) {
  std::vector<Member> found;
  for (const py::handle base : py::handle(reinterpret_cast<PyObject*>(type)).attr("__mro__"))
    for (const auto& [name, item] : py::dict(base.attr("__dict__"))) {
      if (!PyObject_TypeCheck(item.ptr(), &PyMemberDescr_Type)) continue;
      if (starts_with(py::str(name), "__")) continue; // of the interpreter
      const PyMemberDef* field = reinterpret_cast<PyMemberDescrObject*>(item.ptr())->d_member;
      const bool reference = field->type == T_OBJECT || field->type == T_OBJECT_EX;
      found.push_back({field->offset, reference ? nullptr : item.inc_ref().ptr()});
    }
  return found;
}

// Told apart by the address of their interned names.
class Attributes {
 public:
  Attributes() {
    add("_parameters", Attribute::kParameters);
    add("_buffers", Attribute::kBuffers);
    add("_modules", Attribute::kModules);
    // Saving and loading, and backward: a run without gradients does neither.
    for (const char* name : {"_non_persistent_buffers_set", "_backward_pre_hooks",
             "_backward_hooks", "_is_full_backward_hook", "_state_dict_hooks",
             "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"})
      add(name, Attribute::kIgnored);
  }
  Attribute of(PyObject* name) const {
    for (size_t at = place(name); slots_[at].name != nullptr; at = (at + 1) % kSlots)
      if (slots_[at].name == name) return slots_[at].attribute;
    if (PyUnicode_CHECK_INTERNED(name)) return Attribute::kOther;
    for (const Slot& slot : slots_) // a name that came out of a pickle
      if (slot.name != nullptr && PyUnicode_Compare(slot.name, name) == 0) return slot.attribute;
    return Attribute::kOther;
  }

 private:
  static constexpr size_t kSlots = 64;
  struct Slot {
    PyObject* name = nullptr;
    Attribute attribute = Attribute::kOther;
  };
  static size_t place(const void* pointer) {
    return (reinterpret_cast<uintptr_t>(pointer) >> 4) * 0x9E3779B97F4A7C15ull >> 58;
  }
  void add(const char* text, Attribute attribute) {
    PyObject* name = PyUnicode_InternFromString(text);
    size_t at = place(name);
    while (slots_[at].name != nullptr) at = (at + 1) % kSlots;
    slots_[at] = {name, attribute};
  }
  Slot slots_[kSlots];
};

} // namespace

Kind kind_of(PyObject* object) {
  PyTypeObject* type = Py_TYPE(object);
  auto& kinds = types().kinds;
  const auto found = kinds.find(type);
  if (found != kinds.end()) return found->second;
  const Kind kind = look_at(type);
  Py_INCREF(type); // the address must not become another type's
  kinds.emplace(type, kind);
  return kind;
}

const std::vector<Member>& members_of(PyTypeObject* type) {
  auto& members = types().members; // kind_of() keeps the type
  const auto found = members.find(type);
  if (found != members.end()) return found->second;
  return members.emplace(type, look_for_members(type)).first->second;
}

Attribute attribute_of(PyObject* name) {
  static const Attributes* instance = new Attributes;
  return instance->of(name);
}

} // namespace dlms
