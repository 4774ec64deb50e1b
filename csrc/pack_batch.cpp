#include "pack_batch.h"

#include <algorithm>
#include <limits>
#include <string>

namespace gac_fast {
namespace {

void copy_rows(RowsView<const float> from, std::int64_t begin, std::int64_t count, RowsView<float> to,
               std::int64_t position) {
    if (from.stride == from.columns && to.stride == to.columns) {
        std::copy_n(from.row(begin), count * from.columns, to.row(position));
        return;
    }
    for (std::int64_t i = 0; i < count; ++i) std::copy_n(from.row(begin + i), from.columns, to.row(position + i));
}

}  // namespace

std::int64_t packed_length(VectorView<std::int64_t> cu_seqlens, VectorView<std::int64_t> indices,
                           std::int64_t n_steps) {
    const std::int64_t n_trajectories = cu_seqlens.size - 1;
    std::int64_t total = 0;
    for (std::int64_t i = 0; i < indices.size; ++i) {
        const std::int64_t index = indices[i];
        if (index < 0 || index >= n_trajectories) {
            fail("indices", "values within [0, " + std::to_string(n_trajectories) + ")",
                 std::to_string(index) + " at position " + std::to_string(i));
        }
        const std::int64_t begin = cu_seqlens[index];
        const std::int64_t end = cu_seqlens[index + 1];
        if (begin < 0 || end < begin || end > n_steps) {
            fail("cu_seqlens", "offsets that rise within [0, " + std::to_string(n_steps) + "]",
                 std::to_string(begin) + " to " + std::to_string(end) + " for trajectory " + std::to_string(index));
        }
        total += end - begin;
    }
    if (total > std::numeric_limits<std::int32_t>::max()) {
        fail("indices", "a batch of fewer than 2^31 time steps", std::to_string(total));
    }
    return total;
}

void pack_batch(RowsView<const float> observations, RowsView<const float> actions, VectorView<std::int64_t> cu_seqlens,
                VectorView<std::int64_t> indices, RowsView<float> out_observations, RowsView<float> out_actions,
                std::int32_t* out_cu_seqlens) {
    std::int64_t position = 0;
    out_cu_seqlens[0] = 0;
    for (std::int64_t i = 0; i < indices.size; ++i) {
        const std::int64_t begin = cu_seqlens[indices[i]];
        const std::int64_t count = cu_seqlens[indices[i] + 1] - begin;
        copy_rows(observations, begin, count, out_observations, position);
        copy_rows(actions, begin, count, out_actions, position);
        position += count;
        out_cu_seqlens[i + 1] = static_cast<std::int32_t>(position);
    }
}

}  // namespace gac_fast
