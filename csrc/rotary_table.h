// Cosines and sines of the rotary angles of time steps. Angles are worked out in float64 (at step 100,000 a float32
// angle is off by 4e-3) and rounded to float32 after the cosine.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

namespace gac_fast {

// For one position at a time, any one: from products of two small tables.
class RotaryTable {
  public:
    // Pairs (i, i + half) turn by position * base^(-i / half).
    RotaryTable(std::int64_t half, double base);

    // cos and sin [half] of one position >= 0.
    void row(std::int64_t position, float* cos, float* sin) const;

  private:
    struct Turn {
        double cos, sin;
    };
    Turn turn(std::int64_t position, std::int64_t i) const;

    std::int64_t half_;
    std::vector<double> frequency_;
    std::vector<Turn> fine_;    // [kBase][half]
    std::vector<Turn> coarse_;  // [kBase][half], of multiples of kBase
};

// The rows that a list of positions needs, and which row each position takes.
struct RotaryRows {
    std::shared_ptr<const std::vector<float>> turns;  // [row][2][width / 2]: cosines, sines
    std::vector<std::int64_t> rows;                   // [positions.size()]
};

// The rows of dense positions come from a table that the process keeps; scattered ones are worked out one by one. Safe
// to call from several threads.
RotaryRows rotary_rows(const std::vector<std::int64_t>& positions, std::int64_t width, double base);

}  // namespace gac_fast
