// The device decoder as host code, a thread for each lane, against the decoder of the CPU.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "formats/entropy.cuh"
#include "quantloom/error.hpp"
#include "quantloom/random.hpp"

namespace quantloom {
namespace {

struct VectorSink {
  uint8_t* out;
  struct Cursor {
    int64_t position;
    Cursor(const VectorSink& /*sink*/, int64_t at) : position(at) {}
    void advance() { position += 128; }
  };
  void store_run(const Cursor& cursor, uint32_t codes) const {
    for (int i = 0; i < 4; ++i) store(cursor.position + i, codes >> (8 * i) & 0xffU);
  }
  void store(int64_t position, uint32_t code) const { out[position] = static_cast<uint8_t>(code); }
};

struct Decoded {
  std::vector<uint8_t> codes;
  int bad_chunk = std::numeric_limits<int>::max();
};

// In vectors of just their size, so that a sanitizer sees any access beyond them.
Decoded decode_by_a_warp(const EntropyStream& stream) {
  Decoded result;
  result.codes.resize(static_cast<size_t>(stream.count()));
  const EntropyTables& tables = stream.tables();
  std::vector<uint32_t> shared;  // for its alignment
  cuda::EntropyView view;
  const auto put = [&](const auto& values) {
    const auto raw = std::as_bytes(std::span(values));
    std::vector<uint32_t> part((raw.size() + 3) / 4);
    if (!raw.empty()) std::memcpy(part.data(), raw.data(), raw.size());
    shared.insert(shared.end(), part.begin(), part.end());
  };
  const bool huffman = stream.coder() == EntropyCoder::huffman;
  if (huffman) {
    put(std::vector<uint16_t>(tables.prefixes.begin(), tables.prefixes.end()));
  } else if (!tables.fused.empty()) {
    put(tables.fused);
  } else {
    put(std::vector<uint8_t>(tables.slots.begin(), tables.slots.end()));
    view.slots_offset = static_cast<int>(4 * shared.size());
    put(tables.parameters);
  }
  const auto bytes = stream.bytes();
  std::vector<uint32_t> ends(static_cast<size_t>(stream.chunks()));
  if (!ends.empty()) std::memcpy(ends.data(), bytes.data() + stream.offsets_offset(), 4 * ends.size());
  const auto words = bytes.subspan(static_cast<size_t>(stream.payload_offset()));
  std::vector<uint32_t> pairs(std::max<size_t>(1, (words.size() + 3) / 4));
  if (!words.empty()) std::memcpy(pairs.data(), words.data(), words.size());
  view.pairs = pairs.data();
  view.last_pair = std::ssize(pairs) - 1;
  view.ends = ends.data();
  view.count = stream.count();
  view.chunk = stream.chunk();
  view.bits = stream.table_bits();
  if (tables.escape >= 0) view.escape = static_cast<uint32_t>(tables.escape);
  view.escape_bits = tables.escape_bits;
  view.alphabet = static_cast<uint32_t>(stream.alphabet());
  view.bad_chunk = &result.bad_chunk;
  std::vector<uint16_t> ring(cuda::kRingWords + entropy::kTailWords + 1);
  const auto* table_bytes = reinterpret_cast<const unsigned char*>(shared.data());
  // As the rings of a block are: aligned to pairs of words.
  uint16_t* const aligned = ring.data() + reinterpret_cast<uintptr_t>(ring.data()) / 2 % 2;
  const VectorSink sink{result.codes.data()};
  emulated::run_warp([&](int lane) {
    for (int64_t chunk = 0; chunk < stream.chunks(); ++chunk) {
      __syncwarp();
      if (huffman) {
        cuda::decode_chunk<cuda::HuffmanLanes>(view, sink, chunk, table_bytes, aligned, lane);
      } else if (!tables.fused.empty()) {
        cuda::decode_chunk<cuda::RansLanes<cuda::FusedTable>>(view, sink, chunk, table_bytes, aligned, lane);
      } else {
        cuda::decode_chunk<cuda::RansLanes<cuda::SlotTable>>(view, sink, chunk, table_bytes, aligned, lane);
      }
    }
  });
  return result;
}

std::vector<uint8_t> some_codes(int64_t count, double spread, uint64_t seed) {
  const CounterRandom random(seed);
  std::vector<uint8_t> codes(static_cast<size_t>(count));
  for (size_t i = 0; i < codes.size(); ++i) {
    codes[i] = static_cast<uint8_t>(std::clamp(std::nearbyint(100 + spread * random.normal(i)), 0.0, 255.0));
  }
  return codes;
}

TEST(EntropyWarp, CodesEqualTheCpus) {
  const std::vector<EntropyOptions> options = {{.chunk = 384},
                                               {.table_bits = 9, .chunk = 384},
                                               {.table_bits = 14, .chunk = 640},
                                               {.coder = EntropyCoder::huffman, .chunk = 384}};
  uint64_t seed = 0;
  for (const EntropyOptions& option : options) {
    for (const int64_t count : {0, 1, 2, 33, 128, 391, 1501}) {
      for (const double spread : {0.0, 2.0, 60.0}) {
        auto codes = some_codes(count, spread, ++seed);
        for (size_t i = 7; i < codes.size(); i += 97) codes[i] = static_cast<uint8_t>(i / 97);  // rare ones
        const auto bytes = entropy_encode(codes, option);
        const Decoded decoded = decode_by_a_warp(EntropyStream(bytes));
        ASSERT_EQ(decoded.codes, codes) << count << " " << spread << " " << option.table_bits;
        ASSERT_EQ(decoded.bad_chunk, std::numeric_limits<int>::max());
      }
    }
  }
}

// Short streams whose escape is in use, and words that no encoder writes: both decoders take or refuse the
// same.
TEST(EntropyWarp, RefusesWhatTheCpuRefuses) {
  const CounterRandom random(9);
  uint64_t draw = 0;
  int refused = 0;
  int accepted = 0;
  for (const EntropyCoder coder : {EntropyCoder::rans, EntropyCoder::huffman}) {
    auto codes = some_codes(600, 2.0, 5);
    for (size_t i = 7; i < codes.size(); i += 97) codes[i] = static_cast<uint8_t>(i / 97);
    const auto bytes = entropy_encode(codes, {.coder = coder, .table_bits = 9, .chunk = 384});
    const auto payload = static_cast<size_t>(EntropyStream(bytes).payload_offset());
    for (int round = 0; round < 60; ++round) {
      auto changed = bytes;
      const size_t from = round % 2 == 0 ? 24 : payload;
      for (uint64_t i = 0; i <= random.below(draw, 3); ++i) {
        const size_t at = from + random.below(++draw, changed.size() - from);
        changed[at] = static_cast<std::byte>(random.bits(++draw));
      }
      for (size_t i = payload; round % 5 == 4 && i < changed.size(); ++i) {
        changed[i] = static_cast<std::byte>(random.bits(++draw));
      }
      try {
        const EntropyStream stream(changed);
        const Decoded decoded = decode_by_a_warp(stream);
        std::vector<uint8_t> expected(static_cast<size_t>(stream.count()));
        bool sound = true;
        try {
          stream.decode(0, expected, 1);
        } catch (const FileFormatError&) {
          sound = false;
        }
        ASSERT_EQ(decoded.bad_chunk == std::numeric_limits<int>::max(), sound) << round;
        if (sound) {
          ASSERT_EQ(decoded.codes, expected);
        }
        ++(sound ? accepted : refused);
      } catch (const FileFormatError&) {
        continue;  // refused before any decoder
      }
    }
  }
  EXPECT_GT(refused, 20);
}

}  // namespace
}  // namespace quantloom
