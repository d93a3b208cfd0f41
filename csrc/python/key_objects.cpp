// What functions, methods and other objects hold.
#include <cstring>

#include "key_writer.h"

namespace py = pybind11;

namespace dlms {
namespace {

constexpr int kObjectDepth = 2;              // how deep in an attribute objects are looked into
constexpr Py_ssize_t kBuffer = 8 * kLongest; // bytes of an array

} // namespace

void Writer::function(PyObject* object, int depth) {
  auto* self = reinterpret_cast<PyFunctionObject*>(object);
  tag(kFunction);
  pointer(self->func_code);
  if (recipe_ != nullptr) {
    for (PyObject* const* part :
        {&self->func_code, &self->func_closure, &self->func_defaults, &self->func_kwdefaults})
      recipe_->slot(part);
  }
  if (!seen_.insert(object)) return;
  if (PyObject* closure = self->func_closure; closure == nullptr) {
    tag(kNone);
  } else {
    if (recipe_ != nullptr) recipe_->tuple(closure);
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(closure); ++i) {
      PyObject* const* item = reinterpret_cast<PyTupleObject*>(closure)->ob_item + i;
      PyObject* const* inside = &reinterpret_cast<PyCellObject*>(*item)->ob_ref;
      if (recipe_ != nullptr) recipe_->slot(item);
      if (recipe_ != nullptr && *inside == nullptr) recipe_->slot(inside);
      if (*inside != nullptr) value(*inside, depth + 1, inside);
    }
  }
  for (PyObject* const* part : {&self->func_defaults, &self->func_kwdefaults}) {
    if (*part == nullptr) {
      tag(kNone);
    } else {
      value(*part, depth + 1, part);
    }
  }
}

void Writer::method(PyObject* object, int depth) {
  auto* self = reinterpret_cast<PyMethodObject*>(object);
  tag(kFunction);
  pointer(self->im_func);
  if (recipe_ != nullptr) {
    recipe_->slot(&self->im_func);
    recipe_->slot(&self->im_self);
  }
  value(self->im_self, depth + 1, &self->im_self);
}

// An attention processor, an adapter's settings, a partial: its type and what it holds.
void Writer::object(PyObject* object, Kind kind, int depth) {
  tag(kObject);
  pointer(Py_TYPE(object));
  if (recipe_ != nullptr) recipe_->type(object);
  if (kind == Kind::kOpaque || depth > kObjectDepth || !seen_.insert(object)) return;
  members(object, depth);
  const auto dict = py::reinterpret_steal<py::object>(PyObject_GenericGetDict(object, nullptr));
  if (!dict) return PyErr_Clear(); // an object without attributes of its own
  if (!PyDict_Check(dict.ptr())) return impossible();
  if (recipe_ != nullptr) recipe_->holder(object, dict.ptr());
  mapping(dict.ptr(), depth);
}

void Writer::members(PyObject* object, int depth) {
  for (const auto& [offset, descriptor] : members_of(Py_TYPE(object))) {
    if (descriptor == nullptr) {
      auto* where = reinterpret_cast<PyObject* const*>(reinterpret_cast<char*>(object) + offset);
      if (*where != nullptr) {
        value(*where, depth + 1, where);
        continue;
      }
      tag(kNone);
      if (recipe_ != nullptr) recipe_->slot(where);
      continue;
    }
    impossible(); // a number that may change in its place
    const auto item = py::reinterpret_steal<py::object>(Py_TYPE(descriptor)
            ->tp_descr_get(descriptor, object, reinterpret_cast<PyObject*>(Py_TYPE(object))));
    if (!item || !number_or_text(item.ptr())) PyErr_Clear();
  }
}

// Copied first: no code of the items runs.
void Writer::items(PyObject* object, int depth) {
  tag(kItems);
  impossible();
  const auto copied = py::reinterpret_steal<py::object>(PySequence_Tuple(object));
  if (!copied) return PyErr_Clear();
  sequence(copied.ptr(), depth, true);
}

void Writer::buffer(PyObject* object) {
  tag(kBytes);
  impossible();
  Py_buffer view;
  if (PyObject_GetBuffer(object, &view, PyBUF_FULL_RO) != 0) { // of objects, or of dates
    PyErr_Clear();
    return pointer(object);
  }
  raw_number(view.len);
  for (int i = 0; i < view.ndim; ++i) raw_number(view.shape[i]);
  if (view.format != nullptr) out_->put(view.format, std::strlen(view.format));
  std::string bytes(view.len <= kBuffer ? static_cast<size_t>(view.len) : 0, '\0');
  if (bytes.empty()) {
    pointer(view.buf);
  } else if (PyBuffer_ToContiguous(bytes.data(), &view, view.len, 'C') != 0) {
    PyErr_Clear();
  }
  out_->put(bytes.data(), bytes.size());
  PyBuffer_Release(&view);
}

} // namespace dlms
