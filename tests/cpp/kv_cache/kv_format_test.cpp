#include "quantloom/kv_cache/kv_format.hpp"

#include <gtest/gtest.h>

#include <set>
#include <utility>

#include "quantloom/error.hpp"
#include "quantloom/kv_cache/kv_layout.hpp"

namespace quantloom {
namespace {

TEST(KVFormat, ShortFormsAndDescriptionsComeBack) {
  for (const char* spec :
       {"kivi:2:g32:r128", "kivi:4,2:g64:r64:first4", "kivi:1:g16:r48:hadamard", "kivi:8:g1:r1", "token:4",
        "token:8:g64:r32", "token:3,4:first1", "sdr:4:g16", "sdr:7,2:g8:r5:first2:hadamard",
        "kvquant:3:1%:first1", "kvquant:4,2:0.25%:first0", "kvquant:1:r7:2.5%:first3"}) {
    const KVFormat format = kv_format_from_spec(spec);
    EXPECT_EQ(kv_format_from_spec(format.spec()), format) << spec;
    if (std::string_view(spec).find(":r7:") == std::string_view::npos) {
      EXPECT_EQ(format.spec(), spec);
    }
    EXPECT_EQ(kv_format_from_json(format.to_json()), format) << spec;
  }
  EXPECT_EQ(kv_format_from_spec("kivi:2").spec(), "kivi:2:g32:r128");
  EXPECT_EQ(kv_format_from_spec("kivi:4:r32").spec(), "kivi:4:g32:r32");
  EXPECT_EQ(kv_format_from_spec("sdr:4").spec(), "sdr:4:g16");
}

TEST(KVFormat, RefusesWhatItDoesNotUnderstand) {
  for (const char* spec : {"",
                           "kivi",
                           "kivi:",
                           "kivi:5",
                           "kivi:0",
                           "kivi:2:g0",
                           "kivi:2:g32:r0",
                           "kivi:2:g32:r100",
                           "kivi:2:g32:g32",
                           "kivi:2:first",
                           "kivi:2,",
                           "kivi:,2",
                           "kivi:2,2,2",
                           "kvi:2",
                           "token:5",
                           "token:4:g0",
                           "sdr:1",
                           "sdr:8",
                           "sdr:4:hadamar",
                           "kivi:2:first-1",
                           "kivi:2:",
                           "kivi:2:g99999999999999999999",
                           "kvquant:5",
                           "kvquant:2:11%",
                           "kvquant:2:g8",
                           "kvquant:2:hadamard",
                           "kvquant:2:%",
                           "kvquant:2:1.234%",
                           "kvquant:2:1.%",
                           "kivi:2:1%",
                           "kvquant:2:1%:2%"}) {
    EXPECT_THROW(kv_format_from_spec(spec), InvalidArgument) << spec;
  }
  EXPECT_THROW(kv_format_from_json("{}"), InvalidArgument);
  EXPECT_THROW(kv_format_from_json("[]"), InvalidArgument);
  std::string json = kv_format_from_spec("kivi:2").to_json();
  json.replace(json.find("128"), 3, "100");
  EXPECT_THROW(kv_format_from_json(json), InvalidArgument);
}

TEST(KVLayout, StoresTheBitsOfItsFormula) {
  const auto bits = [](const char* spec, int64_t dim) {
    return kv_layout(kv_format_from_spec(spec), dim).average_bits();
  };
  for (const int64_t dim : {64, 96, 128, 256}) {
    EXPECT_EQ(bits("kivi:4", dim), 5.0) << dim;
    EXPECT_EQ(bits("kivi:2", dim), 3.0) << dim;
    EXPECT_EQ(bits("kivi:1", dim), 2.0) << dim;
    EXPECT_EQ(bits("kivi:3", dim), 4.0) << dim;
    EXPECT_EQ(bits("kivi:8", dim), 9.0) << dim;
    EXPECT_EQ(bits("token:4", dim), 4.0 + 32.0 / static_cast<double>(dim)) << dim;
  }
  EXPECT_EQ(bits("kivi:2:g64", 128), 2.5);
  EXPECT_EQ(bits("kivi:4,2", 128), 4.0);
  // 16 bits of scale and 8 shifts of 3 bits for 128 channels.
  EXPECT_EQ(bits("sdr:4:g16", 128), 4.0 + 40.0 / 128);
  // 163 outliers of 32 bits in 128 tokens of 128 channels, padded to 16 bytes, and 32 bits for each value.
  EXPECT_EQ(bits("kvquant:4:1%", 128), 4.0 + 656.0 * 8 / (128 * 128) + 32.0 / 128 / 2);
  EXPECT_EQ(bits("kvquant:2:0%", 128), 2.0 + 32.0 / 128 / 2);
  EXPECT_THROW(bits("kvquant:2", 520), InvalidArgument);
  // 80 channels of 3 bits are 7.5 words; groups of 32, 32 and 16 of a value.
  const KVLayout odd = kv_layout(kv_format_from_spec("kivi:3"), 80);
  EXPECT_EQ(odd.keys.row_bytes, 32);
  EXPECT_EQ(odd.values.groups, 3);
  EXPECT_EQ(odd.page_tokens, 128);
}

TEST(KVLayout, PartsFollowEachOtherAtMultiplesOf16) {
  for (const char* spec : {"kivi:3:g24:r24", "kivi:2:g200:r200", "token:1:g5", "sdr:3:g7", "sdr:5:g16"}) {
    const KVLayout layout = kv_layout(kv_format_from_spec(spec), 80);
    const KVPart& k = layout.keys;
    const KVPart& v = layout.values;
    for (const int64_t offset :
         {k.codes, k.parameters, k.shifts, v.codes, v.parameters, v.shifts, layout.record_bytes}) {
      EXPECT_EQ(offset % 16, 0) << spec;
    }
    EXPECT_GE(k.parameters, k.codes + k.row_bytes * layout.page_tokens) << spec;
    EXPECT_GT(v.codes, k.parameters) << spec;
    EXPECT_GE(v.parameters, v.codes + v.row_bytes * layout.page_tokens) << spec;
    EXPECT_GT(layout.record_bytes, v.parameters) << spec;
    EXPECT_EQ(layout.page_tokens % (k.codec == KVCodec::channel_grid ? k.group : 1), 0) << spec;
  }
}

TEST(KVLayout, ScalesOfChannelsLieByHalvesOfWords) {
  // Words of 2 bits hold 16 codes: scales 0, 8, 1, 9, ..., then least values, then the next 16 channels.
  const auto place = [](int bits, int64_t head_dim, int channel) {
    const ChannelPlace at(bits, head_dim, channel);
    return std::pair(at.scale, at.least);
  };
  EXPECT_EQ(place(2, 64, 0), std::pair(0, 32));
  EXPECT_EQ(place(2, 64, 8), std::pair(2, 34));
  EXPECT_EQ(place(2, 64, 1), std::pair(4, 36));
  EXPECT_EQ(place(2, 64, 15), std::pair(30, 62));
  EXPECT_EQ(place(2, 64, 16), std::pair(64, 96));
  EXPECT_EQ(place(8, 96, 3), std::pair(6, 14));
  // 3 bits, and rows that are no multiple of 16 bytes.
  EXPECT_EQ(place(3, 128, 5), std::pair(20, 22));
  EXPECT_EQ(place(2, 80, 5), std::pair(20, 22));
  for (const int bits : {1, 2, 3, 4, 8}) {
    for (const int64_t head_dim : {8, 64, 80, 96, 128, 256, 1024}) {
      std::set<int> places;
      for (int d = 0; d < head_dim; ++d) {
        const ChannelPlace at(bits, head_dim, d);
        places.insert({at.scale, at.least});
      }
      EXPECT_EQ(std::ssize(places), 2 * head_dim) << bits << " bits, " << head_dim;
      EXPECT_EQ(*places.rbegin(), head_dim * 4 - 2) << bits << " bits, " << head_dim;
    }
  }
}

TEST(KVLayout, RefusesHeadsItCannotStore) {
  const KVFormat format = kv_format_from_spec("kivi:2");
  for (const int64_t dim : {0, 4, 12, 129, 1032, -8})
    EXPECT_THROW(kv_layout(format, dim), InvalidArgument) << dim;
  EXPECT_NO_THROW(kv_layout(kv_format_from_spec("kivi:2:hadamard"), 128));
}

}  // namespace
}  // namespace quantloom
