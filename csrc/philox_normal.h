// Counter-based standard normals: Philox4x32-10 (Salmon et al. 2011) and Box-Muller.
#pragma once

#include <cstdint>

#include "isa.h"

namespace gac_fast {

// Element i of row p takes word i % 4 at counter (i / 4, plans[p], steps[p], 0).
template <typename T>
struct Philox {
    std::uint32_t seed0, seed1;
    // [rows], each within [0, 2^32); strides in elements.
    const std::int64_t *plans, *steps;
    std::int64_t plan_stride, step_stride;
    T* out;  // [rows][columns], rows `out_stride` apart
    std::int64_t rows, columns, out_stride;
    int n_threads;
};

// Box-Muller over each pair of words.
GAC_FAST_DECLARE(void philox_normal(const Philox<float>& args);)
// The words themselves, in the same places.
GAC_FAST_DECLARE(void philox_words(const Philox<std::int64_t>& args);)

}  // namespace gac_fast
