// Cosines and sines of the rotary angles of time steps, kept from call to call.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

namespace gac_fast {

// The rows that a list of positions needs, and which row each position takes.
struct RotaryRows {
    std::shared_ptr<const std::vector<float>> turns;  // [row][2][width / 2]: cosines, sines
    std::vector<std::int64_t> rows;                   // [positions.size()]
};

// Angles are worked out in float64 (at step 100,000 a float32 angle is off by 4e-3) and rounded to float32 after the
// cosine. The rows of dense positions come from a table that the process keeps; scattered ones are worked out one by
// one. Safe to call from several threads.
RotaryRows rotary_rows(const std::vector<std::int64_t>& positions, std::int64_t width, double base);

}  // namespace gac_fast
