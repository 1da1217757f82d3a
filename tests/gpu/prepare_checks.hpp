// Planes in the order of the kernels, against the scalar reference on the CPU.
#pragma once

#include "product_case.hpp"

namespace quantloom {

inline void expect_same_bytes(const Tensor& device, const Tensor& expected, const std::string& name) {
  ASSERT_EQ(device.dtype(), expected.dtype()) << name;
  ASSERT_EQ(device.shape(), expected.shape()) << name;
  const auto bytes = download(device.bytes(), device.byte_count());
  for (size_t i = 0; i < bytes.size(); ++i) {
    ASSERT_EQ(bytes[i], expected.bytes()[i]) << name << ", byte " << i << " of " << bytes.size();
  }
}

// Memory for the planes of the format, full of ones, on the device.
inline PackedTensor empty_packed(const PackedTensor& like) {
  PackedTensor packed{like.format, like.n, like.k, {}};
  for (const auto& [name, plane] : like.planes) {
    Tensor full(plane.dtype(), plane.shape());
    std::memset(full.bytes(), 0xFF, static_cast<size_t>(full.byte_count()));
    packed.planes.emplace(name, to_device(full));
  }
  return packed;
}

inline void check_round_trip(const ProductCase& c) {
  SCOPED_TRACE(c.text());
  Draws draws(c.seed);
  const PackedTensor packed = random_planes(c, draws);
  const PreparedPlanes expected = prepare_fragments(packed);
  const PreparedPlanes prepared = prepared_on_device(packed, false);
  ASSERT_EQ(prepared.planes.size(), expected.planes.size());
  for (const auto& [name, plane] : expected.planes) {
    ASSERT_TRUE(prepared.has(name)) << name;
    expect_same_bytes(prepared.plane(name), plane, name);
    if (::testing::Test::HasFatalFailure()) return;
  }
  PackedTensor back = empty_packed(packed);
  unprepare_cuda(prepared, back, nullptr);
  check_cuda(cudaDeviceSynchronize(), "unprepare_cuda");
  for (const auto& [name, plane] : packed.planes) {
    expect_same_bytes(back.plane(name), plane, "unprepared " + name);
    if (::testing::Test::HasFatalFailure()) return;
  }
}

// Decoded values at their places, bit for bit; nothing written past the padded columns.
inline void check_decoding(const ProductCase& c) {
  Draws draws(c.seed);
  const PackedTensor packed = random_planes(c, draws);
  const bool rounded_twice = dynamic_cast<const Outliers*>(c.format.get()) != nullptr;
  const PreparedPlanes host = prepare_fragments(packed);
  const int64_t padded_k = as_additive(*c.format) != nullptr ? 64 * ceil_div(c.k, 64)
                           : host.has("signs")               ? 128 * host.plane("signs").shape()[1]
                                                             : 64 * host.plane("codes").shape()[1];
  const PreparedPlanes prepared = to_device(host);
  const int64_t stride = padded_k + 8 * draws.below(3);
  std::vector<float> expected(static_cast<size_t>(c.n * c.k));
  dequantize(packed, MatrixView<float>(expected.data(), c.n, c.k));
  for (const DType dtype : {DType::f16, DType::bf16, DType::f32}) {
    SCOPED_TRACE(c.text() + " to " + std::string(name_of(dtype)));
    const GuardedMemory out(c.n * stride * size_of(dtype), 0, 512);
    decode_fragments_cuda(prepared, out.data(), dtype, stride, nullptr);
    check_cuda(cudaDeviceSynchronize(), "decode_fragments_cuda");
    const auto bytes = out.read();
    ASSERT_TRUE(bytes) << "written outside the rows";
    for (int64_t row = 0; row < c.n; ++row) {
      for (int64_t place = 0; place < stride; ++place) {
        const uint32_t got = element_at(bytes->data(), row * stride + place, dtype);
        int64_t column = place;
        if (host.has("source") && place < padded_k) {
          column = host.plane("source").values<int32_t>()[static_cast<size_t>(place)];
        }
        if (place >= padded_k) {
          ASSERT_EQ(got, poison_of(dtype)) << "row " << row << ", place " << place;
        } else if (column >= 0 && column < c.k && rounded_twice && dtype != DType::f32) {
          const float wanted = expected[static_cast<size_t>(row * c.k + column)];
          // No dense value is beyond 8.
          ASSERT_NEAR(float_from(got, dtype), wanted, unit_of(dtype) * (std::fabs(wanted) + 8))
              << "row " << row << ", column " << column;
        } else if (column >= 0 && column < c.k) {
          ASSERT_EQ(got, bits_from(expected[static_cast<size_t>(row * c.k + column)], dtype))
              << "row " << row << ", column " << column;
        }
      }
    }
  }
}

}  // namespace quantloom
