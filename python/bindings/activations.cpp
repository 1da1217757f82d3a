#include <pybind11/stl.h>

#include "arrays.hpp"
#include "quantloom/activations/cuda_activations.hpp"
#include "quantloom/activations/quantized_activations.hpp"

namespace quantloom::python {

namespace {

void* pointer(uintptr_t address) {
  return reinterpret_cast<void*>(address);
}

CudaActivationScratch scratch_of(uintptr_t index, uintptr_t workspace, int64_t workspace_bytes) {
  return {static_cast<const int32_t*>(pointer(index)), pointer(workspace), workspace_bytes};
}

// Names, dtypes and shapes.
py::list planes_of(const ActivationFormat& format, int64_t m, int64_t k, int64_t outliers) {
  py::list result;
  for (const PlaneSpec& spec : activation_planes(format, m, k, outliers)) {
    result.append(
        py::make_tuple(spec.name, std::string(name_of(spec.dtype)), py::tuple(py::cast(spec.shape))));
  }
  return result;
}

// On a CUDA device. Matrices are plain numbers, as for products: the Python side has checked the tensors that
// they stand for, and a call must cost no more than a few microseconds.
void bind_cuda_activations(py::module_& module) {
  py::class_<ActivationFormat>(module, "ActivationDescription")
      .def(py::init(&activation_format_from_json))
      .def("planes", &planes_of)
      .def("cuda_workspace", &activations_cuda_workspace)
      .def("produced_cuda_workspace",
           [](const ActivationFormat& format, const std::string& dtype, int64_t m, int64_t k) {
             return produced_cuda_workspace(format, dtype_from_name(dtype), m, k);
           });
  module.def("outlier_index_words", &outlier_index_words);
  module.def("outlier_index", [](const std::vector<int32_t>& columns, int64_t k) {
    const std::vector<int32_t> index = outlier_index(columns, k);
    return py::array_t<int32_t>(static_cast<py::ssize_t>(index.size()), index.data());
  });
  module.def("find_activation_outliers_cuda",
             [](uintptr_t x, int64_t stride, int64_t m, int64_t k, const std::string& dtype,
                const ActivationFormat& format, uintptr_t index, uintptr_t count, uintptr_t stream) {
               const CudaMatrix matrix{pointer(x), dtype_from_name(dtype), m, k, stride};
               const py::gil_scoped_release release;
               find_activation_outliers_cuda(matrix, format, static_cast<int32_t*>(pointer(index)),
                                             static_cast<int32_t*>(pointer(count)), pointer(stream));
             });
  module.def("quantize_activations_cuda", [](uintptr_t x, int64_t stride, int64_t m, int64_t k,
                                             const std::string& dtype, const ActivationFormat& format,
                                             const std::map<std::string, ArrayRef>& planes, uintptr_t index,
                                             uintptr_t workspace, int64_t workspace_bytes, uintptr_t stream) {
    const CudaMatrix matrix{pointer(x), dtype_from_name(dtype), m, k, stride};
    QuantizedActivations out{format, m, k, to_tensors(planes, "plane")};
    const py::gil_scoped_release release;
    quantize_activations_cuda(matrix, out, scratch_of(index, workspace, workspace_bytes), pointer(stream));
  });
  module.def("round_activations_cuda",
             [](uintptr_t x, int64_t stride, int64_t m, int64_t k, const std::string& dtype,
                const ActivationFormat& format, uintptr_t out, int64_t out_stride, uintptr_t index,
                uintptr_t workspace, int64_t workspace_bytes, uintptr_t stream) {
               const CudaMatrix matrix{pointer(x), dtype_from_name(dtype), m, k, stride};
               const py::gil_scoped_release release;
               round_activations_cuda(matrix, format, pointer(out), out_stride,
                                      scratch_of(index, workspace, workspace_bytes), pointer(stream));
             });
  module.def("dequantize_activations_cuda",
             [](const std::map<std::string, ArrayRef>& planes, const ActivationFormat& format, int64_t m,
                int64_t k, uintptr_t out, const std::string& dtype, uintptr_t stream) {
               const QuantizedActivations x{format, m, k, to_tensors(planes, "plane")};
               const DType type = dtype_from_name(dtype);
               const py::gil_scoped_release release;
               dequantize_activations_cuda(x, pointer(out), type, k, pointer(stream));
             });
}

ProducerKind kind_of(int64_t kind) {
  if (kind < 0 || kind > 2) throw InvalidArgument("kind", text_of(kind), "0, 1 or 2");
  return static_cast<ProducerKind>(kind);
}

void bind_producers(py::module_& module) {
  py::class_<CudaProducer>(module, "CudaProducer")
      .def(py::init([](int64_t kind, uintptr_t weight, uintptr_t bias, const std::string& weight_dtype,
                       double epsilon, bool add_one, uintptr_t up, int64_t up_stride, int64_t m, int64_t k,
                       const std::string& dtype) {
        CudaProducer producer{kind_of(kind),
                              pointer(weight),
                              pointer(bias),
                              dtype_from_name(weight_dtype),
                              static_cast<float>(epsilon),
                              add_one,
                              {}};
        if (producer.kind == ProducerKind::silu_mul) {
          producer.up = {pointer(up), dtype_from_name(dtype), m, k, up_stride};
        }
        return producer;
      }));
  module.def("quantize_produced_cuda",
             [](uintptr_t x, int64_t stride, int64_t m, int64_t k, const std::string& dtype,
                const CudaProducer& producer, const ActivationFormat& format,
                const std::map<std::string, ArrayRef>& planes, uintptr_t index, uintptr_t workspace,
                int64_t workspace_bytes, uintptr_t stream) {
               const CudaMatrix matrix{pointer(x), dtype_from_name(dtype), m, k, stride};
               QuantizedActivations out{format, m, k, to_tensors(planes, "plane")};
               const py::gil_scoped_release release;
               quantize_produced_cuda(matrix, producer, out, scratch_of(index, workspace, workspace_bytes),
                                      pointer(stream));
             });
  module.def(
      "round_produced_cuda",
      [](uintptr_t x, int64_t stride, int64_t m, int64_t k, const std::string& dtype,
         const CudaProducer& producer, const ActivationFormat& format, uintptr_t out, int64_t out_stride,
         uintptr_t index, uintptr_t workspace, int64_t workspace_bytes, uintptr_t stream) {
        const CudaMatrix matrix{pointer(x), dtype_from_name(dtype), m, k, stride};
        const py::gil_scoped_release release;
        round_produced_cuda(matrix, producer, format, pointer(out), out_stride,
                            scratch_of(index, workspace, workspace_bytes), pointer(stream));
      });
  module.def("produce_activations_cuda",
             [](uintptr_t x, int64_t stride, int64_t m, int64_t k, const std::string& dtype,
                const CudaProducer& producer, uintptr_t out, int64_t out_stride, uintptr_t stream) {
               const CudaMatrix matrix{pointer(x), dtype_from_name(dtype), m, k, stride};
               const py::gil_scoped_release release;
               produce_activations_cuda(matrix, producer, pointer(out), out_stride, pointer(stream));
             });
  module.def(
      "produce_activations",
      [](const ArrayRef& x, int64_t kind, const ArrayRef* weight, const ArrayRef* bias, double epsilon,
         bool add_one, const ArrayRef* up, const ArrayRef& out, int64_t threads) {
        const auto vector = [](const char* name, const ArrayRef* array) -> std::span<const float> {
          if (array == nullptr) return {};
          if (array->dtype() != DType::f32 || array->device() != Device::cpu || !array->contiguous()) {
            throw TypeMismatch(name, name_of(array->dtype()), "contiguous float32 on the CPU");
          }
          return {static_cast<const float*>(array->data()), static_cast<size_t>(array->element_count())};
        };
        ActivationProducer producer;
        producer.kind = kind_of(kind);
        producer.weight = vector("weight", weight);
        producer.bias = vector("bias", bias);
        producer.epsilon = static_cast<float>(epsilon);
        producer.add_one = add_one;
        if (up != nullptr) producer.up = up->float_matrix("up");
        const FloatMatrix in = x.float_matrix("x");
        const auto view = out.matrix<float>("out", DType::f32);
        const py::gil_scoped_release release;
        produce_activations(in, producer, view, to_int("threads", threads));
      },
      py::arg("x"), py::arg("kind"), py::arg("weight").none(true), py::arg("bias").none(true),
      py::arg("epsilon"), py::arg("add_one"), py::arg("up").none(true), py::arg("out"), py::arg("threads"));
}

}  // namespace

void bind_activations(py::module_& module) {
  bind_cuda_activations(module);
  bind_producers(module);
  module.def("activations_from_spec",
             [](const std::string& spec) { return activation_format_from_spec(spec).to_json(); });
  module.def("activations_canonical",
             [](const std::string& json) { return activation_format_from_json(json).to_json(); });
  module.def("activations_spec",
             [](const std::string& json) { return activation_format_from_json(json).spec(); });
  module.def("activations_with_range", [](const std::string& json, double low, double high) {
    return with_range(activation_format_from_json(json), static_cast<float>(low), static_cast<float>(high))
        .to_json();
  });
  module.def("quantize_activations", [](const ArrayRef& x, const std::string& json, int64_t threads) {
    const FloatMatrix in = x.float_matrix("x");
    const ActivationFormat format = activation_format_from_json(json);
    QuantizedActivations result;
    {
      const py::gil_scoped_release release;
      result = quantize_activations(in, format, to_int("threads", threads));
    }
    return to_numpy(result.planes, true);
  });
  module.def("dequantize_activations", [](const std::map<std::string, ArrayRef>& planes,
                                          const std::string& json, const ArrayRef& out, int64_t threads) {
    const auto view = out.matrix<float>("out", DType::f32);
    const QuantizedActivations x{activation_format_from_json(json), view.rows(), view.cols(),
                                 to_tensors(planes, "plane")};
    const py::gil_scoped_release release;
    dequantize_activations(x, view, to_int("threads", threads));
  });
  module.def("round_activations",
             [](const ArrayRef& x, const ArrayRef& out, const std::string& json, int64_t threads) {
               const FloatMatrix in = x.float_matrix("x");
               const auto view = out.matrix<float>("out", DType::f32);
               const ActivationFormat format = activation_format_from_json(json);
               const py::gil_scoped_release release;
               round_activations(in, format, view, to_int("threads", threads));
             });
}

}  // namespace quantloom::python
