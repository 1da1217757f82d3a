// Trellis-coded rings on the device: that they close, and that they are as near as reported.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>

#include "common/device.hpp"
#include "formats/trellis_passes.hpp"
#include "trellis_rings.hpp"

namespace quantloom {
namespace {

struct SmallSearch {
  const char* codebook;
  double bits;
  TrellisSearch search;
  int64_t rings;
};

// One of each kind of search, each a test of its own: one of them under a sanitizer takes minutes.
class TrellisSearchSmall : public TrellisCuda, public ::testing::WithParamInterface<SmallSearch> {};

TEST_P(TrellisSearchSmall, RingsClose) {
  const auto& [name, bits, search, rings] = GetParam();
  const Twin codebook(name);
  const std::vector<float> targets =
      normal_targets(rings, codebook.host.rms(), static_cast<uint64_t>(2 * bits));
  // Several rings in rounds of one.
  const int64_t workspace = rings > 1 ? kLeast : kFast;
  expect_rings(codebook, targets, bits, encode(codebook, targets, bits, search, workspace));
}
INSTANTIATE_TEST_SUITE_P(Kinds, TrellisSearchSmall,
                         ::testing::Values(SmallSearch{"mul1", 2, TrellisSearch::fast, 1},
                                           SmallSearch{"mul1", 4, TrellisSearch::fast, 1},
                                           SmallSearch{"mul1", 7, TrellisSearch::fast, 1},
                                           SmallSearch{"mul1", 2.5, TrellisSearch::fast, 1},
                                           SmallSearch{"3inst", 3, TrellisSearch::best, 2},
                                           SmallSearch{"hyb", 3, TrellisSearch::fast, 1},
                                           SmallSearch{"octagon", 2, TrellisSearch::fast, 1},
                                           SmallSearch{"octagon", 4, TrellisSearch::fast, 1},
                                           SmallSearch{"octagon", 2.5, TrellisSearch::fast, 1}));

TEST_F(TrellisCuda, RingsOfEveryKindAndCount) {
  uint64_t seed = 100;
  for (const char* name : {"3inst", "mcg", "mul1", "1mad", "rptc"}) {
    const Twin codebook(name);
    for (int bits = 1; bits <= 8; ++bits) {
      for (const TrellisSearch search : {TrellisSearch::fast, TrellisSearch::normal, TrellisSearch::best}) {
        const int64_t count = 1 + static_cast<int64_t>(seed * 7 % 61);
        const std::vector<float> targets = normal_targets(count, codebook.host.rms(), seed++);
        expect_rings(codebook, targets, bits, encode(codebook, targets, bits, search));
      }
    }
  }
}

TEST_F(TrellisCuda, RingsOfOtherShapes) {
  uint64_t seed = 900;
  for (const char* name : {"mul1", "3inst", "hyb", "rptc2", "octagon"}) {
    const Twin codebook(name);
    const int per_step = codebook.host.weights_per_step;
    for (int half_bits = 2; half_bits <= 16 / per_step; ++half_bits) {
      if (per_step == 1 && half_bits % 2 == 0) continue;
      const double bits = half_bits / 2.0;
      for (const TrellisSearch search : {TrellisSearch::fast, TrellisSearch::normal, TrellisSearch::best}) {
        const int64_t count = 1 + static_cast<int64_t>(seed * 7 % 61);
        const std::vector<float> targets = normal_targets(count, codebook.host.rms(), seed++);
        expect_rings(codebook, targets, bits, encode(codebook, targets, bits, search));
      }
      // Valid rings come back without loss.
      const TrellisShape shape = shape_of(bits, per_step);
      const CounterRandom random(seed);
      std::vector<uint32_t> words(static_cast<size_t>(19 * shape.words()));
      for (size_t i = 0; i < words.size(); ++i) words[i] = static_cast<uint32_t>(random.bits(i));
      const DeviceArray<uint32_t> packed(words);
      const DeviceArray<float> weights(19 * kPositions);
      decode_rings_cuda(codebook.device, packed.data(), 19, shape, weights.data(), DType::f32, nullptr);
      for (const float error : encode(codebook, weights.host(), bits, TrellisSearch::normal).errors) {
        ASSERT_EQ(error, 0) << name << ", " << bits << " bits";
      }
    }
  }
}

TEST_F(TrellisCuda, NoRingsNeedNothing) {
  const Twin codebook("mul1");
  const TrellisWorkspace sizes = trellis_workspace_cuda(shape_of(2), TrellisSearch::normal, 0);
  EXPECT_EQ(sizes.fast_bytes, 0);
  EXPECT_EQ(sizes.least_bytes, 0);
  encode_rings_cuda(codebook.device, {}, TrellisSearch::normal, nullptr, 0, nullptr);
  decode_rings_cuda(codebook.device, nullptr, 0, shape_of(2), nullptr, DType::f32, nullptr);
}

TEST_F(TrellisCuda, ValidRingsHaveNoLoss) {
  for (const char* name : {"3inst", "mcg", "mul1", "1mad", "rptc"}) {
    const Twin codebook(name);
    for (int bits = 1; bits <= 8; ++bits) {
      const CounterRandom random(static_cast<uint64_t>(bits));
      constexpr int64_t kCount = 67;
      std::vector<uint32_t> words(static_cast<size_t>(kCount * 8 * bits));
      for (size_t i = 0; i < words.size(); ++i) words[i] = static_cast<uint32_t>(random.bits(i));
      const DeviceArray<uint32_t> packed(words);
      const DeviceArray<float> weights(kCount * kPositions);
      decode_rings_cuda(codebook.device, packed.data(), kCount, shape_of(bits), weights.data(), DType::f32,
                        nullptr);
      const std::vector<float> targets = weights.host();
      for (const TrellisSearch search : {TrellisSearch::normal, TrellisSearch::best}) {
        const Rings rings = encode(codebook, targets, bits, search);
        expect_rings(codebook, targets, bits, rings);
        for (const float error : rings.errors) {
          ASSERT_EQ(error, 0) << name << ", " << bits << " bits, " << name_of(search);
        }
      }
    }
  }
}

// A ring's result is the same however many blocks and rings share its search.
TEST_F(TrellisCuda, RingsAreIndependentOfTheCount) {
  for (const char* name : {"octagon", "mul1"}) {
    const Twin codebook(name);
    const int per_step = codebook.host.weights_per_step;
    for (int half_bits = 2; half_bits <= 9; ++half_bits) {
      if (half_bits > 8 && per_step == 2) continue;
      const double bits = half_bits / 2.0;
      const int64_t words = shape_of(bits, per_step).words();
      const std::vector<float> targets = normal_targets(1100, codebook.host.rms(), 14);
      for (const TrellisSearch search : {TrellisSearch::normal, TrellisSearch::best}) {
        const Rings together = encode(codebook, targets, bits, search);
        for (const int64_t count : {1, 7, 64, 65, 128, 131, 133, 263, 265, 529}) {
          const Rings some =
              encode(codebook, {targets.begin(), targets.begin() + count * kPositions}, bits, search);
          for (int64_t i = 0; i < count * words; ++i) {
            ASSERT_EQ(some.words[static_cast<size_t>(i)], together.words[static_cast<size_t>(i)])
                << name << ", " << bits << " bits, " << name_of(search) << ", " << count << " rings, word "
                << i;
          }
        }
      }
      const std::vector<float> few(targets.begin(), targets.begin() + 64 * kPositions);
      const Rings once = encode(codebook, few, bits, TrellisSearch::normal);
      for (int repeat = 0; repeat < 20; ++repeat) {
        ASSERT_EQ(encode(codebook, few, bits, TrellisSearch::normal), once)
            << name << ", " << bits << " bits";
      }
    }
  }
}

// With less shared memory the codebook of two weights a step is read from memory, for one pair of rings in a
// block or more: the same rings.
TEST_F(TrellisCuda, RingsAreTheSameWithoutTheCodebookOnTheChip) {
  const Twin codebook("octagon");
  constexpr int64_t kCount = 21;
  const std::vector<float> targets = normal_targets(kCount, codebook.host.rms(), 15);
  const DeviceArray<float> wanted(targets);
  const DeviceFacts device = current_device();
  for (int half_bits = 2; half_bits <= 8; ++half_bits) {
    const double bits = half_bits / 2.0;
    const TrellisShape shape = shape_of(bits, 2);
    const Rings expected = encode(codebook, targets, bits, TrellisSearch::normal);
    const DeviceArray<uint16_t> edges(2 * kCount);
    const DeviceArray<uint32_t> words(kCount * shape.words());
    for (const int pairs : {1, 2, 4}) {
      if (512 * pairs >> half_bits > 140) continue;  // more costs than shared memory holds
      cuda::SearchTask first = cuda::first_pass(shape, TrellisSearch::normal);
      cuda::SearchTask second = cuda::second_pass(shape);
      const DeviceArray<uint32_t> history(second.history_words() * ((kCount + 1) / 2));
      for (cuda::SearchTask* task : {&first, &second}) {
        task->targets = wanted.data();
        task->table = codebook.device.weights();
        task->count = kCount;
        task->history = history.data();
        task->pairs = pairs;
      }
      first.ends = edges.data();
      second.pins = edges.data() + kCount;
      cuda::TracebackResult seams;
      seams.seams = edges.data() + kCount;
      cuda::TracebackResult result;
      result.words = words.data();
      settle();
      cuda::search_rings(first, device.processors, nullptr);
      cuda::trace_back(first, seams, nullptr);
      cuda::search_rings(second, device.processors, nullptr);
      cuda::trace_back(second, result, nullptr);
      ASSERT_EQ(words.host(), expected.words) << bits << " bits, " << pairs;
    }
  }
}

TEST_F(TrellisCuda, EveryRunGivesTheSameBytes) {
  const Twin codebook("mul1");
  for (const int bits : {2, 3, 4, 7}) {
    const std::vector<float> targets = normal_targets(301, 1, 11);
    for (const TrellisSearch search : {TrellisSearch::normal, TrellisSearch::best}) {
      const Rings first = encode(codebook, targets, bits, search);
      for (int repeat = 0; repeat < 100; ++repeat) {
        ASSERT_EQ(encode(codebook, targets, bits, search), first)
            << bits << " bits, " << name_of(search) << ", repeat " << repeat;
      }
    }
  }
}

// A ring's result depends on neither its place, its neighbours nor the workspace.
TEST_F(TrellisCuda, RingsAreIndependent) {
  const Twin codebook("mcg");
  for (int bits = 1; bits <= 8; ++bits) {
    constexpr int64_t kCount = 37;
    const std::vector<float> targets = normal_targets(kCount, 1.2, 12);
    for (const TrellisSearch search : {TrellisSearch::normal, TrellisSearch::best}) {
      const Rings together = encode(codebook, targets, bits, search);
      ASSERT_EQ(encode(codebook, targets, bits, search, kLeast), together) << bits << " bits";
      for (const int64_t ring : {0, 1, 17, 36}) {
        const auto begin = targets.begin() + ring * kPositions;
        const Rings alone = encode(codebook, std::vector<float>(begin, begin + kPositions), bits, search);
        EXPECT_EQ(alone.errors[0], together.errors[static_cast<size_t>(ring)]);
        for (int w = 0; w < 8 * bits; ++w) {
          ASSERT_EQ(alone.words[static_cast<size_t>(w)],
                    together.words[static_cast<size_t>(ring * 8 * bits + w)])
              << bits << " bits, ring " << ring;
        }
      }
    }
  }
}

TEST_F(TrellisCuda, AnyTargetsGiveRings) {
  const Twin codebook("mul1");
  const std::vector<float> special = {0,
                                      -0.0F,
                                      1e-30F,
                                      16,
                                      -16,
                                      20,
                                      -1e6F,
                                      1e38F,
                                      1e-45F,
                                      std::numeric_limits<float>::infinity(),
                                      -std::numeric_limits<float>::infinity(),
                                      std::numeric_limits<float>::quiet_NaN()};
  for (int bits = 1; bits <= 8; ++bits) {
    std::vector<float> targets = normal_targets(static_cast<int64_t>(special.size()) + 2, 1, 13);
    const std::vector<float> plain = targets;
    for (size_t ring = 0; ring < special.size(); ++ring) {
      for (size_t i = 0; i < kPositions; i += ring % 2 + 1) targets[ring * kPositions + i] = special[ring];
    }
    const Rings rings = encode(codebook, targets, bits, TrellisSearch::normal);
    const Rings expected = encode(codebook, plain, bits, TrellisSearch::normal);
    for (size_t ring = 0; ring < special.size() + 2; ++ring) {
      const uint32_t* words = rings.words.data() + ring * static_cast<size_t>(8 * bits);
      for (int position = 0; position < kPositions; ++position) {
        ASSERT_EQ(state_of(words, shape_of(bits), position),
                  rings.states[ring * kPositions + static_cast<size_t>(position)])
            << bits << " bits, " << (ring < special.size() ? special[ring] : 1) << ", position " << position;
      }
      if (ring < special.size()) {
        EXPECT_EQ(std::isnan(rings.errors[ring]), std::isnan(special[ring])) << bits << " bits, " << ring;
      } else {
        EXPECT_EQ(rings.errors[ring], expected.errors[ring]) << bits << " bits";
      }
    }
  }
}

TEST_F(TrellisCuda, DecodesToEveryType) {
  const Twin codebook("1mad");
  const CounterRandom random(3);
  std::vector<uint32_t> words(5 * 8 * 3);
  for (size_t i = 0; i < words.size(); ++i) words[i] = static_cast<uint32_t>(random.bits(i));
  const DeviceArray<uint32_t> packed(words);
  const DeviceArray<float> floats(5 * kPositions);
  const DeviceArray<uint16_t> halves(5 * kPositions);
  const DeviceArray<uint16_t> brains(5 * kPositions);
  decode_rings_cuda(codebook.device, packed.data(), 5, shape_of(3), floats.data(), DType::f32, nullptr);
  decode_rings_cuda(codebook.device, packed.data(), 5, shape_of(3), halves.data(), DType::f16, nullptr);
  decode_rings_cuda(codebook.device, packed.data(), 5, shape_of(3), brains.data(), DType::bf16, nullptr);
  const auto f = floats.host();
  const auto h = halves.host();
  const auto b = brains.host();
  for (size_t i = 0; i < f.size(); ++i) {
    const size_t ring = i / kPositions;
    ASSERT_EQ(
        f[i],
        codebook.values[state_of(words.data() + ring * 24, shape_of(3), static_cast<int>(i % kPositions))]);
    ASSERT_EQ(h[i], f16_from_float(f[i]));
    ASSERT_EQ(b[i], bf16_from_float(f[i]));
  }
}

// The place of a ring's position in its tile, by the tensor core's order: pairs of inputs 8 apart, lanes
// along the outputs.
int input_of(int position) {
  const int lane = position / 8;
  return 2 * (lane % 4) + position % 2 + 8 * (position / 2 % 2);
}
int output_of(int position) {
  return position / 8 / 4 + 8 * (position % 8 / 4);
}

TEST_F(TrellisCudaSmall, TilesAreRings) {
  const Twin codebook("mul1");
  for (const auto& [n, k] : std::vector<std::pair<int64_t, int64_t>>{{16, 16}, {48, 80}, {0, 32}, {32, 0}}) {
    const int64_t tiles = n * k / kPositions;
    const int64_t stride = k + 5;
    const CounterRandom random(static_cast<uint64_t>(n));
    std::vector<uint32_t> words(static_cast<size_t>(tiles * 8 * 3));
    for (size_t i = 0; i < words.size(); ++i) words[i] = static_cast<uint32_t>(random.bits(i));
    const DeviceArray<uint32_t> packed(words);
    const DeviceArray<float> matrix(n * stride);
    const CudaMatrix view{matrix.data(), DType::f32, n, k, stride};
    decode_tiles_cuda(codebook.device, packed.data(), shape_of(3), view, nullptr);
    const DeviceArray<float> targets(tiles * kPositions);
    gather_tiles_cuda(view, 2, targets.data(), nullptr);
    const DeviceArray<uint16_t> halves(n * k);
    decode_tiles_cuda(codebook.device, packed.data(), shape_of(3), {halves.data(), DType::f16, n, k, k},
                      nullptr);
    const std::vector<float> values = matrix.host();
    const std::vector<float> rings = targets.host();
    const std::vector<uint16_t> narrow = halves.host();
    for (int64_t tile = 0; tile < tiles; ++tile) {
      for (int position = 0; position < kPositions; ++position) {
        const int64_t row = tile % (n / 16) * 16 + output_of(position);
        const int64_t column = tile / (n / 16) * 16 + input_of(position);
        const float expected = codebook.values[state_of(words.data() + tile * 24, shape_of(3), position)];
        ASSERT_EQ(values[static_cast<size_t>(row * stride + column)], expected) << row << ", " << column;
        ASSERT_EQ(narrow[static_cast<size_t>(row * k + column)], f16_from_float(expected));
        ASSERT_EQ(rings[static_cast<size_t>(tile * kPositions + position)], 2 * expected);
      }
    }
  }
  const DeviceArray<float> odd(17 * 16);
  EXPECT_THROW(gather_tiles_cuda({odd.data(), DType::f32, 17, 16, 16}, 1, odd.data(), nullptr),
               InvalidArgument);
}

TEST_F(TrellisCuda, ACapturedEncodingCanBeRepeated) {
  const Twin codebook("mul1");
  const std::vector<float> targets = normal_targets(40, 1, 5);
  const Rings expected = encode(codebook, targets, 2, TrellisSearch::best);
  const DeviceArray<float> wanted(targets);
  const DeviceArray<uint32_t> words(40 * 16);
  const int64_t bytes = trellis_workspace_cuda(shape_of(2), TrellisSearch::best, 40).fast_bytes;
  const DeviceArray<std::byte> workspace(bytes);
  CudaRings rings;
  rings.targets = wanted.data();
  rings.count = 40;
  rings.words = words.data();
  const Stream stream;
  settle();
  const Graph graph(stream, [&] {
    encode_rings_cuda(codebook.device, rings, TrellisSearch::best, workspace.data(), bytes,
                      static_cast<cudaStream_t>(stream));
  });
  for (int repeat = 0; repeat < 3; ++repeat) {
    check_cuda(cudaMemset(words.data(), 0x77, static_cast<size_t>(words.bytes())), "poison");
    settle();
    graph.launch(stream);
    stream.synchronize();
    EXPECT_EQ(words.host(), expected.words);
  }
}

TEST_F(TrellisCuda, RefusesBadArguments) {
  const Twin codebook("mul1");
  const DeviceArray<float> targets(normal_targets(2, 1, 1));
  const DeviceArray<uint32_t> words(2 * 8 * 8);
  const int64_t least = trellis_workspace_cuda(shape_of(2), TrellisSearch::normal, 2).least_bytes;
  const DeviceArray<std::byte> workspace(least);
  CudaRings good;
  good.targets = targets.data();
  good.count = 2;
  good.words = words.data();
  const auto run = [&](const CudaRings& rings, void* memory, int64_t bytes) {
    encode_rings_cuda(codebook.device, rings, TrellisSearch::normal, memory, bytes, nullptr);
  };
  EXPECT_NO_THROW(run(good, workspace.data(), least));
  EXPECT_THROW(run(good, workspace.data(), least - 1), InvalidArgument);
  EXPECT_THROW(run(good, workspace.data() + 8, least), InvalidArgument);
  std::vector<TrellisShape> bad_shapes;
  for (const double bits : {-1.0, 0.0, 0.5, 8.5, 9.0}) bad_shapes.push_back(shape_of(bits));
  bad_shapes.push_back(shape_of(4.5, 2));
  bad_shapes.push_back(shape_of(2, 3));
  bad_shapes.push_back({12, 4, 1, 256});
  bad_shapes.push_back({16, 4, 1, 160});
  for (const TrellisShape& shape : bad_shapes) {
    CudaRings bad = good;
    bad.shape = shape;
    EXPECT_THROW(run(bad, workspace.data(), least), InvalidArgument);
    EXPECT_THROW(trellis_workspace_cuda(shape, TrellisSearch::normal, 2), InvalidArgument);
    EXPECT_THROW(
        decode_rings_cuda(codebook.device, words.data(), 2, shape, words.data(), DType::f32, nullptr),
        InvalidArgument);
  }
  // The codebook has one weight a step.
  CudaRings two = good;
  two.shape = shape_of(2, 2);
  EXPECT_THROW(run(two, workspace.data(), least), InvalidArgument);
  for (const int64_t count : {int64_t{-1}, int64_t{1} << 31}) {
    CudaRings bad = good;
    bad.count = count;
    EXPECT_THROW(run(bad, workspace.data(), least), InvalidArgument);
  }
  const std::vector<float> on_host(512);
  CudaRings bad = good;
  bad.targets = on_host.data();
  EXPECT_THROW(run(bad, workspace.data(), least), TypeMismatch);
  EXPECT_THROW(
      decode_rings_cuda(codebook.device, words.data(), 2, shape_of(2), targets.data(), DType::i32, nullptr),
      TypeMismatch);
  EXPECT_THROW(CudaTrellisCodebook(trellis_codebook("mul1", 12)), InvalidArgument);
}

}  // namespace
}  // namespace quantloom
