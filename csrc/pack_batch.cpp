#include "pack_batch.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <utility>

#include "philox.h"

namespace gac_fast {
namespace {

// Last counter word: what the words of a draw are for.
constexpr std::uint32_t kChoose = 0;
constexpr std::uint32_t kDrop = 1;

constexpr double kLn2 = 0.6931471805599453;
constexpr double kSqrtHalf = 0.7071067811865476;
constexpr int kLogTerms = 10;

void copy_rows(RowsView<const float> from, std::int64_t begin, std::int64_t count, RowsView<float> to,
               std::int64_t position) {
    if (from.stride == from.columns && to.stride == to.columns) {
        std::copy_n(from.row(begin), count * from.columns, to.row(position));
        return;
    }
    for (std::int64_t i = 0; i < count; ++i) std::copy_n(from.row(begin + i), from.columns, to.row(position + i));
}

// -ln(u) for u in (0, 1), by operations that round alike everywhere: libraries' logarithms differ in their last bits,
// and a draw must not.
double minus_log(double u) {
    int exponent = 0;
    double mantissa = std::frexp(u, &exponent);
    if (mantissa < kSqrtHalf) {
        mantissa *= 2.0;
        --exponent;
    }
    const double s = (mantissa - 1.0) / (mantissa + 1.0);
    const double s2 = s * s;
    double series = 1.0 / (2 * kLogTerms - 1);
    for (int k = kLogTerms - 2; k >= 0; --k) series = series * s2 + 1.0 / (2 * k + 1);
    return -(exponent * kLn2 + 2.0 * s * series);
}

// 52 bits of two words as a number within (0, 1), both ends excluded.
double uniform(std::uint32_t high, std::uint32_t low) {
    const std::uint64_t bits = (std::uint64_t{high} << 20) | (low >> 12);
    return (static_cast<double>(bits) + 0.5) * 0x1p-52;
}

std::array<std::uint32_t, 4> words(std::array<std::uint32_t, 2> key, std::uint64_t number, std::int64_t i,
                                   std::uint32_t purpose) {
    return philox4x32(key, {static_cast<std::uint32_t>(i), static_cast<std::uint32_t>(number),
                            static_cast<std::uint32_t>(number >> 32), purpose});
}

void check_weights(VectorView<double> weights, std::int64_t n) {
    std::int64_t n_positive = 0;
    for (std::int64_t i = 0; i < weights.size; ++i) {
        if (!(weights[i] >= 0.0 && std::isfinite(weights[i]))) {
            fail("weights", "finite values of at least 0",
                 std::to_string(weights[i]) + " at position " + std::to_string(i));
        }
        n_positive += weights[i] > 0.0;
    }
    if (n < 0 || n > n_positive) {
        fail("n", "at most the " + std::to_string(n_positive) + " trajectories of positive weight", std::to_string(n));
    }
}

}  // namespace

std::vector<Span> find_spans(VectorView<std::int64_t> cu_seqlens, VectorView<std::int64_t> indices,
                             std::int64_t n_steps) {
    const std::int64_t n_trajectories = cu_seqlens.size - 1;
    std::vector<Span> spans;
    spans.reserve(static_cast<std::size_t>(indices.size));
    std::int64_t total = 0;
    for (std::int64_t i = 0; i < indices.size; ++i) {
        const std::int64_t index = indices[i];
        if (index < 0 || index >= n_trajectories) {
            fail("indices", "values within [0, " + std::to_string(std::max<std::int64_t>(0, n_trajectories)) + ")",
                 std::to_string(index) + " at position " + std::to_string(i));
        }
        const std::int64_t begin = cu_seqlens[index];
        const std::int64_t end = cu_seqlens[index + 1];
        if (begin < 0 || end < begin || end > n_steps) {
            fail("cu_seqlens", "offsets that rise within [0, " + std::to_string(n_steps) + "]",
                 std::to_string(begin) + " to " + std::to_string(end) + " for trajectory " + std::to_string(index));
        }
        const std::int64_t count = end - begin;
        if (count > std::numeric_limits<std::int32_t>::max() - total) {
            fail("indices", "a batch of fewer than 2^31 time steps", "more up to position " + std::to_string(i));
        }
        spans.push_back({begin, count});
        total += count;
    }
    return spans;
}

std::int64_t total_count(const std::vector<Span>& spans) {
    std::int64_t total = 0;
    for (const Span& span : spans) total += span.count;
    return total;
}

void pack_batch(RowsView<const float> observations, RowsView<const float> actions, const std::vector<Span>& spans,
                const PackedViews& out) {
    std::int64_t position = 0;
    out.cu_seqlens[0] = 0;
    for (std::size_t i = 0; i < spans.size(); ++i) {
        const auto [begin, count] = spans[i];
        copy_rows(observations, begin, count, out.observations, position);
        copy_rows(actions, begin, count, out.actions, position);
        for (std::int64_t t = 0; t < count; ++t) out.positions[position + t] = t;
        std::fill_n(out.sequence + position, count, static_cast<std::int64_t>(i));
        position += count;
        out.cu_seqlens[i + 1] = static_cast<std::int32_t>(position);
    }
}

// Efraimidis and Spirakis (2006): of independent exponential times of rates w_i, the n earliest are a weighted draw
// without replacement.
void draw_trajectories(std::array<std::uint32_t, 2> key, std::uint64_t number, VectorView<double> weights,
                       std::int64_t n, std::int64_t* out) {
    check_weights(weights, n);
    if (n == 0) return;
    // A heap of the n earliest so far, the latest of them on top; equal times in the order of trajectories.
    using Arrival = std::pair<double, std::int64_t>;
    std::vector<Arrival> earliest;
    earliest.reserve(static_cast<std::size_t>(n));
    const auto size = static_cast<std::size_t>(n);
    for (std::int64_t i = 0; i < weights.size; ++i) {
        const double weight = weights[i];
        if (!(weight > 0.0)) continue;
        const auto w = words(key, number, i, kChoose);
        const double u = uniform(w[0], w[1]);
        // -ln(u) >= 1 - u: most need no logarithm. The margin covers its rounding.
        if (earliest.size() == size && 1.0 - u > earliest.front().first * weight * (1.0 + 1e-9)) continue;
        const Arrival arrival{minus_log(u) / weight, i};
        if (earliest.size() < size) {
            earliest.push_back(arrival);
            std::push_heap(earliest.begin(), earliest.end());
        } else if (arrival < earliest.front()) {
            std::pop_heap(earliest.begin(), earliest.end());
            earliest.back() = arrival;
            std::push_heap(earliest.begin(), earliest.end());
        }
    }
    // By arrival the heavy ones would come first: another word of each gives the order.
    std::vector<std::pair<std::uint32_t, std::int64_t>> order;
    order.reserve(earliest.size());
    for (const Arrival& arrival : earliest) {
        order.emplace_back(words(key, number, arrival.second, kChoose)[2], arrival.second);
    }
    std::sort(order.begin(), order.end());
    for (std::size_t i = 0; i < order.size(); ++i) out[i] = order[i].second;
}

void drop_steps(std::array<std::uint32_t, 2> key, std::uint64_t number, std::uint64_t threshold, std::int64_t n,
                bool* out) {
    for (std::int64_t i = 0; i < n; i += 4) {
        const auto w = words(key, number, i / 4, kDrop);
        for (std::int64_t j = 0; j < std::min<std::int64_t>(4, n - i); ++j) {
            out[i + j] = w[static_cast<std::size_t>(j)] < threshold;
        }
    }
}

}  // namespace gac_fast
