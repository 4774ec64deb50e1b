#include "decode_step_rotary.h"

#include <cmath>

namespace gac_fast {
namespace {

constexpr std::int64_t kBase = 256;

}  // namespace

RotaryTable::RotaryTable(std::int64_t half, double base) : half_(half) {
    for (std::int64_t i = 0; i < half; ++i) {
        frequency_.push_back(std::pow(base, -static_cast<double>(i) / static_cast<double>(half)));
    }
    for (std::int64_t t = 0; t < kBase; ++t) {
        for (std::int64_t i = 0; i < half; ++i) {
            fine_.push_back(turn(t, i));
            coarse_.push_back(turn(t * kBase, i));
        }
    }
}

RotaryTable::Turn RotaryTable::turn(std::int64_t position, std::int64_t i) const {
    const double angle = static_cast<double>(position) * frequency_[static_cast<std::size_t>(i)];
    return {std::cos(angle), std::sin(angle)};
}

void RotaryTable::row(std::int64_t position, float* cos, float* sin) const {
    const Turn* low = fine_.data() + position % kBase * half_;
    const std::int64_t high = position / kBase;
    for (std::int64_t i = 0; i < half_; ++i) {
        const Turn a = low[i];
        const Turn b = high < kBase ? coarse_[static_cast<std::size_t>(high * half_ + i)] : turn(high * kBase, i);
        cos[i] = static_cast<float>(a.cos * b.cos - a.sin * b.sin);
        sin[i] = static_cast<float>(a.sin * b.cos + a.cos * b.sin);
    }
}

}  // namespace gac_fast
