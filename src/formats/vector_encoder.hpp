// The column encoder of the format "vector_codebook", and the fit of its tables.
#pragma once

#include "quantloom/formats/vector_codebook.hpp"

namespace quantloom {

// `self` owns `format`, which has tables.
std::unique_ptr<ColumnEncoder> make_vector_encoder(std::shared_ptr<const Format> self,
                                                   const VectorCodebook& format, int64_t n, int64_t k);

// Tables [codebooks, entries, dim] for w, before rounding to float16.
std::vector<float> fit_tables(const VectorCodebook& format, const FloatMatrix& w, int threads);

}  // namespace quantloom
