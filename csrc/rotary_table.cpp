#include "rotary_table.h"

#include <algorithm>
#include <cmath>
#include <mutex>
#include <numeric>

namespace gac_fast {
namespace {

// Positions of each of the two small tables.
constexpr std::int64_t kBase = 256;

constexpr std::size_t kKept = 4;
// Steps that a table is made longer than asked for, so that batches of slightly longer episodes find it ready.
constexpr std::uint64_t kSlack = 1024;
// Floats of the longest table that is kept: 32 MiB.
constexpr std::uint64_t kMostFloats = 1U << 23;

struct Table {
    std::int64_t width;
    double base;
    std::int64_t first;
    std::uint64_t n_rows;
    std::shared_ptr<const std::vector<float>> turns;
};

void fill_row(std::int64_t position, const std::vector<double>& frequency, float* row) {
    const std::size_t half = frequency.size();
    for (std::size_t i = 0; i < half; ++i) {
        const double angle = static_cast<double>(position) * frequency[i];
        row[i] = static_cast<float>(std::cos(angle));
        row[half + i] = static_cast<float>(std::sin(angle));
    }
}

std::vector<double> frequencies(std::int64_t width, double base) {
    const std::int64_t half = width / 2;
    std::vector<double> frequency(static_cast<std::size_t>(half));
    for (std::int64_t i = 0; i < half; ++i) {
        frequency[static_cast<std::size_t>(i)] = std::pow(base, -static_cast<double>(i) / static_cast<double>(half));
    }
    return frequency;
}

// The kept table that holds [first, first + n_rows), made now if there is none.
Table table_of(std::int64_t width, double base, std::int64_t first, std::uint64_t n_rows) {
    static std::mutex mutex;
    static std::vector<Table> kept;  // the one used last comes first
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = std::find_if(kept.begin(), kept.end(), [&](const Table& table) {
        const auto skipped = static_cast<std::uint64_t>(first) - static_cast<std::uint64_t>(table.first);
        return table.width == width && table.base == base && first >= table.first && skipped < table.n_rows &&
               n_rows <= table.n_rows - skipped;
    });
    if (found != kept.end()) {
        std::rotate(kept.begin(), found, found + 1);
        return kept.front();
    }
    const std::vector<double> frequency = frequencies(width, base);
    const auto row_size = static_cast<std::size_t>(width);
    auto turns = std::make_shared<std::vector<float>>(static_cast<std::size_t>(n_rows) * row_size);
    for (std::uint64_t i = 0; i < n_rows; ++i) {
        const auto position = static_cast<std::int64_t>(static_cast<std::uint64_t>(first) + i);
        fill_row(position, frequency, turns->data() + static_cast<std::size_t>(i) * row_size);
    }
    const Table made{width, base, first, n_rows, std::move(turns)};
    kept.insert(kept.begin(), made);
    if (kept.size() > kKept) kept.pop_back();
    return made;
}

}  // namespace

RotaryTable::RotaryTable(std::int64_t half, double base) : half_(half), frequency_(frequencies(2 * half, base)) {
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

RotaryRows rotary_rows(const std::vector<std::int64_t>& positions, std::int64_t width, double base) {
    RotaryRows result;
    result.rows.resize(positions.size());
    if (positions.empty()) {
        result.turns = std::make_shared<std::vector<float>>();
        return result;
    }
    const auto [low, high] = std::minmax_element(positions.begin(), positions.end());
    // Unsigned: the distance of two positions may be more than an int64 holds.
    const std::uint64_t first = static_cast<std::uint64_t>(*low);
    const std::uint64_t distance = static_cast<std::uint64_t>(*high) - first;
    const std::uint64_t most_rows = kMostFloats / static_cast<std::uint64_t>(width);
    if (distance < most_rows && distance / 64 <= positions.size()) {
        // Whole multiples of the slack where they fit.
        const bool padded = distance + 2 * kSlack < most_rows && *low >= 0 && *high < (std::int64_t{1} << 62);
        const std::uint64_t begin = padded ? first / kSlack * kSlack : first;
        const std::uint64_t n_rows = padded ? (first + distance) / kSlack * kSlack + kSlack - begin : distance + 1;
        const Table table = table_of(width, base, static_cast<std::int64_t>(begin), n_rows);
        for (std::size_t i = 0; i < positions.size(); ++i) {
            result.rows[i] = static_cast<std::int64_t>(static_cast<std::uint64_t>(positions[i]) -
                                                       static_cast<std::uint64_t>(table.first));
        }
        result.turns = table.turns;
        return result;
    }
    const std::vector<double> frequency = frequencies(width, base);
    auto turns = std::make_shared<std::vector<float>>(positions.size() * static_cast<std::size_t>(width));
    for (std::size_t i = 0; i < positions.size(); ++i) {
        fill_row(positions[i], frequency, turns->data() + i * static_cast<std::size_t>(width));
        result.rows[i] = static_cast<std::int64_t>(i);
    }
    result.turns = std::move(turns);
    return result;
}

}  // namespace gac_fast
