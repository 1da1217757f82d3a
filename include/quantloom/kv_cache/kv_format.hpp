// How the keys and values of attention are kept: which of them share a scale, in how many bits, and how many
// recent tokens stay as they are.
//
// x: the elements of one head, a vector of head_dim channels for each token. Two grids, both with codes from
// 0 to 2^bits - 1 and a scale and a least value in float16 for each group:
//   scale = max((max - min) / (2^bits - 1), 2^-24), code = clamp(rne((x - min) / scale), 0, 2^bits - 1)
//   value = scale * code + min
// with scale and min as stored; rne: to the nearest integer, ties to even. A group is
//   by channel    group_size tokens of one channel
//   by token      group_size channels of one token (the last group may be shorter)
//
// Kinds:
//   kivi    keys by channel, values by token (KIVI: Liu et al., 2024)
//   token   keys and values by token; group_size 0: all channels of a head
//   sdr     keys and values by token: 8-bit integers with one float16 scale, max|x| / 127, cut to their
//           significant digits behind a shift that group_size channels share (formats/sdr.hpp)
//
//   kvquant tables of values that calibration finds (kv_tables.hpp; KVQuant: Hooper et al., 2024), the
//   nearest
//           of which a normalized element takes, and `outliers`: the elements of a token that would err most,
//           with what is missing in float16. Keys are normalized by channel with fixed ranges, usually before
//           rotary embeddings; values by token, with the range that is least without the outliers.
//
// After T tokens, `first` of them and the last ones are exact, the others codes. Counted from token `first`,
// the values of the last `window` tokens are exact; so are the keys, but those of kivi move `window` tokens
// at a time: exact are the last (T - first) mod window. What is stored depends on the tokens alone, not on
// how they were split into calls.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace quantloom {

enum class KVKind : uint8_t { kivi, token, sdr, kvquant };

struct KVFormat {
  KVKind kind = KVKind::kivi;
  int key_bits = 2;         // 1, 2, 3, 4 or 8; of sdr 2 to 7; of kvquant 1 to 4
  int value_bits = 2;       // likewise
  int64_t group_size = 32;  // > 0; of token also 0, of kvquant 0
  int64_t window = 128;     // >= 0; of kivi a positive multiple of group_size
  int64_t first = 0;        // tokens at the start of a sequence that are kept exact, >= 0
  // Of kvquant: elements with a correction, in 1/10000 of the channels of a token, 0 to 1000. With n of them
  // for each 10000, the tokens up to slot s of a page have floor((s + 1) * head_dim * n / 10000) together.
  int64_t outliers = 0;
  bool hadamard = false;  // keys are stored rotated: x H / sqrt(head_dim), which queries undo

  // "kivi:2:g32:r128", "kivi:4,2:g32:r128:first4", "token:4", "token:8:g64:r32", "sdr:4:g16:hadamard",
  // "kvquant:3:1%:first1".
  std::string spec() const;
  // A JSON object with sorted keys; kv_format_from_json() reads it back.
  std::string to_json() const;

  friend bool operator==(const KVFormat&, const KVFormat&) = default;
};

// Throws InvalidArgument naming the first field that is out of range or contradicts another.
void require_valid(const KVFormat& format);

// Both throw InvalidArgument naming what was not understood. Parts of a short form after the bits may be left
// out: g32 and r128 for kivi, all channels and r0 for token, g16 and r0 for sdr, 1% and first1 for kvquant.
KVFormat kv_format_from_spec(std::string_view spec);
KVFormat kv_format_from_json(std::string_view json);

}  // namespace quantloom
