// Caches of keys and values.
#include <pybind11/stl.h>

#include <memory>
#include <optional>

#include "arrays.hpp"
#include "quantloom/error.hpp"
#include "quantloom/kv_cache/kv_attention.hpp"

namespace quantloom::python {
namespace {

// [sequences, heads, tokens, head_dim]
KVTokens tokens_of(const char* name, const ArrayRef& x) {
  if (x.device() != Device::cpu) throw TypeMismatch(name, "memory of a GPU", "an array on the CPU");
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

KVSide side_of(const std::string& side) {
  if (side != "keys" && side != "values") throw InvalidArgument("side", side, "keys or values");
  return side == "keys" ? KVSide::keys : KVSide::values;
}

float* out_of(const ArrayRef& out, DType dtype) {
  if (out.dtype() != dtype || out.device() != Device::cpu || !out.contiguous()) {
    throw TypeMismatch("out", name_of(out.dtype()), text_of("contiguous ", name_of(dtype), " on the CPU"));
  }
  return static_cast<float*>(out.data());
}

py::dict layout_of(const KVLayout& layout) {
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
    return layout_of(kv_layout(kv_format_from_json(json), head_dim));
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
  py::class_<KVCache>(module, "KVCache")
      .def(py::init(&make_cache), py::arg("format"), py::arg("sequences"), py::arg("kv_heads"),
           py::arg("head_dim"), py::arg("dtype"), py::arg("capacity"), py::arg("tables").none(true))
      .def("clone", [](const KVCache& cache) { return std::make_unique<KVCache>(cache.clone()); })
      .def("lengths",
           [](const KVCache& cache) {
             std::vector<int64_t> lengths;
             for (int64_t s = 0; s < cache.shape().sequences; ++s) lengths.push_back(cache.length(s));
             return lengths;
           })
      .def("coded",
           [](const KVCache& cache, const std::string& side, int64_t sequence) {
             if (sequence < 0 || sequence >= cache.shape().sequences) {
               throw InvalidArgument("sequence", text_of(sequence),
                                     text_of("0 to ", cache.shape().sequences - 1));
             }
             return cache.coded(side_of(side), sequence);
           })
      .def("append",
           [](KVCache& cache, const ArrayRef& keys, const ArrayRef& values,
              const std::optional<std::vector<int64_t>>& starts, int64_t threads) {
             const KVTokens k = tokens_of("keys", keys);
             const KVTokens v = tokens_of("values", values);
             const std::span<const int64_t> from =
                 starts ? std::span<const int64_t>(*starts) : std::span<const int64_t>();
             const py::gil_scoped_release release;
             cache.append(k, v, from, to_int("threads", threads));
           })
      .def("reorder", [](KVCache& cache, const std::vector<int64_t>& sources) { cache.reorder(sources); })
      .def("clear", &KVCache::clear)
      .def("read",
           [](const KVCache& cache, const std::string& side, int64_t sequence, int64_t head, int64_t first,
              int64_t count, const ArrayRef& out) {
             if (out.element_count() < count * cache.shape().head_dim + 16) {
               throw InvalidArgument("out", text_of(out.element_count(), " elements"),
                                     "head_dim for each token and 16");
             }
             cache.read(side_of(side), sequence, head, first, count, out_of(out, DType::f32));
           })
      .def("attend",
           [](const KVCache& cache, const ArrayRef& queries, double scale, const ArrayRef& out,
              int64_t threads) {
             const KVTokens q = tokens_of("queries", queries);
             float* to = out_of(out, DType::f32);
             if (out.element_count() != queries.element_count()) {
               throw InvalidArgument("out", text_of(out.element_count(), " elements"), "those of queries");
             }
             const py::gil_scoped_release release;
             attend(cache, q, static_cast<float>(scale), to, to_int("threads", threads));
           })
      .def("attend_reference",
           [](const KVCache& cache, const ArrayRef& queries, double scale, const ArrayRef& out) {
             const KVTokens q = tokens_of("queries", queries);
             if (out.element_count() != queries.element_count()) {
               throw InvalidArgument("out", text_of(out.element_count(), " elements"), "those of queries");
             }
             auto* to = reinterpret_cast<double*>(out_of(out, DType::f64));
             const py::gil_scoped_release release;
             attend_reference(cache, q, static_cast<float>(scale), to);
           })
      .def("record",
           [](const KVCache& cache, int64_t sequence, int64_t page, int64_t head) {
             const KVShape& shape = cache.shape();
             const bool exists =
                 sequence >= 0 && sequence < shape.sequences && head >= 0 && head < shape.kv_heads;
             const int64_t tokens =
                 exists ? std::max(cache.coded(KVSide::keys, sequence), cache.coded(KVSide::values, sequence))
                        : 0;
             if (page < 0 || page * cache.layout().page_tokens >= tokens) {
               throw InvalidArgument("page", text_of(page), "a page of a sequence and a head");
             }
             return py::bytes(reinterpret_cast<const char*>(cache.record(sequence, page, head)),
                              static_cast<size_t>(cache.layout().record_bytes));
           })
      .def("layout", [](const KVCache& cache) { return layout_of(cache.layout()); })
      .def("usage", [](const KVCache& cache) {
        const KVUsage u = cache.usage();
        py::dict result;
        result["tokens"] = u.tokens;
        result["coded_keys"] = u.coded_keys;
        result["coded_values"] = u.coded_values;
        result["code_bytes"] = u.code_bytes;
        result["exact_bytes"] = u.exact_bytes;
        result["page_bytes"] = u.page_bytes;
        result["reserved_bytes"] = u.reserved_bytes;
        return result;
      });
}

}  // namespace quantloom::python
