#include "fuzz/targets.hpp"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <nlohmann/json.hpp>

#include "io/packed_description.hpp"
#include "quantloom/formats/codebook.hpp"
#include "quantloom/formats/entropy.hpp"
#include "quantloom/formats/uniform.hpp"
#include "quantloom/io/awq.hpp"
#include "quantloom/io/compressed_tensors.hpp"
#include "quantloom/io/gptq.hpp"
#include "quantloom/io/packed_file.hpp"

namespace quantloom::fuzz {
namespace {

constexpr int64_t kLargestDecoded = 1 << 16;

void require(bool promise) {
  if (!promise) std::abort();
}

// Runs `call`, which may throw errors of the library and no others.
template <class Call>
bool succeeds(const Call& call) {
  try {
    call();
    return true;
  } catch (const Error& error) {
    require(std::strlen(error.what()) > 0);
    return false;
  }
}

bool same_planes(const PackedTensor& a, const PackedTensor& b) {
  if (a.planes.size() != b.planes.size() || a.n != b.n || a.k != b.k) return false;
  for (const auto& [name, plane] : a.planes) {
    const auto found = b.planes.find(name);
    if (found == b.planes.end() || found->second.byte_count() != plane.byte_count()) return false;
    if (plane.byte_count() > 0 &&
        std::memcmp(found->second.bytes(), plane.bytes(), static_cast<size_t>(plane.byte_count())) != 0) {
      return false;
    }
  }
  return true;
}

// A packed tensor that was accepted must decode, and what exports must import as the same planes.
void use(const PackedTensor& packed) {
  if (packed.n > kLargestDecoded || packed.k > kLargestDecoded || packed.n * packed.k > kLargestDecoded)
    return;
  std::vector<float> values(static_cast<size_t>(packed.n * packed.k));
  dequantize(packed, {values.data(), packed.n, packed.k}, 1);
  const auto* uniform = dynamic_cast<const Uniform*>(packed.format.get());
  if (uniform == nullptr) {
    require(!succeeds([&] { to_compressed_tensors(packed); }));
    require(!succeeds([&] { to_gptq(packed, GptqVersion::v1); }));
    return;
  }
  const Uniform& format = *uniform;
  succeeds([&] {
    const auto tensors = to_compressed_tensors(packed);
    PackedTensor back;
    const CompressedTensorsSettings settings{format.bits, format.group_size, format.symmetric,
                                             WordPadding::dense};
    require(succeeds([&] { back = from_compressed_tensors(tensors, settings); }));
    // A group index that says what is so without it does not come back.
    require(same_planes(packed, back) || packed.planes.contains("group_index"));
  });
  for (const GptqVersion version : {GptqVersion::v1, GptqVersion::v2}) {
    succeeds([&] {
      const auto tensors = to_gptq(packed, version);
      PackedTensor back;
      require(succeeds([&] {
        back = from_gptq(tensors, {format.bits, format.group_size, format.symmetric, version});
      }));
      require(same_planes(packed, back) || packed.planes.contains("group_index"));
    });
  }
}

void load_all(std::span<const std::byte> bytes) {
  succeeds([&] {
    const PackedFileReader reader = PackedFileReader::parse(bytes, "input");
    for (const std::string& name : reader.plain()) succeeds([&] { reader.load_plain(name); });
    for (const auto& [name, description] : reader.packed()) {
      const std::string& packed_name = name;
      PackedTensor packed;
      if (succeeds([&] { packed = reader.load_packed(packed_name); })) use(packed);
    }
  });
}

// The input with the checksums and the digest that its content has; empty if it is beyond that.
std::string repaired(std::span<const std::byte> input) {
  std::string result;
  succeeds([&] {
    const SafetensorsFile file = SafetensorsFile::parse(input, "input");
    auto metadata = file.metadata();
    const auto description_text = metadata.extract(std::string(io::kDescriptionKey));
    if (description_text.empty()) return;
    io::PackedDescription description =
        io::read_description(description_text.mapped(), "input", std::ssize(file.names()));
    description.checksums.clear();
    std::map<std::string, io::StoredTensor> stored;
    nlohmann::json header;
    std::string data;
    for (const std::string& name : file.names()) {
      const SafetensorsEntry& entry = file.entry(name);
      stored.emplace(name, io::StoredTensor{entry.dtype, entry.shape});
      description.checksums[name] = io::checksum_of(entry.data);
      const size_t begin = data.size();
      data.append(reinterpret_cast<const char*>(entry.data.data()), entry.data.size());
      header[name] = {{"dtype", safetensors_name_of(entry.dtype)},
                      {"shape", entry.shape},
                      {"data_offsets", {begin, data.size()}}};
    }
    description.digest = io::digest_of(stored, description, metadata);
    metadata[std::string(io::kDescriptionKey)] = io::description_json(description);
    header["__metadata__"] = metadata;
    const std::string text = header.dump();
    const auto length = static_cast<uint64_t>(text.size());
    result.assign(reinterpret_cast<const char*>(&length), sizeof(length));
    result += text + data;
  });
  return result;
}

}  // namespace

void safetensors(std::span<const std::byte> input) {
  succeeds([&] {
    const SafetensorsFile file = SafetensorsFile::parse(input, "input");
    int64_t total = 0;
    for (const std::string& name : file.names()) {
      const SafetensorsEntry& entry = file.entry(name);
      require(std::ssize(entry.data) == checked_mul(checked_product(entry.shape), size_of(entry.dtype)));
      total += std::ssize(entry.data);
      succeeds([&] {
        const Tensor tensor = file.tensor(name);
        require(tensor.byte_count() == std::ssize(entry.data));
        if (tensor.byte_count() > 0) {
          require(std::memcmp(tensor.bytes(), entry.data.data(), entry.data.size()) == 0);
        }
      });
    }
    require(total <= std::ssize(input) - 8);
  });
}

void packed_file(std::span<const std::byte> input) {
  load_all(input);
  const std::string fixed = repaired(input);
  if (!fixed.empty()) load_all(std::as_bytes(std::span(fixed)));
}

void formats(std::span<const std::byte> input) {
  const std::string text(reinterpret_cast<const char*>(input.data()), input.size());
  std::shared_ptr<const Format> format;
  const auto use_format = [&] {
    require(format_from_json(format->to_json())->to_json() == format->to_json());
    const auto* codebook = dynamic_cast<const Codebook*>(format.get());
    std::shared_ptr<const Format> same;
    const bool short_form = succeeds([&] { same = format_from_spec(format->spec()); });
    // Only a table without a name has no short form.
    require(short_form == (codebook == nullptr || !codebook->table_name.empty()));
    require(!short_form || same->to_json() == format->to_json());
    for (const int64_t n : {int64_t{0}, int64_t{1}, int64_t{33}, int64_t{1} << 31, int64_t{1} << 62}) {
      for (const int64_t k : {int64_t{0}, int64_t{1}, int64_t{1000}, int64_t{1} << 31, int64_t{1} << 62}) {
        succeeds([&] { require(!format->planes(n, k).empty()); });
      }
    }
  };
  if (succeeds([&] { format = format_from_json(text); })) use_format();
  if (succeeds([&] { format = format_from_spec(text); })) use_format();
}

void layouts(std::span<const std::byte> input) {
  if (input.size() < 4) return;
  const auto setting = [&](size_t i) { return std::to_integer<int>(input[i]); };
  std::map<std::string, Tensor> tensors;
  const bool read = succeeds([&] {
    const SafetensorsFile file = SafetensorsFile::parse(input.subspan(4), "input");
    for (const std::string& name : file.names()) tensors.emplace(name, file.tensor(name));
  });
  if (!read) return;
  const int bits = setting(0) % 10;
  const int64_t group_size = static_cast<int8_t>(setting(1));
  const bool symmetric = setting(2) % 2 == 0;
  PackedTensor packed;
  const GptqSettings gptq{bits, group_size, symmetric, static_cast<GptqVersion>(1 + setting(3) % 2)};
  if (succeeds([&] { packed = from_gptq(tensors, gptq); })) use(packed);
  if (succeeds([&] { packed = from_awq(tensors, group_size); })) use(packed);
  const CompressedTensorsSettings compressed{bits, group_size, symmetric,
                                             static_cast<WordPadding>(setting(3) / 2 % 3)};
  if (succeeds([&] { packed = from_compressed_tensors(tensors, compressed); })) use(packed);
}

namespace {

// What decodes does so as a whole and in ranges alike, to codes of the alphabet.
void use_stream(std::span<const std::byte> input) {
  constexpr int64_t kMost = 1 << 18;
  const EntropyStream stream(input);
  if (stream.count() > kMost) return;
  std::vector<uint16_t> codes(static_cast<size_t>(stream.count()));
  stream.decode(0, codes, 1);
  for (const uint16_t code : codes) require(code < stream.alphabet());
  const int64_t first = stream.count() / 3;
  std::vector<uint16_t> part(static_cast<size_t>((stream.count() - first) / 2));
  stream.decode(first, part, 1);
  require(std::equal(part.begin(), part.end(), codes.begin() + first));
  if (stream.alphabet() <= 256) {
    std::vector<uint8_t> narrow(codes.size());
    stream.decode(0, narrow, 1);
    require(std::equal(narrow.begin(), narrow.end(), codes.begin()));
  }
}

}  // namespace

void entropy(std::span<const std::byte> input) {
  if (input.size() < 2) return;
  if (input[0] == std::byte{'Q'}) {
    succeeds([&] { use_stream(input); });
    return;
  }
  const int setting = std::to_integer<int>(input[0]);
  EntropyOptions options;
  options.coder = setting % 2 == 0 ? EntropyCoder::rans : EntropyCoder::huffman;
  options.table_bits = setting / 2 % 20;
  options.chunk = 128 * (std::to_integer<int>(input[1]) % 8);
  options.threads = 1;
  std::vector<uint8_t> codes;
  for (const std::byte code : input.subspan(2)) codes.push_back(std::to_integer<uint8_t>(code));
  std::vector<std::byte> bytes;
  if (!succeeds([&] { bytes = entropy_encode(codes, options); })) return;
  std::vector<uint8_t> back(codes.size());
  require(succeeds([&] { EntropyStream(bytes).decode(0, back, 1); }));
  require(back == codes);
}

}  // namespace quantloom::fuzz
