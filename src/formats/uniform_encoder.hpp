// The column encoder of the uniform format, and the check of its group indices.
#pragma once

#include <memory>
#include <span>
#include <string_view>

#include "quantloom/formats/uniform.hpp"

namespace quantloom {

// Throws InvalidArgument naming `argument` unless every index is in [0, groups) and no group has more
// than `columns_per_group` columns.
void require_group_index(std::span<const int32_t> group_of_column, int64_t groups, int64_t columns_per_group,
                         std::string_view argument);

// `self` owns `format`.
std::unique_ptr<ColumnEncoder> make_uniform_encoder(std::shared_ptr<const Format> self, const Uniform& format,
                                                    int64_t n, int64_t k,
                                                    std::span<const int32_t> group_of_column);

}  // namespace quantloom
