#include "key_writer.h"

#include "../tensor_view.h"

namespace py = pybind11;

namespace dlms {
namespace {

constexpr int kCpu = 1;   // kDLCPU
constexpr int kCuda = 2;  // kDLCUDA
constexpr int kDepth = 6; // nested containers of an attribute

} // namespace

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
  out_->put(data, static_cast<size_t>(length));
}

void Writer::integer(PyObject* object) {
  int overflow = 0;
  const long long number = PyLong_AsLongLongAndOverflow(object, &overflow);
  if (overflow == 0) return out_->put(kInt, number);
  const py::str written{py::handle(object)};
  text(written.ptr());
}

// held: a versioned dict or a tuple in one holds it, so that a tuple is what it was.
void Writer::sequence(PyObject* object, int depth, bool held) {
  const bool tuple = PyTuple_Check(object);
  const Py_ssize_t size = tuple ? PyTuple_GET_SIZE(object) : PyList_GET_SIZE(object);
  tag(size > kLongest ? kLong : kSequence);
  raw_number(size);
  if (recipe_ != nullptr && !tuple) recipe_->list(object);
  if (recipe_ != nullptr && tuple && !held) recipe_->tuple(object);
  if (size > kLongest) return;
  PyObject* const* items = tuple ? reinterpret_cast<PyTupleObject*>(object)->ob_item
                                 : reinterpret_cast<PyListObject*>(object)->ob_item;
  for (Py_ssize_t i = 0; i < size; ++i) {
    if (!tuple && (PyList_GET_SIZE(object) != size ||
                      reinterpret_cast<PyListObject*>(object)->ob_item != items))
      return impossible(); // code that an item's type ran has changed it
    value(items[i], depth + 1, tuple && held ? nullptr : items + i);
  }
}

void Writer::mapping(PyObject* object, int depth) {
  const Py_ssize_t size = PyDict_GET_SIZE(object);
  tag(size > kLongest ? kLong : kMapping);
  raw_number(size);
  if (recipe_ != nullptr) recipe_->dict(object);
  if (size > kLongest) return;
  PyObject *key = nullptr, *item = nullptr;
  Py_ssize_t position = 0;
  while (PyDict_Next(object, &position, &key, &item)) {
    const auto kept = py::reinterpret_borrow<py::object>(item); // whatever looking at the key does
    value(key, depth + 1);
    value(item, depth + 1);
  }
}

bool Writer::place(PyObject* item, bool parameter) {
  RawTensor place;
  if (!raw_tensor(item, &place)) return false;
  struct {
    const void* data;
    uint64_t layout;
    uint32_t dtype;
    int32_t type, index, unused; // no padding: every byte counts
  } const packed = {
      place.data, place.layout, place.dtype, place.device.first, place.device.second, 0};
  static_assert(sizeof packed == sizeof(void*) + 24, "padding would be compared");
  moving.put(packed);
  // The host reads it where it launches a kernel: a graph has frozen the number. Its storage may
  // have been given back.
  if (place.ndim == 0 && place.device.first == kCpu && place.data != nullptr)
    moving.put(place.data, place.bytes);
  return !parameter || place.device == device_;
}

// Returns where it lies.
std::pair<int, int> Writer::tensor(PyObject* item, bool parameter) {
  TensorPlace at;
  if (place_of(item, &at)) {
    tag(kTensor);
    place(item, parameter);
    if (recipe_ != nullptr) recipe_->tensor(item, parameter && first_);
    return at.device;
  }
  impossible(); // a subclass that wraps others
  const bool before = tensor_attributes_;
  tensor_attributes_ = true;
  object(item, Kind::kPlainObject, 1);
  tensor_attributes_ = before;
  const std::string there = py::str(py::handle(item).attr("device"));
  const std::string own =
      device_.first == kCuda ? "cuda:" + std::to_string(device_.second) : std::string("cpu");
  return there == own ? device_ : std::make_pair(-1, -1);
}

void Writer::root(PyObject* object, bool first) {
  first_ = first;
  if (recipe_ != nullptr) recipe_->type(object);
  value(object, 0);
}

void Writer::input(PyObject* name, PyObject* item) {
  value(name, 0);
  RawTensor raw;
  if (!raw_tensor(item, &raw)) throw py::type_error("an input of the run is not a plain tensor");
  raw_number(raw.dtype);
  raw_number(raw.device);
  raw_number(raw.ndim);
  out_->put(raw.shape, sizeof(int64_t) * raw.ndim);
}

// The settings that most modules have: written at once. False: something else.
bool Writer::scalar(PyObject* item) {
  if (item == Py_None) {
    tag(kNone);
  } else if (item == Py_True || item == Py_False) {
    out_->put(kBool, static_cast<char>(item == Py_True));
  } else if (PyFloat_CheckExact(item)) {
    out_->put(kFloat, PyFloat_AS_DOUBLE(item));
  } else if (PyLong_CheckExact(item)) {
    integer(item);
  } else {
    return false;
  }
  return true;
}

bool Writer::number_or_text(PyObject* item) {
  if (scalar(item)) return true;
  if (PyLong_Check(item)) {
    integer(item);
  } else if (PyFloat_Check(item)) {
    tag(kFloat);
    raw_number(PyFloat_AS_DOUBLE(item));
  } else if (PyUnicode_Check(item)) {
    text(item);
  } else if (PyBytes_Check(item)) {
    tag(kBytes);
    raw_number(PyBytes_GET_SIZE(item));
    out_->put(PyBytes_AS_STRING(item), static_cast<size_t>(PyBytes_GET_SIZE(item)));
  } else {
    return false;
  }
  return true;
}

bool Writer::plain(PyObject* item) {
  out_ = &moving;
  // Subclasses of numbers may run code of their own where they are written.
  const bool exact = PyUnicode_CheckExact(item) || PyBytes_CheckExact(item);
  const bool written = scalar(item) || (exact && number_or_text(item));
  out_ = &settled;
  return written;
}

void Writer::value(PyObject* item, int depth, PyObject* const* where) {
  if (where == nullptr) {
    if (number_or_text(item)) return;
  } else if (plain(item)) {
    tag(kPlain);
    if (recipe_ != nullptr) recipe_->plain(where);
    return;
  } else {
    if (recipe_ != nullptr) {
      recipe_->slot(where);
      recipe_->type(item);
    }
    if (number_or_text(item)) return impossible();
  }
  if (depth >= kDepth) return tag(kDeep);
  // Types run code of their own where they are looked at, and other threads may run in it: what
  // holds the object may let it go.
  const auto kept = py::reinterpret_borrow<py::object>(item);
  if (PyTuple_Check(item) || PyList_Check(item)) return sequence(item, depth, where == nullptr);
  if (PyDict_Check(item)) return mapping(item, depth);
  const Kind kind = kind_of(item);
  switch (kind) {
    case Kind::kTensor:
      if (tensor_attributes_) tensor(item, false);
      return;
    case Kind::kModule: return module(item);
    case Kind::kFunction: return function(item, depth);
    case Kind::kMethod: return method(item, depth);
    case Kind::kByAddress: tag(kObject); return pointer(item);
    case Kind::kUnordered: return items(item, depth);
    case Kind::kBuffer: return buffer(item);
    case Kind::kByText:
      if (where != nullptr) impossible();
      return text(py::str(py::handle(item)).ptr());
    default: return object(item, kind, depth);
  }
}

void Writer::note_stray(PyObject* name) {
  if (!stray.empty()) return;
  for (PyObject* part : path_) stray += std::string(py::str(py::handle(part))) + ".";
  stray += std::string(py::str(py::handle(name)));
}

template <class Each>
void Writer::entries(PyObject* dict, Each each) {
  if (!PyDict_Check(dict)) return;
  raw_number(static_cast<uint32_t>(PyDict_GET_SIZE(dict)));
  if (recipe_ != nullptr) recipe_->dict(dict);
  const auto kept = py::reinterpret_borrow<py::object>(dict);
  PyObject *name = nullptr, *item = nullptr;
  Py_ssize_t position = 0;
  while (PyDict_Next(dict, &position, &name, &item)) {
    const auto kept_name = py::reinterpret_borrow<py::object>(name);
    const auto kept_item = py::reinterpret_borrow<py::object>(item);
    each(name, item);
  }
}

void Writer::tensors(PyObject* dict, bool parameters) {
  entries(dict, [&](PyObject* name, PyObject* item) {
    if (item == Py_None) return tag(kNone);
    if (tensor(item, parameters) != device_ && parameters) note_stray(name);
  });
}

void Writer::children(PyObject* dict) {
  entries(dict, [&](PyObject* name, PyObject* item) {
    path_.push_back(name);
    value(item, 0);
    path_.pop_back();
  });
}

void Writer::attribute(PyObject* name, PyObject* item) {
  if (PyDict_Check(item) && PyDict_GET_SIZE(item) == 0) { // most of a module's hooks
    if (recipe_ != nullptr) recipe_->dict(item);
    return;
  }
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
  if (!dict) {
    impossible();
    return PyErr_Clear();
  }
  if (recipe_ != nullptr) recipe_->holder(object, dict.ptr());
  PyObject *name = nullptr, *item = nullptr;
  py::object submodules;
  Py_ssize_t position = 0;
  while (PyDict_Next(dict.ptr(), &position, &name, &item)) {
    switch (attribute_of(name)) {
      case Attribute::kParameters: tensors(item, true); break;
      case Attribute::kBuffers: tensors(item, false); break;
      case Attribute::kModules: submodules = py::reinterpret_borrow<py::object>(item); break;
      case Attribute::kIgnored: break;
      case Attribute::kOther: attribute(name, item); break;
    }
  }
  if (submodules) children(submodules.ptr());
}

} // namespace dlms
