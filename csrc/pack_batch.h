// Draws trajectories by their weights and copies the chosen ones next to each other.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "check.h"

namespace gac_fast {

// Rows of one trajectory in packed storage.
struct Span {
    std::int64_t begin;
    std::int64_t count;
};

// The rows of the chosen trajectories. Throws where an index is outside [0, B), where the offsets of a chosen
// trajectory do not rise within [0, n_steps], or where they hold 2^31 time steps or more together.
std::vector<Span> find_spans(VectorView<std::int64_t> cu_seqlens, VectorView<std::int64_t> indices,
                             std::int64_t n_steps);

std::int64_t total_count(const std::vector<Span>& spans);

// Where a batch of n time steps goes.
struct PackedViews {
    RowsView<float> observations;  // [n, obs_dim]
    RowsView<float> actions;       // [n, act_dim]
    std::int32_t* cu_seqlens;      // [b + 1]
    std::int64_t* positions;       // [n], time step within its trajectory
    std::int64_t* sequence;        // [n], place of its trajectory in the batch
};

// Takes spans by value of their check: offsets that another thread changes meanwhile cannot lead it astray.
void pack_batch(RowsView<const float> observations, RowsView<const float> actions, const std::vector<Span>& spans,
                const PackedViews& out);

// n trajectories without repetition, drawn by weight, in random order: a function of (key, number, weights) alone.
// Throws where a weight is negative or not finite, or where fewer than n are positive.
void draw_trajectories(std::array<std::uint32_t, 2> key, std::uint64_t number, VectorView<double> weights,
                       std::int64_t n, std::int64_t* out);

// out[i] = 1 with probability threshold / 2^32, else 0: a function of (key, number, i) alone.
void drop_steps(std::array<std::uint32_t, 2> key, std::uint64_t number, std::uint64_t threshold, std::int64_t n,
                bool* out);

}  // namespace gac_fast
