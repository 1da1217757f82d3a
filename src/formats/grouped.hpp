// What the formats with one scale per group share: their descriptions, planes and checks.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <optional>

#include "quantloom/formats/grouped.hpp"

namespace quantloom {

// Description: the keys "group_size" and "scale_dtype".
nlohmann::json group_size_json(int64_t group_size);
int64_t group_size_field(const nlohmann::json& object, std::string_view json);
DType scale_dtype_field(const nlohmann::json& object, std::string_view json);

// Short form: its parts between colons, and those that say group and scale dtype.
std::vector<std::string_view> split_spec(std::string_view spec);
std::optional<int64_t> parse_integer(std::string_view text);
struct GroupParts {
  std::optional<int64_t> group_size;
  std::optional<DType> scale_dtype;
  // False if `part` says neither, says it badly, or says it a second time.
  bool take(std::string_view part);
};
// "g64", "channel", "tensor".
std::string group_text(int64_t group_size);
// "" for float16, else ":bf16" or ":f32".
std::string_view scale_dtype_suffix(DType scale_dtype);

PlaneSpec scales_plane(const ScaledFormat& format, int64_t n, int64_t k);
// Throws InvalidArgument naming the first scale that is not finite.
void require_finite_scales(const Tensor& scales);
// Planes "codes", "scales" and (optional) "group_index".
std::vector<PlaneSpec> grouped_planes(const GroupedFormat& format, int64_t n, int64_t k);
// Throws InvalidArgument if the bytes of a plane cannot be counted.
void require_countable(const std::vector<PlaneSpec>& specs);
// Checks the values of those three planes: finite scales, zero padding, groups in range.
void validate_grouped(const GroupedFormat& format, const PackedTensor& packed);
// Throws InvalidArgument unless the bits behind `count` codes in each row of `plane` are 0.
void require_zero_padding(const Tensor& plane, const std::string& name, int64_t count, int bits);
// Throws InvalidArgument naming `argument` unless every index is in [0, groups) and no group has more
// than `columns_per_group` columns.
void require_group_index(std::span<const int32_t> group_of_column, int64_t groups, int64_t columns_per_group,
                         std::string_view argument);
// What a column encoder keeps of the groups it is given: nothing if none are given or if they are of
// consecutive columns. Throws InvalidArgument naming group_of_column unless it has a group for each of the
// `k` columns, as require_group_index() wants them.
std::vector<int32_t> permuted_groups(std::span<const int32_t> group_of_column, int64_t k, int64_t groups,
                                     int64_t columns_per_group);

// The stored scale at `index` as float32.
float scale_at(const Tensor& scales, int64_t index);
void store_scale(Tensor& scales, int64_t index, float scale);
std::span<const uint32_t> packed_row(const Tensor& plane, int64_t row);

}  // namespace quantloom
