#include "graph_key.h"

#include <cstring>
#include <unordered_map>
#include <vector>

#include "../tensor_view.h"

namespace py = pybind11;

namespace dlms {
namespace {

constexpr int kCuda = 2;             // kDLCUDA
constexpr int kDepth = 6;            // nested containers of an attribute
constexpr int kObjectDepth = 2;      // how deep in them objects are looked into
constexpr Py_ssize_t kLongest = 512; // entries of a container that are looked at

enum Tag : char {
  kNone = 1,
  kBool,
  kInt,
  kFloat,
  kText,
  kBytes,
  kSequence,
  kMapping,
  kTensor,
  kModule,
  kFunction,
  kObject,
  kSeen,
  kLong, // a container too long to look at
  kDeep,
};

// What kind of object a type makes; types are looked at once.
enum class Kind {
  kPlainObject,
  kOpaque,
  kByAddress,
  kModule,
  kTensor,
  kFunction,
  kMethod,
  kByText
};

struct Types {
  PyTypeObject* module;
  PyTypeObject* tensor;
  std::unordered_map<PyTypeObject*, Kind> kinds; // under the GIL

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
  const py::object module =
      py::getattr(py::handle(reinterpret_cast<PyObject*>(type)), "__module__", py::str(""));
  const std::string from = py::isinstance<py::str>(module) ? std::string(py::str(module)) : "";
  const std::string name = type->tp_name;
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

// Addresses met so far: open addressing, since a large network has thousands of modules.
class Seen {
 public:
  bool insert(const void* pointer) {
    if (2 * (count_ + 1) > slots_.size()) grow();
    const bool fresh = place(pointer);
    count_ += fresh ? 1 : 0;
    return fresh;
  }

 private:
  bool place(const void* pointer) {
    const size_t mask = slots_.size() - 1;
    size_t at = (reinterpret_cast<uintptr_t>(pointer) >> 4) * 0x9E3779B97F4A7C15ull >> 20 & mask;
    while (slots_[at] != nullptr) {
      if (slots_[at] == pointer) return false;
      at = (at + 1) & mask;
    }
    slots_[at] = pointer;
    return true;
  }
  void grow() {
    std::vector<const void*> old(slots_.empty() ? 256 : slots_.size() * 4, nullptr);
    old.swap(slots_);
    for (const void* pointer : old)
      if (pointer != nullptr) place(pointer);
  }
  std::vector<const void*> slots_;
  size_t count_ = 0;
};

// Bytes written one after the other into memory that the thread keeps for its next key.
class Bytes {
 public:
  Bytes() : memory_(scratch()) {}
  template <class T>
  void put(const T& number) {
    put(&number, sizeof number);
  }
  // A tag and its value.
  template <class T>
  void put(char tag, const T& number) {
    char both[1 + sizeof number];
    both[0] = tag;
    std::memcpy(both + 1, &number, sizeof number);
    put(both, sizeof both);
  }
  void put(const void* data, size_t bytes) {
    if (memory_.size() - used_ < bytes) memory_.resize(2 * memory_.size() + bytes);
    std::memcpy(memory_.data() + used_, data, bytes);
    used_ += bytes;
  }
  std::string take() const { return std::string(memory_.data(), used_); }
  size_t size() const { return used_; }

 private:
  static std::vector<char>& scratch() {
    static thread_local std::vector<char> memory(1 << 14);
    return memory;
  }
  std::vector<char>& memory_;
  size_t used_ = 0;
};

class Writer {
 public:
  explicit Writer(std::pair<int, int> device) : device_(device) {}

  void value(PyObject* object, int depth);
  void input(PyObject* name, PyObject* tensor); // shape, dtype and device; the values are copied in
  void with_tensor_attributes(bool count) { tensor_attributes_ = count; }
  std::string take() const { return out_.take(); }
  size_t size() const { return out_.size(); }
  std::string stray; // the first parameter that is not on the run's device

 private:
  template <class T>
  void raw_number(const T& number) {
    out_.put(number);
  }
  void tag(Tag tag) { out_.put(tag); }
  void pointer(const void* pointer) { raw_number(pointer); }
  bool scalar(PyObject* object);
  void text(PyObject* object);
  void integer(PyObject* object);
  void sequence(PyObject* object, int depth);
  void mapping(PyObject* object, int depth);
  std::pair<int, int> tensor(PyObject* object);
  void function(PyObject* object, int depth);
  void object(PyObject* object, Kind kind, int depth);
  void module(PyObject* object);
  void attribute(PyObject* name, PyObject* object);
  void tensors(PyObject* dict, bool parameters);
  void children(PyObject* dict);
  void note_stray(PyObject* name);

  Bytes out_;
  Seen seen_;
  std::vector<PyObject*> path_; // names of the modules that are being looked at
  std::pair<int, int> device_;
  bool tensor_attributes_ = true;
};

void Writer::text(PyObject* object) {
  Py_ssize_t length = 0;
  const char* data = PyUnicode_AsUTF8AndSize(object, &length);
  if (data == nullptr) { // lone surrogates
    PyErr_Clear();
    tag(kObject);
    return pointer(object);
  }
  tag(kText);
  raw_number(length);
  out_.put(data, static_cast<size_t>(length));
}

void Writer::integer(PyObject* object) {
  int overflow = 0;
  const long long number = PyLong_AsLongLongAndOverflow(object, &overflow);
  if (overflow == 0) return out_.put(kInt, number);
  const py::str written{py::handle(object)};
  text(written.ptr());
}

void Writer::sequence(PyObject* object, int depth) {
  const bool tuple = PyTuple_Check(object);
  const Py_ssize_t size = tuple ? PyTuple_GET_SIZE(object) : PyList_GET_SIZE(object);
  tag(size > kLongest ? kLong : kSequence);
  raw_number(size);
  if (size > kLongest) return;
  for (Py_ssize_t i = 0; i < size; ++i) {
    PyObject* item = tuple ? PyTuple_GET_ITEM(object, i) : PyList_GET_ITEM(object, i);
    if (!scalar(item)) value(item, depth + 1);
  }
}

void Writer::mapping(PyObject* object, int depth) {
  const Py_ssize_t size = PyDict_GET_SIZE(object);
  tag(size > kLongest ? kLong : kMapping);
  raw_number(size);
  if (size > kLongest) return;
  PyObject *key = nullptr, *item = nullptr;
  Py_ssize_t position = 0;
  while (PyDict_Next(object, &position, &key, &item)) {
    value(key, depth + 1);
    value(item, depth + 1);
  }
}

// Returns where it lies.
std::pair<int, int> Writer::tensor(PyObject* item) {
  TensorPlace place;
  if (place_of(item, &place)) {
    struct {
      const void* data;
      uint32_t dtype;
      int32_t type, index, unused; // no padding: every byte counts
    } const packed = {place.data, place.dtype, place.device.first, place.device.second, 0};
    static_assert(sizeof packed == sizeof(void*) + 16, "padding would be compared");
    out_.put(kTensor, packed);
    return place.device;
  }
  const bool before = tensor_attributes_;
  tensor_attributes_ = true;
  object(item, Kind::kPlainObject, 1);
  tensor_attributes_ = before;
  const std::string there = py::str(py::handle(item).attr("device"));
  const std::string own =
      device_.first == kCuda ? "cuda:" + std::to_string(device_.second) : std::string("cpu");
  return there == own ? device_ : std::make_pair(-1, -1);
}

void Writer::input(PyObject* name, PyObject* item) {
  value(name, 0);
  RawTensor raw;
  if (!raw_tensor(item, &raw)) throw py::type_error("an input of the run is not a plain tensor");
  raw_number(raw.dtype);
  raw_number(raw.device);
  raw_number(raw.ndim);
  out_.put(raw.shape, sizeof(int64_t) * raw.ndim);
}

void Writer::function(PyObject* object, int depth) {
  tag(kFunction);
  pointer(PyFunction_GET_CODE(object));
  if (!seen_.insert(object)) return;
  for (PyObject* part : {PyFunction_GET_CLOSURE(object), PyFunction_GET_DEFAULTS(object),
           PyFunction_GET_KW_DEFAULTS(object)}) {
    if (part == nullptr) {
      tag(kNone);
    } else if (part == PyFunction_GET_CLOSURE(object)) {
      for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(part); ++i) {
        PyObject* inside = PyCell_GET(PyTuple_GET_ITEM(part, i));
        if (inside != nullptr) value(inside, depth + 1);
      }
    } else {
      value(part, depth + 1);
    }
  }
}

// An attention processor, an adapter's settings, a partial: its type and what it holds.
void Writer::object(PyObject* object, Kind kind, int depth) {
  tag(kObject);
  pointer(Py_TYPE(object));
  if (kind == Kind::kOpaque || depth > kObjectDepth || !seen_.insert(object)) return;
  const auto dict = py::reinterpret_steal<py::object>(PyObject_GenericGetDict(object, nullptr));
  if (!dict) return PyErr_Clear(); // an object without attributes of its own
  if (PyDict_Check(dict.ptr())) mapping(dict.ptr(), depth);
}

// The settings that most modules have: written at once. False: something else.
bool Writer::scalar(PyObject* item) {
  if (item == Py_None) {
    tag(kNone);
  } else if (item == Py_True || item == Py_False) {
    out_.put(kBool, static_cast<char>(item == Py_True));
  } else if (PyFloat_CheckExact(item)) {
    out_.put(kFloat, PyFloat_AS_DOUBLE(item));
  } else if (PyLong_CheckExact(item)) {
    integer(item);
  } else {
    return false;
  }
  return true;
}

void Writer::value(PyObject* item, int depth) {
  if (scalar(item)) return;
  if (PyLong_Check(item)) return integer(item);
  if (PyFloat_Check(item)) {
    tag(kFloat);
    return raw_number(PyFloat_AS_DOUBLE(item));
  }
  if (PyUnicode_Check(item)) return text(item);
  if (depth >= kDepth) return tag(kDeep);
  if (PyTuple_Check(item) || PyList_Check(item)) return sequence(item, depth);
  if (PyDict_Check(item)) return mapping(item, depth);
  if (PyBytes_Check(item)) {
    tag(kBytes);
    raw_number(PyBytes_GET_SIZE(item));
    out_.put(PyBytes_AS_STRING(item), static_cast<size_t>(PyBytes_GET_SIZE(item)));
    return;
  }
  const Kind kind = kind_of(item);
  switch (kind) {
    case Kind::kTensor:
      if (tensor_attributes_) tensor(item);
      return;
    case Kind::kModule: return module(item);
    case Kind::kFunction: return function(item, depth);
    case Kind::kMethod:
      tag(kFunction);
      pointer(PyMethod_GET_FUNCTION(item));
      return value(PyMethod_GET_SELF(item), depth + 1);
    case Kind::kByAddress: tag(kObject); return pointer(item);
    case Kind::kByText: return text(py::str(py::handle(item)).ptr());
    default: return object(item, kind, depth);
  }
}

void Writer::note_stray(PyObject* name) {
  if (!stray.empty()) return;
  for (PyObject* part : path_) stray += std::string(py::str(py::handle(part))) + ".";
  stray += std::string(py::str(py::handle(name)));
}

void Writer::tensors(PyObject* dict, bool parameters) {
  if (!PyDict_Check(dict)) return;
  const auto size = static_cast<uint32_t>(PyDict_GET_SIZE(dict));
  raw_number(size);
  if (size == 0) return;
  PyObject *name = nullptr, *item = nullptr;
  Py_ssize_t position = 0;
  while (PyDict_Next(dict, &position, &name, &item)) {
    if (item == Py_None) {
      tag(kNone);
      continue;
    }
    if (tensor(item) != device_ && parameters) note_stray(name);
  }
}

void Writer::children(PyObject* dict) {
  if (!PyDict_Check(dict)) return;
  const auto size = static_cast<uint32_t>(PyDict_GET_SIZE(dict));
  raw_number(size);
  if (size == 0) return;
  PyObject *name = nullptr, *item = nullptr;
  Py_ssize_t position = 0;
  while (PyDict_Next(dict, &position, &name, &item)) {
    path_.push_back(name);
    value(item, 0);
    path_.pop_back();
  }
}

// The attributes that every nn.Module has, told apart by the address of their interned names.
enum class Attribute { kOther, kParameters, kBuffers, kModules, kIgnored };

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

const Attributes& attributes() {
  static const Attributes* instance = new Attributes;
  return *instance;
}

void Writer::attribute(PyObject* name, PyObject* item) {
  const bool empty = PyDict_Check(item) && PyDict_GET_SIZE(item) == 0;
  if (empty) return; // most of a module's hooks
  if (PyUnicode_CHECK_INTERNED(name)) {
    pointer(name);
  } else {
    text(name);
  }
  if (!scalar(item)) value(item, 1);
}

void Writer::module(PyObject* object) {
  tag(kModule);
  pointer(Py_TYPE(object));
  if (!seen_.insert(object)) return tag(kSeen);
  const auto dict = py::reinterpret_steal<py::object>(PyObject_GenericGetDict(object, nullptr));
  if (!dict) return PyErr_Clear();
  const Attributes& known = attributes();
  PyObject *name = nullptr, *item = nullptr, *submodules = nullptr;
  Py_ssize_t position = 0;
  while (PyDict_Next(dict.ptr(), &position, &name, &item)) {
    switch (known.of(name)) {
      case Attribute::kParameters: tensors(item, true); break;
      case Attribute::kBuffers: tensors(item, false); break;
      case Attribute::kModules: submodules = item; break;
      case Attribute::kIgnored: break;
      case Attribute::kOther: attribute(name, item); break;
    }
  }
  if (submodules != nullptr) children(submodules);
}

} // namespace

KeyAnswer graph_key(uint64_t owner, const py::dict& inputs, py::handle options, py::handle modules,
    bool tensor_attributes) {
  const auto first = inputs.begin();
  RawTensor state;
  if (first == inputs.end() || !raw_tensor(first->second, &state))
    throw py::value_error("a run needs at least one input tensor");
  Writer writer(state.device);
  KeyAnswer answer;
  answer.key.owner = owner;
  const py::int_ number(owner);
  writer.value(number.ptr(), 0);
  for (const auto& [name, item] : inputs) writer.input(name.ptr(), item.ptr());
  writer.value(options.ptr(), 0);
  answer.key.coarse = writer.size();
  writer.with_tensor_attributes(tensor_attributes);
  for (const py::handle item : modules) {
    writer.value(item.ptr(), 0);
    if (answer.stray.empty() && item.is(modules[py::int_(0)])) answer.stray = writer.stray;
  }
  answer.key.bytes = writer.take();
  return answer;
}

} // namespace dlms
