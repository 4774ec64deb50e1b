#include "decode_step.h"

#include <utility>

#include "gemm.h"
#include "token_rows.h"

namespace gac_fast {
namespace GAC_FAST_ISA {
namespace {

constexpr float kLowest = -3.4e38F;

// ---------------------------------------------------------------------------------------------------------------------
// Packing

// Hands out parts of memory that the caller owns; counts alone where there is none.
class Taker {
  public:
    explicit Taker(char* base) : base_(base) {}

    template <typename T>
    T* take(std::int64_t n) {
        T* p = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + used_);
        used_ += static_cast<std::size_t>(round_up(n * static_cast<std::int64_t>(sizeof(T)), 64));
        return p;
    }

    const float* vector(const float* x, std::int64_t n) {
        const std::int64_t padded = round_up(n, kColumns);
        float* p = take<float>(padded);
        if (p == nullptr) return nullptr;
        for (std::int64_t i = 0; i < padded; ++i) p[i] = i < n ? x[i] : 0.0F;
        return p;
    }

    // Columns from `first` on of a linear map.
    template <typename T>
    PackedLinear linear(const LinearSource& source, std::int64_t first, std::int64_t n_out, std::int64_t n_in) {
        T* w = take<T>(packed_size<T>(n_out, n_in));
        if (w != nullptr) pack<T>(source.w + first * n_in, n_in, 1, n_out, n_in, w);
        return {w, vector(base_ == nullptr ? nullptr : source.b + first, n_out)};
    }

    PackedNorm norm(const LinearSource& source, std::int64_t n) { return {vector(source.w, n), vector(source.b, n)}; }

    std::size_t used() const { return used_; }

  private:
    char* base_;
    std::size_t used_ = 0;
};

template <typename T>
std::size_t pack_all(const DecoderSource& source, char* memory, PackedDecoder* packed) {
    const DecodeSizes& s = source.sizes;
    Taker taker(memory);
    auto* layers = taker.take<PackedLayer>(s.n_layers);
    for (std::int64_t i = 0; i < s.n_layers; ++i) {
        const LayerSource& from = source.layers[i];
        PackedLayer layer;
        // In the order of their use.
        layer.norm1 = taker.norm(from.norm1, s.dim);
        layer.q = taker.linear<T>(from.qkv, 0, s.dim, s.dim);
        layer.kv = taker.linear<T>(from.qkv, s.dim, 2 * s.dim, s.dim);
        layer.o = taker.linear<T>(from.o, 0, s.dim, s.dim);
        layer.norm2 = taker.norm(from.norm2, s.dim);
        layer.plan_q = taker.linear<T>(from.plan_q, 0, s.dim, s.dim);
        layer.plan_o = taker.linear<T>(from.plan_o, 0, s.dim, s.dim);
        layer.norm3 = taker.norm(from.norm3, s.dim);
        layer.in = taker.linear<T>(from.in, 0, s.hidden, s.dim);
        layer.out = taker.linear<T>(from.out, 0, s.dim, s.hidden);
        if (layers != nullptr) layers[i] = layer;
    }
    PackedDecoder all;
    all.sizes = s;
    all.layers = layers;
    all.embed_state = taker.linear<float>(source.embed_state, 0, s.dim, s.obs_dim);
    all.embed_action = {nullptr, nullptr};
    if (s.reads_actions) all.embed_action = taker.linear<float>(source.embed_action, 0, s.dim, s.act_dim);
    all.norm = taker.norm(source.norm, s.dim);
    all.head = taker.linear<float>(source.head, 0, s.act_dim, s.dim);
    if (packed != nullptr) *packed = all;
    return taker.used();
}

// ---------------------------------------------------------------------------------------------------------------------
// Rows

inline Vec load_up_to(const float* p, std::int64_t n) { return n >= kLanes ? load(p) : load_first(p, n); }

template <typename T>
inline void store_up_to(T* p, Vec x, std::int64_t n) {
    if (n >= kLanes) {
        store(p, x);
    } else {
        store_first(p, x, n);
    }
}

inline float reciprocal_root(float x) { return 1.0F / __builtin_sqrtf(x); }

// y = norm(x), zeros up to ldy; then x += bias, for the product that will be added to it.
template <typename T>
void norm_row(std::int64_t dim, float* x, const PackedNorm& norm, const float* bias, T* y, std::int64_t ldy) {
    Vec total{};
    for (std::int64_t i = 0; i < dim; i += kLanes) total += load_up_to(x + i, dim - i);
    const float mean = sum(total) / static_cast<float>(dim);
    Vec squares{};
    for (std::int64_t i = 0; i < dim; i += kLanes) {
        Vec centred = load_up_to(x + i, dim - i) - mean;
        if (dim - i < kLanes) {
            float lanes[kLanes] = {};
            store_first(lanes, centred, dim - i);
            centred = load(lanes);
        }
        squares += centred * centred;
    }
    const float scale = reciprocal_root(sum(squares) / static_cast<float>(dim) + kNormEps);
    for (std::int64_t i = 0; i < dim; i += kLanes) {
        const Vec old = load_up_to(x + i, dim - i);
        store_up_to(y + i, (old - mean) * scale * load(norm.w + i) + load(norm.b + i), dim - i);
        if (bias != nullptr) store_up_to(x + i, old + load(bias + i), dim - i);
    }
    for (std::int64_t i = dim; i < ldy; ++i) y[i] = T{};
}

template <typename T>
void silu_rows(std::int64_t m, std::int64_t n, const float* x, std::int64_t ldx, T* y, std::int64_t ldy,
               std::int64_t padded) {
    for (std::int64_t r = 0; r < m; ++r) {
        for (std::int64_t i = 0; i < n; i += kLanes) {
            const Vec v = load(x + r * ldx + i);
            store_up_to(y + r * ldy + i, v * gate<T>(v), n - i);
        }
        for (std::int64_t i = n; i < padded; ++i) y[r * ldy + i] = T{};
    }
}

// To 2e-7 of its own size: below 0.625 a polynomial (Cephes), above by the exponential.
inline Vec tanh(Vec x) {
    const IntVec sign = (IntVec)x & static_cast<std::int32_t>(0x80000000U);
    const Vec size = (Vec)((IntVec)x & 0x7FFFFFFF);
    const Vec z = x * x;
    Vec p = z * -5.70498872745e-3F + 2.06390887954e-2F;
    p = p * z - 5.37397155531e-2F;
    p = p * z + 1.33314422036e-1F;
    p = p * z - 3.33332819422e-1F;
    const Vec small = x + x * z * p;
    const Vec large = (Vec)((IntVec)(1.0F - 2.0F / (exp(size + size) + 1.0F)) | sign);
    // A NaN compares false, and `small` keeps it.
    return size > 0.625F ? large : small;
}

// ---------------------------------------------------------------------------------------------------------------------
// Attention of one query to n keys

constexpr int kChunk = 2 * kLanes;

// A chunk of a row as two vectors: halves of float, even and odd elements of Bf16.
struct Pair {
    Vec a, b;
};

inline Pair load_pair(const float* p) { return {load(p), load(p + kLanes)}; }

inline Pair split(IntVec bits) { return {(Vec)(bits << 16), (Vec)(bits & static_cast<std::int32_t>(0xFFFF0000U))}; }

inline Pair load_pair(const Bf16* p) {
    IntVec bits;
    std::memcpy(&bits, p, sizeof(bits));
    return split(bits);
}

// The first n elements, 0 < n < kChunk; the others are zero.
inline Pair load_pair_first(const float* p, std::int64_t n) {
    if (n <= kLanes) return {load_up_to(p, n), Vec{}};
    return {load(p), load_first(p + kLanes, n - kLanes)};
}

// n even.
inline Pair load_pair_first(const Bf16* p, std::int64_t n) {
    Bf16 lanes[kChunk] = {};
    std::memcpy(lanes, p, static_cast<std::size_t>(n) * sizeof(Bf16));
    return load_pair(lanes);
}

template <int... I>
inline Vec even_of(Vec a, Vec b, std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(a, b, (2 * I)...);
}
template <int... I>
inline Vec odd_of(Vec a, Vec b, std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(a, b, (2 * I + 1)...);
}
template <int FIRST, int... I>
inline Vec interleave(Vec a, Vec b, std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(a, b, (FIRST + I / 2 + I % 2 * kLanes)...);
}
using Lanes = std::make_integer_sequence<int, kLanes>;

// Halves of float -> as load_pair() of a row of KV has them, and back.
template <typename KV>
inline Pair arrange(Pair x) {
    if constexpr (sizeof(KV) == sizeof(float)) return x;
    return {even_of(x.a, x.b, Lanes{}), odd_of(x.a, x.b, Lanes{})};
}
template <typename KV>
inline Pair restore(Pair x) {
    if constexpr (sizeof(KV) == sizeof(float)) return x;
    return {interleave<0>(x.a, x.b, Lanes{}), interleave<kLanes / 2>(x.a, x.b, Lanes{})};
}

// Blocks of SIZE lanes: even blocks of a and b one after the other (HIGH = 0), or odd ones (HIGH = 1).
template <int SIZE, int HIGH, int... I>
inline Vec blocks_of(Vec a, Vec b, std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(a, b, (I / SIZE % 2 * kLanes + I / SIZE / 2 * 2 * SIZE + HIGH * SIZE + I % SIZE)...);
}

// Lane i of the result is the sum of x[i].
template <int N>
inline Vec sums_of(Vec* x) {
    if constexpr (N == 1) {
        return x[0];
    } else {
        constexpr int kHalf = N / 2;
        for (int i = 0; i < kHalf; ++i) {
            x[i] = blocks_of<kHalf, 0>(x[i], x[i + kHalf], Lanes{}) + blocks_of<kHalf, 1>(x[i], x[i + kHalf], Lanes{});
        }
        return sums_of<kHalf>(x);
    }
}

inline Vec lane_numbers() {
    float lanes[kLanes];
    for (int i = 0; i < kLanes; ++i) lanes[i] = static_cast<float>(i);
    return load(lanes);
}

constexpr std::int64_t kMostWidth = 256;

// Memory that is read next, fetched little by little: keys and values of many environments lie in a far cache, and a
// head at a time is no pattern that the processor foresees.
struct Ahead {
    const char* next = nullptr;
    const char* end = nullptr;
    std::int64_t lines = 0;  // per block of kLanes slots

    void fetch() {
        for (std::int64_t i = 0; i < lines && next < end; ++i, next += 64) __builtin_prefetch(next, 0, 2);
    }
};

// Adds to `sum` the products of a chunk of a query and of a row.
struct FloatQuery {
    Pair x;
};
inline Vec add_products(const FloatQuery& query, const float* row, Vec sum) {
    const Pair key = load_pair(row);
    return sum + (key.a * query.x.a + key.b * query.x.b);
}
inline Vec add_products(const FloatQuery& query, const Bf16* row, Vec sum) {
    const Pair key = load_pair(row);
    return sum + (key.a * query.x.a + key.b * query.x.b);
}

template <typename KV>
struct QueryOf {
    using Type = FloatQuery;
    static Type make(Pair x) { return {arrange<KV>(x)}; }
};

#if defined(__AVX512BF16__)
#define GAC_FAST_PAIR_PRODUCTS 1
struct PairQuery {
    __m512bh x;
};
inline Vec add_products(const PairQuery& query, const Bf16* row, Vec sum) {
    return (Vec)_mm512_dpbf16_ps((__m512)sum, query.x, (__m512bh)_mm512_loadu_si512(row));
}

template <>
struct QueryOf<Bf16> {
    using Type = PairQuery;
    static Type make(Pair x) { return {_mm512_cvtne2ps_pbh((__m512)x.b, (__m512)x.a)}; }
};

// Element i of the first 16, or of the last 16, of a row of 32 whose groups of eight were cut into `low` and `high`.
template <int FIRST, int... I>
inline Vec join(Vec low, Vec high, std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(low, high, (FIRST + I / 8 * 4 + I % 4 + I / 4 % 2 * kLanes)...);
}

// out = sum over slots of weight * v / total, by products of neighbouring slots. `weights` has a zero after the last.
template <int CHUNKS, typename Out>
inline void mix_pairs(std::int64_t stride, const Bf16* v, std::int64_t n, const Bf16* weights, float scale, Out* out) {
    constexpr int kPairsAtOnce = CHUNKS == 1 ? 4 : CHUNKS == 2 ? 2 : 1;
    __m512 low[kPairsAtOnce][CHUNKS] = {};
    __m512 high[kPairsAtOnce][CHUNKS] = {};
    const auto add = [&](std::int64_t w, int s, const Bf16* second) {
        std::int32_t both;
        std::memcpy(&both, weights + w, sizeof(both));
        const __m512bh weight = (__m512bh)_mm512_set1_epi32(both);
        for (int c = 0; c < CHUNKS; ++c) {
            const __m512i a = _mm512_loadu_si512(v + w * stride + c * kChunk);
            const __m512i b = _mm512_loadu_si512(second + c * kChunk);
            low[s][c] = _mm512_dpbf16_ps(low[s][c], weight, (__m512bh)_mm512_unpacklo_epi16(a, b));
            high[s][c] = _mm512_dpbf16_ps(high[s][c], weight, (__m512bh)_mm512_unpackhi_epi16(a, b));
        }
    };
    std::int64_t w = 0;
    for (; w + 2 * kPairsAtOnce <= n; w += 2 * kPairsAtOnce) {
        for (int s = 0; s < kPairsAtOnce; ++s) add(w + 2 * s, s, v + (w + 2 * s + 1) * stride);
    }
    for (; w + 2 <= n; w += 2) add(w, 0, v + (w + 1) * stride);
    // The last one twice, the second time with weight zero.
    if (w < n) add(w, 0, v + w * stride);
    for (int c = 0; c < CHUNKS; ++c) {
        Vec x = (Vec)low[0][c];
        Vec y = (Vec)high[0][c];
        for (int s = 1; s < kPairsAtOnce; ++s) {
            x += (Vec)low[s][c];
            y += (Vec)high[s][c];
        }
        store(out + c * kChunk, join<0>(x, y, Lanes{}) * scale);
        store(out + c * kChunk + kLanes, join<8>(x, y, Lanes{}) * scale);
    }
}
#else
#define GAC_FAST_PAIR_PRODUCTS 0
#endif

// One head. CHUNKS > 0: width = CHUNKS * kChunk; 0: any even width up to kMostWidth. q is scaled already.
template <int CHUNKS, typename KV, typename Out>
void attend_head(std::int64_t width, std::int64_t stride, const float* q, const KV* k, const KV* v, std::int64_t n,
                 float* scores, Out* out, Ahead& ahead_k, Ahead& ahead_v) {
    constexpr int kMost = CHUNKS > 0 ? CHUNKS : static_cast<int>(kMostWidth / kChunk);
    const std::int64_t tail = CHUNKS > 0 ? 0 : width % kChunk;
    const std::int64_t whole = CHUNKS > 0 ? CHUNKS : width / kChunk;
    // Rows whose tail has to be read apart are multiplied as floats.
    using Query = typename QueryOf<KV>::Type;
    Query query[kMost];
    for (std::int64_t c = 0; c < whole; ++c) query[c] = QueryOf<KV>::make(load_pair(q + c * kChunk));
    Pair query_tail{};
    if (tail > 0) query_tail = arrange<KV>(load_pair_first(q + whole * kChunk, tail));

    Vec top = broadcast(kLowest);
    for (std::int64_t first = 0; first < n; first += kLanes) {
        ahead_k.fetch();
        Vec dots[kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) {
            // Beyond n the last one again: nothing unwritten is read.
            const KV* row = k + min_of(first + i, n - 1) * stride;
            Vec dot{};
            for (std::int64_t c = 0; c < whole; ++c) dot = add_products(query[c], row + c * kChunk, dot);
            if (tail > 0) {
                const Pair key = load_pair_first(row + whole * kChunk, tail);
                dot += key.a * query_tail.a + key.b * query_tail.b;
            }
            dots[i] = dot;
        }
        Vec score = sums_of<kLanes>(dots);
        if (first + kLanes > n) score = lane_numbers() < static_cast<float>(n - first) ? score : broadcast(kLowest);
        store(scores + first, score);
        top = max_of(top, score);
    }
    const float highest = max_lane(top);
    Vec total{};
#if GAC_FAST_PAIR_PRODUCTS
    if constexpr (CHUNKS > 0 && sizeof(KV) == sizeof(Bf16)) {
        Bf16* weights = reinterpret_cast<Bf16*>(scores);
        for (std::int64_t first = 0; first < n; first += kLanes) {
            ahead_v.fetch();
            // In place: what is written lies before what is read next.
            const Vec weight = exp(load(scores + first) - highest);
            store(weights + first, weight);
            total += weight;
        }
        if (n % 2 != 0) weights[n] = {0};
        return mix_pairs<CHUNKS>(stride, v, n, weights, 1.0F / sum(total), out);
    }
#endif
    for (std::int64_t first = 0; first < n; first += kLanes) {
        ahead_v.fetch();
        const Vec weight = exp(load(scores + first) - highest);
        store(scores + first, weight);
        total += weight;
    }
    const float scale = 1.0F / sum(total);

    // Several slots at once hide the latency of a sum.
    constexpr int kSlots = CHUNKS == 1 ? 4 : CHUNKS == 2 ? 2 : 1;
    Pair sums[kSlots][kMost + 1] = {};
    std::int64_t w = 0;
    for (; w + kSlots <= n; w += kSlots) {
        for (int s = 0; s < kSlots; ++s) {
            const KV* row = v + (w + s) * stride;
            const float weight = scores[w + s];
            for (std::int64_t c = 0; c < whole; ++c) {
                const Pair value = load_pair(row + c * kChunk);
                sums[s][c].a += weight * value.a;
                sums[s][c].b += weight * value.b;
            }
            if (tail > 0) {
                const Pair value = load_pair_first(row + whole * kChunk, tail);
                sums[s][whole].a += weight * value.a;
                sums[s][whole].b += weight * value.b;
            }
        }
    }
    for (; w < n; ++w) {
        for (std::int64_t c = 0; c < whole; ++c) {
            const Pair value = load_pair(v + w * stride + c * kChunk);
            sums[0][c].a += scores[w] * value.a;
            sums[0][c].b += scores[w] * value.b;
        }
    }
    for (std::int64_t c = 0; c < whole + (tail > 0); ++c) {
        Pair x = sums[0][c];
        for (int s = 1; s < kSlots; ++s) {
            x.a += sums[s][c].a;
            x.b += sums[s][c].b;
        }
        x = restore<KV>({x.a * scale, x.b * scale});
        const std::int64_t left = width - c * kChunk;
        store_up_to(out + c * kChunk, x.a, left);
        if (left > kLanes) store_up_to(out + c * kChunk + kLanes, x.b, left - kLanes);
    }
}

template <typename KV, typename Out>
void attend(std::int64_t heads, std::int64_t stride, std::int64_t width, const float* q, const KV* k, const KV* v,
            std::int64_t n, float* scores, Out* out, Ahead& ahead_k, Ahead& ahead_v) {
    const auto head = width == kChunk       ? attend_head<1, KV, Out>
                      : width == 2 * kChunk ? attend_head<2, KV, Out>
                      : width == 4 * kChunk ? attend_head<4, KV, Out>
                                            : attend_head<0, KV, Out>;
    for (std::int64_t h = 0; h < heads; ++h) {
        head(width, stride, q + h * width, k + h * width, v + h * width, n, scores, out + h * width, ahead_k, ahead_v);
    }
}

// Attention of one query to few keys [n, H, d], for the first `heads` of `all` heads: their products side by side. q_at
// and k_at [H * n] say where the query and the key of product i begin, those of one head beside each other. VECS > 0:
// width = VECS * kLanes.
template <int VECS, typename Out>
void attend_few(std::int64_t heads, std::int64_t all, std::int64_t width, float scale, const float* q, const float* k,
                const float* v, std::int64_t n, const std::int32_t* q_at, const std::int32_t* k_at, float* scores,
                Out* out) {
    const std::int64_t used = VECS > 0 ? VECS * kLanes : width;
    const std::int64_t products = heads * n;
    for (std::int64_t first = 0; first < products; first += kLanes) {
        Vec dots[kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) {
            const std::int64_t at = min_of(first + i, products - 1);
            const float* x = q + q_at[at];
            const float* y = k + k_at[at];
            Vec dot{};
            if constexpr (VECS > 0) {
                for (std::int64_t d = 0; d < used; d += kLanes) dot += load(x + d) * load(y + d);
            } else {
                for (std::int64_t d = 0; d < used; d += kLanes) {
                    dot += load_up_to(x + d, used - d) * load_up_to(y + d, used - d);
                }
            }
            dots[i] = dot;
        }
        store(scores + first, sums_of<kLanes>(dots) * scale);
    }
    for (std::int64_t h = 0; h < heads; ++h) {
        float top = scores[h * n];
        for (std::int64_t z = 1; z < n; ++z) top = scores[h * n + z] > top ? scores[h * n + z] : top;
        for (std::int64_t z = 0; z < n; ++z) scores[h * n + z] -= top;
    }
    for (std::int64_t first = 0; first < products; first += kLanes) store(scores + first, exp(load(scores + first)));
    for (std::int64_t h = 0; h < heads; ++h) {
        float total = 0;
        for (std::int64_t z = 0; z < n; ++z) total += scores[h * n + z];
        const float share = 1.0F / total;
        for (std::int64_t d = 0; d < used; d += kLanes) {
            const std::int64_t left = VECS > 0 ? kLanes : used - d;
            Vec x{};
            for (std::int64_t z = 0; z < n; ++z) {
                x += scores[h * n + z] * load_up_to(v + (z * all + h) * width + d, left);
            }
            store_up_to(out + h * width + d, x * share, left);
        }
    }
}

// Turns the pairs (i, i + half) of every head and scales the result.
void rotate(std::int64_t heads, std::int64_t half, const float* cos, const float* sin, float scale, float* x) {
    for (std::int64_t h = 0; h < heads; ++h, x += 2 * half) {
        for (std::int64_t i = 0; i < half; i += kLanes) {
            const std::int64_t n = half - i;
            const Vec c = load_up_to(cos + i, n) * scale;
            const Vec s = load_up_to(sin + i, n) * scale;
            const Vec low = load_up_to(x + i, n);
            const Vec high = load_up_to(x + half + i, n);
            store_up_to(x + i, low * c - high * s, n);
            store_up_to(x + half + i, high * c + low * s, n);
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// The step

float observation(const DecodeStepArgs& a, std::int64_t row, std::int64_t i) {
    const char* p = a.observations + row * a.row_bytes + i * a.element_bytes;
    if (a.doubles) {
        double x;
        std::memcpy(&x, p, sizeof(x));
        return static_cast<float>(x);
    }
    float x;
    std::memcpy(&x, p, sizeof(x));
    return x;
}

// Cosines and sines of the rows' positions, one pair of rows for neighbours that share theirs, and which one is whose.
void fill_turns(const DecodeStepArgs& a, std::int64_t first, std::int64_t n, std::int64_t m, std::int64_t ldr,
                float* turns, std::int32_t* turn_of) {
    std::int32_t n_turns = 0;
    std::int64_t known = -1;
    for (std::int64_t r = 0; r < m; ++r) {
        const std::int64_t t = r < n ? a.steps[first + r] : max_of(a.steps[first + r - n] - 1, 0);
        if (t != known) {
            a.rotary->row(t, turns + 2 * n_turns * ldr, turns + (2 * n_turns + 1) * ldr);
            ++n_turns;
            known = t;
        }
        turn_of[r] = n_turns - 1;
    }
}

// Where the products of attend_few() begin, for the first `heads` of all.
void fill_places(std::int64_t heads, std::int64_t all, std::int64_t width, std::int64_t n_z, std::int32_t* q_at,
                 std::int32_t* k_at) {
    for (std::int64_t h = 0; h < heads; ++h) {
        for (std::int64_t z = 0; z < n_z; ++z) {
            q_at[h * n_z + z] = static_cast<std::int32_t>(h * width);
            k_at[h * n_z + z] = static_cast<std::int32_t>((z * all + h) * width);
        }
    }
}

template <typename Out>
auto attend_few_of(std::int64_t width) {
    return width == kLanes       ? attend_few<1, Out>
           : width == 2 * kLanes ? attend_few<2, Out>
           : width == 4 * kLanes ? attend_few<4, Out>
                                 : attend_few<0, Out>;
}

// From the last layer's rows of states to actions; `last` [n, ldx] and `y` [n, lda] are scratch memory.
void finish_step(const DecodeStepArgs& a, std::int64_t first, std::int64_t n, float* x, std::int64_t ldx, float* last,
                 float* y, std::int64_t lda) {
    const PackedDecoder& weights = *a.weights;
    const DecodeSizes& s = weights.sizes;
    for (std::int64_t e = 0; e < n; ++e) {
        norm_row(s.dim, x + e * ldx, weights.norm, nullptr, last + e * ldx, ldx);
    }
    gemm<float>(n, s.act_dim, s.dim, last, ldx, static_cast<const float*>(weights.head.w), y, lda, Begin::kBias,
                weights.head.b);
    for (std::int64_t e = 0; e < n; ++e) {
        const std::int64_t p = first + e;
        for (std::int64_t i = 0; i < s.act_dim; i += kLanes) {
            const std::int64_t left = s.act_dim - i;
            const Vec mean = tanh(load(y + e * lda + i));
            store_up_to(a.last_action + p * s.act_dim + i, mean, left);
            Vec action = mean;
            if (a.action_mid != nullptr) {
                // Rounded twice, as torch does: noise of size 0 changes no bit.
                action = mean * load_up_to(a.action_half + i, left);
                asm volatile("" : "+m"(action));
                action += load_up_to(a.action_mid + i, left);
            }
            store_up_to(a.out + p * s.act_dim + i, action, left);
        }
        ++a.steps[p];
    }
}

// Environments [first, first + n).
template <typename T>
void step_tile(const DecodeStepArgs& a, std::int64_t first, std::int64_t n) {
    const PackedDecoder& weights = *a.weights;
    const DecodeSizes& s = weights.sizes;
    const std::int64_t width = s.dim / s.n_heads;
    const std::int64_t half = width / 2;
    const std::int64_t m = s.reads_actions ? 2 * n : n;
    const std::int64_t ldx = round_up(s.dim, kColumns);
    const std::int64_t ldkv = round_up(2 * s.dim, kColumns);
    const std::int64_t ldh = round_up(s.hidden, kColumns);
    const std::int64_t lda = round_up(s.act_dim, kColumns);
    const std::int64_t ldr = round_up(half, kLanes);

    Arena arena;
    float *x = nullptr, *q = nullptr, *y = nullptr, *scores = nullptr, *turns = nullptr, *in = nullptr, *last = nullptr;
    T *normed = nullptr, *hidden = nullptr;
    std::int32_t *turn_of = nullptr, *q_at = nullptr, *k_at = nullptr;
    for (int pass = 0; pass < 2; ++pass) {
        // State tokens first, then those of actions.
        x = arena.take<float>(m * ldx);
        normed = arena.take<T>(m * ldx);
        q = arena.take<float>(m * ldx);
        y = arena.take<float>(m * max_of(max_of(ldkv, ldh), lda));
        hidden = arena.take<T>(m * ldh);
        scores = arena.take<float>(round_up(max_of(a.window, s.n_heads * a.n_z), kLanes));
        q_at = arena.take<std::int32_t>(s.n_heads * a.n_z);
        k_at = arena.take<std::int32_t>(s.n_heads * a.n_z);
        turns = arena.take<float>(2 * m * ldr);
        turn_of = arena.take<std::int32_t>(m);
        in = arena.take<float>(n * max_of(s.obs_dim, s.act_dim));
        last = arena.take<float>(n * ldx);
        if (pass == 0) arena = Arena(arena.used());
    }

    for (std::int64_t e = 0; e < n; ++e) {
        for (std::int64_t i = 0; i < s.obs_dim; ++i) {
            const float value = observation(a, first + e, i);
            in[e * s.obs_dim + i] = a.obs_mean == nullptr ? value : (value - a.obs_mean[i]) / a.obs_std[i];
        }
    }
    gemm<float>(n, s.dim, s.obs_dim, in, s.obs_dim, static_cast<const float*>(weights.embed_state.w), x, ldx,
                Begin::kBias, weights.embed_state.b);
    if (s.reads_actions) {
        // At step 0 there is none: those rows are computed and never read.
        gemm<float>(n, s.dim, s.act_dim, a.last_action + first * s.act_dim, s.act_dim,
                    static_cast<const float*>(weights.embed_action.w), x + n * ldx, ldx, Begin::kBias,
                    weights.embed_action.b);
    }

    fill_turns(a, first, n, m, ldr, turns, turn_of);

    const TileScope tiles;
    const auto product = [&](std::int64_t rows, std::int64_t n_out, std::int64_t n_in, const T* from, std::int64_t ld,
                             const PackedLinear& linear, float* to, std::int64_t ldy, Begin begin) {
        gemm<T>(rows, n_out, n_in, from, ld, static_cast<const T*>(linear.w), to, ldy, begin, linear.b);
    };
    const float scale = reciprocal_root(static_cast<float>(width));
    const auto attend_plan = attend_few_of<T>(width);
    fill_places(s.n_heads, s.n_heads, width, a.n_z, q_at, k_at);
    for (std::int64_t l = 0; l < s.n_layers; ++l) {
        const PackedLayer& layer = weights.layers[l];
        // Of the last layer's action tokens nothing but keys and values is ever read.
        const std::int64_t rows = l + 1 < s.n_layers ? m : n;
        for (std::int64_t r = 0; r < m; ++r) {
            norm_row(s.dim, x + r * ldx, layer.norm1, layer.o.b, normed + r * ldx, ldx);
        }
        product(rows, s.dim, s.dim, normed, ldx, layer.q, q, ldx, Begin::kBias);
        product(m, 2 * s.dim, s.dim, normed, ldx, layer.kv, y, ldkv, Begin::kBias);
        for (std::int64_t e = 0; e < n; ++e) {
            const std::int64_t t = a.steps[first + e];
            const std::int64_t ring = (l * a.n_rows + first + e) * a.window * s.dim;
            T* ring_k = static_cast<T*>(a.ring_k) + ring;
            T* ring_v = static_cast<T*>(a.ring_v) + ring;
            // The ring that comes next: of the environment beside, or of the first one in the next layer.
            const std::int64_t next_e = e + 1 < n ? e + 1 : 0;
            const std::int64_t next_l = e + 1 < n ? l : l + 1;
            Ahead ahead_k, ahead_v;
            if (next_l < s.n_layers) {
                const std::int64_t tokens = s.reads_actions ? 2 : 1;
                const std::int64_t at = (next_l * a.n_rows + first + next_e) * a.window * s.dim;
                const std::int64_t used = min_of(tokens * a.steps[first + next_e], a.window) * s.dim;
                const std::int64_t lines = round_up(kLanes * width * static_cast<std::int64_t>(sizeof(T)) / tokens, 64);
                const T* next_k = static_cast<const T*>(a.ring_k) + at;
                const T* next_v = static_cast<const T*>(a.ring_v) + at;
                ahead_k = {reinterpret_cast<const char*>(next_k), reinterpret_cast<const char*>(next_k + used),
                           lines / 64};
                ahead_v = {reinterpret_cast<const char*>(next_v), reinterpret_cast<const char*>(next_v + used),
                           lines / 64};
            }
            const auto feed = [&](std::int64_t r, std::int64_t index) {
                const float* cos = turns + 2 * turn_of[r] * ldr;
                float* key = y + r * ldkv;
                const std::int64_t slot = index % a.window;
                rotate(s.n_heads, half, cos, cos + ldr, 1.0F, key);
                convert(key, s.dim, ring_k + slot * s.dim);
                convert(key + s.dim, s.dim, ring_v + slot * s.dim);
                if (r >= rows) return;
                rotate(s.n_heads, half, cos, cos + ldr, scale, q + r * ldx);
                attend(s.n_heads, s.dim, width, q + r * ldx, ring_k, ring_v, min_of(index + 1, a.window), scores,
                       normed + r * ldx, ahead_k, ahead_v);
            };
            // The older token first: s_t may overwrite the slot that a_{t-1} is the last to see.
            if (s.reads_actions && t > 0) feed(n + e, 2 * t - 1);
            feed(e, s.reads_actions ? 2 * t : t);
        }
        product(rows, s.dim, s.dim, normed, ldx, layer.o, x, ldx, Begin::kAdd);
        for (std::int64_t r = 0; r < rows; ++r) {
            norm_row(s.dim, x + r * ldx, layer.norm2, layer.plan_o.b, normed + r * ldx, ldx);
        }
        product(rows, s.dim, s.dim, normed, ldx, layer.plan_q, q, ldx, Begin::kBias);
        for (std::int64_t r = 0; r < rows; ++r) {
            const std::int64_t e = r < n ? r : r - n;
            const std::int64_t plan = (l * a.n_rows + first + e) * a.n_z * s.dim;
            attend_plan(s.n_heads, s.n_heads, width, scale, q + r * ldx, a.plan_k + plan, a.plan_v + plan, a.n_z, q_at,
                        k_at, scores, normed + r * ldx);
        }
        product(rows, s.dim, s.dim, normed, ldx, layer.plan_o, x, ldx, Begin::kAdd);
        for (std::int64_t r = 0; r < rows; ++r) {
            norm_row(s.dim, x + r * ldx, layer.norm3, layer.out.b, normed + r * ldx, ldx);
        }
        product(rows, s.hidden, s.dim, normed, ldx, layer.in, y, ldh, Begin::kBias);
        silu_rows(rows, s.hidden, y, ldh, hidden, ldh, ldh);
        product(rows, s.dim, s.hidden, hidden, ldh, layer.out, x, ldx, Begin::kAdd);
    }

    finish_step(a, first, n, x, ldx, last, y, lda);
}

// ---------------------------------------------------------------------------------------------------------------------
// All environments by several threads, each of which has some of the heads and some of the columns of every product

// Memory of all members.
template <typename T>
struct Together {
    const DecodeStepArgs* args;
    Meeting* meeting;
    float* x[2];  // [m, D]: what is read, and what becomes of it
    T* mixed;     // [m, D]
    T* hidden;    // [m, hidden]

    // Of one member alone.
    struct Own {
        T* normed;
        float *q, *y, *scores, *turns, *in;
        std::int32_t *turn_of, *q_at, *k_at;
    };
    Own own[kMostMembers];
};

// Whole heads and whole columns of a product.
inline std::int64_t unit_of(const DecodeSizes& s) {
    const std::int64_t width = s.dim / s.n_heads;
    return width % kColumns == 0 ? width : kColumns;
}

inline bool may_share_columns(const DecodeSizes& s) {
    const std::int64_t width = s.dim / s.n_heads;
    return (width % kColumns == 0 || kColumns % width == 0) && s.dim % unit_of(s) == 0 && s.hidden % kColumns == 0 &&
           s.dim / unit_of(s) > 1;
}

template <typename T>
void step_member(const Together<T>& all, int member, int size) {
    const DecodeStepArgs& a = *all.args;
    const PackedDecoder& weights = *a.weights;
    const DecodeSizes& s = weights.sizes;
    const std::int64_t n = a.n_rows;
    const std::int64_t width = s.dim / s.n_heads;
    const std::int64_t half = width / 2;
    const std::int64_t m = s.reads_actions ? 2 * n : n;
    const std::int64_t ldx = s.dim;
    const std::int64_t ldkv = 2 * s.dim;
    const std::int64_t lda = round_up(s.act_dim, kColumns);
    const std::int64_t ldr = round_up(half, kLanes);
    const typename Together<T>::Own& own = all.own[member];
    float *x = all.x[0], *next = all.x[1];

    // Its columns [c0, c0 + nc), so many heads, its hidden units [g0, g0 + ng).
    const std::int64_t n_units = s.dim / unit_of(s);
    const std::int64_t c0 = n_units * member / size * unit_of(s);
    const std::int64_t nc = n_units * (member + 1) / size * unit_of(s) - c0;
    const std::int64_t nh = nc / width;
    const std::int64_t g0 = s.hidden / kColumns * member / size * kColumns;
    const std::int64_t ng = s.hidden / kColumns * (member + 1) / size * kColumns - g0;

    const auto meet = [&] { all.meeting->wait(member, size); };
    const auto product = [&](std::int64_t rows, std::int64_t first, std::int64_t n_out, std::int64_t n_in,
                             const T* from, std::int64_t ld, const PackedLinear& linear, float* to, std::int64_t ldy,
                             Begin begin) {
        gemm<T>(rows, n_out, n_in, from, ld, static_cast<const T*>(linear.w) + packed_size<T>(first, n_in), to + first,
                ldy, begin, linear.b + first);
    };
    // Norms are computed by every member; of x each goes on with its columns alone, in other memory than is being read.
    const auto norm_rows = [&](std::int64_t rows, const PackedNorm& norm, const float* bias) {
        for (std::int64_t r = 0; r < rows; ++r) {
            norm_row<T>(s.dim, x + r * ldx, norm, nullptr, own.normed + r * ldx, ldx);
            for (std::int64_t i = c0; i < c0 + nc; i += kLanes) {
                store(next + r * ldx + i, load(x + r * ldx + i) + load(bias + i));
            }
        }
        std::swap(x, next);
    };

    for (std::int64_t e = 0; e < n; ++e) {
        for (std::int64_t i = 0; i < s.obs_dim; ++i) {
            const float value = observation(a, e, i);
            own.in[e * s.obs_dim + i] = a.obs_mean == nullptr ? value : (value - a.obs_mean[i]) / a.obs_std[i];
        }
    }
    gemm<float>(n, nc, s.obs_dim, own.in, s.obs_dim,
                static_cast<const float*>(weights.embed_state.w) + packed_size<float>(c0, s.obs_dim), x + c0, ldx,
                Begin::kBias, weights.embed_state.b + c0);
    if (s.reads_actions) {
        gemm<float>(n, nc, s.act_dim, a.last_action, s.act_dim,
                    static_cast<const float*>(weights.embed_action.w) + packed_size<float>(c0, s.act_dim),
                    x + n * ldx + c0, ldx, Begin::kBias, weights.embed_action.b + c0);
    }
    fill_turns(a, 0, n, m, ldr, own.turns, own.turn_of);
    const TileScope tiles;
    const float scale = reciprocal_root(static_cast<float>(width));
    const auto attend_plan = attend_few_of<T>(width);
    fill_places(nh, s.n_heads, width, a.n_z, own.q_at, own.k_at);
    meet();

    for (std::int64_t l = 0; l < s.n_layers; ++l) {
        const PackedLayer& layer = weights.layers[l];
        const std::int64_t rows = l + 1 < s.n_layers ? m : n;
        norm_rows(m, layer.norm1, layer.o.b);
        product(rows, c0, nc, s.dim, own.normed, ldx, layer.q, own.q, ldx, Begin::kBias);
        product(m, c0, nc, s.dim, own.normed, ldx, layer.kv, own.y, ldkv, Begin::kBias);
        product(m, s.dim + c0, nc, s.dim, own.normed, ldx, layer.kv, own.y, ldkv, Begin::kBias);
        for (std::int64_t e = 0; e < n; ++e) {
            const std::int64_t t = a.steps[e];
            const std::int64_t ring = (l * a.n_rows + e) * a.window * s.dim + c0;
            T* ring_k = static_cast<T*>(a.ring_k) + ring;
            T* ring_v = static_cast<T*>(a.ring_v) + ring;
            const auto feed = [&](std::int64_t r, std::int64_t index) {
                const float* cos = own.turns + 2 * own.turn_of[r] * ldr;
                float* key = own.y + r * ldkv + c0;
                float* query = own.q + r * ldx + c0;
                const std::int64_t slot = index % a.window;
                rotate(nh, half, cos, cos + ldr, 1.0F, key);
                convert(key, nc, ring_k + slot * s.dim);
                convert(key + s.dim, nc, ring_v + slot * s.dim);
                if (r >= rows) return;
                rotate(nh, half, cos, cos + ldr, scale, query);
                Ahead none_k, none_v;
                attend(nh, s.dim, width, query, ring_k, ring_v, min_of(index + 1, a.window), own.scores,
                       all.mixed + r * ldx + c0, none_k, none_v);
            };
            if (s.reads_actions && t > 0) feed(n + e, 2 * t - 1);
            feed(e, s.reads_actions ? 2 * t : t);
        }
        meet();
        product(rows, c0, nc, s.dim, all.mixed, ldx, layer.o, x, ldx, Begin::kAdd);
        meet();
        norm_rows(rows, layer.norm2, layer.plan_o.b);
        product(rows, c0, nc, s.dim, own.normed, ldx, layer.plan_q, own.q, ldx, Begin::kBias);
        for (std::int64_t r = 0; r < rows; ++r) {
            const std::int64_t e = r < n ? r : r - n;
            const std::int64_t plan = (l * a.n_rows + e) * a.n_z * s.dim + c0;
            attend_plan(nh, s.n_heads, width, scale, own.q + r * ldx + c0, a.plan_k + plan, a.plan_v + plan, a.n_z,
                        own.q_at, own.k_at, own.scores, all.mixed + r * ldx + c0);
        }
        meet();
        product(rows, c0, nc, s.dim, all.mixed, ldx, layer.plan_o, x, ldx, Begin::kAdd);
        meet();
        norm_rows(rows, layer.norm3, layer.out.b);
        product(rows, g0, ng, s.dim, own.normed, ldx, layer.in, own.y, s.hidden, Begin::kBias);
        silu_rows(rows, ng, own.y + g0, s.hidden, all.hidden + g0, s.hidden, ng);
        meet();
        product(rows, c0, nc, s.hidden, all.hidden, s.hidden, layer.out, x, ldx, Begin::kAdd);
        meet();
    }
    if (member > 0) return;
    finish_step(a, 0, n, x, ldx, own.q, own.y, lda);
}

// False, and then nothing was done, where no other thread is awake.
template <typename T>
bool step_together(const DecodeStepArgs& a) {
    const DecodeSizes& s = a.weights->sizes;
    const std::int64_t m = s.reads_actions ? 2 * a.n_rows : a.n_rows;
    const std::int64_t width = s.dim / s.n_heads;
    const std::int64_t ldy = max_of(max_of(2 * s.dim, s.hidden), round_up(s.act_dim, kColumns));
    const std::int64_t n_members = min_of(a.n_threads, kMostMembers);
    Meeting meeting;
    Together<T> all;
    Arena arena;
    for (int pass = 0; pass < 2; ++pass) {
        all.args = &a;
        all.meeting = &meeting;
        for (float*& x : all.x) x = arena.take<float>(m * s.dim);
        all.mixed = arena.take<T>(m * s.dim);
        all.hidden = arena.take<T>(m * s.hidden);
        for (std::int64_t i = 0; i < n_members; ++i) {
            typename Together<T>::Own& own = all.own[i];
            own.normed = arena.take<T>(m * s.dim);
            own.q = arena.take<float>(m * s.dim);
            own.y = arena.take<float>(m * ldy);
            own.scores = arena.take<float>(round_up(max_of(a.window, s.n_heads * a.n_z), kLanes));
            own.turns = arena.take<float>(2 * m * round_up(width / 2, kLanes));
            own.in = arena.take<float>(a.n_rows * s.obs_dim);
            own.turn_of = arena.take<std::int32_t>(m);
            own.q_at = arena.take<std::int32_t>(s.n_heads * a.n_z);
            own.k_at = arena.take<std::int32_t>(s.n_heads * a.n_z);
        }
        if (pass == 0) arena = Arena(arena.used());
    }
    return run_together(
        a.n_threads,
        [](void* context, int member, int size) {
            step_member<T>(*static_cast<const Together<T>*>(context), member, size);
        },
        &all);
}

// Environments of one task at most: their activations stay in the second-level cache.
template <typename T>
constexpr std::int64_t kMostEnvironments = 64;

// What one more environment adds to a step, in microseconds: products and rings at the rates of one core.
template <typename T>
double cost_of_environment(const DecodeStepArgs& a) {
    const DecodeSizes& s = a.weights->sizes;
    const double tokens = s.reads_actions ? 2.0 : 1.0;
    const auto weights = static_cast<double>(s.n_layers * s.dim * (6 * s.dim + 2 * s.hidden));
    const auto rings = static_cast<double>(2 * s.n_layers * a.window * s.dim);
#if defined(__AMX_BF16__)
    constexpr double kFlops = sizeof(T) == sizeof(float) ? 150e3 : 1000e3;
#else
    constexpr double kFlops = 150e3;
#endif
    constexpr double kBytes = 15e3;
    return 2.0 * tokens * weights / kFlops + rings * static_cast<double>(sizeof(T)) / kBytes;
}

// What a task must be worth. Where steps follow each other at once, workers are awake, or will be the next time. Where
// they have slept meanwhile, two tasks of 150 us were no faster than one of 300.
constexpr double kWorthTaking = 15.0;
constexpr double kWorthWaking = 150.0;

template <typename T>
std::int64_t tiles_of(const DecodeStepArgs& a) {
    const std::int64_t at_least = (a.n_rows + kMostEnvironments<T> - 1) / kMostEnvironments<T>;
    if (at_least >= a.n_threads) return round_up(at_least, max_of(a.n_threads, 1));
    const double worth = a.soon_after ? kWorthTaking : kWorthWaking;
    const double tasks = static_cast<double>(a.n_rows) * cost_of_environment<T>(a) / worth;
    const std::int64_t at_most = min_of(a.n_threads, a.n_rows);
    return tasks < static_cast<double>(at_most) ? max_of(at_least, static_cast<std::int64_t>(tasks)) : at_most;
}

// Whether few rows and many weights make it worth while that each thread reads a part of the weights alone. A meeting
// of two threads takes 0.5 to 0.7 us on a virtual machine and 1 to 1.4 with what they have to tell each other, and a
// layer has six: as long as all weights fit the second-level cache, one thread reads them faster than two meet.
constexpr double kSecondLevelCache = 2.0 * 1024 * 1024;
constexpr std::int64_t kFewRows = 16;

template <typename T>
bool is_better_together(const DecodeStepArgs& a) {
    const DecodeSizes& s = a.weights->sizes;
    const auto weights = static_cast<double>(s.n_layers * s.dim * (6 * s.dim + 2 * s.hidden));
    return a.soon_after && a.n_threads > 1 && a.n_rows * (s.reads_actions ? 2 : 1) <= kFewRows &&
           weights * static_cast<double>(sizeof(T)) > kSecondLevelCache && may_share_columns(s);
}

template <typename T>
void step_all(const DecodeStepArgs& a) {
    if (is_better_together<T>(a) && step_together<T>(a)) return;
    const std::int64_t n_tiles = tiles_of<T>(a);
    parallel_for(n_tiles, a.n_threads, [&](std::int64_t i) {
        const std::int64_t first = a.n_rows * i / n_tiles;
        step_tile<T>(a, first, a.n_rows * (i + 1) / n_tiles - first);
    });
}

}  // namespace

std::size_t decode_step_pack(const DecoderSource& source, char* memory, PackedDecoder* packed) {
    return source.sizes.bf16 ? pack_all<Bf16>(source, memory, packed) : pack_all<float>(source, memory, packed);
}

std::int64_t decode_step(const DecodeStepArgs& args) {
    for (std::int64_t p = 0; p < args.n_rows; ++p) {
        for (std::int64_t i = 0; i < args.weights->sizes.obs_dim; ++i) {
            const float x = observation(args, p, i);
            // Zero for finite values, NaN for others.
            if (x - x != 0.0F) return p;
        }
    }
    if (args.weights->sizes.bf16) {
        step_all<Bf16>(args);
    } else {
        step_all<float>(args);
    }
    return -1;
}

}  // namespace GAC_FAST_ISA
}  // namespace gac_fast
