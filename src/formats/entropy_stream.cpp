// Streams of entropy coded chunks: header, model, offsets.
#include <algorithm>
#include <cmath>
#include <limits>

#include "formats/entropy_coding.hpp"
#include "formats/model_code.hpp"
#include "quantloom/checked_math.hpp"
#include "quantloom/error.hpp"
#include "quantloom/parallel.hpp"

namespace quantloom {
namespace entropy {

void refuse_chunk(int64_t chunk, const char* why) {
  throw FileFormatError(text_of("entropy stream: chunk ", chunk, " ", why));
}

}  // namespace entropy

namespace {

constexpr uint32_t kMagic = 0x4e454c51;  // "QLEN"
constexpr uint8_t kVersion = 2;
constexpr int64_t kHeaderBytes = 32;
constexpr double kTableLoss = 0.0005;  // bits per code that a smaller table may cost
// Tables of 2^12 slots decode faster than larger ones and may cost more.
constexpr int kFastTable = 12;
constexpr double kFastTableLoss = 0.0015;
constexpr int kLargestNarrowTable = 14;  // for up to 256 symbols
// The default chunk is the shortest whose bits beyond the entropy, as estimated, are no more than this.
constexpr double kChunkLoss = 0.0085;
constexpr int64_t kShortestDefault = 1 << 15;
constexpr int64_t kHuffmanDefault = 1 << 16;

[[noreturn]] void refuse(const std::string& why) {
  throw FileFormatError("entropy stream: " + why);
}

template <class T>
void append(std::vector<std::byte>& bytes, T value) {
  const auto* begin = reinterpret_cast<const std::byte*>(&value);
  bytes.insert(bytes.end(), begin, begin + sizeof(T));
}

template <class T>
T load(std::span<const std::byte> bytes, int64_t at) {
  T value{};
  std::memcpy(&value, bytes.data() + at, sizeof(T));
  return value;
}

struct Model {
  int bits = 0;
  std::vector<uint32_t> values;
  int32_t escape = -1;
};

// Frequencies for 2^bits slots, and what they cost in bits per code. Codes whose share is a small part of a
// slot would take whole slots from the others: where it is cheaper they share one code, the escape.
struct RansFit {
  Model model;
  double cost = 0;
};

RansFit fit_rans_bits(std::span<const uint64_t> counts, int bits) {
  constexpr double kRareShare = 0.3;
  RansFit plain{{bits, quantize_frequencies(counts, bits), -1}, 0};
  plain.cost = cross_entropy_of(counts, plain.model.values);
  double total = 0;
  for (const uint64_t c : counts) total += static_cast<double>(c);
  std::vector<uint64_t> merged(counts.begin(), counts.end());
  int32_t escape = -1;
  uint64_t rare = 0;
  int64_t kinds = 0;
  for (size_t i = 0; i < counts.size(); ++i) {
    if (counts[i] == 0 || static_cast<double>(counts[i]) * std::exp2(bits) >= kRareShare * total) continue;
    if (escape < 0) escape = static_cast<int32_t>(i);
    rare += counts[i];
    ++kinds;
    merged[i] = 0;
  }
  if (kinds < 2) return plain;
  merged[static_cast<size_t>(escape)] = rare;
  RansFit escaped{{bits, quantize_frequencies(merged, bits), escape}, 0};
  escaped.cost = cross_entropy_of(merged, escaped.model.values) +
                 static_cast<double>(rare) / total * entropy::bits_of_alphabet(std::ssize(counts));
  return escaped.cost < plain.cost ? escaped : plain;
}

RansFit fit_rans(std::span<const uint64_t> counts, int64_t used, int table_bits) {
  // One frequency must not fill a large table: it would not fit its field.
  if (used == 1) return fit_rans_bits(counts, kEntropySmallestTable);
  if (table_bits != 0) return fit_rans_bits(counts, table_bits);
  const double entropy = entropy_of(counts);
  const int most = std::ssize(counts) <= 256 ? kLargestNarrowTable : kEntropyLargestTable;
  for (int bits = std::max(10, entropy::bits_of_alphabet(used));; ++bits) {
    RansFit fit = fit_rans_bits(counts, bits);
    const double loss = fit.cost - entropy;
    if (bits >= most || loss <= (bits == kFastTable ? kFastTableLoss : kTableLoss)) return fit;
  }
}

Model fit_huffman(std::span<const uint64_t> counts, int64_t used, int table_bits) {
  const std::vector<double> weights(counts.begin(), counts.end());
  const auto cost = [&](const std::vector<int>& lengths) {
    double bits = 0;
    for (size_t i = 0; i < lengths.size(); ++i) bits += weights[i] * lengths[i];
    return bits;
  };
  double sum = 0;
  for (const double w : weights) sum += w;
  std::vector<int> lengths;
  if (table_bits != 0) {
    lengths = huffman_lengths(weights, table_bits);
  } else {
    const double best = cost(huffman_lengths(weights));
    for (int bits = std::max(10, entropy::bits_of_alphabet(used));; ++bits) {
      lengths = huffman_lengths(weights, bits);
      if (bits == kEntropyLongestCode || cost(lengths) - best <= kTableLoss * sum) break;
    }
  }
  if (used == 1) {
    std::vector<uint32_t> single(counts.size());
    for (size_t i = 0; i < counts.size(); ++i) single[i] = static_cast<uint32_t>(counts[i] != 0);
    return {0, std::move(single)};
  }
  return {*std::max_element(lengths.begin(), lengths.end()), {lengths.begin(), lengths.end()}};
}

void check_options(const EntropyOptions& options) {
  const bool rans = options.coder == EntropyCoder::rans;
  const int least = rans ? kEntropySmallestTable : 1;
  const int most = rans ? kEntropyLargestTable : kEntropyLongestCode;
  if (options.table_bits != 0 && (options.table_bits < least || options.table_bits > most)) {
    throw InvalidArgument("table_bits", text_of(options.table_bits),
                          text_of("0 (automatic) or ", least, " to ", most));
  }
  if (options.chunk < 0 || options.chunk > kEntropyLargestChunk || options.chunk % kEntropyChunkStep != 0) {
    throw InvalidArgument(
        "chunk", text_of(options.chunk),
        text_of("0 (automatic) or a multiple of ", kEntropyChunkStep, " up to ", kEntropyLargestChunk));
  }
  if (std::ssize(options.frequencies) > kEntropyAlphabet) {
    throw InvalidArgument("frequencies", text_of(options.frequencies.size(), " numbers"),
                          text_of("at most ", kEntropyAlphabet));
  }
}

// For rANS: `fixed` bits per code are lost whatever the chunk.
int64_t default_chunk(double fixed, double entropy) {
  // Offset, states, and the room that the longest tail leaves in the words that it might fill.
  const double bits = 235 + std::max(0.0, 448.0 - static_cast<double>(entropy::kLongestTail) * entropy);
  int64_t chunk = kShortestDefault;
  while (chunk < kEntropyLargestChunk && fixed + bits / static_cast<double>(chunk) > kChunkLoss) chunk *= 2;
  // Where no chunk meets the bound because of what is lost anyway, long ones would not help.
  return fixed > kChunkLoss ? 2 * kShortestDefault : chunk;
}

template <class Code>
std::vector<std::byte> encode(std::span<const Code> codes, const EntropyOptions& options) {
  check_options(options);
  const bool rans = options.coder == EntropyCoder::rans;
  const int64_t count = std::ssize(codes);
  const bool given = !options.frequencies.empty();
  std::vector<uint64_t> counts =
      count_codes(codes, given ? std::ssize(options.frequencies) : kEntropyAlphabet, options.threads);
  if (given) {
    for (size_t i = 0; i < counts.size(); ++i) {
      if (counts[i] != 0 && options.frequencies[i] == 0) {
        throw InvalidArgument("frequencies", text_of("0 for the code ", i, ", which occurs"),
                              "a positive number for each code that occurs");
      }
    }
    counts.assign(options.frequencies.begin(), options.frequencies.end());
  } else {
    while (!counts.empty() && counts.back() == 0) counts.pop_back();
  }
  const int64_t used = std::ssize(counts) - std::count(counts.begin(), counts.end(), uint64_t{0});
  Model model;
  double loss = 0;
  if (used > 0 && rans) {
    RansFit fit = fit_rans(counts, used, options.table_bits);
    loss = fit.cost - entropy_of(counts);
    model = std::move(fit.model);
  } else if (used > 0) {
    model = fit_huffman(counts, used, options.table_bits);
  }

  const std::vector<std::byte> packed_model = entropy::pack_model(model.values, options.coder);
  int64_t chunk = options.chunk;
  if (chunk == 0 && rans) {
    const double fixed = loss + 8.0 * static_cast<double>(packed_model.size()) /
                                    static_cast<double>(std::max<int64_t>(1, count));
    chunk = default_chunk(fixed, entropy_of(counts));
  } else if (chunk == 0) {
    chunk = kHuffmanDefault;
  }
  const int64_t chunks = ceil_div(count, chunk);
  std::vector<std::vector<uint16_t>> words(static_cast<size_t>(chunks));
  const auto coded = [&](const auto& encode_chunk) {
    parallel_for(chunks, options.threads, [&](int64_t c) {
      const int64_t first = c * chunk;
      words[static_cast<size_t>(c)] = encode_chunk(
          codes.subspan(static_cast<size_t>(first), static_cast<size_t>(std::min(chunk, count - first))));
    });
  };
  if (rans) {
    const entropy::RansModel coder = entropy::rans_model(model.values, model.bits, model.escape);
    coded([&](std::span<const Code> part) { return entropy::encode_rans(part, coder); });
  } else {
    const entropy::HuffmanModel coder = entropy::huffman_model(model.values, model.bits);
    coded([&](std::span<const Code> part) { return entropy::encode_huffman(part, coder); });
  }

  int64_t payload = 0;
  for (const auto& part : words) payload += std::ssize(part);
  if (payload > std::numeric_limits<uint32_t>::max()) {
    throw InvalidArgument("codes", text_of(count, " codes of ", 2 * payload, " bytes"),
                          "at most 8 GiB of coded words; split the codes");
  }
  std::vector<std::byte> bytes;
  const int64_t table = checked_pad(std::ssize(packed_model), 4);
  bytes.reserve(static_cast<size_t>(kHeaderBytes + table + 4 * chunks + 2 * payload));
  append(bytes, kMagic);
  append(bytes, kVersion);
  append(bytes, static_cast<uint8_t>(options.coder));
  append(bytes, static_cast<uint8_t>(model.bits));
  append(bytes, uint8_t{0});
  append(bytes, static_cast<uint32_t>(model.values.size()));
  append(bytes, static_cast<uint32_t>(chunk));
  append(bytes, static_cast<uint64_t>(count));
  append(bytes, static_cast<uint32_t>(packed_model.size()));
  append(bytes, static_cast<uint32_t>(model.escape + 1));
  bytes.insert(bytes.end(), packed_model.begin(), packed_model.end());
  bytes.resize(static_cast<size_t>(kHeaderBytes + table));
  uint32_t end = 0;
  for (const auto& part : words) append(bytes, end += static_cast<uint32_t>(part.size()));
  for (const auto& part : words) {
    const auto raw = std::as_bytes(std::span(part));
    bytes.insert(bytes.end(), raw.begin(), raw.end());
  }
  return bytes;
}

void check_frequencies(std::span<const uint32_t> model, int bits) {
  if (bits < kEntropySmallestTable || bits > kEntropyLargestTable) {
    refuse(text_of("a table of 2^", bits, " slots, expected 2^", kEntropySmallestTable, " to 2^",
                   kEntropyLargestTable));
  }
  uint64_t sum = 0;
  for (const uint32_t f : model) {
    // The frequency of a single code has no field in tables above the smallest.
    if (f == uint32_t{1} << bits && bits > kEntropySmallestTable) refuse("one code in a large table");
    sum += f;
  }
  if (sum != uint64_t{1} << bits) refuse(text_of("frequencies with sum ", sum, ", expected 2^", bits));
}

void check_lengths(std::span<const uint32_t> model, int bits) {
  if (bits > kEntropyLongestCode) {
    refuse(text_of("codes of ", bits, " bits, expected at most ", kEntropyLongestCode));
  }
  uint64_t sum = 0;
  uint32_t longest = 0;
  for (const uint32_t length : model) {
    if (length > static_cast<uint32_t>(std::max(bits, 1))) {
      refuse(text_of("a code of ", length, " bits, expected at most ", bits));
    }
    longest = std::max(longest, length);
    if (length != 0) sum += uint64_t{1} << (kEntropyLongestCode - length);
  }
  // A single code of no bits is stored as the length 1 in a table of 0 bits.
  const int whole = bits == 0 ? kEntropyLongestCode - 1 : kEntropyLongestCode;
  if (sum != uint64_t{1} << whole || longest != static_cast<uint32_t>(std::max(bits, 1))) {
    refuse("code lengths that are not those of a complete prefix code");
  }
}

}  // namespace

std::vector<std::byte> entropy_encode(std::span<const uint8_t> codes, const EntropyOptions& options) {
  return encode(codes, options);
}
std::vector<std::byte> entropy_encode(std::span<const uint16_t> codes, const EntropyOptions& options) {
  return encode(codes, options);
}

EntropyStream::EntropyStream(std::span<const std::byte> bytes) : bytes_(bytes) {
  const int64_t size = std::ssize(bytes);
  if (size < kHeaderBytes) refuse(text_of(size, " bytes, expected a header of ", kHeaderBytes));
  if (load<uint32_t>(bytes, 0) != kMagic) refuse("the first bytes are not QLEN");
  const int version = load<uint8_t>(bytes, 4);
  if (version < 1 || version > kVersion) {
    refuse(text_of("version ", version, ", expected 1 to ", int{kVersion}));
  }
  const auto coder = load<uint8_t>(bytes, 5);
  if (coder > 1) refuse(text_of("coder ", int{coder}, ", expected 0 (rANS) or 1 (Huffman)"));
  coder_ = static_cast<EntropyCoder>(coder);
  table_bits_ = load<uint8_t>(bytes, 6);
  alphabet_ = load<uint32_t>(bytes, 8);
  chunk_ = load<uint32_t>(bytes, 12);
  const auto count = load<uint64_t>(bytes, 16);
  const int64_t table = load<uint32_t>(bytes, 24);
  const int64_t escape = int64_t{load<uint32_t>(bytes, 28)} - 1;
  if (load<uint8_t>(bytes, 7) != 0) refuse("a reserved byte that is not 0");
  if (alphabet_ > kEntropyAlphabet) {
    refuse(text_of(alphabet_, " symbols, expected at most ", kEntropyAlphabet));
  }
  if (chunk_ == 0 || chunk_ > kEntropyLargestChunk || chunk_ % kEntropyChunkStep != 0) {
    refuse(text_of("chunks of ", chunk_, " codes, expected a multiple of ", kEntropyChunkStep, " up to ",
                   kEntropyLargestChunk));
  }
  if (count > uint64_t{1} << 62) refuse(text_of(count, " codes"));
  count_ = static_cast<int64_t>(count);
  chunks_ = ceil_div(count_, chunk_);
  // Sizes before anything of their size is made: an offset for each chunk, words that fill the rest.
  offsets_offset_ = kHeaderBytes + checked_pad(table, 4);
  if (offsets_offset_ > size || chunks_ > (size - offsets_offset_) / 4) refuse("the offsets end early");
  payload_offset_ = offsets_offset_ + 4 * chunks_;
  if (alphabet_ == 0 ? count_ != 0 || table != 0 || table_bits_ != 0 : table == 0) {
    refuse("codes without a model");
  }
  for (int64_t i = kHeaderBytes + table; i < offsets_offset_; ++i) {
    if (load<uint8_t>(bytes, i) != 0) refuse("padding that is not 0");
  }
  const auto packed_model = bytes.subspan(kHeaderBytes, static_cast<size_t>(table));
  model_ = version == 1 ? entropy::unpack_model_1(packed_model, alphabet_)
                        : entropy::unpack_model(packed_model, alphabet_, coder_);
  // An escape must have slots; Huffman codes have none.
  if (escape >= 0 &&
      (coder_ != EntropyCoder::rans || escape >= alphabet_ || model_[static_cast<size_t>(escape)] == 0)) {
    refuse(text_of("the escape ", escape, ", which is no code of the model"));
  }
  if (alphabet_ > 0) {
    if (coder_ == EntropyCoder::rans) {
      check_frequencies(model_, table_bits_);
      tables_ = entropy::rans_tables(entropy::rans_model(model_, table_bits_, static_cast<int32_t>(escape)));
    } else {
      check_lengths(model_, table_bits_);
      tables_ = entropy::huffman_tables(entropy::huffman_model(model_, table_bits_));
    }
  }
  int64_t end = 0;
  for (int64_t c = 0; c < chunks_; ++c) {
    const int64_t next = load<uint32_t>(bytes, offsets_offset_ + 4 * c);
    if (next < end) refuse(text_of("the offset of chunk ", c, " goes back"));
    end = next;
  }
  if (size - payload_offset_ != 2 * end) {
    refuse(text_of(size - payload_offset_, " bytes of words, expected ", 2 * end));
  }
}

int64_t EntropyStream::codes_of(int64_t chunk) const {
  return std::min(chunk_, count_ - chunk * chunk_);
}

std::span<const std::byte> EntropyStream::words_of(int64_t chunk) const {
  const int64_t begin = chunk == 0 ? 0 : load<uint32_t>(bytes_, offsets_offset_ + 4 * (chunk - 1));
  const int64_t end = load<uint32_t>(bytes_, offsets_offset_ + 4 * chunk);
  return bytes_.subspan(static_cast<size_t>(payload_offset_ + 2 * begin),
                        static_cast<size_t>(2 * (end - begin)));
}

namespace {

template <class Code>
void decode_range(const EntropyStream& stream, int64_t first, std::span<Code> codes, int threads) {
  const int64_t count = std::ssize(codes);
  if (first < 0 || first > stream.count() || count > stream.count() - first) {
    throw InvalidArgument("codes", text_of("codes ", first, " to ", first, " + ", count),
                          text_of("a range within ", stream.count(), " codes"));
  }
  if (stream.alphabet() > int64_t{1} << (8 * sizeof(Code))) {
    throw InvalidArgument("codes", "uint8",
                          text_of("uint16, for an alphabet of ", stream.alphabet(), " symbols"));
  }
  resolve_threads(threads);
  if (count == 0) return;
  const auto decode_chunk = [&](int64_t chunk, std::span<Code> out) {
    if (stream.coder() == EntropyCoder::rans) {
      entropy::decode_rans(stream.words_of(chunk), stream.tables(), stream.table_bits(), chunk, out);
    } else {
      entropy::decode_huffman(stream.words_of(chunk), stream.tables(), stream.table_bits(), chunk, out);
    }
  };
  const int64_t first_chunk = first / stream.chunk();
  const int64_t chunks = (first + count - 1) / stream.chunk() - first_chunk + 1;
  parallel_for(chunks, threads, [&](int64_t i) {
    const int64_t chunk = first_chunk + i;
    const int64_t begin = chunk * stream.chunk();
    const int64_t size = stream.codes_of(chunk);
    const int64_t from = std::max(begin, first);
    const int64_t to = std::min(begin + size, first + count);
    const auto out = codes.subspan(static_cast<size_t>(from - first), static_cast<size_t>(to - from));
    if (to - from == size) return decode_chunk(chunk, out);
    std::vector<Code> whole(static_cast<size_t>(size));
    decode_chunk(chunk, whole);
    std::copy_n(whole.begin() + (from - begin), out.size(), out.begin());
  });
}

}  // namespace

void EntropyStream::decode(int64_t first, std::span<uint8_t> codes, int threads) const {
  decode_range(*this, first, codes, threads);
}
void EntropyStream::decode(int64_t first, std::span<uint16_t> codes, int threads) const {
  decode_range(*this, first, codes, threads);
}

}  // namespace quantloom
