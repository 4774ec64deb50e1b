#include "gemm.h"

#include "tiles.h"

namespace gac_fast {
namespace GAC_FAST_ISA {
namespace {

const float* offset(const float* bias, std::int64_t n) { return bias == nullptr ? nullptr : bias + n; }

// ---------------------------------------------------------------------------------------------------------------------
// float32: panels of two vectors, [panel][n_in][2 * kLanes]

constexpr std::int64_t kPanel = 2 * kLanes;

#if defined(__AVX512F__)
constexpr int kMostRows = 12;
#elif defined(__AVX2__)
constexpr int kMostRows = 6;
#else
constexpr int kMostRows = 5;
#endif

// The beginning of y joins at the end, so that no sum waits for it. Unrolled by demand: GCC 12 would keep the sums in
// memory.
template <int ROWS, int VECS>
[[gnu::always_inline]] inline void finish(Vec (&sums)[ROWS][VECS], float* y, std::int64_t ldy, Begin begin,
                                          const float* bias) {
    if (begin == Begin::kBias) {
#pragma GCC unroll 32
        for (int v = 0; v < VECS; ++v) {
            const Vec b = load(bias + v * kLanes);
            for (int r = 0; r < ROWS; ++r) sums[r][v] += b;
        }
    } else if (begin == Begin::kAdd) {
#pragma GCC unroll 32
        for (int r = 0; r < ROWS; ++r) {
            for (int v = 0; v < VECS; ++v) sums[r][v] += load(y + r * ldy + v * kLanes);
        }
    }
#pragma GCC unroll 32
    for (int r = 0; r < ROWS; ++r) {
        for (int v = 0; v < VECS; ++v) store(y + r * ldy + v * kLanes, sums[r][v]);
    }
}

// How far ahead of its use a panel is fetched, in elements: weights come from a cache further out.
constexpr std::int64_t kCacheLine = 64 / sizeof(float);
constexpr std::int64_t kAhead = 1024 / sizeof(float);

// ROWS x (PANELS * kPanel) outputs in registers.
template <int ROWS, int PANELS>
void block_f32(std::int64_t n_in, const float* x, std::int64_t ldx, const float* packed, float* y, std::int64_t ldy,
               Begin begin, const float* bias) {
    constexpr int kVecs = 2 * PANELS;
    Vec sums[ROWS][kVecs];
    for (int r = 0; r < ROWS; ++r) {
        for (int v = 0; v < kVecs; ++v) sums[r][v] = Vec{};
    }
    for (std::int64_t k = 0; k < n_in; ++k) {
        Vec w[kVecs];
        for (int p = 0; p < PANELS; ++p) {
            const float* panel = packed + (p * n_in + k) * kPanel;
            for (std::int64_t i = 0; i < kPanel; i += kCacheLine) __builtin_prefetch(panel + kAhead + i);
            w[2 * p] = load(panel);
            w[2 * p + 1] = load(panel + kLanes);
        }
        for (int r = 0; r < ROWS; ++r) {
            const Vec a = broadcast(x[r * ldx + k]);
            for (int v = 0; v < kVecs; ++v) sums[r][v] += a * w[v];
        }
    }
    finish<ROWS, kVecs>(sums, y, ldy, begin, bias);
}

// Few rows leave registers for more panels, whose sums hide the latency of each other.
template <int ROWS>
constexpr int panels_of() {
#if defined(__AVX512F__)
    return ROWS <= 3 ? 4 : ROWS <= 6 ? 2 : 1;
#else
    return ROWS <= 1 ? 4 : ROWS <= 3 ? 2 : 1;
#endif
}

template <int ROWS>
void rows_f32(std::int64_t n_panels, std::int64_t n_in, const float* x, std::int64_t ldx, const float* packed, float* y,
              std::int64_t ldy, Begin begin, const float* bias) {
    constexpr int kPanels = panels_of<ROWS>();
    std::int64_t p = 0;
    for (; p + kPanels <= n_panels; p += kPanels) {
        block_f32<ROWS, kPanels>(n_in, x, ldx, packed + p * n_in * kPanel, y + p * kPanel, ldy, begin,
                                 offset(bias, p * kPanel));
    }
    for (; p < n_panels; ++p) {
        block_f32<ROWS, 1>(n_in, x, ldx, packed + p * n_in * kPanel, y + p * kPanel, ldy, begin,
                           offset(bias, p * kPanel));
    }
}

using RowsF32 = void (*)(std::int64_t, std::int64_t, const float*, std::int64_t, const float*, float*, std::int64_t,
                         Begin, const float*);

#if defined(__AVX512F__)
constexpr RowsF32 kRowsF32[] = {rows_f32<1>, rows_f32<2>, rows_f32<3>, rows_f32<4>,  rows_f32<5>,  rows_f32<6>,
                                rows_f32<7>, rows_f32<8>, rows_f32<9>, rows_f32<10>, rows_f32<11>, rows_f32<12>};
#elif defined(__AVX2__)
constexpr RowsF32 kRowsF32[] = {rows_f32<1>, rows_f32<2>, rows_f32<3>, rows_f32<4>, rows_f32<5>, rows_f32<6>};
#else
constexpr RowsF32 kRowsF32[] = {rows_f32<1>, rows_f32<2>, rows_f32<3>, rows_f32<4>, rows_f32<5>};
#endif

// ---------------------------------------------------------------------------------------------------------------------
// bfloat16: panels of 16 columns, neighbouring inputs side by side, [panel][n_in / 2][16][2]

constexpr std::int64_t kTileColumns = 16;

#if defined(__AMX_BF16__)
struct alignas(64) TileConfig {
    std::uint8_t palette = 1;
    std::uint8_t start_row = 0;
    std::uint8_t reserved[14] = {};
    std::uint16_t row_bytes[16] = {};
    std::uint8_t rows[16] = {};

    // Tiles 0-3: sums, 4-5: x, 6-7: W; the lower ones (2, 3, 5) have `low` rows.
    TileConfig(int top, int low) {
        for (int t = 0; t < 8; ++t) {
            row_bytes[t] = 64;
            rows[t] = static_cast<std::uint8_t>(t == 2 || t == 3 || t == 5 ? low : t < 6 ? top : 16);
        }
    }
};

void load_config(int top, int low) {
    const TileConfig config(top, low);
    asm volatile("" ::"r"(&config) : "memory");
    _tile_loadconfig(&config);
}

// Tile numbers have to be literals, hence two bodies. 16 to 32 rows, two column tiles.
void tiles_two(std::int64_t n_pairs, const Bf16* x, std::int64_t ldx, const Bf16* packed, float* y, std::int64_t ldy,
               Begin begin) {
    const std::int64_t panel = n_pairs * 32;
    const int x_stride = static_cast<int>(ldx * 2);
    const int y_stride = static_cast<int>(ldy * 4);
    if (begin == Begin::kZero) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    } else {
        _tile_loadd(0, y, y_stride);
        _tile_loadd(1, y + 16, y_stride);
        _tile_loadd(2, y + 16 * ldy, y_stride);
        _tile_loadd(3, y + 16 * ldy + 16, y_stride);
    }
    for (std::int64_t k = 0; k < n_pairs; k += 16) {
        _tile_loadd(6, packed + k * 32, 64);
        _tile_loadd(4, x + 2 * k, x_stride);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, packed + panel + k * 32, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, x + 16 * ldx + 2 * k, x_stride);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, y, y_stride);
    _tile_stored(1, y + 16, y_stride);
    _tile_stored(2, y + 16 * ldy, y_stride);
    _tile_stored(3, y + 16 * ldy + 16, y_stride);
}

// Up to 16 rows, two column tiles.
void tiles_one(std::int64_t n_pairs, const Bf16* x, std::int64_t ldx, const Bf16* packed, float* y, std::int64_t ldy,
               Begin begin) {
    const std::int64_t panel = n_pairs * 32;
    const int x_stride = static_cast<int>(ldx * 2);
    const int y_stride = static_cast<int>(ldy * 4);
    if (begin == Begin::kZero) {
        _tile_zero(0);
        _tile_zero(1);
    } else {
        _tile_loadd(0, y, y_stride);
        _tile_loadd(1, y + 16, y_stride);
    }
    for (std::int64_t k = 0; k < n_pairs; k += 16) {
        _tile_loadd(4, x + 2 * k, x_stride);
        _tile_loadd(6, packed + k * 32, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, packed + panel + k * 32, 64);
        _tile_dpbf16ps(1, 4, 7);
    }
    _tile_stored(0, y, y_stride);
    _tile_stored(1, y + 16, y_stride);
}

void fill_bias(std::int64_t m, std::int64_t n, const float* bias, float* y, std::int64_t ldy) {
    for (std::int64_t r = 0; r < m; ++r) {
        for (std::int64_t c = 0; c < n; c += kLanes) store(y + r * ldy + c, load(bias + c));
    }
}
#else
constexpr int kVecsPerPanel = static_cast<int>(kTileColumns) / kLanes;

// ROWS x (PANELS * 16) outputs in registers, from pairs of inputs: a bfloat16 is the upper half of a float.
template <int ROWS, int PANELS>
void block_bf16(std::int64_t n_pairs, const Bf16* x, std::int64_t ldx, const Bf16* packed, float* y, std::int64_t ldy,
                Begin begin, const float* bias) {
    constexpr int kVecs = kVecsPerPanel * PANELS;
    Vec sums[ROWS][kVecs];
    for (int r = 0; r < ROWS; ++r) {
        for (int v = 0; v < kVecs; ++v) sums[r][v] = Vec{};
    }
    for (std::int64_t k = 0; k < n_pairs; ++k) {
        for (int v = 0; v < kVecs; ++v) {
            const Bf16* w = packed + ((v / kVecsPerPanel) * n_pairs + k) * 32 + (v % kVecsPerPanel) * 2 * kLanes;
            IntVec pairs;
            std::memcpy(&pairs, w, sizeof(pairs));
            const Vec even = (Vec)(pairs << 16);
            const Vec odd = (Vec)(pairs & static_cast<std::int32_t>(0xFFFF0000U));
            for (int r = 0; r < ROWS; ++r) {
                sums[r][v] += to_float(x[r * ldx + 2 * k]) * even;
                sums[r][v] += to_float(x[r * ldx + 2 * k + 1]) * odd;
            }
        }
    }
    finish<ROWS, kVecs>(sums, y, ldy, begin, bias);
}

// The number of panels is even.
template <int ROWS, int PANELS>
void rows_bf16(std::int64_t n_panels, std::int64_t n_pairs, const Bf16* x, std::int64_t ldx, const Bf16* packed,
               float* y, std::int64_t ldy, Begin begin, const float* bias) {
    std::int64_t p = 0;
    for (; p + PANELS <= n_panels; p += PANELS) {
        block_bf16<ROWS, PANELS>(n_pairs, x, ldx, packed + p * n_pairs * 32, y + p * kTileColumns, ldy, begin,
                                 offset(bias, p * kTileColumns));
    }
    for (; p < n_panels; p += 2) {
        block_bf16<ROWS, 2>(n_pairs, x, ldx, packed + p * n_pairs * 32, y + p * kTileColumns, ldy, begin,
                            offset(bias, p * kTileColumns));
    }
}
#endif

// first[0], second[0], first[1], ...
void store_pairs(Bf16* p, Vec first, Vec second) {
    Bf16 halves[2 * kLanes];
    store(halves, first);
    store(halves + kLanes, second);
#if defined(__AVX512F__)
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(halves)));
    const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(halves + kLanes)));
    _mm512_storeu_si512(p, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
#else
    for (int i = 0; i < kLanes; ++i) {
        p[2 * i] = halves[i];
        p[2 * i + 1] = halves[kLanes + i];
    }
#endif
}

}  // namespace

template <>
std::int64_t packed_size<float>(std::int64_t n_out, std::int64_t n_in) {
    return round_up(n_out, kColumns) * n_in;
}

template <>
std::int64_t packed_size<Bf16>(std::int64_t n_out, std::int64_t n_in) {
    return round_up(n_out, kColumns) * round_up(n_in, kPairs);
}

template <>
void pack<float>(const float* w, std::int64_t stride_out, std::int64_t stride_in, std::int64_t n_out, std::int64_t n_in,
                 float* packed) {
    for (std::int64_t first = 0; first < round_up(n_out, kColumns); first += kPanel, packed += n_in * kPanel) {
        const float* columns = w + first * stride_out;
        const std::int64_t n_columns = min_of(kPanel, n_out - first);
        std::int64_t k = 0;
        if (stride_out == 1) {
            for (; k < n_in && n_columns == kPanel; ++k) {
                store(packed + k * kPanel, load(columns + k * stride_in));
                store(packed + k * kPanel + kLanes, load(columns + k * stride_in + kLanes));
            }
        }
#if defined(__AVX512F__)
        if (stride_in == 1) {
            for (; k + kLanes <= n_in && n_columns == kPanel; k += kLanes) {
                for (std::int64_t half = 0; half < kPanel; half += kLanes) {
                    Vec rows[kLanes];
                    for (int r = 0; r < kLanes; ++r) rows[r] = load(columns + (half + r) * stride_out + k);
                    transpose(rows);
                    for (int r = 0; r < kLanes; ++r) store(packed + (k + r) * kPanel + half, rows[r]);
                }
            }
        }
#endif
        for (; k < n_in; ++k) {
            for (std::int64_t c = 0; c < kPanel; ++c) {
                packed[k * kPanel + c] = c < n_columns ? columns[c * stride_out + k * stride_in] : 0.0F;
            }
        }
    }
}

template <>
void pack<Bf16>(const float* w, std::int64_t stride_out, std::int64_t stride_in, std::int64_t n_out, std::int64_t n_in,
                Bf16* packed) {
    const std::int64_t n_rows = round_up(n_in, kPairs);
    for (std::int64_t first = 0; first < round_up(n_out, kColumns);
         first += kTileColumns, packed += n_rows * kTileColumns) {
        const float* columns = w + first * stride_out;
        const std::int64_t n_columns = min_of(kTileColumns, n_out - first);
        std::int64_t k = 0;
        if (stride_out == 1) {
            for (; k + 2 <= n_in && n_columns == kTileColumns; k += 2) {
                const float* inputs = columns + k * stride_in;
                for (std::int64_t c = 0; c < kTileColumns; c += kLanes) {
                    store_pairs(packed + (k * kTileColumns + 2 * c), load(inputs + c), load(inputs + stride_in + c));
                }
            }
        }
#if defined(__AVX512F__)
        if (stride_in == 1) {
            for (; k + 2 * kLanes <= n_in && n_columns == kTileColumns; k += 2 * kLanes) {
                // A lane is a pair.
                Vec rows[kLanes];
                for (int r = 0; r < kLanes; ++r) {
                    Bf16 inputs[2 * kLanes];
                    convert(columns + r * stride_out + k, 2 * kLanes, inputs);
                    std::memcpy(&rows[r], inputs, sizeof(inputs));
                }
                transpose(rows);
                std::memcpy(packed + k * kTileColumns, rows, sizeof(rows));
            }
        }
#endif
        for (; k < n_rows; k += 2) {
            for (std::int64_t c = 0; c < kTileColumns; ++c) {
                for (std::int64_t i = k; i < k + 2; ++i) {
                    packed[k * kTileColumns + 2 * c + i - k] =
                        c < n_columns && i < n_in ? to_bf16(columns[c * stride_out + i * stride_in]) : Bf16{0};
                }
            }
        }
    }
}

template <>
void gemm<float>(std::int64_t m, std::int64_t n_out, std::int64_t n_in, const float* x, std::int64_t ldx,
                 const float* packed, float* y, std::int64_t ldy, Begin begin, const float* bias) {
    const std::int64_t n_panels = round_up(n_out, kColumns) / kPanel;
    const std::int64_t n_blocks = (m + kMostRows - 1) / kMostRows;
    // Blocks of nearly equal size. Panel by panel, so that one panel serves all rows from the nearest cache.
    const std::int64_t step = m > kMostRows ? 1 : n_panels;
    for (std::int64_t p = 0; p < n_panels; p += step) {
        for (std::int64_t b = 0; b < n_blocks; ++b) {
            const std::int64_t r = m * b / n_blocks;
            const std::int64_t rows = m * (b + 1) / n_blocks - r;
            kRowsF32[rows - 1](step, n_in, x + r * ldx, ldx, packed + p * n_in * kPanel, y + r * ldy + p * kPanel, ldy,
                               begin, offset(bias, p * kPanel));
        }
    }
}

template <>
void gemm<Bf16>(std::int64_t m, std::int64_t n_out, std::int64_t n_in, const Bf16* x, std::int64_t ldx,
                const Bf16* packed, float* y, std::int64_t ldy, Begin begin, const float* bias) {
    const std::int64_t n_panels = round_up(n_out, kColumns) / kTileColumns;
    const std::int64_t n_pairs = round_up(n_in, kPairs) / 2;
    std::int64_t r = 0;
#if defined(__AMX_BF16__)
    if (begin == Begin::kBias) fill_bias(m, n_panels * kTileColumns, bias, y, ldy);
    memory_barrier();
    for (; r < m; r += 32) {
        const std::int64_t rows = min_of(32, m - r);
        if (rows < 32) load_config(static_cast<int>(min_of(rows, 16)), static_cast<int>(max_of(1, rows - 16)));
        for (std::int64_t p = 0; p < n_panels; p += 2) {
            (rows > 16 ? tiles_two : tiles_one)(n_pairs, x + r * ldx, ldx, packed + p * n_pairs * 32,
                                                y + r * ldy + p * kTileColumns, ldy, begin);
        }
        if (rows < 32) load_config(16, 16);
    }
    memory_barrier();
#else
    for (; r + 4 <= m; r += 4) {
        rows_bf16<4, 2>(n_panels, n_pairs, x + r * ldx, ldx, packed, y + r * ldy, ldy, begin, bias);
    }
    for (; r < m; ++r) {
        rows_bf16<1, 4>(n_panels, n_pairs, x + r * ldx, ldx, packed, y + r * ldy, ldy, begin, bias);
    }
#endif
}

TileScope::TileScope() {
#if defined(__AMX_BF16__)
    load_config(16, 16);
#endif
}

TileScope::~TileScope() {
#if defined(__AMX_BF16__)
    _tile_release();
#endif
}

}  // namespace GAC_FAST_ISA
}  // namespace gac_fast
