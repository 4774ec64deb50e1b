#include "weight_gradient.h"

#include "gemm.h"
#include "tiles.h"
#include "token_rows.h"

namespace gac_fast {
namespace GAC_FAST_ISA {
namespace {

// Rows of a task, and of what it packs at once.
constexpr std::int64_t kRowsPerTask = 2048;
constexpr std::int64_t kRowsPerPanel = 256;
constexpr std::int64_t kMostRanges = 32;
// Rows come from a far cache, a piece of each at a time, which is no pattern that the processor foresees.
constexpr std::int64_t kRowsAhead = 48;

std::int64_t n_ranges(std::int64_t n_rows) {
    return max_of(1, min_of((n_rows + kRowsPerTask - 1) / kRowsPerTask, kMostRanges));
}

// A product a^T b over rows. `a` is the narrower of the two: it is the one that has to be turned.
template <typename T>
struct Product {
    const T *a, *b;
    std::int64_t a_stride, b_stride, n_a, n_b;
    bool swapped;  // a is x, and the result the transpose of dw

    explicit Product(const WeightGradient& map) {
        swapped = map.n_in < map.n_out;
        const auto* dy = static_cast<const T*>(map.dy);
        const auto* x = static_cast<const T*>(map.x);
        a = swapped ? x : dy;
        b = swapped ? dy : x;
        a_stride = swapped ? map.x_stride : map.dy_stride;
        b_stride = swapped ? map.dy_stride : map.x_stride;
        n_a = swapped ? map.n_in : map.n_out;
        n_b = swapped ? map.n_out : map.n_in;
    }
};

#if defined(__AVX512F__)
constexpr std::int64_t kMostRows = 12;
#elif defined(__AVX2__)
constexpr std::int64_t kMostRows = 6;
#else
constexpr std::int64_t kMostRows = 5;
#endif
constexpr std::int64_t kPanel = 2 * kLanes;

// Sums of floats: [round_up(n_a, kMostRows)][round_up(n_b, kPanel)]; of tiles: both rounded up to 32.
template <typename T>
constexpr bool kTiles = false;
#if defined(__AMX_BF16__)
template <>
constexpr bool kTiles<Bf16> = true;
#endif

template <typename T>
std::int64_t sum_rows(std::int64_t n_a) {
    return round_up(n_a, kTiles<T> ? 32 : kMostRows);
}
template <typename T>
std::int64_t sum_columns(std::int64_t n_b) {
    return round_up(n_b, kTiles<T> ? 32 : kPanel);
}

// ---------------------------------------------------------------------------------------------------------------------
// float sums in registers; a bfloat16 becomes a float when it is packed

// to[row][WIDTH] of columns [first, first + WIDTH) of x, those from n on zero.
template <int WIDTH, typename T>
void pack_columns(std::int64_t rows, const T* x, std::int64_t stride, std::int64_t first, std::int64_t n, float* to) {
    const std::int64_t n_columns = min_of(WIDTH, n - first);
    if (n_columns < WIDTH) std::memset(to, 0, static_cast<std::size_t>(rows * WIDTH) * sizeof(float));
    for (std::int64_t r = 0; r < rows; ++r) {
        const T* from = x + r * stride + first;
        float* row = to + r * WIDTH;
        __builtin_prefetch(from + kRowsAhead * stride, 0, 2);
        if (WIDTH * sizeof(T) > 64) __builtin_prefetch(from + kRowsAhead * stride + 64 / sizeof(T), 0, 2);
        if constexpr (WIDTH % kLanes == 0) {
            if (n_columns == WIDTH) {
                for (int v = 0; v < WIDTH; v += kLanes) store(row + v, load(from + v));
                continue;
            }
        }
        for (std::int64_t c = 0; c < n_columns; ++c) row[c] = to_float(from[c]);
    }
}

// sums[kMostRows][kPanel] += a^T b of packed columns.
void add_block(std::int64_t rows, const float* a, const float* b, float* sums, std::int64_t ld) {
    constexpr int kRows = static_cast<int>(kMostRows);
    Vec total[kRows][2];
#pragma GCC unroll 32
    for (int i = 0; i < kRows; ++i) {
        total[i][0] = load(sums + i * ld);
        total[i][1] = load(sums + i * ld + kLanes);
    }
    for (std::int64_t r = 0; r < rows; ++r) {
        const Vec b0 = load(b + r * kPanel);
        const Vec b1 = load(b + r * kPanel + kLanes);
#pragma GCC unroll 32
        for (int i = 0; i < kRows; ++i) {
            const Vec w = broadcast(a[r * kMostRows + i]);
            total[i][0] += w * b0;
            total[i][1] += w * b1;
        }
    }
#pragma GCC unroll 32
    for (int i = 0; i < kRows; ++i) {
        store(sums + i * ld, total[i][0]);
        store(sums + i * ld + kLanes, total[i][1]);
    }
}

template <typename T>
void add_product(const Product<T>& p, std::int64_t first, std::int64_t last, float* sums) {
    const std::int64_t ld = sum_columns<T>(p.n_b);
    Arena arena;
    float* b_packed = nullptr;
    float* a_packed = nullptr;
    for (int pass = 0; pass < 2; ++pass) {
        b_packed = arena.take<float>(kRowsPerPanel * kPanel);
        a_packed = arena.take<float>(kRowsPerPanel * sum_rows<T>(p.n_a));
        if (pass == 0) arena = Arena(arena.used());
    }
    for (std::int64_t r = first; r < last; r += kRowsPerPanel) {
        const std::int64_t rows = min_of(kRowsPerPanel, last - r);
        for (std::int64_t i = 0; i < p.n_a; i += kMostRows) {
            pack_columns<kMostRows>(rows, p.a + r * p.a_stride, p.a_stride, i, p.n_a, a_packed + i * kRowsPerPanel);
        }
        for (std::int64_t j = 0; j < p.n_b; j += kPanel) {
            pack_columns<kPanel>(rows, p.b + r * p.b_stride, p.b_stride, j, p.n_b, b_packed);
            for (std::int64_t i = 0; i < p.n_a; i += kMostRows) {
                add_block(rows, a_packed + i * kRowsPerPanel, b_packed, sums + i * ld + j, ld);
            }
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Tiles: pairs of neighbouring rows are what a product sums over

#if defined(__AMX_BF16__)
// Rows r and r + 1 of 16 columns, side by side; those from n_columns or n_rows on zero.
Vec row_pair(const Bf16* x, std::int64_t stride, std::int64_t n_rows, std::int64_t n_columns) {
    const auto mask = static_cast<__mmask16>(n_columns >= 16 ? 0xFFFF : n_columns <= 0 ? 0 : (1 << n_columns) - 1);
    const __m256i top = n_rows > 0 ? _mm256_maskz_loadu_epi16(mask, x) : _mm256_setzero_si256();
    const __m256i low = n_rows > 1 ? _mm256_maskz_loadu_epi16(mask, x + stride) : _mm256_setzero_si256();
    const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(low), 16);
    return (Vec)_mm512_or_si512(_mm512_cvtepu16_epi32(top), high);
}

// As the right operand of tiles: [column tile][pair of rows][16][2]. The number of tiles is even.
void pack_right(std::int64_t rows, const Bf16* x, std::int64_t stride, std::int64_t n_columns, std::int64_t n_tiles,
                Bf16* to) {
    const std::int64_t n_pairs = round_up(rows, 32) / 2;
    for (std::int64_t t = 0; t < n_tiles; t += 2) {
        for (std::int64_t k = 0; k < n_pairs; ++k) {
            const Bf16* from = x + 2 * k * stride + 16 * t;
            __builtin_prefetch(from + kRowsAhead * stride, 0, 2);
            __builtin_prefetch(from + (kRowsAhead + 1) * stride, 0, 2);
            for (std::int64_t i = 0; i < 2; ++i) {
                const Vec pair = row_pair(from + 16 * i, stride, rows - 2 * k, n_columns - 16 * (t + i));
                std::memcpy(to + ((t + i) * n_pairs + k) * 32, &pair, sizeof(pair));
            }
        }
    }
}

// As the left one, columns of x as rows of tiles: [column tile][16 pairs of rows][16 columns][16 pairs][2].
void pack_left(std::int64_t rows, const Bf16* x, std::int64_t stride, std::int64_t n_columns, std::int64_t n_tiles,
               Bf16* to) {
    const std::int64_t n_blocks = round_up(rows, 32) / 32;
    for (std::int64_t block = 0; block < n_blocks; ++block) {
        for (std::int64_t t = 0; t < n_tiles; ++t) {
            Vec pairs[kLanes];
            for (std::int64_t k = 0; k < kLanes; ++k) {
                const std::int64_t r = 32 * block + 2 * k;
                const Bf16* from = x + r * stride + 16 * t;
                if (t % 2 == 0) {
                    __builtin_prefetch(from + kRowsAhead * stride, 0, 2);
                    __builtin_prefetch(from + (kRowsAhead + 1) * stride, 0, 2);
                }
                pairs[k] = row_pair(from, stride, rows - r, n_columns - 16 * t);
            }
            transpose(pairs);
            std::memcpy(to + (t * n_blocks + block) * 512, pairs, sizeof(pairs));
        }
    }
}

// sums[32][32] += of two tiles on either side.
void add_tiles(std::int64_t n_blocks, const Bf16* a, const Bf16* b, float* sums, std::int64_t ld) {
    const int stride = static_cast<int>(ld * 4);
    _tile_loadd(0, sums, stride);
    _tile_loadd(1, sums + 16, stride);
    _tile_loadd(2, sums + 16 * ld, stride);
    _tile_loadd(3, sums + 16 * ld + 16, stride);
    for (std::int64_t k = 0; k < n_blocks; ++k) {
        _tile_loadd(4, a + k * 512, 64);
        _tile_loadd(6, b + k * 512, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, b + (n_blocks + k) * 512, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, a + (n_blocks + k) * 512, 64);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sums, stride);
    _tile_stored(1, sums + 16, stride);
    _tile_stored(2, sums + 16 * ld, stride);
    _tile_stored(3, sums + 16 * ld + 16, stride);
}

template <>
void add_product<Bf16>(const Product<Bf16>& p, std::int64_t first, std::int64_t last, float* sums) {
    constexpr std::int64_t kColumnTiles = 4;
    const std::int64_t ld = sum_columns<Bf16>(p.n_b);
    const std::int64_t a_tiles = sum_rows<Bf16>(p.n_a) / 16;
    const std::int64_t b_tiles = ld / 16;
    Arena arena;
    Bf16* b_packed = nullptr;
    Bf16* a_packed = nullptr;
    for (int pass = 0; pass < 2; ++pass) {
        b_packed = arena.take<Bf16>(kRowsPerPanel * 16 * kColumnTiles);
        a_packed = arena.take<Bf16>(kRowsPerPanel * 16 * a_tiles);
        if (pass == 0) arena = Arena(arena.used());
    }
    const TileScope scope;
    for (std::int64_t r = first; r < last; r += kRowsPerPanel) {
        const std::int64_t rows = min_of(kRowsPerPanel, last - r);
        const std::int64_t n_blocks = round_up(rows, 32) / 32;
        pack_left(rows, p.a + r * p.a_stride, p.a_stride, p.n_a, a_tiles, a_packed);
        for (std::int64_t t = 0; t < b_tiles; t += kColumnTiles) {
            const std::int64_t n_tiles = min_of(kColumnTiles, b_tiles - t);
            pack_right(rows, p.b + r * p.b_stride + 16 * t, p.b_stride, p.n_b - 16 * t, n_tiles, b_packed);
            memory_barrier();
            for (std::int64_t j = 0; j < n_tiles; j += 2) {
                for (std::int64_t i = 0; i < a_tiles; i += 2) {
                    add_tiles(n_blocks, a_packed + i * n_blocks * 512, b_packed + j * n_blocks * 512,
                              sums + 16 * (i * ld + t + j), ld);
                }
            }
            memory_barrier();
        }
    }
}
#endif

// ---------------------------------------------------------------------------------------------------------------------
// All maps

// Where the sums of one map lie: [range][sum_rows][sum_columns].
template <typename T>
std::int64_t sums_size(const WeightGradient& map) {
    const Product<T> p(map);
    return round_up(sum_rows<T>(p.n_a) * sum_columns<T>(p.n_b), 16);
}

// From the gradient of the folded matrix W diag(norm_w) those of W, norm_w and norm_b. A few columns at a time, which
// leaves the sums over rows in registers.
void unfold(const WeightGradient& map) {
    for_vectors(map.n_in, [&](auto get, auto put) {
        const Vec scale = get(map.norm_w);
        const Vec offset = get(map.norm_b);
        Vec scales{};
        Vec offsets{};
        for (std::int64_t o = 0; o < map.n_out; ++o) {
            const Vec w = get(map.w + o * map.n_in);
            const Vec dw = get(map.dw + o * map.n_in);
            scales += w * dw;
            offsets += w * map.db[o];
            put(map.dw + o * map.n_in, dw * scale + offset * map.db[o]);
        }
        put(map.dnorm_w, scales);
        put(map.dnorm_b, offsets);
    });
}

template <typename T>
void run(const WeightGradients& args) {
    const std::int64_t n = n_ranges(args.n_rows);
    // Every map has a task per range; tasks of the largest map come first only by the order of the caller's list.
    parallel_for(args.n_maps * n, args.n_threads, [&](std::int64_t task) {
        float* sums = static_cast<float*>(args.partials);
        for (std::int64_t i = 0; i < task / n; ++i) sums += n * sums_size<T>(args.maps[i]);
        const std::int64_t range = task % n;
        const WeightGradient& map = args.maps[task / n];
        sums += range * sums_size<T>(map);
        std::memset(sums, 0, static_cast<std::size_t>(sums_size<T>(map)) * sizeof(float));
        add_product<T>(Product<T>(map), args.n_rows * range / n, args.n_rows * (range + 1) / n, sums);
    });
    parallel_for(args.n_maps, args.n_threads, [&](std::int64_t task) {
        float* sums = static_cast<float*>(args.partials);
        for (std::int64_t i = 0; i < task; ++i) sums += n * sums_size<T>(args.maps[i]);
        const WeightGradient& map = args.maps[task];
        const Product<T> p(map);
        const std::int64_t ld = sum_columns<T>(p.n_b);
        for (std::int64_t i = 0; i < p.n_a; ++i) {
            float* row = sums + i * ld;
            for (std::int64_t j = 0; j < ld; j += kLanes) {
                Vec total = load(row + j);
                for (std::int64_t range = 1; range < n; ++range) total += load(row + range * sums_size<T>(map) + j);
                store(row + j, total);
            }
            if (p.swapped) {
                for (std::int64_t j = 0; j < p.n_b; ++j) map.dw[j * map.n_in + i] = row[j];
            } else {
                std::memcpy(map.dw + i * map.n_in, row, static_cast<std::size_t>(p.n_b) * sizeof(float));
            }
        }
        if (map.w != nullptr) unfold(map);
    });
}

}  // namespace

std::size_t weight_gradients_bytes(const WeightGradients& args) {
    std::int64_t size = 0;
    for (std::int64_t i = 0; i < args.n_maps; ++i) {
        size += args.bf16 ? sums_size<Bf16>(args.maps[i]) : sums_size<float>(args.maps[i]);
    }
    return static_cast<std::size_t>(size * n_ranges(args.n_rows)) * sizeof(float);
}

void weight_gradients(const WeightGradients& args) {
    if (args.bf16) {
        run<Bf16>(args);
    } else {
        run<float>(args);
    }
}

}  // namespace GAC_FAST_ISA
}  // namespace gac_fast
