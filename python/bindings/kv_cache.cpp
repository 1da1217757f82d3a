// Caches of keys and values.
#include "kv_cache.hpp"

#include <pybind11/stl.h>

#include <memory>
#include <optional>

#include "quantloom/error.hpp"

namespace quantloom::python {

KVTokens kv_tokens(const char* name, const ArrayRef& x, Device device) {
  if (x.device() != device) {
    const bool cpu = device == Device::cpu;
    throw TypeMismatch(name, cpu ? "memory of a CUDA device" : "memory of the CPU",
                       cpu ? "memory of the CPU" : "memory of a CUDA device");
  }
  const auto& shape = x.shape();
  if (shape.size() != 4) {
    throw InvalidArgument(name, text_of(shape.size(), " dimensions"), "[sequences, heads, tokens, head_dim]");
  }
  if (shape[3] > 1 && x.element_count() > 0 && x.strides()[3] != 1) {
    throw InvalidArgument(name, text_of("elements ", x.strides()[3], " apart along the last axis"),
                          "them next to each other");
  }
  return {x.data(),
          x.dtype(),
          shape[0],
          shape[1],
          shape[2],
          shape[3],
          {x.strides()[0], x.strides()[1], x.strides()[2]}};
}

KVSide kv_side(const std::string& side) {
  if (side != "keys" && side != "values") throw InvalidArgument("side", side, "keys or values");
  return side == "keys" ? KVSide::keys : KVSide::values;
}

py::dict to_dict(const KVLayout& layout) {
  const auto part = [](const KVPart& p) {
    py::dict result;
    result["codec"] = p.codec == KVCodec::channel_grid ? "channel_grid"
                      : p.codec == KVCodec::token_grid ? "token_grid"
                                                       : "digits";
    result["bits"] = p.bits;
    result["group"] = p.group;
    result["groups"] = p.groups;
    result["row_bytes"] = p.row_bytes;
    result["codes"] = p.codes;
    result["parameters"] = p.parameters;
    return result;
  };
  py::dict result;
  result["page_tokens"] = layout.page_tokens;
  result["record_bytes"] = layout.record_bytes;
  result["average_bits"] = layout.average_bits();
  result["keys"] = part(layout.keys);
  result["values"] = part(layout.values);
  return result;
}

py::dict to_dict(const KVUsage& usage) {
  py::dict result;
  result["tokens"] = usage.tokens;
  result["coded_keys"] = usage.coded_keys;
  result["coded_values"] = usage.coded_values;
  result["code_bytes"] = usage.code_bytes;
  result["exact_bytes"] = usage.exact_bytes;
  result["page_bytes"] = usage.page_bytes;
  result["reserved_bytes"] = usage.reserved_bytes;
  return result;
}

void require_room_for(const ArrayRef& queries, const ArrayRef& out) {
  if (out.element_count() != queries.element_count()) {
    throw InvalidArgument("out", text_of(out.element_count(), " elements"), "those of queries");
  }
}

namespace {

float* out_of(const ArrayRef& out, DType dtype) {
  if (out.dtype() != dtype || out.device() != Device::cpu || !out.contiguous()) {
    throw TypeMismatch("out", name_of(out.dtype()), text_of("contiguous ", name_of(dtype), " on the CPU"));
  }
  return static_cast<float*>(out.data());
}

std::unique_ptr<KVCache> make_cache(const std::string& json, int64_t sequences, int64_t kv_heads,
                                    int64_t head_dim, const std::string& dtype, int64_t capacity,
                                    const std::shared_ptr<KVTables>& tables) {
  const KVShape shape{sequences, kv_heads, head_dim, dtype_from_name(dtype)};
  return std::make_unique<KVCache>(kv_format_from_json(json), shape, capacity, tables);
}

std::vector<float> floats_of(const char* name, const ArrayRef& x) {
  if (x.dtype() != DType::f32 || x.device() != Device::cpu || !x.contiguous()) {
    throw TypeMismatch(name, name_of(x.dtype()), "contiguous float32 on the CPU");
  }
  const auto* data = static_cast<const float*>(x.data());
  return {data, data + x.element_count()};
}

std::shared_ptr<KVTables> make_tables(const ArrayRef& key_bounds, const ArrayRef& key_values,
                                      const ArrayRef& value_bounds, const ArrayRef& value_values,
                                      const ArrayRef& key_scale, const ArrayRef& key_middle,
                                      const std::shared_ptr<KVRotation>& rotation) {
  auto tables = std::make_shared<KVTables>();
  tables->keys = {floats_of("key_bounds", key_bounds), floats_of("key_values", key_values)};
  tables->values = {floats_of("value_bounds", value_bounds), floats_of("value_values", value_values)};
  tables->key_scale = floats_of("key_scale", key_scale);
  tables->key_middle = floats_of("key_middle", key_middle);
  tables->rotation = rotation;
  return tables;
}

}  // namespace

void bind_kv_cache(py::module_& module) {
  module.def("kv_format_from_spec",
             [](const std::string& spec) { return kv_format_from_spec(spec).to_json(); });
  module.def("kv_format_canonical",
             [](const std::string& json) { return kv_format_from_json(json).to_json(); });
  module.def("kv_format_spec", [](const std::string& json) { return kv_format_from_json(json).spec(); });
  module.def("kv_layout", [](const std::string& json, int64_t head_dim) {
    return to_dict(kv_layout(kv_format_from_json(json), head_dim));
  });
  py::class_<KVRotation, std::shared_ptr<KVRotation>>(module, "KVRotation")
      .def(py::init([](const ArrayRef& cosines, const ArrayRef& sines) {
        auto rotation = std::make_shared<KVRotation>();
        cosines.require_rank_2("cosines");
        rotation->rotated = cosines.shape()[1] * 2;
        rotation->cosines = floats_of("cosines", cosines);
        rotation->sines = floats_of("sines", sines);
        return rotation;
      }));
  py::class_<KVTables, std::shared_ptr<KVTables>>(module, "KVTables")
      .def(py::init(&make_tables), py::arg("key_bounds"), py::arg("key_values"), py::arg("value_bounds"),
           py::arg("value_values"), py::arg("key_scale"), py::arg("key_middle"),
           py::arg("rotation").none(true));
  module.def("require_valid_kv_tables",
             [](const KVTables& tables, const std::string& json, int64_t kv_heads, int64_t head_dim) {
               require_valid(tables, kv_format_from_json(json), kv_heads, head_dim);
             });
  py::class_<KVCache>(module, "KVCache")
      .def(py::init(&make_cache), py::arg("format"), py::arg("sequences"), py::arg("kv_heads"),
           py::arg("head_dim"), py::arg("dtype"), py::arg("capacity"), py::arg("tables").none(true))
      .def("clone", [](const KVCache& cache) { return std::make_unique<KVCache>(cache.clone()); })
      .def("lengths", &lengths_of<KVCache>)
      .def("coded", &coded_of<KVCache>)
      .def("reserve", &KVCache::reserve)
      .def("append",
           [](KVCache& cache, const ArrayRef& keys, const ArrayRef& values,
              const std::optional<std::vector<int64_t>>& starts, int64_t threads) {
             const KVTokens k = kv_tokens("keys", keys, Device::cpu);
             const KVTokens v = kv_tokens("values", values, Device::cpu);
             const std::span<const int64_t> from =
                 starts ? std::span<const int64_t>(*starts) : std::span<const int64_t>();
             const py::gil_scoped_release release;
             cache.append(k, v, from, to_int("threads", threads));
           })
      .def("reorder", [](KVCache& cache, const std::vector<int64_t>& sources) { cache.reorder(sources); })
      .def("clear", &KVCache::clear)
      .def("require_queries", &require_queries_of<KVCache>)
      .def("read",
           [](const KVCache& cache, const std::string& side, int64_t sequence, int64_t head, int64_t first,
              int64_t count, const ArrayRef& out) {
             if (out.element_count() < count * cache.shape().head_dim + 16) {
               throw InvalidArgument("out", text_of(out.element_count(), " elements"),
                                     "head_dim for each token and 16");
             }
             cache.read(kv_side(side), sequence, head, first, count, out_of(out, DType::f32));
           })
      .def("attend",
           [](const KVCache& cache, const ArrayRef& queries, double scale, const ArrayRef& out,
              int64_t threads) {
             const KVTokens q = kv_tokens("queries", queries, Device::cpu);
             float* to = out_of(out, DType::f32);
             require_room_for(queries, out);
             const py::gil_scoped_release release;
             attend(cache, q, static_cast<float>(scale), to, to_int("threads", threads));
           })
      .def("attend_reference",
           [](const KVCache& cache, const ArrayRef& queries, double scale, const ArrayRef& out) {
             const KVTokens q = kv_tokens("queries", queries, Device::cpu);
             require_room_for(queries, out);
             auto* to = reinterpret_cast<double*>(out_of(out, DType::f64));
             const py::gil_scoped_release release;
             attend_reference(cache, q, static_cast<float>(scale), to);
           })
      .def("record",
           [](const KVCache& cache, int64_t sequence, int64_t page, int64_t head) {
             require_record(cache, sequence, page, head);
             return py::bytes(reinterpret_cast<const char*>(cache.record(sequence, page, head)),
                              static_cast<size_t>(cache.layout().record_bytes));
           })
      .def("layout", [](const KVCache& cache) { return to_dict(cache.layout()); })
      .def("usage", [](const KVCache& cache) { return to_dict(cache.usage()); });
}

}  // namespace quantloom::python
