// What the steps of rounding to a rotated trellis on the device share on the host's side.
#pragma once

#include <algorithm>
#include <cstddef>
#include <utility>
#include <vector>

#include "common/device_buffer.hpp"
#include "formats/trellis_basis.hpp"
#include "formats/trellis_codes.hpp"
#include "quantloom/checked_math.hpp"
#include "quantloom/dtype.hpp"
#include "quantloom/formats/trellis_cuda.hpp"
#include "rounding/trellis_steps.hpp"

namespace quantloom::cuda {

inline constexpr int64_t kStep = trellis::kTileSide;

template <class T>
DeviceBuffer<T> uploaded(const std::vector<T>& values, cudaStream_t stream) {
  DeviceBuffer<T> buffer(static_cast<int64_t>(values.size()), stream);
  buffer.upload(values.data(), static_cast<int64_t>(values.size()));
  return buffer;
}

inline std::vector<float> floats_of(const std::vector<uint16_t>& halves) {
  std::vector<float> values;
  for (const uint16_t bits : halves) values.push_back(float_from_f16(bits));
  return values;
}

inline CudaMatrix matrix_of(float* data, int64_t rows, int64_t cols, int64_t stride) {
  return {data, DType::f32, rows, cols, stride};
}

// The scales of a matrix, on both sides of the bus.
struct DeviceScales {
  DeviceScales(trellis::Scales fitted, cudaStream_t stream)
      : host(std::move(fitted)),
        input(uploaded(floats_of(host.input), stream)),
        output(uploaded(floats_of(host.output), stream)) {}
  trellis::Scales host;
  DeviceBuffer<float> input;
  DeviceBuffer<float> output;
};

// Encodes strips of a rotated matrix.
class RingCoder {
 public:
  // rings: the most at once.
  RingCoder(const Trellis& format, int64_t rings, cudaStream_t stream)
      : shape_(format.shape()),
        codebook_(format.codebook, stream),
        stream_(stream),
        targets_(checked_mul(rings, trellis::kRingLength), stream) {
    const TrellisWorkspace wanted = trellis_workspace_cuda(shape_, TrellisSearch::normal, rings);
    size_t free_bytes = 0;
    size_t all_bytes = 0;
    check_cuda(cudaMemGetInfo(&free_bytes, &all_bytes), "memory of the device");
    workspace_bytes_ =
        std::clamp(static_cast<int64_t>(free_bytes / 2), wanted.least_bytes, wanted.fast_bytes);
    workspace_ = DeviceBuffer<std::byte>(workspace_bytes_, stream);
  }

  const TrellisShape& shape() const { return shape_; }
  // words: of all tiles of `strip`, whose columns follow each other.
  void encode(const CudaMatrix& strip, uint32_t* words) const {
    gather_tiles_cuda(strip, 1, targets_.data(), stream_);
    CudaRings rings;
    rings.targets = targets_.data();
    rings.count = strip.rows / kStep * (strip.cols / kStep);
    rings.shape = shape_;
    rings.words = words;
    encode_rings_cuda(codebook_, rings, TrellisSearch::normal, workspace_.data(), workspace_bytes_, stream_);
  }
  void decode(const uint32_t* words, const CudaMatrix& strip) const {
    decode_tiles_cuda(codebook_, words, shape_, strip, stream_);
  }

 private:
  TrellisShape shape_;
  CudaTrellisCodebook codebook_;
  cudaStream_t stream_;
  DeviceBuffer<float> targets_;
  DeviceBuffer<std::byte> workspace_;
  int64_t workspace_bytes_ = 0;
};

// A matrix on its way to a trellis: its sizes, padded ones and dead columns.
struct TrellisTask {
  TrellisTask(const CudaMatrix& matrix, const Trellis& form, cudaStream_t s)
      : w(matrix),
        format(form),
        stream(s),
        rows(checked_pad(matrix.rows, kRotationBlock)),
        cols(checked_pad(matrix.cols, kRotationBlock)),
        target(form.codebook.rms() * trellis_best_ratio(form.half_bits, form.codebook.code)) {}

  // Words of the rings of 16 columns.
  int64_t step_words() const { return rows / kStep * format.shape().words(); }
  DeviceBuffer<float> rotated(const uint8_t* dead, const DeviceScales& scales) const {
    DeviceBuffer<float> result(checked_mul(rows, cols), stream);
    divide_by_scales(w, dead, scales.input.data(), scales.output.data(), result.data(), rows, cols, stream);
    rotate_columns(result.data(), rows, cols, stream);
    rotate_rows(result.data(), rows, cols, stream);
    return result;
  }
  // [n, k]. rotated: scratch memory of that size.
  DeviceBuffer<float> decoded(const RingCoder& coder, const uint32_t* words, const DeviceScales& scales,
                              float* rotated) const {
    coder.decode(words, matrix_of(rotated, rows, cols, cols));
    rotate_columns(rotated, rows, cols, stream);
    rotate_rows(rotated, rows, cols, stream);
    DeviceBuffer<float> result(checked_mul(w.rows, w.cols), stream);
    multiply_by_scales(rotated, cols, scales.input.data(), scales.output.data(), result.data(), w.rows,
                       w.cols, stream);
    return result;
  }

  CudaMatrix w;
  const Trellis& format;
  cudaStream_t stream;
  int64_t rows;
  int64_t cols;
  double target;
};

// What rounding makes, before it is written to planes.
struct TrellisResult {
  DeviceBuffer<uint32_t> words;
  DeviceScales scales;
  DeviceBuffer<float> decoded;  // [n, k]
};

}  // namespace quantloom::cuda
