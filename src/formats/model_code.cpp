#include "formats/model_code.hpp"

#include <bit>

#include "quantloom/error.hpp"

namespace quantloom::entropy {
namespace {

constexpr int kWidest = 16;  // bits of a number

[[noreturn]] void refuse(const std::string& why) {
  throw FileFormatError("entropy stream: " + why);
}

class Bits {
 public:
  void put(uint32_t value, int count) {
    for (int i = 0; i < count; ++i) {
      if (filled_ % 8 == 0) bytes_.push_back(std::byte{0});
      bytes_.back() |= static_cast<std::byte>((value >> i & 1U) << (filled_++ % 8));
    }
  }
  std::vector<std::byte> take() { return std::move(bytes_); }

 private:
  std::vector<std::byte> bytes_;
  size_t filled_ = 0;
};

class BitReader {
 public:
  explicit BitReader(std::span<const std::byte> bytes) : bytes_(bytes) {}
  uint32_t take(int count) {
    uint32_t value = 0;
    for (int i = 0; i < count; ++i, ++at_) {
      if (at_ / 8 >= bytes_.size()) refuse("the model ends early");
      value |= (std::to_integer<uint32_t>(bytes_[at_ / 8]) >> (at_ % 8) & 1U) << i;
    }
    return value;
  }
  void finish() {
    while (at_ % 8 != 0) {
      if (take(1) != 0) refuse("the model has bits behind its end");
    }
    if (at_ / 8 != bytes_.size()) {
      refuse(text_of("the model has ", bytes_.size() - at_ / 8, " bytes too many"));
    }
  }

 private:
  std::span<const std::byte> bytes_;
  size_t at_ = 0;
};

// Differences of small numbers: 0, 1, -1, 2, ... as 1, 2, 3, 4, ... in Elias's gamma code.
void put_difference(Bits& bits, int difference) {
  const auto place = static_cast<uint32_t>(difference > 0 ? 2 * difference : 1 - 2 * difference);
  const int length = static_cast<int>(std::bit_width(place)) - 1;
  bits.put(0, length);
  bits.put(1, 1);
  bits.put(place, length);
}
int take_difference(BitReader& bits) {
  int length = 0;
  while (bits.take(1) == 0) {
    if (++length > 5) refuse("the model has a number that is too large");
  }
  const auto place = static_cast<int>(uint32_t{1} << length | bits.take(length));
  return place % 2 == 0 ? place / 2 : -(place / 2);
}

}  // namespace

// Huffman: lengths, each as its difference to the one before. rANS: of frequencies the widths, likewise, and
// behind each the bits below its highest one.
std::vector<std::byte> pack_model(std::span<const uint32_t> model, EntropyCoder coder) {
  const bool lengths = coder == EntropyCoder::huffman;
  Bits bits;
  int before = 0;
  for (const uint32_t value : model) {
    const int width = lengths ? static_cast<int>(value) : static_cast<int>(std::bit_width(value));
    put_difference(bits, width - before);
    if (!lengths && width > 1) bits.put(value, width - 1);
    before = width;
  }
  return bits.take();
}

std::vector<uint32_t> unpack_model(std::span<const std::byte> bytes, int64_t alphabet, EntropyCoder coder) {
  const bool lengths = coder == EntropyCoder::huffman;
  std::vector<uint32_t> model(static_cast<size_t>(alphabet));
  BitReader bits(bytes);
  int width = 0;
  for (uint32_t& value : model) {
    width += take_difference(bits);
    if (width < 0 || width > kWidest) refuse(text_of("the model has a number of ", width, " bits"));
    if (lengths) {
      value = static_cast<uint32_t>(width);
    } else if (width > 0) {
      value = uint32_t{1} << (width - 1) | bits.take(width - 1);
    }
  }
  bits.finish();
  return model;
}

std::vector<uint32_t> unpack_model_1(std::span<const std::byte> bytes, int64_t alphabet) {
  std::vector<uint32_t> model(static_cast<size_t>(alphabet));
  size_t at = 0;
  for (uint32_t& value : model) {
    for (int shift = 0;; shift += 7) {
      if (at >= bytes.size()) refuse("the model ends early");
      if (shift > 14) refuse("the model has a number of more than 21 bits");
      const auto byte = std::to_integer<uint32_t>(bytes[at++]);
      value |= (byte & 0x7fU) << shift;
      if (byte < 0x80) {
        if (byte == 0 && shift > 0) refuse("the model has a number with leading zeros");
        break;
      }
    }
  }
  if (at != bytes.size()) refuse(text_of("the model has ", bytes.size() - at, " bytes too many"));
  return model;
}

}  // namespace quantloom::entropy
