// Copies chosen trajectories next to each other.
#pragma once

#include <cstdint>

#include "check.h"

namespace gac_fast {

// Time steps of the chosen trajectories together. Throws where an index is outside [0, B) or the offsets of a chosen
// trajectory do not rise within [0, n_steps].
std::int64_t packed_length(VectorView<std::int64_t> cu_seqlens, VectorView<std::int64_t> indices, std::int64_t n_steps);

// Fills out_observations and out_actions [n, .] and out_cu_seqlens [b + 1]; n must be packed_length(...).
void pack_batch(RowsView<const float> observations, RowsView<const float> actions, VectorView<std::int64_t> cu_seqlens,
                VectorView<std::int64_t> indices, RowsView<float> out_observations, RowsView<float> out_actions,
                std::int32_t* out_cu_seqlens);

}  // namespace gac_fast
