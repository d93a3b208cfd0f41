#include "graph_bindings.h"

#include <pybind11/stl.h>

#include <memory>
#include <vector>

#include "../cuda/device_ring.h"
#include "../cuda/graph_cache.h"
#include "../cuda/graph_run.h"
#include "../tensor_view.h"
#include "graph_key.h"

namespace py = pybind11;

namespace dlms {
namespace {

using cuda::GraphCache;
using cuda::GraphKey;
using cuda::GraphRun;
using cuda::Span;

template <class Handle>
Handle handle_of(uintptr_t number) {
  return reinterpret_cast<Handle>(number);
}

RawTensor memory_of(py::handle tensor, const char* what) {
  RawTensor raw;
  if (!raw_tensor(tensor, &raw))
    throw py::type_error(std::string(what) + " of a captured run is a " +
                         Py_TYPE(tensor.ptr())->tp_name + ", expected a plain torch.Tensor");
  if (!raw.contiguous)
    throw py::value_error(std::string(what) + " of a captured run is not contiguous");
  return raw;
}

// GraphRun over torch tensors: keeps the buffers alive and checks what it is launched with.
class TensorRun {
 public:
  TensorRun(uintptr_t graph, const py::tuple& inputs, py::object output, int device, bool take)
      : inputs_(inputs), output_(std::move(output)) {
    // The run's once there is one: buffers may be refused before.
    cuda::OwnedGraph taken(cuda::driver(), take ? handle_of<cuda::Graph>(graph) : nullptr);
    std::vector<Span> spans;
    for (const py::handle tensor : inputs) {
      const RawTensor raw = memory_of(tensor, "an input buffer");
      layouts_.push_back({raw.dtype, raw.device});
      spans.push_back({raw.data, raw.bytes});
    }
    const RawTensor out = memory_of(output_, "the output buffer");
    output_layout_ = {out.dtype, out.device};
    const Span span{out.data, out.bytes};
    const auto ownership = take ? GraphRun::Ownership::kTake : GraphRun::Ownership::kBorrow;
    const py::gil_scoped_release release;
    (void)taken.release();
    run_ = std::make_unique<GraphRun>(
        handle_of<cuda::Graph>(graph), std::move(spans), span, device, ownership);
  }

  // inputs: contiguous tensors of the buffers' dtypes and devices, at most as large; output: one
  // like the output buffer.
  void launch(const py::tuple& inputs, py::handle output, uintptr_t stream) {
    if (inputs.size() != layouts_.size())
      throw py::value_error("the run has " + std::to_string(layouts_.size()) + " inputs, not " +
                            std::to_string(inputs.size()));
    std::vector<Span> spans;
    spans.reserve(inputs.size());
    for (size_t i = 0; i < inputs.size(); ++i) {
      const py::handle tensor = inputs[i];
      const RawTensor raw = memory_of(tensor, "an input");
      check(tensor, raw, layouts_[i], "input " + std::to_string(i));
      spans.push_back({raw.data, raw.bytes});
    }
    const RawTensor out = memory_of(output, "the output");
    check(output, out, output_layout_, "the output");
    if (out.bytes != run_->output().bytes)
      throw py::value_error("the output is " + describe(output) + ", the run writes " +
                            std::to_string(run_->output().bytes) + " bytes");
    const py::gil_scoped_release release;
    run_->launch(spans, out.data, handle_of<cuda::Stream>(stream));
  }

  GraphRun& run() { return *run_; }

 private:
  struct Layout {
    uint32_t dtype;
    std::pair<int, int> device;
  };
  static void check(
      py::handle tensor, const RawTensor& raw, const Layout& layout, const std::string& what) {
    if (raw.dtype != layout.dtype || raw.device != layout.device)
      throw py::value_error(what + " is " + describe(tensor) +
                            ": not of the dtype and device that the run was captured with");
  }

  py::tuple inputs_;
  py::object output_;
  std::vector<Layout> layouts_;
  Layout output_layout_;
  std::unique_ptr<GraphRun> run_;
};

// A Python object whose last owner may be any thread, with or without the interpreter's lock.
GraphCache::Value shared(py::object object) {
  return {object.release().ptr(), [](void* held) {
            if (!Py_IsInitialized()) return;
            const py::gil_scoped_acquire acquire;
            Py_DECREF(static_cast<PyObject*>(held));
          }};
}

py::object object_of(const GraphCache::Value& value) {
  if (value == nullptr) return py::none();
  return py::reinterpret_borrow<py::object>(static_cast<PyObject*>(value.get()));
}

py::tuple claim(GraphCache& cache, const GraphKey& key) {
  GraphCache::Answer answer;
  {
    const py::gil_scoped_release release; // it may wait for a capture of another thread
    answer = cache.claim(key);
  }
  static const char* const kNames[] = {"found", "failed", "mine", "again"};
  return py::make_tuple(
      kNames[static_cast<int>(answer.claim)], object_of(answer.value), answer.reason);
}

py::dict stats(const GraphCache& cache) {
  const GraphCache::Stats s = cache.stats();
  py::dict out;
  out["captures"] = s.captures;
  out["replays"] = s.replays;
  out["evictions"] = s.evictions;
  out["failures"] = s.failures;
  out["entries"] = s.entries;
  out["bytes"] = s.bytes;
  out["gain"] = s.graph_seconds > 0 ? py::object(py::float_(s.plain_seconds / s.graph_seconds))
                                    : py::object(py::none());
  return out;
}

void bind_runs(py::module_& m) {
  py::register_exception<cuda::DriverError>(m, "DriverError", PyExc_RuntimeError);
  m.def("cuda_driver_problem", &cuda::driver_problem,
      "Why this process has no CUDA driver for captured runs, or an empty text.");
  m.def("use_cuda_driver", &cuda::use_driver, py::arg("path"),
      "Take the driver's functions from this library; an empty path: from the system's.");
  m.def(
      "cuda_stream",
      [](int device) {
        const cuda::Driver& driver = cuda::driver();
        // Retained for good, as the stream is.
        const auto* context = new cuda::PrimaryContext(driver, device);
        const cuda::ContextScope scope(driver, context->get());
        cuda::Stream stream = nullptr;
        driver.check(driver.stream_create(&stream, cuda::kStreamNonBlocking), "cuStreamCreate");
        return reinterpret_cast<uintptr_t>(stream);
      },
      py::arg("device"), "A stream of its own on a device, never destroyed.");
  py::class_<TensorRun>(m, "GraphRun",
      "An instantiated CUDA graph: inputs are copied in, it runs, its result is copied out.")
      .def(py::init<uintptr_t, const py::tuple&, py::object, int, bool>(), py::arg("graph"),
          py::arg("inputs"), py::arg("output"), py::arg("device"), py::arg("take") = false,
          "graph: cudaGraph_t, only read, or taken over if `take`; inputs, output: the tensors "
          "that it reads and writes.")
      .def("launch", &TensorRun::launch, py::arg("inputs"), py::arg("output"), py::arg("stream"),
          "Enqueue one run on a stream (cudaStream_t), copies included, without waiting.")
      .def(
          "upload",
          [](TensorRun& run, uintptr_t stream) {
            const py::gil_scoped_release release;
            run.run().upload(handle_of<cuda::Stream>(stream));
          },
          py::arg("stream"))
      .def_property_readonly(
          "nodes", [](TensorRun& run) { return run.run().nodes(); },
          "Nodes of the graph, without the copies around it.")
      .def_property_readonly("launches", [](TensorRun& run) { return run.run().launches(); });
}

// As HistoryRing, over a tensor [depth, B, ...] on any device.
class TensorRing {
 public:
  explicit TensorRing(py::object tensor) : tensor_(std::move(tensor)) {
    const RawTensor raw = memory_of(tensor_, "the ring");
    if (raw.ndim < 2) throw py::value_error("a ring is [depth, B, ...], not " + describe(tensor_));
    const int64_t depth = raw.shape[0];
    ring_ = std::make_unique<cuda::DeviceRing>(
        raw.data, depth, depth < 1 ? 0 : raw.bytes / static_cast<size_t>(depth));
  }
  const py::object& tensor() const { return tensor_; }
  cuda::DeviceRing& ring() { return *ring_; }
  void push(const py::object& m) {
    const int64_t slot = ring_->next_slot();
    tensor_[py::int_(slot)].attr("copy_")(m);
    ring_->wrote(slot);
  }
  py::object past(int64_t k) const { return tensor_[py::int_(ring_->past_slot(k))]; }

 private:
  py::object tensor_;
  std::unique_ptr<cuda::DeviceRing> ring_;
};

void bind_loops(py::module_& m) {
  m.def(
      "loop_graph",
      [](uintptr_t first, uintptr_t body, uintptr_t advance, py::handle counter, py::handle count,
          int device) {
        auto* at = static_cast<int*>(memory_of(counter, "the counter").data);
        const auto* until = static_cast<const int*>(memory_of(count, "the count").data);
        const py::gil_scoped_release release;
        return reinterpret_cast<uintptr_t>(cuda::loop_graph(handle_of<cuda::Graph>(first),
            handle_of<cuda::Graph>(body), handle_of<cuda::Function>(advance), at, until, device));
      },
      py::arg("first"), py::arg("body"), py::arg("advance"), py::arg("counter"), py::arg("count"),
      py::arg("device"),
      "A graph that runs `first` once and `body` count times; counter, count: int32 tensors of one "
      "element. The result is to be handed to GraphRun(take=True).");
  m.def("loop_kernel", &cuda::loop_kernel, py::arg("library"), py::arg("device"),
      "The kernel of loop_graph (CUfunction) from the library of the CUDA operators.");
  py::class_<TensorRing>(m, "DeviceHistoryRing",
      "The last `depth` values of m in one tensor [depth, B, ...] on any device.")
      .def(py::init<py::object>(), py::arg("tensor"))
      .def_property_readonly("tensor", &TensorRing::tensor)
      .def_property_readonly("depth", [](TensorRing& r) { return r.ring().depth(); })
      .def_property_readonly("newest", [](TensorRing& r) { return r.ring().newest(); })
      .def_property_readonly("next_slot", [](TensorRing& r) { return r.ring().next_slot(); })
      .def("push", &TensorRing::push, py::arg("m"), "Copy m, [B, ...], over the oldest value.")
      .def("past", &TensorRing::past, py::arg("k"), "m_{n-k}, a view [B, ...].")
      .def("reset", [](TensorRing& r) { r.ring().reset(); });
}

void bind_cache(py::module_& m) {
  py::class_<GraphKey>(m, "GraphKey", "All that a captured run depends on; equal keys, equal runs.")
      .def("__eq__",
          [](const GraphKey& a, const py::object& b) {
            return py::isinstance<GraphKey>(b) && a.bytes == py::cast<const GraphKey&>(b).bytes;
          })
      .def("__hash__", [](const GraphKey& key) { return std::hash<std::string>()(key.bytes); })
      .def("__len__", [](const GraphKey& key) { return key.bytes.size(); })
      .def_property_readonly("owner", [](const GraphKey& key) { return key.owner; });
  m.def(
      "graph_key",
      [](uint64_t owner, const py::dict& inputs, py::handle options, const py::tuple& modules,
          bool tensor_attributes) {
        KeyAnswer answer = graph_key(owner, inputs, options, modules, tensor_attributes);
        return py::make_tuple(std::move(answer.key), answer.stray);
      },
      py::arg("owner"), py::arg("inputs"), py::arg("options"), py::arg("modules"),
      py::arg("tensor_attributes") = true,
      "(key, path of a parameter that is not on the first input's device, or '').");
  m.def("key_walks", &key_walks,
      "How many keys were read from the objects themselves, not from the last key's recipe.");
  py::class_<GraphCache>(m, "GraphCache", "Captured runs by key, bounded, least recently used out.")
      .def(py::init<uint64_t, size_t>(), py::arg("max_bytes"), py::arg("max_entries"))
      .def("find", [](GraphCache& c, const GraphKey& key) { return object_of(c.find(key)); })
      .def("claim", &claim)
      .def("put",
          [](GraphCache& c, const GraphKey& claimed, const GraphKey& key, py::object value,
              uint64_t bytes) {
            GraphCache::Value kept = shared(std::move(value));
            const py::gil_scoped_release release;
            c.put(claimed, key, std::move(kept), bytes);
          })
      .def("fail", &GraphCache::fail, py::call_guard<py::gil_scoped_release>())
      .def("release", &GraphCache::release, py::call_guard<py::gil_scoped_release>())
      .def("measured", &GraphCache::measured, py::call_guard<py::gil_scoped_release>())
      .def("contains", &GraphCache::contains)
      .def("failure", &GraphCache::failure)
      .def("invalidate", &GraphCache::invalidate, py::call_guard<py::gil_scoped_release>())
      .def("set_bounds", &GraphCache::set_bounds, py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("max_bytes", &GraphCache::max_bytes)
      .def_property_readonly("max_entries", &GraphCache::max_entries)
      .def("stats", &stats);
}

} // namespace

void bind_graphs(py::module_& module) {
  bind_runs(module);
  bind_loops(module);
  bind_cache(module);
}

} // namespace dlms
