#include "plan_attention.h"

#include "attention.h"

namespace gac_fast {
namespace GAC_FAST_ISA {
namespace {

// One task: a chunk of queries of one head.
template <typename T, int LD>
struct Head {
    Head(const PlanAttention& in, const QueryChunk& chunk, std::int64_t head)
        : op(in), tokens(chunk), q(static_cast<const T*>(in.q.data) + head * in.q.head_stride), number(head) {}

    void load_plan(const PlanView& x, float* rows) const {
        const T* from = static_cast<const T*>(x.data) + tokens.sequence * x.sequence_stride + number * x.head_stride;
        for (std::int64_t z = 0; z < op.n_plan_vectors; ++z) {
            load_row(from + z * x.vector_stride, op.width, rows + z * LD);
        }
    }

    // Up to a panel of rows; zero from n on.
    void load_rows(const T* from, std::int64_t stride, std::int64_t n, float scale, float* rows, float* columns) const {
        for (std::int64_t r = 0; r < n; ++r) load_scaled_row(from + r * stride, op.width, scale, rows + r * LD);
        fill_zero(rows + n * LD, (kQueries - n) * LD);
        transpose_panel(rows, LD, op.width, columns);
    }

    // Scores in, exp(score - maximum) out, and the reciprocal of their sum.
    void soften(int v, float* weights, Vec& inverse) const {
        Vec top = broadcast(-__builtin_inff());
        float* column = weights + v * kLanes;
        for (std::int64_t z = 0; z < op.n_plan_vectors; ++z) top = max_of(top, load(column + z * kQueries));
        Vec total{};
        for (std::int64_t z = 0; z < op.n_plan_vectors; ++z) {
            const Vec x = exp(load(column + z * kQueries) - top);
            total += x;
            store(column + z * kQueries, x);
        }
        inverse = 1.0F / total;
    }

    // rows[query][c] = sum over z of weights[z][query] * plan[z][c].
    void weighted_rows(const float* weights, const float* plan, float* rows) const {
        for (std::int64_t r = 0; r < kQueries; r += kMostRows) {
            product_columns<kDown>(min_of(kMostRows, kQueries - r), round_up(op.width, kLanes), op.n_plan_vectors,
                                   weights + r, plan, LD, rows + r * LD, LD, false);
        }
    }

    const PlanAttention& op;
    const QueryChunk& tokens;
    const T* q;
    std::int64_t number;
};

float scale_of(std::int64_t width) { return 1.0F / __builtin_sqrtf(static_cast<float>(width)); }

template <typename T, int LD>
void forward(const PlanAttentionForward& call, const QueryChunk& chunk, std::int64_t head) {
    const PlanAttention& op = call.in;
    const Head<T, LD> in(op, chunk, head);
    const float scale = scale_of(op.width);
    Arena arena;
    for (int pass = 0; pass < 2; ++pass) {
        float* keys = arena.take<float>((op.n_plan_vectors + kMostRows) * LD);
        float* values = arena.take<float>((op.n_plan_vectors + kMostRows) * LD);
        float* rows = arena.take<float>(kQueries * LD);
        float* columns = arena.take<float>(kQueries * LD);
        float* weights = arena.take<float>((op.n_plan_vectors + kRows) * kQueries);
        float* inverse = arena.take<float>(kQueries);
        if (pass == 0) {
            arena = Arena(arena.used());
            continue;
        }
        in.load_plan(op.k, keys);
        in.load_plan(op.v, values);
        auto* out = static_cast<T*>(call.out.data) + head * call.out.head_stride;
        for (std::int64_t q = chunk.first; q < chunk.last; q += kQueries) {
            const std::int64_t n = min_of(kQueries, chunk.last - q);
            in.load_rows(in.q + q * op.q.token_stride, op.q.token_stride, n, scale, rows, columns);
            scores<2, LD>(op.n_plan_vectors, op.width, keys, columns, weights);
            for (int v = 0; v < 2; ++v) {
                Vec reciprocal_sum;
                in.soften(v, weights, reciprocal_sum);
                store(inverse + v * kLanes, reciprocal_sum);
            }
            in.weighted_rows(weights, values, rows);
            for (std::int64_t r = 0; r < n; ++r) {
                store_scaled_row(rows + r * LD, op.width, inverse[r], out + (q + r) * call.out.token_stride);
            }
        }
    }
}

template <typename T, int LD>
void backward(const PlanAttentionBackward& call, std::int64_t number, std::int64_t head) {
    const PlanAttention& op = call.in;
    const QueryChunk& chunk = op.chunks[number];
    const Head<T, LD> in(op, chunk, head);
    const float scale = scale_of(op.width);
    const std::int64_t n_z = op.n_plan_vectors;
    const std::int64_t padded = round_up(op.width, kLanes);
    Arena arena;
    for (int pass = 0; pass < 2; ++pass) {
        float* keys = arena.take<float>((n_z + kMostRows) * LD);
        float* values = arena.take<float>((n_z + kMostRows) * LD);
        float* d_keys = arena.take<float>((n_z + kRows) * LD);
        float* d_values = arena.take<float>((n_z + kRows) * LD);
        float* rows = arena.take<float>(kQueries * LD);
        float* columns = arena.take<float>(kQueries * LD);
        float* d_rows = arena.take<float>(kQueries * LD);
        float* d_columns = arena.take<float>(kQueries * LD);
        float* weights = arena.take<float>((n_z + kRows) * kQueries);
        float* d_scores = arena.take<float>((n_z + kRows) * kQueries);
        if (pass == 0) {
            arena = Arena(arena.used());
            continue;
        }
        in.load_plan(op.k, keys);
        in.load_plan(op.v, values);
        fill_zero(d_keys, (n_z + kRows) * LD);
        fill_zero(d_values, (n_z + kRows) * LD);
        const T* d_out = static_cast<const T*>(call.d_out.data) + head * call.d_out.head_stride;
        auto* d_q = static_cast<T*>(call.d_q.data) + head * call.d_q.head_stride;
        for (std::int64_t q = chunk.first; q < chunk.last; q += kQueries) {
            const std::int64_t n = min_of(kQueries, chunk.last - q);
            in.load_rows(in.q + q * op.q.token_stride, op.q.token_stride, n, scale, rows, columns);
            in.load_rows(d_out + q * call.d_out.token_stride, call.d_out.token_stride, n, 1.0F, d_rows, d_columns);
            scores<2, LD>(n_z, op.width, keys, columns, weights);
            scores<2, LD>(n_z, op.width, values, d_columns, d_scores);
            for (int v = 0; v < 2; ++v) {
                Vec inverse;
                in.soften(v, weights, inverse);
                Vec delta{};
                for (std::int64_t z = 0; z < n_z; ++z) {
                    float* at = weights + z * kQueries + v * kLanes;
                    const Vec x = load(at) * inverse;
                    store(at, x);
                    delta += x * load(d_scores + z * kQueries + v * kLanes);
                }
                for (std::int64_t z = 0; z < n_z; ++z) {
                    float* at = d_scores + z * kQueries + v * kLanes;
                    store(at, load(weights + z * kQueries + v * kLanes) * (load(at) - delta));
                }
            }
            // Rows of products come by fours.
            for (std::int64_t i = n_z * kQueries; i < round_up(n_z, kRows) * kQueries; i += kLanes) {
                store(weights + i, Vec{});
                store(d_scores + i, Vec{});
            }
            for (std::int64_t z = 0; z < n_z;) {
                const std::int64_t n_rows = min_of(kMostRows, round_up(n_z - z, kRows));
                product_columns<static_cast<int>(kQueries)>(n_rows, padded, n, weights + z * kQueries, d_rows, LD,
                                                            d_values + z * LD, LD, true);
                product_columns<static_cast<int>(kQueries)>(n_rows, padded, n, d_scores + z * kQueries, rows, LD,
                                                            d_keys + z * LD, LD, true);
                z += n_rows;
            }
            in.weighted_rows(d_scores, keys, rows);
            for (std::int64_t r = 0; r < n; ++r) {
                store_scaled_row(rows + r * LD, op.width, scale, d_q + (q + r) * call.d_q.token_stride);
            }
        }
        float* share = call.partial + (number * op.n_heads + head) * 2 * n_z * op.width;
        for (std::int64_t z = 0; z < n_z; ++z) {
            convert(d_keys + z * LD, op.width, share + z * op.width);
            convert(d_values + z * LD, op.width, share + (n_z + z) * op.width);
        }
    }
}

// The shares of one sequence and head, added in the order of the chunks.
template <typename T>
void reduce(const PlanAttentionBackward& call, std::int64_t sequence, std::int64_t head) {
    const PlanAttention& op = call.in;
    const std::int64_t size = op.n_plan_vectors * op.width;
    Arena arena(static_cast<std::size_t>(size + kLanes) * sizeof(float));
    float* total = arena.take<float>(size);
    for (int part = 0; part < 2; ++part) {
        fill_zero(total, size);
        for (std::int64_t i = call.first_chunks[sequence]; i < call.first_chunks[sequence + 1]; ++i) {
            const float* share = call.partial + ((i * op.n_heads + head) * 2 + part) * size;
            for (std::int64_t j = 0; j < size; ++j) total[j] += share[j];
        }
        const WriteablePlanView& to = part == 0 ? call.d_k : call.d_v;
        auto* first = static_cast<T*>(to.data) + sequence * to.sequence_stride + head * to.head_stride;
        for (std::int64_t z = 0; z < op.n_plan_vectors; ++z) {
            convert(total + z * op.width, op.width, first + z * to.vector_stride);
        }
    }
}

template <typename T>
void forward_any(const PlanAttentionForward& call, const QueryChunk& chunk, std::int64_t head) {
    const std::int64_t width = call.in.width;
    if (width <= 32) return forward<T, 32>(call, chunk, head);
    if (width <= 64) return forward<T, 64>(call, chunk, head);
    if (width <= 128) return forward<T, 128>(call, chunk, head);
    forward<T, 256>(call, chunk, head);
}

template <typename T>
void backward_any(const PlanAttentionBackward& call, std::int64_t number, std::int64_t head) {
    const std::int64_t width = call.in.width;
    if (width <= 32) return backward<T, 32>(call, number, head);
    if (width <= 64) return backward<T, 64>(call, number, head);
    if (width <= 128) return backward<T, 128>(call, number, head);
    backward<T, 256>(call, number, head);
}

}  // namespace

void plan_attention(const PlanAttentionForward& op) {
    const std::int64_t n_heads = op.in.n_heads;
    parallel_for(op.in.n_chunks * n_heads, op.in.n_threads, [&op, n_heads](std::int64_t i) {
        (op.in.bf16 ? forward_any<Bf16> : forward_any<float>)(op, op.in.chunks[i / n_heads], i % n_heads);
    });
}

void plan_attention_backward(const PlanAttentionBackward& op) {
    const std::int64_t n_heads = op.in.n_heads;
    parallel_for(op.in.n_chunks * n_heads, op.in.n_threads, [&op, n_heads](std::int64_t i) {
        (op.in.bf16 ? backward_any<Bf16> : backward_any<float>)(op, i / n_heads, i % n_heads);
    });
    parallel_for(op.n_sequences * n_heads, op.in.n_threads, [&op, n_heads](std::int64_t i) {
        (op.in.bf16 ? reduce<Bf16> : reduce<float>)(op, i / n_heads, i % n_heads);
    });
}

}  // namespace GAC_FAST_ISA
}  // namespace gac_fast
