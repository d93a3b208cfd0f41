#include "tensor_view.h"

#include <ATen/dlpack.h>

#include <sstream>
#include <utility>

namespace py = pybind11;

namespace dlms {
namespace {

struct Torch {
  PyTypeObject* tensor_type = nullptr;
  PyTypeObject* parameter_type = nullptr;
  const DLPackExchangeAPI* api = nullptr;

  Torch() {
    // Kept for the life of the process, like the torch module itself.
    const py::object type = py::module_::import("torch").attr("Tensor");
    tensor_type = reinterpret_cast<PyTypeObject*>(type.inc_ref().ptr());
    const py::object parameter = py::module_::import("torch.nn").attr("Parameter");
    parameter_type = reinterpret_cast<PyTypeObject*>(parameter.inc_ref().ptr());
    if (!py::hasattr(type, "__dlpack_c_exchange_api__"))
      throw py::import_error("dlms_engine._C needs torch >= 2.11: no __dlpack_c_exchange_api__");
    const py::object capsule = type.attr("__dlpack_c_exchange_api__");
    api = static_cast<const DLPackExchangeAPI*>(
        PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    if (api == nullptr) throw py::error_already_set();
    if (api->header.version.major != DLPACK_MAJOR_VERSION)
      throw py::import_error("dlms_engine._C was built for another DLPack major version");
  }
};

const Torch& torch() {
  static const Torch instance;
  return instance;
}

bool dtype_of(const DLDataType& type, Dtype* out) {
  if (type.lanes != 1) return false;
  if (type.code == kDLBfloat && type.bits == 16) {
    *out = Dtype::kBFloat16;
    return true;
  }
  if (type.code != kDLFloat) return false;
  *out = type.bits == 64 ? Dtype::kFloat64 : type.bits == 16 ? Dtype::kFloat16 : Dtype::kFloat32;
  return type.bits == 64 || type.bits == 32 || type.bits == 16;
}

DLDataType dlpack_type(Dtype dtype) {
  DLDataType type;
  type.code = dtype == Dtype::kBFloat16 ? kDLBfloat : kDLFloat;
  type.bits = static_cast<uint8_t>(8 * element_size(dtype));
  type.lanes = 1;
  return type;
}

// What a tensor over foreign memory holds on to.
struct Lease {
  std::shared_ptr<char> memory;
  std::vector<int64_t> shape, strides;
  DLManagedTensorVersioned managed = {};
};

// object.name(), as an integer; the names are interned once.
int64_t call_int(PyObject* object, PyObject* name) {
  PyObject* arguments[] = {object};
  PyObject* result =
      PyObject_VectorcallMethod(name, arguments, 1 | PY_VECTORCALL_ARGUMENTS_OFFSET, nullptr);
  if (result == nullptr) throw py::error_already_set();
  const int64_t value = PyLong_AsLongLong(result);
  Py_DECREF(result);
  if (value == -1 && PyErr_Occurred() != nullptr) throw py::error_already_set();
  return value;
}

bool is_contiguous(const DLTensor& t) {
  if (t.strides == nullptr) return true;
  int64_t expected = 1;
  for (int d = t.ndim - 1; d >= 0; --d) {
    if (t.shape[d] == 0) return true;
    if (t.shape[d] != 1 && t.strides[d] != expected) return false;
    expected *= t.shape[d];
  }
  return true;
}

} // namespace

bool TensorView::has_shape(const int64_t* expected, int n) const {
  if (ndim != n) return false;
  for (int d = 0; d < n; ++d)
    if (shape[d] != expected[d]) return false;
  return true;
}

namespace {

bool export_tensor(py::handle object, DLTensor* raw) {
  const Torch& t = torch();
  if (Py_TYPE(object.ptr()) != t.parameter_type && !PyObject_TypeCheck(object.ptr(), t.tensor_type))
    return false;
  if (t.api->dltensor_from_py_object_no_sync(object.ptr(), raw) == 0) return true;
  PyErr_Clear();
  return false;
}

// Of sizes and strides: a view of the same memory may have others, or a new tensor there.
uint64_t layout_of(const DLTensor& raw) {
  uint64_t digest = static_cast<uint64_t>(raw.ndim);
  const auto mix = [&digest](int64_t number) {
    digest = (digest ^ static_cast<uint64_t>(number)) * 0x9E3779B97F4A7C15ull;
    digest ^= digest >> 32;
  };
  for (int d = 0; d < raw.ndim; ++d) {
    mix(raw.shape[d]);
    mix(raw.strides == nullptr ? -1 : raw.strides[d]);
  }
  return digest;
}

void take_place(const DLTensor& raw, TensorPlace* out) {
  out->data = static_cast<char*>(raw.data) + raw.byte_offset;
  out->layout = layout_of(raw);
  out->dtype = raw.dtype.code | raw.dtype.bits << 8 | static_cast<uint32_t>(raw.dtype.lanes) << 16;
  out->device = {static_cast<int>(raw.device.device_type), raw.device.device_id};
}

} // namespace

bool place_of(py::handle object, TensorPlace* out) {
  DLTensor raw;
  if (!export_tensor(object, &raw)) return false;
  take_place(raw, out);
  return true;
}

bool raw_tensor(py::handle object, RawTensor* out) {
  DLTensor raw;
  if (!export_tensor(object, &raw)) return false;
  take_place(raw, out);
  out->ndim = raw.ndim;
  out->shape = raw.shape;
  out->contiguous = is_contiguous(raw);
  size_t elements = 1;
  for (int d = 0; d < raw.ndim; ++d) elements *= static_cast<size_t>(raw.shape[d]);
  out->bytes = (elements * raw.dtype.bits * raw.dtype.lanes + 7) / 8;
  return true;
}

TensorView view_of(py::handle object, const char* name) {
  const Torch& t = torch();
  if (!PyObject_TypeCheck(object.ptr(), t.tensor_type)) {
    throw py::type_error(std::string(name) + " is a " + Py_TYPE(object.ptr())->tp_name +
                         ", expected a torch.Tensor");
  }
  DLTensor raw;
  if (t.api->dltensor_from_py_object_no_sync(object.ptr(), &raw) != 0)
    throw py::error_already_set();
  TensorView view;
  view.data = static_cast<char*>(raw.data) + raw.byte_offset;
  view.known_dtype = dtype_of(raw.dtype, &view.dtype);
  view.on_cpu = raw.device.device_type == kDLCPU;
  view.contiguous = is_contiguous(raw);
  view.ndim = raw.ndim;
  view.shape = raw.shape;
  return view;
}

py::object tensor_over(
    std::shared_ptr<char> memory, char* data, const std::vector<int64_t>& shape, Dtype dtype) {
  auto lease = std::make_unique<Lease>();
  lease->memory = std::move(memory);
  lease->shape = shape;
  DLManagedTensorVersioned& managed = lease->managed;
  managed.version.major = DLPACK_MAJOR_VERSION;
  managed.version.minor = DLPACK_MINOR_VERSION;
  managed.manager_ctx = lease.get();
  managed.deleter = [](DLManagedTensorVersioned* self) {
    delete static_cast<Lease*>(self->manager_ctx);
  };
  managed.dl_tensor.data = data;
  managed.dl_tensor.device = {kDLCPU, 0};
  managed.dl_tensor.ndim = static_cast<int32_t>(shape.size());
  managed.dl_tensor.dtype = dlpack_type(dtype);
  managed.dl_tensor.shape = lease->shape.data();
  std::vector<int64_t> strides(shape.size(), 1);
  for (size_t d = shape.size(); d-- > 1;)
    strides[d - 1] = strides[d] * (shape[d] > 0 ? shape[d] : 1);
  lease->strides = std::move(strides);
  managed.dl_tensor.strides = lease->strides.data();
  void* out = nullptr;
  if (torch().api->managed_tensor_to_py_object_no_sync(&lease->managed, &out) != 0)
    throw py::error_already_set();
  (void)lease.release(); // the tensor's now; its deleter frees it
  return py::reinterpret_steal<py::object>(static_cast<PyObject*>(out));
}

int64_t product(const std::vector<int64_t>& shape) {
  int64_t total = 1;
  for (const int64_t size : shape) total *= size;
  return total;
}

int64_t checked_bytes(const std::vector<int64_t>& shape, Dtype dtype) {
  const auto refuse = [&shape](const char* why) {
    throw py::value_error(
        "shape is " + shape_text(shape.data(), static_cast<int>(shape.size())) + ", " + why);
  };
  constexpr int64_t kMost = int64_t(1) << 57; // sums of a few such numbers do not overflow
  int64_t total = element_size(dtype);
  for (const int64_t size : shape) {
    if (size < 0) refuse("sizes must be >= 0");
    if (__builtin_mul_overflow(total, size, &total) || total > kMost) refuse("too large");
  }
  return total;
}

std::string describe(py::handle object) {
  std::ostringstream out;
  out << std::string(py::str(object.attr("dtype"))) << " "
      << std::string(py::str(py::list(object.attr("shape")))) << " on "
      << std::string(py::str(object.attr("device")));
  return out.str();
}

void require_storage(const TensorView& view, py::handle object, const std::string& name) {
  static PyObject* const kStorage = PyUnicode_InternFromString("untyped_storage");
  static PyObject* const kBytes = PyUnicode_InternFromString("nbytes");
  static PyObject* const kOffset = PyUnicode_InternFromString("storage_offset");
  int64_t elements = 1;
  for (int d = 0; d < view.ndim; ++d) elements *= view.shape[d];
  if (elements == 0) return;
  PyObject* arguments[] = {object.ptr()};
  const auto storage = py::reinterpret_steal<py::object>(
      PyObject_VectorcallMethod(kStorage, arguments, 1 | PY_VECTORCALL_ARGUMENTS_OFFSET, nullptr));
  if (!storage) throw py::error_already_set();
  const int64_t size = element_size(view.dtype);
  const int64_t end = (call_int(object.ptr(), kOffset) + elements) * size;
  const int64_t bytes = call_int(storage.ptr(), kBytes);
  if (view.data != nullptr && bytes >= end) return;
  throw py::value_error(name + " is " + describe(object) + " with a storage of " +
                        std::to_string(bytes) + " bytes, expected " + std::to_string(end) +
                        ": its storage was resized");
}

void require(const TensorView& view, py::handle object, const std::string& name,
    const int64_t* shape, int ndim, Dtype dtype) {
  if (view.known_dtype && view.dtype == dtype && view.on_cpu && view.contiguous &&
      view.has_shape(shape, ndim))
    return require_storage(view, object, name);
  throw py::value_error(name + " is " + describe(object) +
                        (view.contiguous ? "" : " and not contiguous") +
                        ", expected contiguous torch." + dtype_name(dtype) + " " +
                        shape_text(shape, ndim) + " on cpu");
}

Dtype dtype_from_python(py::handle torch_dtype, const char* name) {
  const py::module_ module = py::module_::import("torch");
  for (const Dtype d : {Dtype::kFloat32, Dtype::kFloat64, Dtype::kBFloat16, Dtype::kFloat16}) {
    if (torch_dtype.is(module.attr(dtype_name(d)))) return d;
  }
  throw py::value_error(std::string(name) + " is " + std::string(py::str(torch_dtype)) +
                        ", expected torch.float32, float64, bfloat16 or float16");
}

const char* dtype_name(Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat64: return "float64";
    case Dtype::kBFloat16: return "bfloat16";
    case Dtype::kFloat16: return "float16";
    default: return "float32";
  }
}

std::string shape_text(const int64_t* shape, int ndim) {
  std::ostringstream out;
  out << "[";
  for (int d = 0; d < ndim; ++d) out << (d != 0 ? ", " : "") << shape[d];
  out << "]";
  return out.str();
}

} // namespace dlms
