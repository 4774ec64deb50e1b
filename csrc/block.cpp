#include "block.h"

#include "gemm.h"
#include "token_rows.h"

namespace gac_fast {
namespace GAC_FAST_ISA {
namespace {

// ---------------------------------------------------------------------------------------------------------------------
// The plan: keys and values of a sequence as one matrix each, [H * n_z][D] and zero outside the head of its row, packed

template <typename T>
struct PlanPacks {
    // Scores = q keys^T, attended = probs values; the other way round in the backward.
    T *keys, *keys_transposed, *values, *values_transposed;

    PlanPacks(void* memory, std::int64_t sequence, std::int64_t n_plan, std::int64_t dim) {
        const std::int64_t normal = round_up(packed_size<T>(n_plan, dim), 32);
        const std::int64_t swapped = round_up(packed_size<T>(dim, n_plan), 32);
        T* p = static_cast<T*>(memory) + sequence * size(n_plan, dim);
        keys = p;
        values = p + normal;
        keys_transposed = p + 2 * normal;
        values_transposed = p + 2 * normal + swapped;
    }

    // Elements of one sequence.
    static std::int64_t size(std::int64_t n_plan, std::int64_t dim) {
        return 2 * (round_up(packed_size<T>(n_plan, dim), 32) + round_up(packed_size<T>(dim, n_plan), 32));
    }
};

void fill_plan(const BlockPlan& plan, std::int64_t sequence, const BlockShape& s, std::int64_t dim, float scale,
               float* matrix) {
    const std::int64_t width = dim / s.n_heads;
    std::memset(matrix, 0, static_cast<std::size_t>(s.n_heads * s.n_z * dim) * sizeof(float));
    for (std::int64_t h = 0; h < s.n_heads; ++h) {
        for (std::int64_t z = 0; z < s.n_z; ++z) {
            float* row = matrix + (h * s.n_z + z) * dim + h * width;
            const std::int64_t o = sequence * plan.stride_b + z * plan.stride_z + h * plan.stride_h;
            if (plan.bf16) {
                convert(static_cast<const Bf16*>(plan.data) + o, width, row);
            } else {
                convert(static_cast<const float*>(plan.data) + o, width, row);
            }
            for (std::int64_t c = 0; c < width; ++c) row[c] *= scale;
        }
    }
}

inline float plan_scale(std::int64_t dim, const BlockShape& s) {
    return 1.0F / __builtin_sqrtf(static_cast<float>(dim / s.n_heads));
}

template <typename T>
void pack_plans(const BlockShape& s, std::int64_t dim, const BlockPlan& k, const BlockPlan& v, void* memory,
                bool forward, bool backward) {
    const std::int64_t n_plan = s.n_heads * s.n_z;
    parallel_for(s.n_sequences, s.n_threads, [&](std::int64_t b) {
        if (s.first_tile[b] == s.first_tile[b + 1]) return;
        Arena sizes;
        sizes.take<float>(n_plan * dim);
        Arena arena(sizes.used());
        float* matrix = arena.take<float>(n_plan * dim);
        const PlanPacks<T> packs(memory, b, n_plan, dim);
        fill_plan(k, b, s, dim, plan_scale(dim, s), matrix);
        if (forward) pack<T>(matrix, dim, 1, n_plan, dim, packs.keys);
        if (backward) pack<T>(matrix, 1, dim, dim, n_plan, packs.keys_transposed);
        fill_plan(v, b, s, dim, 1.0F, matrix);
        if (backward) pack<T>(matrix, dim, 1, n_plan, dim, packs.values);
        if (forward) pack<T>(matrix, 1, dim, dim, n_plan, packs.values_transposed);
    });
}

// Softmax over the n_z scores of each head; in place and as operand.
template <typename T>
void softmax(std::int64_t rows, const BlockShape& s, float* scores, std::int64_t lds, T* probs, std::int64_t ldp) {
    const std::int64_t n = s.n_heads * s.n_z;
    for (std::int64_t r = 0; r < rows; ++r) {
        float* row = scores + r * lds;
        for (std::int64_t first = 0; first < n; first += s.n_z) {
            float top = row[first];
            for (std::int64_t z = 1; z < s.n_z; ++z) top = row[first + z] > top ? row[first + z] : top;
            for (std::int64_t z = 0; z < s.n_z; ++z) row[first + z] -= top;
        }
        for_vectors(n, [&](auto get, auto put) { put(row, exp(get(row))); });
        for (std::int64_t first = 0; first < n; first += s.n_z) {
            float total = 0;
            for (std::int64_t z = 0; z < s.n_z; ++z) total += row[first + z];
            const float scale = 1.0F / total;
            for (std::int64_t z = 0; z < s.n_z; ++z) row[first + z] *= scale;
        }
        convert(row, n, probs + r * ldp);
        zero_pad(probs + r * ldp, n, padded(n));
    }
}

// From the gradient of the probabilities that of the scores; in place and as operand.
template <typename T>
void softmax_gradient(std::int64_t rows, const BlockShape& s, const float* probs, float* grad, std::int64_t ldg, T* out,
                      std::int64_t ldo) {
    const std::int64_t n = s.n_heads * s.n_z;
    for (std::int64_t r = 0; r < rows; ++r) {
        float* row = grad + r * ldg;
        const float* p = probs + r * n;
        for (std::int64_t first = 0; first < n; first += s.n_z) {
            float total = 0;
            for (std::int64_t z = first; z < first + s.n_z; ++z) total += p[z] * row[z];
            for (std::int64_t z = first; z < first + s.n_z; ++z) row[z] = p[z] * (row[z] - total);
        }
        convert(row, n, out + r * ldo);
        zero_pad(out + r * ldo, n, padded(n));
    }
}

// out[z][D] = scale * sum over rows of weights[h, z] x[D of h]
void sum_plan_gradient(std::int64_t rows, const BlockShape& s, std::int64_t dim, const float* weights, std::int64_t ldw,
                       const float* x, std::int64_t ldx, float scale, float* out) {
    const std::int64_t width = dim / s.n_heads;
    for (std::int64_t h = 0; h < s.n_heads; ++h) {
        for (std::int64_t z = 0; z < s.n_z; z += 4) {
            const std::int64_t n_z = min_of(4, s.n_z - z);
            const float* w = weights + h * s.n_z + z;
            for_vectors(width, [&](auto get, auto put) {
                Vec sums[4] = {};
                const float* column = x + h * width;
                if (n_z == 4) {
                    for (std::int64_t r = 0; r < rows; ++r) {
                        const Vec v = get(column + r * ldx);
                        for (int i = 0; i < 4; ++i) sums[i] += w[r * ldw + i] * v;
                    }
                } else {
                    for (std::int64_t r = 0; r < rows; ++r) {
                        const Vec v = get(column + r * ldx);
                        for (int i = 0; i < n_z; ++i) sums[i] += w[r * ldw + i] * v;
                    }
                }
                for (int i = 0; i < n_z; ++i) put(out + (z + i) * dim + h * width, sums[i] * scale);
            });
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// One tile

template <typename T>
struct Maps {
    const BlockPacks& p;

    // y[rows][ldy] of map i.
    void apply(BlockMap i, std::int64_t rows, const T* x, std::int64_t ldx, float* y, std::int64_t ldy,
               Begin begin) const {
        gemm<T>(rows, n_out(i), n_in(i), x, ldx, static_cast<const T*>(p.forward[i]), y, ldy, begin, p.bias[i]);
    }

    // The gradient of its input.
    void apply_transposed(BlockMap i, std::int64_t rows, const T* dy, std::int64_t ldy, float* dx,
                          std::int64_t ldx) const {
        gemm<T>(rows, n_in(i), n_out(i), dy, ldy, static_cast<const T*>(p.transposed[i]), dx, ldx, Begin::kZero);
    }

    std::int64_t n_out(BlockMap i) const { return i == kBlockIn ? p.hidden : i == kBlockNext ? p.n_next : p.dim; }
    std::int64_t n_in(BlockMap i) const { return i == kBlockOut ? p.hidden : p.dim; }
};

template <typename T>
struct Scratch {
    float *x, *wide, *scores, *narrow, *rstd;
    T *normed, *narrow_operand, *wide_operand, *plan_operand, *space;

    Scratch(Arena& arena, std::int64_t rows, const BlockPacks& p, std::int64_t n_plan) {
        const std::int64_t ld_dim = padded(p.dim);
        const std::int64_t ld_wide = max_of(max_of(padded(p.hidden), padded(p.n_next)), ld_dim);
        x = arena.take<float>(rows * ld_dim);
        narrow = arena.take<float>(rows * ld_dim);
        wide = arena.take<float>(rows * ld_wide);
        scores = arena.take<float>(rows * padded(n_plan));
        rstd = arena.take<float>(rows);
        normed = arena.take<T>(rows * ld_dim);
        narrow_operand = arena.take<T>(rows * ld_dim);
        wide_operand = arena.take<T>(rows * ld_wide);
        plan_operand = arena.take<T>(rows * padded(n_plan));
        space = arena.take<T>(rows * ld_wide);
    }

    static std::size_t bytes(std::int64_t rows, const BlockPacks& p, std::int64_t n_plan) {
        Arena sizes;
        const Scratch measured(sizes, rows, p, n_plan);
        static_cast<void>(measured);
        return sizes.used();
    }
};

template <typename T>
void forward_tile(const BlockForward& f, const BlockTile& t) {
    const BlockPacks& p = *f.packs;
    const BlockShape& s = f.shape;
    const std::int64_t n_plan = s.n_heads * s.n_z;
    const std::int64_t rows = t.count;
    const std::int64_t ld = padded(p.dim);
    const std::int64_t ld_hidden = padded(p.hidden);
    const std::int64_t ld_plan = padded(n_plan);
    const bool saves = f.normed1 != nullptr;
    Arena arena(Scratch<T>::bytes(rows, p, n_plan));
    const Scratch<T> b(arena, rows, p, n_plan);
    const Maps<T> maps{p};
    const PlanPacks<T> plan(f.plan_packs, t.sequence, n_plan, p.dim);
    const TileScope tiles;

    copy_rows(rows, p.dim, f.x + t.first * f.x_stride, f.x_stride, b.x, ld);
    if (p.has_o) {
        std::int64_t lda;
        const T* attended =
            operand(rows, p.dim, at<T>(f.attended, t.first * f.attended_stride), f.attended_stride, b.space, &lda);
        maps.apply(kBlockO, rows, attended, lda, b.x, ld, Begin::kAdd);
    }

    T* normed = saves ? at<T>(f.normed1, t.first * ld) : b.normed;
    float* rstd = saves ? f.rstd + 2 * t.first : b.rstd;
    const std::int64_t rstd_stride = saves ? 2 : 1;
    normalise(rows, p.dim, p.has_o ? p.bias[kBlockO] : nullptr, b.x, ld, normed, ld, rstd, rstd_stride);
    float* q = f.q != nullptr ? f.q + t.first * ld : b.narrow;
    maps.apply(kBlockPlanQ, rows, normed, ld, q, ld, kMapBegin<T>);
    const T* q_operand;
    if constexpr (kIsFloat<T>) {
        q_operand = q;
    } else {
        finish_rows(rows, p.dim, q, ld, p.bias[kBlockPlanQ], b.narrow_operand, ld, true);
        q_operand = b.narrow_operand;
    }
    gemm<T>(rows, n_plan, p.dim, q_operand, ld, plan.keys, b.scores, ld_plan, Begin::kZero);
    softmax(rows, s, b.scores, ld_plan, b.plan_operand, ld_plan);
    if (saves) {
        for (std::int64_t r = 0; r < rows; ++r) {
            convert(b.scores + r * ld_plan, n_plan, f.probs + (t.first + r) * n_plan);
        }
    }
    gemm<T>(rows, p.dim, n_plan, b.plan_operand, ld_plan, plan.values_transposed, b.narrow, ld, Begin::kZero);
    const T* read;
    if constexpr (kIsFloat<T>) {
        read = b.narrow;
    } else {
        copy_rows(rows, p.dim, b.narrow, ld, b.narrow_operand, ld);
        read = b.narrow_operand;
    }
    maps.apply(kBlockPlanO, rows, read, ld, b.x, ld, Begin::kAdd);

    normed = saves ? at<T>(f.normed2, t.first * ld) : b.normed;
    normalise(rows, p.dim, p.bias[kBlockPlanO], b.x, ld, normed, ld, rstd + (saves ? 1 : 0), rstd_stride);
    float* hidden = f.hidden != nullptr ? f.hidden + t.first * ld_hidden : b.wide;
    maps.apply(kBlockIn, rows, normed, ld, hidden, ld_hidden, kMapBegin<T>);
    for (std::int64_t r = 0; r < rows; ++r) {
        T* out = b.wide_operand + r * ld_hidden;
        const float* row = hidden + r * ld_hidden;
        for_vectors(p.hidden, [&](auto get, auto put) {
            const Vec x = kIsFloat<T> ? get(row) : get(row) + get(p.bias[kBlockIn]);
            put(out, x * gate<T>(x));
        });
        zero_pad(out, p.hidden, ld_hidden);
    }
    maps.apply(kBlockOut, rows, b.wide_operand, ld_hidden, b.x, ld, Begin::kAdd);

    normalise(rows, p.dim, p.bias[kBlockOut], b.x, ld, b.normed, ld, b.rstd, 1);
    for (std::int64_t r = 0; r < rows; ++r) convert(b.x + r * ld, p.dim, f.x_out + (t.first + r) * p.dim);
    T* y = at<T>(f.y, t.first * p.n_next);
    if constexpr (kIsFloat<T>) {
        if (p.n_next % kColumns == 0) {
            maps.apply(kBlockNext, rows, b.normed, ld, y, p.n_next, Begin::kBias);
            return;
        }
    }
    const std::int64_t ld_next = padded(p.n_next);
    maps.apply(kBlockNext, rows, b.normed, ld, b.wide, ld_next, kMapBegin<T>);
    finish_rows(rows, p.n_next, b.wide, ld_next, p.bias[kBlockNext], y, p.n_next, false);
}

template <typename T>
void backward_tile(const BlockBackward& f, std::int64_t i_tile) {
    const BlockTile& t = f.shape.tiles[i_tile];
    const BlockPacks& p = *f.packs;
    const BlockShape& s = f.shape;
    const BlockOperands* out = f.operands;
    const std::int64_t n_plan = s.n_heads * s.n_z;
    const std::int64_t rows = t.count;
    const std::int64_t ld = padded(p.dim);
    const std::int64_t ld_hidden = padded(p.hidden);
    const std::int64_t ld_plan = padded(n_plan);
    Arena arena(Scratch<T>::bytes(rows, p, n_plan));
    const Scratch<T> b(arena, rows, p, n_plan);
    const Maps<T> maps{p};
    const PlanPacks<T> plan(f.plan_packs, t.sequence, n_plan, p.dim);
    const TileScope tiles;
    float* dbias[kBlockMaps];
    if (out != nullptr) {
        std::int64_t columns = 0;
        for (int i = p.has_o ? 0 : 1; i < kBlockMaps; ++i) columns += maps.n_out(static_cast<BlockMap>(i));
        float* next = out->dbias_partials + i_tile * columns;
        for (int i = p.has_o ? 0 : 1; i < kBlockMaps; ++i) {
            dbias[i] = next;
            next += maps.n_out(static_cast<BlockMap>(i));
        }
    }
    // Where a row of T goes: to the operands of the weights' gradients, or into scratch.
    const auto kept = [&](void* whole, std::int64_t stride, T* scratch) {
        return out != nullptr ? at<T>(whole, t.first * stride) : scratch;
    };

    // The next layer's map and norm.
    float* dx = b.x;
    for (std::int64_t r = 0; r < rows; ++r) {
        if (f.dx_out != nullptr) {
            convert(f.dx_out + (t.first + r) * f.dx_out_stride, p.dim, dx + r * ld);
        } else {
            std::memset(dx + r * ld, 0, static_cast<std::size_t>(p.dim) * sizeof(float));
        }
    }
    T* dx_operand = kept(out != nullptr ? out->dx3 : nullptr, ld, b.narrow_operand);
    if (f.dy != nullptr) {
        std::int64_t ldy;
        const T* dy = operand(rows, p.n_next, at<T>(f.dy, t.first * f.dy_stride), f.dy_stride, b.space, &ldy);
        maps.apply_transposed(kBlockNext, rows, dy, ldy, b.narrow, ld);
        T* normed3 = kept(out != nullptr ? out->normed3 : nullptr, ld, b.normed);
        copy_rows(rows, p.dim, f.x_out + t.first * p.dim, p.dim, b.wide, ld);
        normalise<T>(rows, p.dim, nullptr, b.wide, ld, normed3, ld, b.rstd, 1);
        if (out != nullptr) sum_columns(rows, p.n_next, dy, ldy, dbias[kBlockNext]);
        add_norm_gradient(rows, p.dim, b.narrow, ld, normed3, ld, b.rstd, 1, dx, ld, dx_operand, ld);
    } else {
        copy_rows(rows, p.dim, dx, ld, dx_operand, ld);
        if (out != nullptr) {
            std::memset(dbias[kBlockNext], 0, static_cast<std::size_t>(p.n_next) * sizeof(float));
            std::memset(at<T>(out->normed3, t.first * ld), 0, static_cast<std::size_t>(rows * ld) * sizeof(T));
        }
    }
    if (out != nullptr) sum_columns(rows, p.dim, dx, ld, dbias[kBlockOut]);

    // The MLP. Its two wide matrices take turns in scratch: pre-activations first, in T, then the gradient.
    const T* normed2 = at<T>(f.normed2, t.first * ld);
    const float* hidden = f.hidden != nullptr ? f.hidden + t.first * ld_hidden : nullptr;
    T* pre = b.space;
    if (hidden == nullptr) {
        maps.apply(kBlockIn, rows, normed2, ld, b.wide, ld_hidden, kMapBegin<T>);
        finish_rows(rows, p.hidden, b.wide, ld_hidden, p.bias[kBlockIn], pre, ld_hidden, false);
    }
    maps.apply_transposed(kBlockOut, rows, dx_operand, ld, b.wide, ld_hidden);
    T* dhidden = kept(out != nullptr ? out->dhidden : nullptr, ld_hidden, b.wide_operand);
    T* activated = out != nullptr ? at<T>(out->activated, t.first * ld_hidden) : nullptr;
    const auto through_silu = [&](const auto* before) {
        for (std::int64_t r = 0; r < rows; ++r) {
            const std::int64_t o = r * ld_hidden;
            for_vectors(p.hidden, [&](auto get, auto put) {
                const Vec x = get(before + o);
                const Vec g = gate<T>(x);
                put(dhidden + o, get(b.wide + o) * (g * (1.0F + x * (1.0F - g))));
                if (activated != nullptr) put(activated + o, x * g);
            });
            zero_pad(dhidden + o, p.hidden, ld_hidden);
            if (activated != nullptr) zero_pad(activated + o, p.hidden, ld_hidden);
        }
    };
    if (hidden != nullptr) {
        through_silu(hidden);
    } else {
        through_silu(static_cast<const T*>(pre));
    }
    if (out != nullptr) sum_columns(rows, p.hidden, dhidden, ld_hidden, dbias[kBlockIn]);
    maps.apply_transposed(kBlockIn, rows, dhidden, ld_hidden, b.narrow, ld);
    dx_operand = kept(out != nullptr ? out->dx2 : nullptr, ld, b.narrow_operand);
    add_norm_gradient(rows, p.dim, b.narrow, ld, normed2, ld, f.rstd + 2 * t.first + 1, 2, dx, ld, dx_operand, ld);
    if (out != nullptr) sum_columns(rows, p.dim, dx, ld, dbias[kBlockPlanO]);

    // Plan attention: b.narrow holds the gradient of what was read, b.wide the queries.
    const T* normed1 = at<T>(f.normed1, t.first * ld);
    const float* probs = f.probs + t.first * n_plan;
    if (out != nullptr) {
        copy_rows(rows, n_plan, probs, n_plan, b.plan_operand, ld_plan);
        gemm<T>(rows, p.dim, n_plan, b.plan_operand, ld_plan, plan.values_transposed, b.narrow, ld, Begin::kZero);
        copy_rows(rows, p.dim, b.narrow, ld, at<T>(out->attended_plan, t.first * ld), ld);
    }
    maps.apply_transposed(kBlockPlanO, rows, dx_operand, ld, b.narrow, ld);
    const T* dread;
    if constexpr (kIsFloat<T>) {
        dread = b.narrow;
    } else {
        copy_rows(rows, p.dim, b.narrow, ld, b.space, ld);
        dread = b.space;
    }
    gemm<T>(rows, n_plan, p.dim, dread, ld, plan.values, b.scores, ld_plan, Begin::kZero);
    softmax_gradient(rows, s, probs, b.scores, ld_plan, b.plan_operand, ld_plan);
    const float* q = f.q != nullptr ? f.q + t.first * ld : b.wide;
    if (f.q == nullptr) maps.apply(kBlockPlanQ, rows, normed1, ld, b.wide, ld, Begin::kBias);
    float* partial = f.plan_partials + i_tile * 2 * s.n_z * p.dim;
    sum_plan_gradient(rows, s, p.dim, b.scores, ld_plan, q, ld, plan_scale(p.dim, s), partial);
    sum_plan_gradient(rows, s, p.dim, probs, n_plan, b.narrow, ld, 1.0F, partial + s.n_z * p.dim);
    if (f.dx == nullptr) return;

    gemm<T>(rows, p.dim, n_plan, b.plan_operand, ld_plan, plan.keys_transposed, b.narrow, ld, Begin::kZero);
    T* dq = kept(out != nullptr ? out->dq : nullptr, ld, b.space);
    copy_rows(rows, p.dim, b.narrow, ld, dq, ld);
    if (out != nullptr) sum_columns(rows, p.dim, b.narrow, ld, dbias[kBlockPlanQ]);
    maps.apply_transposed(kBlockPlanQ, rows, dq, ld, b.narrow, ld);
    dx_operand = kept(out != nullptr ? out->dx1 : nullptr, ld, b.narrow_operand);
    add_norm_gradient(rows, p.dim, b.narrow, ld, normed1, ld, f.rstd + 2 * t.first, 2, dx, ld, dx_operand, ld);
    const auto give = [&](const float* from, auto* to) {
        const std::int64_t others = (f.every - 1) * p.dim;
        for (std::int64_t r = 0; r < rows; ++r) {
            auto* row = to + (t.first + r) * f.every * p.dim;
            convert(from + r * ld, p.dim, row);
            std::memset(row + p.dim, 0, static_cast<std::size_t>(others) * sizeof(*row));
        }
    };
    give(dx, f.dx);
    if (!p.has_o) return;
    if (out != nullptr) sum_columns(rows, p.dim, dx, ld, dbias[kBlockO]);
    maps.apply_transposed(kBlockO, rows, dx_operand, ld, b.narrow, ld);
    give(b.narrow, static_cast<T*>(f.dattended));
}

template <typename T>
void run_forward(const BlockForward& f) {
    pack_plans<T>(f.shape, f.packs->dim, f.k, f.v, f.plan_packs, true, false);
    parallel_for(f.shape.n_tiles, f.shape.n_threads, [&](std::int64_t i) { forward_tile<T>(f, f.shape.tiles[i]); });
}

template <typename T>
void run_backward(const BlockBackward& f) {
    const BlockShape& s = f.shape;
    const BlockPacks& p = *f.packs;
    pack_plans<T>(s, p.dim, f.k, f.v, f.plan_packs, f.operands != nullptr, true);
    parallel_for(s.n_tiles, s.n_threads, [&](std::int64_t i) { backward_tile<T>(f, i); });
    const std::int64_t n = s.n_z * p.dim;
    parallel_for(s.n_sequences, s.n_threads, [&](std::int64_t i) {
        sum_partials(f.plan_partials, s.first_tile[i], s.first_tile[i + 1], 2 * n, n, f.dplan_k + i * n);
        sum_partials(f.plan_partials + n, s.first_tile[i], s.first_tile[i + 1], 2 * n, n, f.dplan_v + i * n);
    });
    if (f.operands == nullptr) return;
    const std::int64_t columns = (p.has_o ? 4 : 3) * p.dim + p.hidden + p.n_next;
    sum_partials(f.operands->dbias_partials, 0, s.n_tiles, columns, columns, f.operands->dbias);
}

template <typename T>
void pack_map(const BlockLinear& map, bool transposed, void* packed) {
    if (transposed) {
        pack<T>(map.weight, 1, map.stride, map.n_in, map.n_out, static_cast<T*>(packed));
    } else {
        pack<T>(map.weight, map.stride, 1, map.n_out, map.n_in, static_cast<T*>(packed));
    }
}

}  // namespace

void block_fingerprint(const float* x, std::int64_t n, BlockFingerprint* state) {
    // Each word is mixed in by a bijection of its lane's state, so that one changed word always shows; rotation and
    // exclusive or beside the product keep sign flips and powers of two from cancelling, as they would in a sum.
    typedef std::uint32_t WordVec __attribute__((vector_size(kLanes * 4)));
    constexpr int kChains = 4;
    WordVec first[kChains] = {};
    WordVec second[kChains] = {};
    const auto mix = [&](int chain, Vec words) {
        const WordVec w = (WordVec)words;
        const WordVec a = first[chain] ^ w;
        first[chain] = (a << 13 | a >> 19) * 0x9E3779B1U;
        const WordVec b = second[chain] + w;
        second[chain] = (b << 17 | b >> 15) * 0x85EBCA77U;
    };
    std::int64_t i = 0;
    for (; i + kChains * kLanes <= n; i += kChains * kLanes) {
        for (int c = 0; c < kChains; ++c) mix(c, load(x + i + c * kLanes));
    }
    for (; i + kLanes <= n; i += kLanes) mix(0, load(x + i));
    if (i < n) mix(1, load_first(x + i, n - i));
    const auto join = [](std::uint64_t h, std::uint32_t word) {
        h = (h ^ word) * 0x9E3779B97F4A7C15U;
        return h ^ h >> 29;
    };
    for (int c = 0; c < kChains; ++c) {
        for (int lane = 0; lane < kLanes; ++lane) {
            state->first = join(state->first, first[c][lane]);
            state->second = join(state->second, second[c][lane]);
        }
    }
}

std::size_t block_pack_bytes(bool bf16, std::int64_t n_out, std::int64_t n_in) {
    return bf16 ? static_cast<std::size_t>(packed_size<Bf16>(n_out, n_in)) * sizeof(Bf16)
                : static_cast<std::size_t>(packed_size<float>(n_out, n_in)) * sizeof(float);
}

// The map W (x * norm_w + norm_b) + b as one matrix without gaps and one bias.
void block_fold(const BlockLinear& map, const float* norm_w, const float* norm_b, float* weight, float* bias) {
    for (std::int64_t o = 0; o < map.n_out; ++o) {
        const float* row = map.weight + o * map.stride;
        float* out = weight + o * map.n_in;
        Vec total{};
        for_vectors(map.n_in, [&](auto get, auto put) {
            const Vec w = get(row);
            put(out, w * get(norm_w));
            total += w * get(norm_b);
        });
        bias[o] = map.bias[o] + sum(total);
    }
}

void block_pack(bool bf16, const BlockLinear& map, bool transposed, void* packed) {
    if (bf16) {
        pack_map<Bf16>(map, transposed, packed);
    } else {
        pack_map<float>(map, transposed, packed);
    }
}

std::size_t block_plan_bytes(const BlockShape& shape, std::int64_t dim, bool bf16) {
    const std::int64_t n_plan = shape.n_heads * shape.n_z;
    const std::int64_t bytes = bf16 ? PlanPacks<Bf16>::size(n_plan, dim) * 2 : PlanPacks<float>::size(n_plan, dim) * 4;
    return static_cast<std::size_t>(shape.n_sequences * bytes);
}

void block_forward(const BlockForward& args) {
    if (args.packs->bf16) {
        run_forward<Bf16>(args);
    } else {
        run_forward<float>(args);
    }
}

void block_backward(const BlockBackward& args) {
    if (args.packs->bf16) {
        run_backward<Bf16>(args);
    } else {
        run_backward<float>(args);
    }
}

}  // namespace GAC_FAST_ISA
}  // namespace gac_fast
