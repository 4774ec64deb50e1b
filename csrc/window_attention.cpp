#include "window_attention.h"

#include "attention.h"
#include "gemm.h"

namespace gac_fast {
namespace GAC_FAST_ISA {
namespace {

// Keys that the queries [q, q + kQueries) of a panel see: those of the first vector [low[0], high[0]), of the second
// [low[1], high[1]); low[0] <= low[1] <= high[0] <= high[1].
struct Band {
    std::int64_t low[2], high[2];
};

Band band_of(std::int64_t q, std::int64_t window, std::int64_t begin, std::int64_t end) {
    Band band;
    band.low[0] = max_of(begin, q - window + 1);
    band.high[0] = min_of(end, q + kLanes);
    band.low[1] = min_of(max_of(begin, q + kLanes - window + 1), band.high[0]);
    band.high[1] = min_of(end, q + kQueries);
    return band;
}

std::int64_t most_band_rows(const WindowAttention& in, std::int64_t n_keys) {
    return min_of(n_keys, in.window - 1 + kQueries) + kRows;
}

// y[key - low[0]][query] for the keys that each vector sees. The queries of a panel differ in what they see: only the
// middle of the band is worth two vectors.
template <int LD>
void band_scores(const Band& band, std::int64_t width, const float* rows, const float* columns, float* y) {
    const std::int64_t both = band.low[1] - band.low[0];
    const std::int64_t second = band.high[0] - band.low[0];
    scores<1, LD>(both, width, rows, columns, y);
    scores<2, LD>(second - both, width, rows + both * LD, columns, y + both * kQueries);
    scores<1, LD>(band.high[1] - band.high[0], width, rows + second * LD, columns + kLanes,
                  y + second * kQueries + kLanes);
}

// Which lanes of vector v of the panel that begins at query q see a key.
class Masked {
  public:
    Masked(const Band& band, std::int64_t q, std::int64_t window) : band_(band), q_(q) {
        for (int i = 0; i < kLanes; ++i) lanes_[i] = i;
        window_ = static_cast<std::int32_t>(min_of(window, std::int64_t{1} << 30));
    }

    // All lanes of vector v see the key.
    bool whole(int v, std::int64_t key) const {
        const std::int64_t ahead = q_ + v * kLanes - key;
        return ahead >= 0 && ahead + kLanes <= window_;
    }

    Vec visible(int v, std::int64_t key, Vec x, float otherwise) const {
        const IntVec ahead = lanes_ + static_cast<std::int32_t>(q_ + v * kLanes - key);
        return (ahead >= 0) & (ahead < window_) ? x : Vec{} + otherwise;
    }

    // What neither vector computed becomes zero, and so do the rows after the band that products take along.
    void clear_rest(float* y, std::int64_t n_after = kRows - 1) const {
        for (std::int64_t key = band_.low[0]; key < band_.low[1]; ++key) store(at(y, 1, key), Vec{});
        for (std::int64_t key = band_.high[0]; key < band_.high[1] + n_after; ++key) store(at(y, 0, key), Vec{});
        for (std::int64_t key = band_.high[1]; key < band_.high[1] + n_after; ++key) store(at(y, 1, key), Vec{});
    }

    float* at(float* y, int v, std::int64_t key) const { return y + (key - band_.low[0]) * kQueries + v * kLanes; }

  private:
    const Band& band_;
    std::int64_t q_;
    std::int32_t window_;
    IntVec lanes_;
};

// The first n lanes of the panel: scores in; exponentials below the maximum out, with the maximum and the reciprocal of
// the sum.
[[gnu::flatten]] void soften(const Band& band, const Masked& masked, std::int64_t n, float* weights, float* maximum,
                             float* kept, float* inverse) {
    for (int v = 0; v < 2 && v * kLanes < n; ++v) {
        Vec top = broadcast(-__builtin_inff());
        for (std::int64_t key = band.low[v]; key < band.high[v]; ++key) {
            Vec x = load(masked.at(weights, v, key));
            if (!masked.whole(v, key)) x = masked.visible(v, key, x, -__builtin_inff());
            top = max_of(top, x);
        }
        Vec total{};
        for (std::int64_t key = band.low[v]; key < band.high[v]; ++key) {
            Vec x = exp(load(masked.at(weights, v, key)) - top);
            if (!masked.whole(v, key)) x = masked.visible(v, key, x, 0.0F);
            total += x;
            store(masked.at(weights, v, key), x);
        }
        const Vec reciprocal_total = 1.0F / total;
        store(inverse + v * kLanes, reciprocal_total);
        const std::int64_t left = n - v * kLanes;
        if (left >= kLanes) {
            store(maximum + v * kLanes, top);
            store(kept + v * kLanes, reciprocal_total);
        } else {
            store_first(maximum + v * kLanes, top, left);
            store_first(kept + v * kLanes, reciprocal_total, left);
        }
    }
}

// Scores in, weights out; gradients of the weights in, of the scores out.
[[gnu::flatten]] void differentiate(const Band& band, const Masked& masked, std::int64_t n, const float* maximum,
                                    const float* kept, float* weights, float* d_scores) {
    for (int v = 0; v < 2 && v * kLanes < n; ++v) {
        const std::int64_t left = n - v * kLanes;
        const bool all = left >= kLanes;
        const Vec top = all ? load(maximum + v * kLanes) : load_first(maximum + v * kLanes, left);
        const Vec inverse = all ? load(kept + v * kLanes) : load_first(kept + v * kLanes, left);
        // Equal to the product of the output and its gradient, but for the rounding of the output.
        Vec delta{};
        for (std::int64_t key = band.low[v]; key < band.high[v]; ++key) {
            Vec x = exp(load(masked.at(weights, v, key)) - top) * inverse;
            if (!masked.whole(v, key)) x = masked.visible(v, key, x, 0.0F);
            delta += x * load(masked.at(d_scores, v, key));
            store(masked.at(weights, v, key), x);
        }
        for (std::int64_t key = band.low[v]; key < band.high[v]; ++key) {
            float* at = masked.at(d_scores, v, key);
            store(at, load(masked.at(weights, v, key)) * (load(at) - delta));
        }
    }
}

// One task: a chunk of queries of one head.
template <typename T>
struct Head {
    Head(const WindowAttention& in, const QueryChunk& chunk, std::int64_t head)
        : op(in),
          tokens(chunk),
          first_key(max_of(chunk.begin, chunk.first - in.window + 1)),
          q(start(in.q, head)),
          k(start(in.k, head)),
          v(start(in.v, head)) {}

    static const T* start(const HeadsView& x, std::int64_t head) {
        return static_cast<const T*>(x.data) + head * x.head_stride;
    }

    const float* turn(std::int64_t token) const {
        return op.turns == nullptr ? nullptr : op.turns + op.turn_rows[token] * op.width;
    }

    void load_turned(const T* x, std::int64_t token, float scale, float* y) const {
        if (op.turns != nullptr) {
            load_turned_row(x, turn(token), op.width, scale, y);
        } else {
            load_scaled_row(x, op.width, scale, y);
        }
    }

    // Keys and values up to `end`, of which those before `loaded` are there.
    template <int LD>
    void load_keys(std::int64_t end, std::int64_t& loaded, float* keys, float* values) const {
        for (; loaded < end; ++loaded) {
            const std::int64_t row = (loaded - first_key) * LD, later = min_of(loaded + kAhead, op.n_tokens - 1);
            prefetch_row(k + later * op.k.token_stride, op.width);
            prefetch_row(v + later * op.v.token_stride, op.width);
            load_turned(k + loaded * op.k.token_stride, loaded, 1.0F, keys + row);
            load_row(v + loaded * op.v.token_stride, op.width, values + row);
        }
    }

    // Queries from `token` on, turned and scaled; zero from the end of the sequence on.
    template <int LD>
    void load_query_rows(std::int64_t token, float scale, float* rows) const {
        const std::int64_t n = min_of(kQueries, tokens.end - token);
        for (std::int64_t r = 0; r < n; ++r) {
            prefetch_row(q + min_of(token + r + kAhead, op.n_tokens - 1) * op.q.token_stride, op.width);
            load_turned(q + (token + r) * op.q.token_stride, token + r, scale, rows + r * LD);
        }
        fill_zero(rows + n * LD, (kQueries - n) * LD);
    }

    template <int LD>
    void store_d_queries(const WindowAttentionBackward& call, std::int64_t token, std::int64_t n, float scale,
                         std::int64_t head, const float* rows) const {
        auto* d_q = static_cast<T*>(call.d_q.data) + head * call.d_q.head_stride;
        for (std::int64_t r = 0; r < n; ++r) {
            store_turned(rows + r * LD, token + r, scale, d_q + (token + r) * call.d_q.token_stride);
        }
    }

    // Of the chunk's own tokens. The scale is in the queries already.
    template <int LD>
    void store_d_keys(const WindowAttentionBackward& call, std::int64_t head, const float* d_keys,
                      const float* d_values) const {
        auto* d_k = static_cast<T*>(call.d_k.data) + head * call.d_k.head_stride;
        auto* d_v = static_cast<T*>(call.d_v.data) + head * call.d_v.head_stride;
        for (std::int64_t key = tokens.first; key < tokens.last; ++key) {
            const std::int64_t row = (key - tokens.first) * LD;
            store_turned(d_keys + row, key, 1.0F, d_k + key * call.d_k.token_stride);
            store_scaled_row(d_values + row, op.width, 1.0F, d_v + key * call.d_v.token_stride);
        }
    }

    void store_turned(const float* y, std::int64_t token, float scale, T* x) const {
        if (op.turns != nullptr) {
            store_turned_back(y, turn(token), op.width, scale, x);
        } else {
            store_scaled_row(y, op.width, scale, x);
        }
    }

    const WindowAttention& op;
    const QueryChunk& tokens;
    std::int64_t first_key;
    const T *q, *k, *v;
};

float scale_of(std::int64_t width) { return 1.0F / __builtin_sqrtf(static_cast<float>(width)); }

// rows[query][c] = sum over the keys that it sees of weights[key][query] * keys[key][c]; `keys` begins at low[0].
template <int LD>
void weighted_rows(const Band& band, std::int64_t q, std::int64_t window, std::int64_t width, const float* weights,
                   const float* keys, float* rows) {
    for (std::int64_t r = 0; r < kQueries; r += kMostRows) {
        const std::int64_t n = min_of(kMostRows, kQueries - r);
        const std::int64_t low = max_of(band.low[0], q + r - window + 1);
        const std::int64_t high = min_of(band.high[1], q + r + n);
        const std::int64_t skipped = low - band.low[0];
        product_columns<kDown>(n, round_up(width, kLanes), high - low, weights + skipped * kQueries + r,
                               keys + skipped * LD, LD, rows + r * LD, LD, false);
    }
}

template <typename T, int LD>
void forward(const WindowAttentionForward& call, const QueryChunk& chunk, std::int64_t head) {
    const WindowAttention& op = call.in;
    const Head<T> in(op, chunk, head);
    const float scale = scale_of(op.width);
    const std::int64_t n_keys = chunk.last - in.first_key;
    Arena arena;
    for (int pass = 0; pass < 2; ++pass) {
        float* keys = arena.take<float>((n_keys + kMostRows) * LD);
        float* values = arena.take<float>((n_keys + kMostRows) * LD);
        float* rows = arena.take<float>(kQueries * LD);
        float* columns = arena.take<float>(kQueries * LD);
        float* weights = arena.take<float>(most_band_rows(op, n_keys) * kQueries);
        float* inverse = arena.take<float>(kQueries);
        if (pass == 0) {
            arena = Arena(arena.used());
            continue;
        }
        auto* out = static_cast<T*>(call.out.data) + head * call.out.head_stride;
        std::int64_t loaded = in.first_key;
        for (std::int64_t q = chunk.first; q < chunk.last; q += kQueries) {
            const Band band = band_of(q, op.window, chunk.begin, chunk.end);
            in.template load_keys<LD>(band.high[1], loaded, keys, values);
            in.template load_query_rows<LD>(q, scale, rows);
            transpose_panel(rows, LD, op.width, columns);
            const std::int64_t first = (band.low[0] - in.first_key) * LD;
            band_scores<LD>(band, op.width, keys + first, columns, weights);

            const Masked masked(band, q, op.window);
            const std::int64_t n = min_of(kQueries, chunk.end - q);
            float* maximum = call.softmax + head * op.n_tokens + q;
            float* kept = maximum + op.n_heads * op.n_tokens;
            soften(band, masked, n, weights, maximum, kept, inverse);
            masked.clear_rest(weights);
            weighted_rows<LD>(band, q, op.window, op.width, weights, values + first, rows);
            for (std::int64_t r = 0; r < n; ++r) {
                store_scaled_row(rows + r * LD, op.width, inverse[r], out + (q + r) * call.out.token_stride);
            }
        }
    }
}

// Gradients of the chunk's queries, keys and values. The panels after the chunk that see its keys are worked out again
// for their share of the gradients of keys and values, so that every task writes rows of its own and nothing is added
// across tasks.
template <typename T, int LD>
void backward(const WindowAttentionBackward& call, const QueryChunk& chunk, std::int64_t head) {
    const WindowAttention& op = call.in;
    const Head<T> in(op, chunk, head);
    const float scale = scale_of(op.width);
    const std::int64_t last_query = min_of(chunk.end, chunk.last + op.window - 1);
    const std::int64_t n_own = chunk.last - chunk.first;
    const std::int64_t n_keys =
        min_of(chunk.end, round_up(last_query - chunk.first, kQueries) + chunk.first) - in.first_key;
    Arena arena;
    for (int pass = 0; pass < 2; ++pass) {
        float* keys = arena.take<float>((n_keys + kMostRows) * LD);
        float* values = arena.take<float>((n_keys + kMostRows) * LD);
        float* d_keys = arena.take<float>((n_own + kRows) * LD);
        float* d_values = arena.take<float>((n_own + kRows) * LD);
        float* rows = arena.take<float>(kQueries * LD);
        float* columns = arena.take<float>(kQueries * LD);
        float* d_rows = arena.take<float>(kQueries * LD);
        float* d_columns = arena.take<float>(kQueries * LD);
        float* weights = arena.take<float>(most_band_rows(op, n_keys) * kQueries);
        float* d_scores = arena.take<float>(most_band_rows(op, n_keys) * kQueries);
        if (pass == 0) {
            arena = Arena(arena.used());
            continue;
        }
        fill_zero(d_keys, (n_own + kRows) * LD);
        fill_zero(d_values, (n_own + kRows) * LD);
        const T* d_out = Head<T>::start(call.d_out, head);
        std::int64_t loaded = in.first_key;
        for (std::int64_t q = chunk.first; q < last_query; q += kQueries) {
            const Band band = band_of(q, op.window, chunk.begin, chunk.end);
            in.template load_keys<LD>(band.high[1], loaded, keys, values);
            in.template load_query_rows<LD>(q, scale, rows);
            transpose_panel(rows, LD, op.width, columns);
            const std::int64_t n = min_of(kQueries, chunk.end - q);
            for (std::int64_t r = 0; r < n; ++r) {
                const std::int64_t later = min_of(q + r + kAhead, op.n_tokens - 1);
                prefetch_row(d_out + later * call.d_out.token_stride, op.width);
                load_row(d_out + (q + r) * call.d_out.token_stride, op.width, d_rows + r * LD);
            }
            fill_zero(d_rows + n * LD, (kQueries - n) * LD);
            transpose_panel(d_rows, LD, op.width, d_columns);
            const std::int64_t first = (band.low[0] - in.first_key) * LD;
            band_scores<LD>(band, op.width, keys + first, columns, weights);
            band_scores<LD>(band, op.width, values + first, d_columns, d_scores);

            const Masked masked(band, q, op.window);
            const float* maximum = call.softmax + head * op.n_tokens + q;
            const float* kept = maximum + op.n_heads * op.n_tokens;
            differentiate(band, masked, n, maximum, kept, weights, d_scores);
            masked.clear_rest(weights);
            masked.clear_rest(d_scores);

            const std::int64_t high = min_of(band.high[1], chunk.last);
            for (std::int64_t key = max_of(band.low[0], chunk.first); key < high;) {
                const std::int64_t n_rows = min_of(kMostRows, round_up(high - key, kRows));
                const std::int64_t low_query = max_of(0, key - q);
                const std::int64_t depth = min_of(n, key - q + n_rows - 1 + op.window) - low_query;
                const std::int64_t at = (key - band.low[0]) * kQueries + low_query;
                const std::int64_t to = (key - chunk.first) * LD;
                const std::int64_t columns_padded = round_up(op.width, kLanes);
                product_columns<static_cast<int>(kQueries)>(n_rows, columns_padded, depth, weights + at,
                                                            d_rows + low_query * LD, LD, d_values + to, LD, true);
                product_columns<static_cast<int>(kQueries)>(n_rows, columns_padded, depth, d_scores + at,
                                                            rows + low_query * LD, LD, d_keys + to, LD, true);
                key += n_rows;
            }
            if (q >= chunk.last) continue;
            weighted_rows<LD>(band, q, op.window, op.width, d_scores, keys + first, rows);
            in.template store_d_queries<LD>(call, q, n, scale, head, rows);
        }
        in.template store_d_keys<LD>(call, head, d_keys, d_values);
    }
}

#if defined(__AMX_BF16__)
// ---------------------------------------------------------------------------------------------------------------------
// bfloat16 on tiles: the same panels, with every product of 16 x 16 sums over 32 bfloat16 pairs at a time

static_assert(kQueries == 32, "a panel is two tiles wide and one deep");

// GCC's tile intrinsics do not say that they touch memory.
void memory_barrier() { asm volatile("" ::: "memory"); }

// y[r][c] (+)= sum over k of a[r][k] * b[k / 2][c][k % 2], a of R x 16 rows and 32 * depth columns, b of C x 16
// columns; lda and ldy count elements, ldb those of a row of pairs. Tile numbers have to be literals.
template <int R, int C>
void tile_block(std::int64_t depth, const Bf16* a, std::int64_t lda, const Bf16* b, std::int64_t ldb, float* y,
                std::int64_t ldy, bool add) {
    const auto a_bytes = static_cast<int>(lda * 2), b_bytes = static_cast<int>(ldb * 2);
    const auto y_bytes = static_cast<int>(ldy * 4);
    if (add) {
        _tile_loadd(0, y, y_bytes);
        if constexpr (C == 2) _tile_loadd(1, y + 16, y_bytes);
        if constexpr (R == 2) _tile_loadd(2, y + 16 * ldy, y_bytes);
        if constexpr (R == 2 && C == 2) _tile_loadd(3, y + 16 * ldy + 16, y_bytes);
    } else {
        _tile_zero(0);
        if constexpr (C == 2) _tile_zero(1);
        if constexpr (R == 2) _tile_zero(2);
        if constexpr (R == 2 && C == 2) _tile_zero(3);
    }
    for (std::int64_t k = 0; k < depth; ++k) {
        _tile_loadd(4, a + k * 32, a_bytes);
        _tile_loadd(6, b + k * 16 * ldb, b_bytes);
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (C == 2) {
            _tile_loadd(7, b + k * 16 * ldb + 32, b_bytes);
            _tile_dpbf16ps(1, 4, 7);
        }
        if constexpr (R == 2) {
            _tile_loadd(5, a + 16 * lda + k * 32, a_bytes);
            _tile_dpbf16ps(2, 5, 6);
            if constexpr (C == 2) _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, y, y_bytes);
    if constexpr (C == 2) _tile_stored(1, y + 16, y_bytes);
    if constexpr (R == 2) _tile_stored(2, y + 16 * ldy, y_bytes);
    if constexpr (R == 2 && C == 2) _tile_stored(3, y + 16 * ldy + 16, y_bytes);
}

// At least n_rows rows, in whole tiles.
template <int C>
void tile_rows(std::int64_t n_rows, std::int64_t depth, const Bf16* a, std::int64_t lda, const Bf16* b,
               std::int64_t ldb, float* y, std::int64_t ldy, bool add) {
    std::int64_t r = 0;
    for (; r + 16 < n_rows; r += 32) tile_block<2, C>(depth, a + r * lda, lda, b, ldb, y + r * ldy, ldy, add);
    if (r < n_rows) tile_block<1, C>(depth, a + r * lda, lda, b, ldb, y + r * ldy, ldy, add);
}

// Rows that whole tiles may write, or read, past the ones they were asked for.
constexpr std::int64_t kTileSpare = 32;

template <int LD>
void tile_band_scores(const Band& band, const Bf16* rows, const Bf16* columns, float* y) {
    const std::int64_t both = band.low[1] - band.low[0];
    const std::int64_t second = band.high[0] - band.low[0];
    tile_rows<1>(both, LD / 32, rows, LD, columns, 2 * kQueries, y, kQueries, false);
    tile_rows<2>(second - both, LD / 32, rows + both * LD, LD, columns, 2 * kQueries, y + both * kQueries, kQueries,
                 false);
    tile_rows<1>(band.high[1] - band.high[0], LD / 32, rows + second * LD, LD, columns + 32, 2 * kQueries,
                 y + second * kQueries + 16, kQueries, false);
}

// y[r / 2][c][r % 2] = x[r][c]: what a product over r reads. n_rows and n_columns are even, and whole vectors.
void pair_rows(const float* x, std::int64_t ldx, std::int64_t n_rows, std::int64_t n_columns, Bf16* y) {
    alignas(64) std::uint16_t order[32];
    for (int i = 0; i < 16; ++i) {
        order[2 * i] = static_cast<std::uint16_t>(i);
        order[2 * i + 1] = static_cast<std::uint16_t>(16 + i);
    }
    const __m512i interleave = _mm512_load_si512(order);
    for (std::int64_t r = 0; r < n_rows; r += 2) {
        for (std::int64_t c = 0; c < n_columns; c += 16) {
            const Vec even = load(x + r * ldx + c), odd = load(x + (r + 1) * ldx + c);
            const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
            _mm512_storeu_si512(y + r * n_columns + 2 * c, _mm512_permutexvar_epi16(interleave, both));
        }
    }
}

// y[c / 2][r][c % 2] = x[r][c] of a panel: what a product over c reads.
template <int LD>
void pair_columns(const Bf16* x, Bf16* y) {
    // A pair is one element of four bytes.
    const auto* from = reinterpret_cast<const float*>(x);
    auto* to = reinterpret_cast<float*>(y);
    for (std::int64_t c = 0; c < LD / 2; c += kLanes) {
        for (std::int64_t r = 0; r < kQueries; r += kLanes) {
            transpose_square(from + r * (LD / 2) + c, LD / 2, to + c * kQueries + r, kQueries);
        }
    }
}

// y[c][r] = x[r][c] of a panel of rows, rows of y n_keys apart. `pairs` has room for the panel.
template <int LD>
void turn_down(const float* x, Bf16* pairs, std::int64_t n_keys, Bf16* y) {
    pair_rows(x, LD, kQueries, LD, pairs);
    // pairs[r / 2][c] of four bytes to y[c][r / 2].
    alignas(64) float square[kLanes * kLanes];
    for (std::int64_t c = 0; c < LD; c += kLanes) {
        transpose_square(reinterpret_cast<const float*>(pairs) + c, LD, square, kLanes);
        for (std::int64_t i = 0; i < kLanes; ++i) {
            std::memcpy(y + (c + i) * n_keys, square + i * kLanes, 64);
        }
    }
}

template <int LD>
void round_rows(const float* x, std::int64_t n, Bf16* y) {
    convert(x, n * LD, y);
}

// rows[query][c] = sum over the keys of weights[key][query] * keys[c][key], from weights as pairs of rows.
template <int LD>
void tile_weighted_rows(std::int64_t n_deep, const Bf16* keys, std::int64_t n_keys, const Bf16* weights, float* down,
                        float* rows) {
    memory_barrier();
    tile_rows<2>(LD, n_deep, keys, n_keys, weights, 2 * kQueries, down, kQueries, false);
    memory_barrier();
    for (std::int64_t c = 0; c < LD; c += kLanes) {
        for (std::int64_t r = 0; r < kQueries; r += kLanes) {
            transpose_square(down + c * kQueries + r, kQueries, rows + r * LD + c, LD);
        }
    }
}

// Keys in panels from first_key on: as rows, and down; `loaded` counts whole panels.
template <int LD>
struct TileKeys {
    const Head<Bf16>& in;
    std::int64_t n_keys;  // columns of what lies down
    float* panel;         // [kQueries][LD]
    Bf16* pairs;          // [kQueries][LD]

    // `down` null: not needed. turned: k, else v.
    void load(bool turned, std::int64_t first, Bf16* rows, Bf16* down) const {
        const WindowAttention& op = in.op;
        const HeadsView& view = turned ? op.k : op.v;
        const Bf16* x = turned ? in.k : in.v;
        const std::int64_t n = min_of(kQueries, in.tokens.end - first);
        for (std::int64_t r = 0; r < n; ++r) {
            prefetch_row(x + min_of(first + r + kAhead, op.n_tokens - 1) * view.token_stride, op.width);
            const Bf16* from = x + (first + r) * view.token_stride;
            if (turned) {
                in.load_turned(from, first + r, 1.0F, panel + r * LD);
            } else {
                load_row(from, op.width, panel + r * LD);
            }
        }
        fill_zero(panel + n * LD, (kQueries - n) * LD);
        const std::int64_t at = first - in.first_key;
        if (rows != nullptr) round_rows<LD>(panel, kQueries, rows + at * LD);
        if (down != nullptr) turn_down<LD>(panel, pairs, n_keys, down + at);
    }
};

template <int LD>
void forward_tiles(const WindowAttentionForward& call, const QueryChunk& chunk, std::int64_t head) {
    const WindowAttention& op = call.in;
    const Head<Bf16> in(op, chunk, head);
    const float scale = scale_of(op.width);
    const std::int64_t n_keys = round_up(chunk.last - in.first_key, kQueries) + kTileSpare;
    const std::int64_t n_band = most_band_rows(op, n_keys) + kTileSpare;
    const TileScope scope;
    Arena arena;
    for (int pass = 0; pass < 2; ++pass) {
        Bf16* keys = arena.take<Bf16>((n_keys + kTileSpare) * LD);
        Bf16* values = arena.take<Bf16>((n_keys + kTileSpare) * LD);  // [LD][n_keys]
        float* rows = arena.take<float>(kQueries * LD);
        Bf16* rounded = arena.take<Bf16>(kQueries * LD);
        Bf16* columns = arena.take<Bf16>(kQueries * LD);
        float* down = arena.take<float>(kQueries * LD);
        float* weights = arena.take<float>(n_band * kQueries);
        Bf16* weight_pairs = arena.take<Bf16>(n_band * kQueries);
        float* inverse = arena.take<float>(kQueries);
        if (pass == 0) {
            arena = Arena(arena.used());
            continue;
        }
        // Tiles take the columns past the head's width along, and multiply what has no key yet by zero.
        fill_zero(rows, kQueries * LD);
        std::memset(values, 0, static_cast<std::size_t>((n_keys + kTileSpare) * LD) * sizeof(Bf16));
        const TileKeys<LD> load_keys{in, n_keys, rows, rounded};
        auto* out = static_cast<Bf16*>(call.out.data) + head * call.out.head_stride;
        std::int64_t loaded = in.first_key;
        for (std::int64_t q = chunk.first; q < chunk.last; q += kQueries) {
            const Band band = band_of(q, op.window, chunk.begin, chunk.end);
            for (; loaded < band.high[1]; loaded += kQueries) {
                load_keys.load(true, loaded, keys, nullptr);
                load_keys.load(false, loaded, nullptr, values);
            }
            in.template load_query_rows<LD>(q, scale, rows);
            round_rows<LD>(rows, kQueries, rounded);
            pair_columns<LD>(rounded, columns);
            const std::int64_t first = band.low[0] - in.first_key;
            memory_barrier();
            tile_band_scores<LD>(band, keys + first * LD, columns, weights);
            memory_barrier();

            const Masked masked(band, q, op.window);
            const std::int64_t n = min_of(kQueries, chunk.end - q);
            float* maximum = call.softmax + head * op.n_tokens + q;
            soften(band, masked, n, weights, maximum, maximum + op.n_heads * op.n_tokens, inverse);
            const std::int64_t n_deep = (band.high[1] - band.low[0] + 31) / 32;
            masked.clear_rest(weights, n_deep * 32 - (band.high[1] - band.low[0]));
            pair_rows(weights, kQueries, n_deep * 32, kQueries, weight_pairs);
            tile_weighted_rows<LD>(n_deep, values + first, n_keys, weight_pairs, down, rows);
            for (std::int64_t r = 0; r < n; ++r) {
                store_scaled_row(rows + r * LD, op.width, inverse[r], out + (q + r) * call.out.token_stride);
            }
        }
    }
}

template <int LD>
void backward_tiles(const WindowAttentionBackward& call, const QueryChunk& chunk, std::int64_t head) {
    const WindowAttention& op = call.in;
    const Head<Bf16> in(op, chunk, head);
    const float scale = scale_of(op.width);
    const std::int64_t last_query = min_of(chunk.end, chunk.last + op.window - 1);
    const std::int64_t n_own = chunk.last - chunk.first;
    const std::int64_t n_keys =
        round_up(min_of(chunk.end, round_up(last_query - chunk.first, kQueries) + chunk.first) - in.first_key,
                 kQueries) +
        kTileSpare;
    const std::int64_t n_band = most_band_rows(op, n_keys) + kTileSpare;
    const TileScope scope;
    Arena arena;
    for (int pass = 0; pass < 2; ++pass) {
        Bf16* keys = arena.take<Bf16>((n_keys + kTileSpare) * LD);
        Bf16* keys_down = arena.take<Bf16>((n_keys + kTileSpare) * LD);
        Bf16* values = arena.take<Bf16>((n_keys + kTileSpare) * LD);
        float* d_keys = arena.take<float>((n_own + kTileSpare) * LD);
        float* d_values = arena.take<float>((n_own + kTileSpare) * LD);
        float* rows = arena.take<float>(kQueries * LD);
        Bf16* rounded = arena.take<Bf16>(kQueries * LD);
        Bf16* columns = arena.take<Bf16>(kQueries * LD);
        Bf16* row_pairs = arena.take<Bf16>(kQueries * LD);
        Bf16* d_columns = arena.take<Bf16>(kQueries * LD);
        Bf16* d_row_pairs = arena.take<Bf16>(kQueries * LD);
        float* down = arena.take<float>(kQueries * LD);
        float* weights = arena.take<float>(n_band * kQueries);
        float* d_scores = arena.take<float>(n_band * kQueries);
        Bf16* rounded_weights = arena.take<Bf16>(n_band * kQueries);
        Bf16* rounded_scores = arena.take<Bf16>(n_band * kQueries);
        if (pass == 0) {
            arena = Arena(arena.used());
            continue;
        }
        fill_zero(d_keys, (n_own + kTileSpare) * LD);
        fill_zero(d_values, (n_own + kTileSpare) * LD);
        // Tiles take the columns past the head's width along, and multiply what has no key yet by zero.
        fill_zero(rows, kQueries * LD);
        std::memset(keys_down, 0, static_cast<std::size_t>((n_keys + kTileSpare) * LD) * sizeof(Bf16));
        const TileKeys<LD> load_keys{in, n_keys, rows, rounded};
        const Bf16* d_out = Head<Bf16>::start(call.d_out, head);
        std::int64_t loaded = in.first_key;
        for (std::int64_t q = chunk.first; q < last_query; q += kQueries) {
            const Band band = band_of(q, op.window, chunk.begin, chunk.end);
            for (; loaded < band.high[1]; loaded += kQueries) {
                load_keys.load(true, loaded, keys, keys_down);
                load_keys.load(false, loaded, values, nullptr);
            }
            const std::int64_t n = min_of(kQueries, chunk.end - q);
            for (std::int64_t r = 0; r < n; ++r) {
                const std::int64_t later = min_of(q + r + kAhead, op.n_tokens - 1);
                prefetch_row(d_out + later * call.d_out.token_stride, op.width);
                load_row(d_out + (q + r) * call.d_out.token_stride, op.width, rows + r * LD);
            }
            fill_zero(rows + n * LD, (kQueries - n) * LD);
            round_rows<LD>(rows, kQueries, rounded);
            pair_columns<LD>(rounded, d_columns);
            pair_rows(rows, LD, kQueries, LD, d_row_pairs);
            in.template load_query_rows<LD>(q, scale, rows);
            round_rows<LD>(rows, kQueries, rounded);
            pair_columns<LD>(rounded, columns);
            pair_rows(rows, LD, kQueries, LD, row_pairs);
            const std::int64_t first = band.low[0] - in.first_key;
            memory_barrier();
            tile_band_scores<LD>(band, keys + first * LD, columns, weights);
            tile_band_scores<LD>(band, values + first * LD, d_columns, d_scores);
            memory_barrier();

            const Masked masked(band, q, op.window);
            const float* maximum = call.softmax + head * op.n_tokens + q;
            differentiate(band, masked, n, maximum, maximum + op.n_heads * op.n_tokens, weights, d_scores);
            const std::int64_t n_deep = (band.high[1] - band.low[0] + 31) / 32;
            const std::int64_t n_rest = n_deep * 32 - (band.high[1] - band.low[0]);
            masked.clear_rest(weights, n_rest);
            masked.clear_rest(d_scores, n_rest);
            convert(weights, n_deep * 32 * kQueries, rounded_weights);
            convert(d_scores, n_deep * 32 * kQueries, rounded_scores);

            const std::int64_t key = max_of(band.low[0], chunk.first);
            const std::int64_t n_rows = min_of(band.high[1], chunk.last) - key;
            const std::int64_t at = (key - band.low[0]) * kQueries, to = (key - chunk.first) * LD;
            // Rows past those of the band are taken along only at the end of the chunk: they fall into spare rows.
            memory_barrier();
            for (std::int64_t c = 0; c < LD; c += 32) {
                tile_rows<2>(n_rows, 1, rounded_weights + at, kQueries, d_row_pairs + 2 * c, 2 * LD, d_values + to + c,
                             LD, true);
                tile_rows<2>(n_rows, 1, rounded_scores + at, kQueries, row_pairs + 2 * c, 2 * LD, d_keys + to + c, LD,
                             true);
            }
            memory_barrier();
            if (q >= chunk.last) continue;
            pair_rows(d_scores, kQueries, n_deep * 32, kQueries, rounded_scores);
            tile_weighted_rows<LD>(n_deep, keys_down + first, n_keys, rounded_scores, down, rows);
            in.template store_d_queries<LD>(call, q, n, scale, head, rows);
        }
        in.template store_d_keys<LD>(call, head, d_keys, d_values);
    }
}
#endif

template <typename T, int LD>
void forward_at(const WindowAttentionForward& call, const QueryChunk& chunk, std::int64_t head) {
#if defined(__AMX_BF16__)
    if constexpr (sizeof(T) == sizeof(Bf16)) return forward_tiles<LD>(call, chunk, head);
#endif
    forward<T, LD>(call, chunk, head);
}

template <typename T>
void forward_any(const WindowAttentionForward& call, const QueryChunk& chunk, std::int64_t head) {
    const std::int64_t width = call.in.width;
    if (width <= 32) return forward_at<T, 32>(call, chunk, head);
    if (width <= 64) return forward_at<T, 64>(call, chunk, head);
    if (width <= 128) return forward_at<T, 128>(call, chunk, head);
    forward_at<T, 256>(call, chunk, head);
}

template <typename T, int LD>
void backward_at(const WindowAttentionBackward& call, const QueryChunk& chunk, std::int64_t head) {
#if defined(__AMX_BF16__)
    if constexpr (sizeof(T) == sizeof(Bf16)) return backward_tiles<LD>(call, chunk, head);
#endif
    backward<T, LD>(call, chunk, head);
}

template <typename T>
void backward_any(const WindowAttentionBackward& call, const QueryChunk& chunk, std::int64_t head) {
    const std::int64_t width = call.in.width;
    if (width <= 32) return backward_at<T, 32>(call, chunk, head);
    if (width <= 64) return backward_at<T, 64>(call, chunk, head);
    if (width <= 128) return backward_at<T, 128>(call, chunk, head);
    backward_at<T, 256>(call, chunk, head);
}

// attend(chunk, head) for all of them. Rows of the heads of a token lie side by side: two threads at the same chunk
// would write to neighbouring cache lines, which are fetched in pairs, and one thread is best off with all heads of a
// chunk. Where there are too few of those, as many chunks as threads are shared out at a time, head by head,
// neighbouring tasks at different ones.
template <typename F>
void for_each_head(const WindowAttention& in, F&& attend) {
    constexpr std::int64_t kChunksPerThread = 4;
    const std::int64_t n_heads = in.n_heads, n_chunks = in.n_chunks;
    if (in.n_threads <= 1 || n_chunks >= kChunksPerThread * in.n_threads) {
        return parallel_for(n_chunks, in.n_threads, [&](std::int64_t i) {
            for (std::int64_t h = 0; h < n_heads; ++h) attend(in.chunks[i], h);
        });
    }
    const std::int64_t n_tasks = in.n_threads * n_heads;
    parallel_for(n_chunks * n_heads, in.n_threads, [&](std::int64_t i) {
        const std::int64_t first = i / n_tasks * in.n_threads;
        const std::int64_t n_at_once = min_of(in.n_threads, n_chunks - first);
        attend(in.chunks[first + i % n_tasks % n_at_once], i % n_tasks / n_at_once);
    });
}

}  // namespace

void window_attention(const WindowAttentionForward& op) {
    for_each_head(op.in, [&op](const QueryChunk& chunk, std::int64_t head) {
        (op.in.bf16 ? forward_any<Bf16> : forward_any<float>)(op, chunk, head);
    });
}

void window_attention_backward(const WindowAttentionBackward& op) {
    for_each_head(op.in, [&op](const QueryChunk& chunk, std::int64_t head) {
        (op.in.bf16 ? backward_any<Bf16> : backward_any<float>)(op, chunk, head);
    });
}

}  // namespace GAC_FAST_ISA
}  // namespace gac_fast
