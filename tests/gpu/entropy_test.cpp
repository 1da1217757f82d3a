#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>

#include "cuda_streams.hpp"
#include "device_memory.hpp"
#include "quantloom/error.hpp"
#include "quantloom/formats/entropy_cuda.hpp"

namespace quantloom {
namespace {

constexpr int kPoison = 0xA5;
constexpr std::array<EntropyCoder, 2> kCoders = {EntropyCoder::rans, EntropyCoder::huffman};

class EntropyCuda : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!has_cuda_device()) GTEST_SKIP() << "no CUDA device in this machine";
  }
};
// Few launches: this suite also runs under compute-sanitizer.
class EntropyCudaSmall : public EntropyCuda {};

std::vector<uint8_t> random_codes(int64_t count, int64_t alphabet, double spread, uint64_t seed) {
  const CounterRandom random(seed);
  std::vector<uint8_t> codes(static_cast<size_t>(count));
  for (size_t i = 0; i < codes.size(); ++i) {
    const double value =
        spread > 0 ? std::nearbyint(static_cast<double>(alphabet - 1) / 2 + spread * random.normal(i))
                   : static_cast<double>(random.below(i, static_cast<uint64_t>(alphabet)));
    codes[i] = static_cast<uint8_t>(std::clamp(value, 0.0, static_cast<double>(alphabet - 1)));
  }
  return codes;
}

// Decodes [first, first + count) into the middle of poisoned memory and compares all of it.
void expect_codes(const CudaEntropyStream& device, const std::vector<uint8_t>& codes, int64_t first,
                  int64_t count, int64_t offset) {
  SCOPED_TRACE(text_of("codes ", first, " + ", count, " at offset ", offset));
  const int64_t total = offset + count + 64;
  const auto memory = device_bytes(total);
  check_cuda(cudaMemset(memory.get(), kPoison, static_cast<size_t>(total)), "poison");
  device.decode(first, count, reinterpret_cast<uint8_t*>(memory.get()) + offset, nullptr);
  EXPECT_NO_THROW(device.check(nullptr));
  const std::vector<std::byte> got = download(memory.get(), total);
  for (int64_t i = 0; i < total; ++i) {
    const bool inside = i >= offset && i < offset + count;
    const int expected = inside ? codes[static_cast<size_t>(first + i - offset)] : kPoison;
    ASSERT_EQ(std::to_integer<int>(got[static_cast<size_t>(i)]), expected) << "byte " << i - offset;
  }
}

void expect_whole(const std::vector<uint8_t>& codes, const EntropyOptions& options, int64_t offset = 0) {
  const auto bytes = entropy_encode(codes, options);
  const CudaEntropyStream device{EntropyStream(bytes)};
  EXPECT_EQ(device.count(), std::ssize(codes));
  expect_codes(device, codes, 0, std::ssize(codes), offset);
}

TEST_F(EntropyCudaSmall, CodesEqualTheCpus) {
  for (const EntropyCoder coder : kCoders) {
    for (const int64_t count : {1, 33, 1000, 5003}) {
      expect_whole(random_codes(count, 60, 4.0, 1), {.coder = coder, .chunk = 640}, count % 3);
    }
    expect_whole(random_codes(4000, 256, 2.0, 2), {.coder = coder, .table_bits = 14});
  }
  // Rare codes, which are spelled out.
  std::vector<uint8_t> codes = random_codes(40'000, 20, 1.0, 3);
  for (size_t i = 0; i < 100; ++i) codes[i * 397] = static_cast<uint8_t>(100 + i);
  expect_whole(codes, {.table_bits = 9});
  expect_whole(codes, {.table_bits = 14});
}

TEST_F(EntropyCuda, CodesEqualTheCpus) {
  uint64_t seed = 10;
  for (const EntropyCoder coder : kCoders) {
    for (const int64_t count : {0, 1, 2, 31, 127, 128, 129, 997, 4096, 40'009, 300'007}) {
      for (const int64_t alphabet : {1, 2, 16, 49, 256}) {
        for (const int64_t chunk : {0, 128, 1280, 8192}) {
          const double spread = ++seed % 3 == 0 ? 0.0 : static_cast<double>(alphabet) / 12.0;
          SCOPED_TRACE(text_of("count ", count, " alphabet ", alphabet, " chunk ", chunk));
          expect_whole(random_codes(count, alphabet, spread, seed), {.coder = coder, .chunk = chunk},
                       static_cast<int64_t>(seed % 4));
        }
      }
    }
  }
}

TEST_F(EntropyCuda, EveryTableSize) {
  const auto codes = random_codes(100'003, 200, 6.0, 7);
  for (int bits = kEntropySmallestTable; bits <= kEntropyLargestTable; ++bits) {
    expect_whole(codes, {.table_bits = bits, .chunk = 4096});
  }
  for (int bits = 7; bits <= kEntropyLongestCode; ++bits) {
    expect_whole(codes, {.coder = EntropyCoder::huffman, .table_bits = bits, .chunk = 4096});
  }
}

TEST_F(EntropyCuda, Ranges) {
  const auto codes = random_codes(20'000, 49, 3.0, 8);
  for (const EntropyCoder coder : kCoders) {
    const auto bytes = entropy_encode(codes, {.coder = coder, .chunk = 1024});
    const CudaEntropyStream device{EntropyStream(bytes)};
    for (const auto& [first, count] :
         {std::array<int64_t, 2>{0, 1}, {1023, 2}, {1024, 1024}, {777, 9000}, {19'999, 1}, {20'000, 0}}) {
      for (const int64_t offset : {0, 1, 2, 3}) expect_codes(device, codes, first, count, offset);
    }
  }
}

uint16_t half_of(float value, DType dtype) {
  return dtype == DType::f16 ? f16_from_float(value) : bf16_from_float(value);
}

struct Matrix {
  int64_t n;
  int64_t k;
  int64_t rows_per_scale;
  int64_t columns_per_scale;
};

void expect_values(const Matrix& m, EntropyCoder coder, DType out, DType scale_dtype, int64_t padding,
                   uint64_t seed, int64_t first_row = 0, int64_t rows = -1) {
  if (rows < 0) rows = m.n;
  SCOPED_TRACE(text_of("[", m.n, ", ", m.k, "], scales of ", m.rows_per_scale, " x ", m.columns_per_scale,
                       ", ", name_of(out), ", padding ", padding, ", rows ", first_row, " + ", rows));
  constexpr int64_t kAlphabet = 49;
  const auto codes = random_codes(m.n * m.k, kAlphabet, 3.0, seed);
  const auto bytes = entropy_encode(codes, {.coder = coder, .chunk = 1024});
  const EntropyStream stream(bytes);
  const CudaEntropyStream device(stream);
  const CounterRandom random(seed + 1);
  std::vector<float> table(kAlphabet);
  for (size_t i = 0; i < table.size(); ++i) table[i] = static_cast<float>(random.normal(i));
  const int64_t scale_columns = ceil_div(m.k, m.columns_per_scale);
  const int64_t scale_count = ceil_div(m.n, m.rows_per_scale) * scale_columns;
  std::vector<float> scales(static_cast<size_t>(scale_count));
  std::vector<std::byte> stored(static_cast<size_t>(scale_count * size_of(scale_dtype)));
  for (size_t i = 0; i < scales.size(); ++i) {
    scales[i] = static_cast<float>(std::exp(random.normal(1000 + i)));
    if (scale_dtype == DType::f32) {
      std::memcpy(stored.data() + 4 * i, &scales[i], 4);
    } else {
      const uint16_t half = half_of(scales[i], scale_dtype);
      std::memcpy(stored.data() + 2 * i, &half, 2);
      scales[i] = scale_dtype == DType::f16 ? float_from_f16(half) : float_from_bf16(half);
    }
  }
  const auto device_table = device_bytes(4 * kAlphabet);
  upload(table.data(), device_table.get(), 4 * kAlphabet);
  const auto device_scales = device_bytes(std::ssize(stored));
  upload(stored.data(), device_scales.get(), std::ssize(stored));

  const int64_t stride = m.k + padding;
  const int64_t element = size_of(out);
  const int64_t total = (rows * stride + 16) * element;
  const auto memory = device_bytes(total);
  check_cuda(cudaMemset(memory.get(), kPoison, static_cast<size_t>(total)), "poison");
  const EntropyValues values{m.n,
                             m.k,
                             reinterpret_cast<const float*>(device_table.get()),
                             kAlphabet,
                             device_scales.get(),
                             scale_dtype,
                             m.rows_per_scale,
                             m.columns_per_scale};
  device.decode_values(values, first_row, rows, memory.get(), out, stride, nullptr);
  EXPECT_NO_THROW(device.check(nullptr));
  std::vector<std::byte> expected(static_cast<size_t>(total), std::byte{kPoison});
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < m.k; ++c) {
      const int64_t row = first_row + r;
      const float scale =
          scales[static_cast<size_t>(row / m.rows_per_scale * scale_columns + c / m.columns_per_scale)];
      const float value = table[codes[static_cast<size_t>(row * m.k + c)]] * scale;
      std::byte* to = expected.data() + (r * stride + c) * element;
      if (out == DType::f32) {
        std::memcpy(to, &value, 4);
      } else {
        const uint16_t half = half_of(value, out);
        std::memcpy(to, &half, 2);
      }
    }
  }
  EXPECT_EQ(download(memory.get(), total), expected);
}

constexpr std::array<DType, 3> kFloats = {DType::f16, DType::bf16, DType::f32};

TEST_F(EntropyCudaSmall, ValuesEqualTheCpus) {
  for (const EntropyCoder coder : kCoders) {
    expect_values({17, 96, 1, 32}, coder, DType::f16, DType::bf16, 0, 20);
    expect_values({9, 101, 2, 7}, coder, DType::f32, DType::f32, 3, 21);
  }
}

TEST_F(EntropyCuda, ValuesEqualTheCpus) {
  uint64_t seed = 30;
  const std::array<Matrix, 11> cases = {{{1, 1, 1, 1},
                                         {64, 256, 1, 64},
                                         {64, 256, 64, 256},
                                         {33, 1000, 1, 1000},
                                         {33, 1000, 1, 128},
                                         {33, 1000, 5, 24},
                                         {130, 257, 1, 16},
                                         {5000, 3, 7, 2},
                                         {2000, 8, 1, 4},
                                         {3, 9973, 1 << 20, int64_t{1} << 40},
                                         {7, 128, 2, 100}}};
  for (const EntropyCoder coder : kCoders) {
    for (const Matrix& m : cases) {
      for (const DType out : kFloats) {
        for (const int64_t padding : {0, 1, 8}) {
          ++seed;
          expect_values(m, coder, out, kFloats[seed % 3], padding, seed);
        }
      }
    }
    expect_values({100, 512, 1, 128}, coder, DType::f16, DType::f16, 0, ++seed, 33, 40);
    expect_values({100, 515, 3, 128}, coder, DType::bf16, DType::f32, 5, ++seed, 99, 1);
    expect_values({100, 515, 3, 128}, coder, DType::bf16, DType::f32, 5, ++seed, 100, 0);
  }
}

// Words that no encoder writes: decoding ends, stays in its memory, and is reported where the CPU reports it.
void expect_safe(const std::vector<std::byte>& bytes) {
  std::vector<uint8_t> host;
  bool sound = true;
  try {
    const EntropyStream stream(bytes);
    host.resize(static_cast<size_t>(stream.count()));
    stream.decode(0, host, 1);
  } catch (const FileFormatError&) {
    sound = false;
  }
  if (host.empty()) return;  // the CPU refused the head
  const int64_t count = std::ssize(host);
  const CudaEntropyStream device{EntropyStream(bytes)};
  const auto memory = device_bytes(count + 128);
  check_cuda(cudaMemset(memory.get(), kPoison, static_cast<size_t>(count + 128)), "poison");
  device.decode(0, count, reinterpret_cast<uint8_t*>(memory.get()) + 64, nullptr);
  if (sound) {
    EXPECT_NO_THROW(device.check(nullptr));
  } else {
    EXPECT_THROW(device.check(nullptr), FileFormatError);
    EXPECT_THROW(device.check(nullptr), FileFormatError);
  }
  const std::vector<std::byte> got = download(memory.get(), count + 128);
  for (int64_t i = 0; i < 64; ++i) {
    ASSERT_EQ(got[static_cast<size_t>(i)], std::byte{kPoison});
    ASSERT_EQ(got[static_cast<size_t>(64 + count + i)], std::byte{kPoison});
  }
  if (sound) {
    EXPECT_EQ(std::memcmp(got.data() + 64, host.data(), host.size()), 0);
  }
}

void break_streams(int rounds, uint64_t seed) {
  const CounterRandom random(seed);
  uint64_t draw = 0;
  for (const EntropyCoder coder : kCoders) {
    std::vector<uint8_t> codes = random_codes(4000, 40, 3.0, seed);
    for (size_t i = 0; i < 20; ++i) codes[i * 197] = static_cast<uint8_t>(100 + i);
    const auto bytes = entropy_encode(codes, {.coder = coder, .chunk = 640});
    const auto payload = static_cast<size_t>(EntropyStream(bytes).payload_offset());
    for (int round = 0; round < rounds; ++round) {
      auto changed = bytes;
      for (uint64_t i = 0; i < 1 + random.below(draw, 3); ++i) {
        const size_t at = 24 + random.below(++draw, changed.size() - 24);
        changed[at] = static_cast<std::byte>(random.bits(++draw));
      }
      expect_safe(changed);
      for (size_t i = payload; i < changed.size(); ++i)
        changed[i] = static_cast<std::byte>(random.bits(++draw));
      expect_safe(changed);
    }
  }
}

TEST_F(EntropyCudaSmall, HostileStreams) {
  break_streams(4, 50);
}
TEST_F(EntropyCuda, HostileStreams) {
  break_streams(400, 60);
}

TEST_F(EntropyCuda, RunsInGraphsAndOtherStreams) {
  const auto codes = random_codes(70'000, 49, 3.0, 70);
  const auto bytes = entropy_encode(codes, {.chunk = 4096});
  const Stream stream;
  const CudaEntropyStream device(EntropyStream(bytes), stream);
  const auto memory = device_bytes(std::ssize(codes));
  auto* const out = reinterpret_cast<uint8_t*>(memory.get());
  const Graph graph(stream, [&] { device.decode(0, std::ssize(codes), out, stream); });
  for (int round = 0; round < 2; ++round) {
    check_cuda(cudaMemsetAsync(out, kPoison, codes.size(), stream), "poison");
    graph.launch(stream);
    device.check(stream);
    EXPECT_EQ(std::memcmp(download(out, std::ssize(codes)).data(), codes.data(), codes.size()), 0);
  }
}

TEST_F(EntropyCuda, RefusesBadArguments) {
  const std::vector<uint16_t> wide = {1, 300, 2};
  const auto wide_bytes = entropy_encode(wide);
  EXPECT_THROW(CudaEntropyStream{EntropyStream(wide_bytes)}, Unsupported);

  const auto codes = random_codes(4 * 64, 16, 2.0, 80);
  const auto bytes = entropy_encode(codes);
  const CudaEntropyStream device{EntropyStream(bytes)};
  const auto out = device_bytes(4 * 64 * 4);
  auto* const as_codes = reinterpret_cast<uint8_t*>(out.get());
  std::vector<uint8_t> host(codes.size());
  EXPECT_THROW(device.decode(0, 257, as_codes, nullptr), InvalidArgument);
  EXPECT_THROW(device.decode(-1, 5, as_codes, nullptr), InvalidArgument);
  EXPECT_THROW(device.decode(0, 256, nullptr, nullptr), InvalidArgument);
  EXPECT_THROW(device.decode(0, 256, host.data(), nullptr), TypeMismatch);

  const auto table = device_bytes(1024);
  const EntropyValues good{4, 64, reinterpret_cast<const float*>(table.get()), 16, table.get(), DType::f32,
                           1, 32};
  const auto call = [&](const EntropyValues& values, int64_t rows, void* to, DType dtype, int64_t stride) {
    device.decode_values(values, 0, rows, to, dtype, stride, nullptr);
  };
  const auto with = [&](const auto& change) {
    EntropyValues changed = good;
    change(changed);
    return changed;
  };
  EXPECT_THROW(call(with([](auto& v) { v.n = 5; }), 4, out.get(), DType::f32, 64), InvalidArgument);
  EXPECT_THROW(call(with([](auto& v) { v.entries = 3; }), 4, out.get(), DType::f32, 64), InvalidArgument);
  EXPECT_THROW(call(with([](auto& v) { v.table = nullptr; }), 4, out.get(), DType::f32, 64), InvalidArgument);
  EXPECT_THROW(call(with([](auto& v) { v.columns_per_scale = 0; }), 4, out.get(), DType::f32, 64),
               InvalidArgument);
  EXPECT_THROW(call(with([](auto& v) { v.scale_dtype = DType::i8; }), 4, out.get(), DType::f32, 64),
               TypeMismatch);
  EXPECT_THROW(call(good, 5, out.get(), DType::f32, 64), InvalidArgument);
  EXPECT_THROW(call(good, 4, out.get(), DType::f32, 63), InvalidArgument);
  EXPECT_THROW(call(good, 4, out.get(), DType::i8, 64), TypeMismatch);
  EXPECT_THROW(call(good, 4, out.get() + 1, DType::f16, 64), InvalidArgument);
  EXPECT_THROW(call(good, 4, host.data(), DType::f16, 64), TypeMismatch);
  EXPECT_EQ(cudaGetLastError(), cudaSuccess);
}

}  // namespace
}  // namespace quantloom
