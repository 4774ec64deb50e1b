// What window and plan attention share: small products between blocks of rows, rotation, rows in and out.
//
// A panel is kQueries queries side by side, one per lane of two vectors: scores are kept as [key][query], so that the
// softmax over the keys runs down the lanes and needs no sum across them.
#pragma once

#include <cstdint>

#include "simd.h"

namespace gac_fast {
namespace GAC_FAST_ISA {

constexpr std::int64_t kQueries = 2 * kLanes;
// Rows of products come in multiples of this; buffers have that many to spare.
constexpr std::int64_t kRows = 4;

// ---------------------------------------------------------------------------------------------------------------------
// y[r][c] (+)= sum over k of a(r, k) * b[k][c], c < NV * kLanes

// How a lies in memory: rows of LD elements; kDown: a(r, k) = a[k * kQueries + r].
constexpr int kDown = 0;

template <int ROWS, int NV, int LD>
inline void product_block(std::int64_t depth, const float* a, const float* b, std::int64_t ldb, float* y,
                          std::int64_t ldy, bool add) {
    constexpr std::int64_t kRowStep = LD == kDown ? 1 : LD;
    constexpr std::int64_t kDepthStep = LD == kDown ? kQueries : 1;
    Vec sums[ROWS][NV];
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 12
        for (int v = 0; v < NV; ++v) sums[r][v] = add ? load(y + r * ldy + v * kLanes) : Vec{};
    }
    for (std::int64_t k = 0; k < depth; ++k) {
        Vec w[NV];
#pragma GCC unroll 12
        for (int v = 0; v < NV; ++v) w[v] = load(b + k * ldb + v * kLanes);
#pragma GCC unroll 12
        for (int r = 0; r < ROWS; ++r) {
            const float x = a[r * kRowStep + k * kDepthStep];
#pragma GCC unroll 12
            for (int v = 0; v < NV; ++v) sums[r][v] += x * w[v];
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 12
        for (int v = 0; v < NV; ++v) store(y + r * ldy + v * kLanes, sums[r][v]);
    }
}

#if defined(__AVX512F__)
constexpr std::int64_t kMostRows = 12;
#else
constexpr std::int64_t kMostRows = 4;
#endif

// n_rows: 4, 8 or 12, at most kMostRows.
template <int NV, int LD>
inline void product_rows(std::int64_t n_rows, std::int64_t depth, const float* a, const float* b, std::int64_t ldb,
                         float* y, std::int64_t ldy, bool add) {
#if defined(__AVX512F__)
    if (n_rows == 12) return product_block<12, NV, LD>(depth, a, b, ldb, y, ldy, add);
    if (n_rows == 8) return product_block<8, NV, LD>(depth, a, b, ldb, y, ldy, add);
#endif
    static_cast<void>(n_rows);
    product_block<4, NV, LD>(depth, a, b, ldb, y, ldy, add);
}

// All columns of a block of rows; n_columns is a multiple of kLanes.
template <int LD>
inline void product_columns(std::int64_t n_rows, std::int64_t n_columns, std::int64_t depth, const float* a,
                            const float* b, std::int64_t ldb, float* y, std::int64_t ldy, bool add) {
    std::int64_t c = 0;
    for (; c + 2 * kLanes <= n_columns; c += 2 * kLanes) {
        product_rows<2, LD>(n_rows, depth, a, b + c, ldb, y + c, ldy, add);
    }
    if (c < n_columns) product_rows<1, LD>(n_rows, depth, a, b + c, ldb, y + c, ldy, add);
}

// Scores against the queries of NV vectors: y[r][query] = sum over c of rows[r][c] * columns[c][query] for at least
// n_rows rows.
template <int NV, int LD>
inline void scores(std::int64_t n_rows, std::int64_t width, const float* rows, const float* columns, float* y) {
    for (std::int64_t r = 0; r < n_rows;) {
        const std::int64_t n = min_of(kMostRows, round_up(n_rows - r, kRows));
        product_rows<NV, LD>(n, width, rows + r * LD, columns, kQueries, y + r * kQueries, kQueries, false);
        r += n;
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Rows in and out: [d] of the caller, float32 here, padded with zeros to a multiple of kLanes

// Rows lie a token apart, too far for the processor to see them coming: the row that is read kAhead rows later.
constexpr std::int64_t kAhead = kQueries;

template <typename T>
inline void prefetch_row(const T* x, std::int64_t width) {
    constexpr std::int64_t kLine = 64 / static_cast<std::int64_t>(sizeof(T));
    for (std::int64_t i = 0; i < width; i += kLine) __builtin_prefetch(x + i);
}

template <typename T>
inline void load_row(const T* x, std::int64_t width, float* y) {
    convert(x, width, y);
    const std::int64_t whole = width / kLanes * kLanes;
    for (std::int64_t i = width; whole < width && i < whole + kLanes; ++i) y[i] = 0.0F;
}

// `turn`: cosines [half], then sines [half], of the angles of the pairs (i, i + half).
template <typename T>
inline void load_turned_row(const T* x, const float* turn, std::int64_t width, float scale, float* y) {
    const std::int64_t half = width / 2;
    const std::int64_t padded = round_up(width, kLanes);
    if (padded > width) store(y + padded - kLanes, Vec{});
    std::int64_t i = 0;
    for (; i + kLanes <= half; i += kLanes) {
        const Vec x1 = load(x + i) * scale, x2 = load(x + half + i) * scale;
        const Vec cosine = load(turn + i), sine = load(turn + half + i);
        store(y + i, x1 * cosine - x2 * sine);
        store(y + half + i, x2 * cosine + x1 * sine);
    }
    if (i < half) {
        const std::int64_t n = half - i;
        const Vec x1 = load_first(x + i, n) * scale, x2 = load_first(x + half + i, n) * scale;
        const Vec cosine = load_first(turn + i, n), sine = load_first(turn + half + i, n);
        store_first(y + i, x1 * cosine - x2 * sine, n);
        store_first(y + half + i, x2 * cosine + x1 * sine, n);
    }
}

// The same turn backwards: the gradient of x from that of the turned row.
template <typename T>
inline void store_turned_back(const float* y, const float* turn, std::int64_t width, float scale, T* x) {
    const std::int64_t half = width / 2;
    std::int64_t i = 0;
    for (; i + kLanes <= half; i += kLanes) {
        const Vec y1 = load(y + i) * scale, y2 = load(y + half + i) * scale;
        const Vec cosine = load(turn + i), sine = load(turn + half + i);
        store(x + i, y1 * cosine + y2 * sine);
        store(x + half + i, y2 * cosine - y1 * sine);
    }
    if (i < half) {
        const std::int64_t n = half - i;
        const Vec y1 = load_first(y + i, n) * scale, y2 = load_first(y + half + i, n) * scale;
        const Vec cosine = load_first(turn + i, n), sine = load_first(turn + half + i, n);
        store_first(x + i, y1 * cosine + y2 * sine, n);
        store_first(x + half + i, y2 * cosine - y1 * sine, n);
    }
}

template <typename T>
inline void load_scaled_row(const T* x, std::int64_t width, float scale, float* y) {
    load_row(x, width, y);
    for (std::int64_t i = 0; i < width; i += kLanes) store(y + i, load(y + i) * scale);
}

template <typename T>
inline void store_scaled_row(const float* y, std::int64_t width, float scale, T* x) {
    std::int64_t i = 0;
    for (; i + kLanes <= width; i += kLanes) store(x + i, load(y + i) * scale);
    if (i < width) store_first(x + i, load_first(y + i, width - i) * scale, width - i);
}

// ---------------------------------------------------------------------------------------------------------------------
// Transposes

#if defined(__AVX512F__)
template <int STEP>
inline void swap_lanes(Vec* x) {
    alignas(64) std::int32_t low[kLanes], high[kLanes];
    for (int i = 0; i < kLanes; ++i) {
        low[i] = (i & STEP) != 0 ? kLanes + i - STEP : i;
        high[i] = (i & STEP) != 0 ? kLanes + i : i + STEP;
    }
    const __m512i to_low = _mm512_load_si512(low), to_high = _mm512_load_si512(high);
    for (int i = 0; i < kLanes; ++i) {
        if ((i & STEP) != 0) continue;
        const __m512 a = (__m512)x[i], b = (__m512)x[i + STEP];
        x[i] = (Vec)_mm512_permutex2var_ps(a, to_low, b);
        x[i + STEP] = (Vec)_mm512_permutex2var_ps(a, to_high, b);
    }
}
#endif

// y[c][r] = x[r][c] for one square of kLanes.
inline void transpose_square(const float* x, std::int64_t ldx, float* y, std::int64_t ldy) {
#if defined(__AVX512F__)
    Vec rows[kLanes];
    for (int r = 0; r < kLanes; ++r) rows[r] = load(x + r * ldx);
    swap_lanes<8>(rows);
    swap_lanes<4>(rows);
    swap_lanes<2>(rows);
    swap_lanes<1>(rows);
    for (int r = 0; r < kLanes; ++r) store(y + r * ldy, rows[r]);
#elif defined(__AVX2__)
    __m256 a[8], b[8];
    for (int r = 0; r < 8; ++r) a[r] = _mm256_loadu_ps(x + r * ldx);
    for (int r = 0; r < 8; r += 2) {
        b[r] = _mm256_unpacklo_ps(a[r], a[r + 1]);
        b[r + 1] = _mm256_unpackhi_ps(a[r], a[r + 1]);
    }
    for (int r = 0; r < 8; r += 4) {
        a[r] = _mm256_shuffle_ps(b[r], b[r + 2], 0x44);
        a[r + 1] = _mm256_shuffle_ps(b[r], b[r + 2], 0xEE);
        a[r + 2] = _mm256_shuffle_ps(b[r + 1], b[r + 3], 0x44);
        a[r + 3] = _mm256_shuffle_ps(b[r + 1], b[r + 3], 0xEE);
    }
    for (int r = 0; r < 4; ++r) {
        _mm256_storeu_ps(y + r * ldy, _mm256_permute2f128_ps(a[r], a[r + 4], 0x20));
        _mm256_storeu_ps(y + (r + 4) * ldy, _mm256_permute2f128_ps(a[r], a[r + 4], 0x31));
    }
#else
    for (int r = 0; r < kLanes; ++r) {
        for (int c = 0; c < kLanes; ++c) y[c * ldy + r] = x[r * ldx + c];
    }
#endif
}

// columns[c][query] = rows[query][c] of one panel; `columns` has room for round_up(width, kLanes) rows.
inline void transpose_panel(const float* rows, std::int64_t ld, std::int64_t width, float* columns) {
    for (std::int64_t c = 0; c < width; c += kLanes) {
        for (std::int64_t r = 0; r < kQueries; r += kLanes) {
            transpose_square(rows + r * ld + c, ld, columns + c * kQueries + r, kQueries);
        }
    }
}

inline Vec lane_numbers() {
    Vec x;
    for (int i = 0; i < kLanes; ++i) x[i] = static_cast<float>(i);
    return x;
}

inline void fill_zero(float* x, std::int64_t n) {
    if (n > 0) std::memset(x, 0, static_cast<std::size_t>(n) * sizeof(float));
}

}  // namespace GAC_FAST_ISA
}  // namespace gac_fast
