// Cosines and sines of rotary positions, from products of two tables: exact to float32 at any position.
#pragma once

#include <cstdint>
#include <vector>

namespace gac_fast {

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

}  // namespace gac_fast
