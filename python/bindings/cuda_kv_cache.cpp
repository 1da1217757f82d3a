// Caches of keys and values in memory of a CUDA device: that of the tensors, which the Python side makes
// current. Streams are addresses.
#include "quantloom/kv_cache/cuda_kv_cache.hpp"

#include <pybind11/stl.h>

#include <memory>
#include <optional>

#include "kv_cache.hpp"
#include "quantloom/error.hpp"

namespace quantloom::python {
namespace {

void* pointer(uintptr_t address) {
  return reinterpret_cast<void*>(address);
}

void* out_of(const ArrayRef& out) {
  if (out.device() != Device::cuda || !out.contiguous()) {
    throw TypeMismatch("out", out.device() == Device::cuda ? "memory with gaps" : "memory of the CPU",
                       "contiguous memory of a CUDA device");
  }
  return out.data();
}

std::unique_ptr<CudaKVCache> make_cache(const std::string& json, int64_t sequences, int64_t kv_heads,
                                        int64_t head_dim, const std::string& dtype, int64_t capacity,
                                        const std::shared_ptr<KVTables>& tables, uintptr_t stream) {
  const KVShape shape{sequences, kv_heads, head_dim, dtype_from_name(dtype)};
  const py::gil_scoped_release release;
  return std::make_unique<CudaKVCache>(kv_format_from_json(json), shape, capacity, tables, pointer(stream));
}

void append(CudaKVCache& cache, const ArrayRef& keys, const ArrayRef& values,
            const std::optional<std::vector<int64_t>>& starts, bool check, uintptr_t stream) {
  const KVTokens k = kv_tokens("keys", keys, Device::cuda);
  const KVTokens v = kv_tokens("values", values, Device::cuda);
  const std::span<const int64_t> from =
      starts ? std::span<const int64_t>(*starts) : std::span<const int64_t>();
  const py::gil_scoped_release release;
  cache.append(k, v, from, {.stream = pointer(stream), .check = check});
}

void attend(const CudaKVCache& cache, const ArrayRef& queries, double scale, const ArrayRef& out,
            uintptr_t stream) {
  const KVTokens q = kv_tokens("queries", queries, Device::cuda);
  void* to = out_of(out);
  require_room_for(queries, out);
  if (out.dtype() != queries.dtype()) {
    throw TypeMismatch("out", name_of(out.dtype()), text_of(name_of(queries.dtype()), ", as queries"));
  }
  const py::gil_scoped_release release;
  cache.attend(q, static_cast<float>(scale), to, pointer(stream));
}

void read(const CudaKVCache& cache, const std::string& side, int64_t sequence, int64_t first, int64_t count,
          const ArrayRef& out, uintptr_t stream) {
  require_sequence(cache, sequence);
  const KVShape& shape = cache.shape();
  if (out.shape() != std::vector<int64_t>{shape.kv_heads, count, shape.head_dim}) {
    throw InvalidArgument("out", text_of(out.element_count(), " elements"), "[kv_heads, count, head_dim]");
  }
  void* to = out_of(out);
  const KVSide which = kv_side(side);
  const py::gil_scoped_release release;
  cache.read(which, sequence, first, count, to, out.dtype(), pointer(stream));
}

py::bytes record(const CudaKVCache& cache, int64_t sequence, int64_t page, int64_t head) {
  require_record(cache, sequence, page, head);
  const std::vector<std::byte> bytes = cache.record(sequence, page, head);
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

}  // namespace

void bind_cuda_kv_cache(py::module_& module) {
  using release = py::call_guard<py::gil_scoped_release>;
  py::class_<CudaKVCache>(module, "CudaKVCache")
      .def(py::init(&make_cache), py::arg("format"), py::arg("sequences"), py::arg("kv_heads"),
           py::arg("head_dim"), py::arg("dtype"), py::arg("capacity"), py::arg("tables").none(true),
           py::arg("stream"))
      .def(
          "clone",
          [](const CudaKVCache& cache, uintptr_t stream) {
            return std::make_unique<CudaKVCache>(cache.clone(pointer(stream)));
          },
          release())
      .def("lengths", &lengths_of<CudaKVCache>, release())
      .def("coded", &coded_of<CudaKVCache>, release())
      .def(
          "reserve",
          [](CudaKVCache& cache, int64_t tokens, uintptr_t stream) {
            cache.reserve(tokens, pointer(stream));
          },
          release())
      .def("append", &append)
      .def(
          "reorder",
          [](CudaKVCache& cache, const std::vector<int64_t>& sources, uintptr_t stream) {
            cache.reorder(sources, pointer(stream));
          },
          release())
      .def(
          "clear", [](CudaKVCache& cache, uintptr_t stream) { cache.clear(pointer(stream)); }, release())
      .def("require_queries", &require_queries_of<CudaKVCache>)
      .def("read", &read)
      .def("attend", &attend)
      .def("record", &record)
      .def("layout", [](const CudaKVCache& cache) { return to_dict(cache.layout()); })
      .def("usage", [](const CudaKVCache& cache) { return to_dict(cache.usage()); });
}

}  // namespace quantloom::python
