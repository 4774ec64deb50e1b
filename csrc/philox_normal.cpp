#include "philox_normal.h"

#include <algorithm>
#include <cmath>
#include <string>

namespace gac_fast {
namespace {

constexpr int kRounds = 10;
constexpr std::uint64_t kMultiplier0 = 0xD2511F53;
constexpr std::uint64_t kMultiplier1 = 0xCD9E8D57;
constexpr std::uint32_t kWeyl0 = 0x9E3779B9;
constexpr std::uint32_t kWeyl1 = 0xBB67AE85;

constexpr double kTwoToMinus32 = 1.0 / 4294967296.0;
constexpr double kTwoPi = 6.283185307179586476925;

std::uint32_t high_word(std::uint64_t x) { return static_cast<std::uint32_t>(x >> 32); }
std::uint32_t low_word(std::uint64_t x) { return static_cast<std::uint32_t>(x); }

std::uint32_t counter_word(std::int64_t value, const char* name, std::int64_t row) {
    if (value < 0 || value > INT64_C(0xFFFFFFFF)) {
        fail(name, "values within [0, 2^32)", std::to_string(value) + " in row " + std::to_string(row));
    }
    return static_cast<std::uint32_t>(value);
}

// In double: the result is the float nearest to the exact normal, whatever the word (near u = 1 a float32 logarithm
// would lose half of its digits).
std::array<float, 4> box_muller(const std::array<std::uint32_t, 4>& words) {
    std::array<float, 4> normals{};
    for (std::size_t pair = 0; pair < 4; pair += 2) {
        const double radius = std::sqrt(-2.0 * std::log((words[pair] + 1.0) * kTwoToMinus32));
        const double angle = words[pair + 1] * (kTwoPi * kTwoToMinus32);
        normals[pair] = static_cast<float>(radius * std::cos(angle));
        normals[pair + 1] = static_cast<float>(radius * std::sin(angle));
    }
    return normals;
}

template <typename T, typename Transform>
void fill(std::array<std::uint32_t, 2> key, VectorView<std::int64_t> plans, VectorView<std::int64_t> steps,
          RowsView<T> out, Transform transform) {
    // Every id is checked before the first write: bad input leaves the output as it was.
    for (std::int64_t p = 0; p < out.rows; ++p) {
        counter_word(plans[p], "plans", p);
        counter_word(steps[p], "step", p);
    }
    for (std::int64_t p = 0; p < out.rows; ++p) {
        const auto plan = static_cast<std::uint32_t>(plans[p]);
        const auto step = static_cast<std::uint32_t>(steps[p]);
        T* row = out.row(p);
        for (std::int64_t i = 0; i < out.columns; i += 4) {
            const auto values = transform(philox4x32(key, {static_cast<std::uint32_t>(i / 4), plan, step, 0}));
            std::copy_n(values.begin(), std::min<std::int64_t>(4, out.columns - i), row + i);
        }
    }
}

}  // namespace

std::array<std::uint32_t, 4> philox4x32(std::array<std::uint32_t, 2> key, std::array<std::uint32_t, 4> counter) {
    for (int round = 0; round < kRounds; ++round) {
        const std::uint64_t product0 = kMultiplier0 * counter[0];
        const std::uint64_t product1 = kMultiplier1 * counter[2];
        counter = {high_word(product1) ^ counter[1] ^ key[0], low_word(product1),
                   high_word(product0) ^ counter[3] ^ key[1], low_word(product0)};
        key = {key[0] + kWeyl0, key[1] + kWeyl1};
    }
    return counter;
}

void philox_normal(std::array<std::uint32_t, 2> key, VectorView<std::int64_t> plans, VectorView<std::int64_t> steps,
                   RowsView<float> out) {
    fill(key, plans, steps, out, box_muller);
}

void philox_words(std::array<std::uint32_t, 2> key, VectorView<std::int64_t> plans, VectorView<std::int64_t> steps,
                  RowsView<std::int64_t> out) {
    fill(key, plans, steps, out, [](const std::array<std::uint32_t, 4>& words) { return words; });
}

}  // namespace gac_fast
