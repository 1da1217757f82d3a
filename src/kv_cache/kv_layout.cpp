#include "quantloom/kv_cache/kv_layout.hpp"

#include <algorithm>
#include <bit>

#include "quantloom/checked_math.hpp"
#include "quantloom/error.hpp"
#include "quantloom/transforms/hadamard.hpp"

namespace quantloom {
namespace {

constexpr int64_t kPageTokens = 128;
constexpr int64_t kAlignment = 16;
constexpr int64_t kPairBytes = 4;  // a scale and a least value
constexpr int64_t kOutlierBytes = 4;

KVPart part_of(const KVFormat& format, KVSide side, int64_t head_dim, int64_t page_tokens, int64_t& end) {
  KVPart part;
  const bool keys = side == KVSide::keys;
  part.bits = keys ? format.key_bits : format.value_bits;
  part.codec = format.kind == KVKind::kvquant        ? (keys ? KVCodec::channel_table : KVCodec::token_table)
               : format.kind == KVKind::sdr          ? KVCodec::digits
               : format.kind == KVKind::kivi && keys ? KVCodec::channel_grid
                                                     : KVCodec::token_grid;
  part.row_bytes = ceil_div(head_dim * part.bits, 32) * 4;
  part.codes = end;
  end = checked_pad(end + checked_mul(page_tokens, part.row_bytes), kAlignment);
  part.parameters = end;
  if (part.codec == KVCodec::channel_grid) {
    part.group = format.group_size;
    part.groups = page_tokens / part.group;
    end += part.groups * head_dim * kPairBytes;
  } else {
    part.group = format.group_size == 0 ? head_dim : std::min(format.group_size, head_dim);
    part.groups = ceil_div(head_dim, part.group);
    if (part.has_table()) {
      if (!keys) end = checked_pad(end + page_tokens * kPairBytes, kAlignment);
      part.outlier_share = format.outliers;
      part.outliers = end;
      end += part.outliers_before(page_tokens, head_dim) * kOutlierBytes;
    } else if (part.codec == KVCodec::token_grid) {
      end += page_tokens * part.groups * kPairBytes;
    } else {
      part.shift_bits = std::bit_width(static_cast<unsigned>(8 - part.bits));
      part.shift_bytes = ceil_div(part.groups * part.shift_bits, 8);
      end = checked_pad(end + page_tokens * 2, kAlignment);
      part.shifts = end;
      end += page_tokens * part.shift_bytes;
    }
  }
  end = checked_pad(end, kAlignment);
  return part;
}

}  // namespace

KVLayout kv_layout(const KVFormat& format, int64_t head_dim) {
  require_valid(format);
  if (head_dim < 8 || head_dim > 1024 || head_dim % 8 != 0) {
    throw InvalidArgument("head_dim", text_of(head_dim), "a multiple of 8 from 8 to 1024");
  }
  if (format.hadamard && !hadamard_size(head_dim)) {
    throw InvalidArgument("head_dim", text_of(head_dim), "the order of a known Hadamard matrix");
  }
  if (format.outliers > 0 && head_dim > 65536 / kPageTokens) {
    throw InvalidArgument(
        "head_dim", text_of(head_dim),
        text_of("at most ", 65536 / kPageTokens, " with outliers, whose places take 16 bits"));
  }
  KVLayout layout;
  layout.head_dim = head_dim;
  const int64_t group = format.kind == KVKind::kivi ? format.group_size : 1;
  layout.page_tokens = group * std::max<int64_t>(1, kPageTokens / group);
  int64_t end = 0;
  layout.keys = part_of(format, KVSide::keys, head_dim, layout.page_tokens, end);
  layout.values = part_of(format, KVSide::values, head_dim, layout.page_tokens, end);
  layout.record_bytes = end;
  return layout;
}

double KVLayout::average_bits() const {
  return static_cast<double>(record_bytes) * 8 / static_cast<double>(2 * page_tokens * head_dim);
}

}  // namespace quantloom
