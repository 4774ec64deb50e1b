// Counter-based standard normals: Philox4x32-10 (Salmon et al. 2011) and Box-Muller.
#pragma once

#include <array>
#include <cstdint>

#include "check.h"

namespace gac_fast {

// Four random words of a counter under a key.
std::array<std::uint32_t, 4> philox4x32(std::array<std::uint32_t, 2> key, std::array<std::uint32_t, 4> counter);

// Element i of row p takes word i % 4 at counter (i / 4, plans[p], steps[p], 0) and Box-Muller over its word pair.
// plans and steps hold as many values as out has rows, each within [0, 2^32).
void philox_normal(std::array<std::uint32_t, 2> key, VectorView<std::int64_t> plans, VectorView<std::int64_t> steps,
                   RowsView<float> out);

// The words themselves, in the same places.
void philox_words(std::array<std::uint32_t, 2> key, VectorView<std::int64_t> plans, VectorView<std::int64_t> steps,
                  RowsView<std::int64_t> out);

}  // namespace gac_fast
