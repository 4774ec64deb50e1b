#include "seed_plans.h"

#include "direct_products.h"
#include "philox_normal_simd.h"
#include "token_rows.h"

namespace gac_fast {
namespace GAC_FAST_ISA {
namespace {

constexpr float kLeastNorm = 1e-12F;
// Plans of a task: few, so that a handful of them is shared out among threads.
constexpr std::int64_t kPlans = 2;
// Rows of a product.
constexpr std::int64_t kRows = 4;

std::int64_t n_tasks(std::int64_t n_plans) { return (n_plans + kPlans - 1) / kPlans; }

// Rows of n floats, each with room for whole vectors.
struct Room {
    float* data;
    std::int64_t ld;

    Room(Arena& arena, std::int64_t rows, std::int64_t n)
        : data(arena.take<float>(rows * round_up(n, kLanes))), ld(round_up(n, kLanes)) {}

    float* row(std::int64_t i) const { return data + i * ld; }
};

// Keys and values of rows (plan, plan vector) of a batch.
template <typename F>
F* kv_rows(const SeedModel& m, F* kv, std::int64_t layer, std::int64_t which, std::int64_t row) {
    return kv + ((2 * layer + which) * m.n_plans * m.n_z + row) * m.dim;
}

struct ForwardScratch {
    Room hidden, x, y;

    ForwardScratch(Arena& arena, const SeedModel& m)
        : hidden(arena, kPlans, m.hidden), x(arena, kRows, m.dim), y(arena, kRows, 2 * m.dim) {}
};

void forward_task(const SeedForward& f, std::int64_t first, std::int64_t m) {
    const SeedModel& model = f.model;
    const std::int64_t d = model.n_z * model.dim;
    const std::int64_t dim = model.dim;
    Arena sizes;
    const ForwardScratch measured(sizes, model);
    static_cast<void>(measured);
    Arena arena(sizes.used());
    const ForwardScratch b(arena, model);
    const float* z0 = f.z0 + first * d;
    float* z = f.z + first * d;
    if (model.w1 != nullptr) {
        float* before = f.before + first * model.hidden;
        direct({model.w1, d, 1, model.hidden, d, nullptr}, m, z0, d, before, model.hidden, Begin::kBias, model.b1);
        for (std::int64_t p = 0; p < m; ++p) {
            for_vectors(model.hidden,
                        [&](auto get, auto put) { put(b.hidden.row(p), silu(get(before + p * model.hidden))); });
        }
        direct({model.w2, model.hidden, 1, d, model.hidden, nullptr}, m, b.hidden.data, b.hidden.ld, z, d, Begin::kBias,
               model.b2);
        for_vectors(m * d, [&](auto get, auto put) { put(z, get(z) + get(z0)); });
    } else {
        std::memcpy(z, z0, static_cast<std::size_t>(m * d) * sizeof(float));
    }
    for (std::int64_t r = 0; r < m * model.n_z; ++r) {
        float* row = z + r * dim;
        Vec squares{};
        for_vectors(dim, [&](auto get, auto) { squares += get(row) * get(row); });
        const float scale = 1.0F / __builtin_sqrtf(sum(squares) / static_cast<float>(dim) + kNormEps);
        f.scale[first * model.n_z + r] = scale;
        for_vectors(dim, [&](auto get, auto put) { put(row, get(row) * scale); });
    }
    for (std::int64_t l = 0; l < model.n_layers; ++l) {
        const SeedLayer& layer = model.layers[l];
        for (std::int64_t r = 0; r < m * model.n_z; r += kRows) {
            const std::int64_t rows = min_of(kRows, m * model.n_z - r);
            for (std::int64_t i = 0; i < rows; ++i) {
                const float* position = layer.position + (r + i) % model.n_z * dim;
                for_vectors(dim, [&](auto get, auto put) { put(b.x.row(i), get(z + (r + i) * dim) + get(position)); });
            }
            direct({layer.w, dim, 1, 2 * dim, dim, nullptr}, rows, b.x.data, b.x.ld, b.y.data, b.y.ld, Begin::kBias,
                   layer.b);
            for (std::int64_t i = 0; i < rows; ++i) {
                for (std::int64_t which = 0; which < 2; ++which) {
                    std::memcpy(kv_rows(model, f.kv, l, which, first * model.n_z + r + i), b.y.row(i) + which * dim,
                                static_cast<std::size_t>(dim) * sizeof(float));
                }
            }
        }
    }
}

struct GradientScratch {
    Room dz, sums, x, before1, active1, before2, back, hidden;

    GradientScratch(Arena& arena, const SeedModel& m, const SeedReturns* r)
        : dz(arena, kPlans, m.n_z * m.dim),
          sums(arena, kRows, m.dim),
          x(arena, kPlans, r == nullptr ? 0 : m.n_z * m.dim + r->n_obs),
          before1(arena, kPlans, r == nullptr ? 0 : r->hidden1),
          active1(arena, kPlans, r == nullptr ? 0 : r->hidden1),
          before2(arena, kPlans, r == nullptr ? 0 : r->hidden2),
          back(arena, kPlans, r == nullptr ? 0 : r->hidden1),
          hidden(arena, kPlans, m.hidden) {}
};

// The part of the return, added to b.dz.
void add_return_gradient(const SeedGradient& f, std::int64_t first, std::int64_t m, const GradientScratch& b) {
    const SeedReturns& r = *f.returns;
    const std::int64_t d = f.model.n_z * f.model.dim;
    const std::int64_t n_in = d + r.n_obs;
    for (std::int64_t p = 0; p < m; ++p) {
        std::memcpy(b.x.row(p), f.z + (first + p) * d, static_cast<std::size_t>(d) * sizeof(float));
        if (r.n_obs > 0) {
            std::memcpy(b.x.row(p) + d, r.context + (first + p) * r.context_stride,
                        static_cast<std::size_t>(r.n_obs) * sizeof(float));
        }
    }
    for (std::int64_t e = 0; e < r.n_members; ++e) {
        const float* w1 = r.w1 + e * r.hidden1 * n_in;
        const float* w2 = r.w2 + e * r.hidden2 * r.hidden1;
        const float* w3 = r.w3 + e * 2 * r.hidden2;
        direct({w1, n_in, 1, r.hidden1, n_in, nullptr}, m, b.x.data, b.x.ld, b.before1.data, b.before1.ld, Begin::kBias,
               r.b1 + e * r.hidden1);
        for (std::int64_t p = 0; p < m; ++p) {
            for_vectors(r.hidden1, [&](auto get, auto put) { put(b.active1.row(p), silu(get(b.before1.row(p)))); });
        }
        direct({w2, r.hidden1, 1, r.hidden2, r.hidden1, nullptr}, m, b.active1.data, b.active1.ld, b.before2.data,
               b.before2.ld, Begin::kBias, r.b2 + e * r.hidden2);
        for (std::int64_t p = 0; p < m; ++p) {
            float* row = b.before2.row(p);
            Vec total{};
            for_vectors(r.hidden2, [&](auto get, auto) { total += silu(get(row)) * get(w3); });
            const float mean = sum(total) + r.b3[2 * e];
            const float d_mean = (mean - r.y[first + p]) * r.weight[first + p] / static_cast<float>(r.n_members);
            for_vectors(r.hidden2, [&](auto get, auto put) { put(row, silu_slope(get(row)) * get(w3) * d_mean); });
        }
        direct({w2, 1, r.hidden1, r.hidden1, r.hidden2, nullptr}, m, b.before2.data, b.before2.ld, b.back.data,
               b.back.ld, Begin::kZero, nullptr);
        for (std::int64_t p = 0; p < m; ++p) {
            for_vectors(r.hidden1, [&](auto get, auto put) {
                put(b.back.row(p), get(b.back.row(p)) * silu_slope(get(b.before1.row(p))));
            });
        }
        direct({w1, 1, n_in, d, r.hidden1, nullptr}, m, b.back.data, b.back.ld, b.dz.data, b.dz.ld, Begin::kAdd,
               nullptr);
    }
}

void gradient_task(const SeedGradient& f, std::int64_t first, std::int64_t m) {
    const SeedModel& model = f.model;
    const std::int64_t d = model.n_z * model.dim;
    const std::int64_t dim = model.dim;
    Arena sizes;
    const GradientScratch measured(sizes, model, f.returns);
    static_cast<void>(measured);
    Arena arena(sizes.used());
    const GradientScratch b(arena, model, f.returns);
    for (std::int64_t r = 0; r < m * model.n_z; r += kRows) {
        const std::int64_t rows = min_of(kRows, m * model.n_z - r);
        Begin begin = Begin::kZero;
        for (std::int64_t l = 0; l < model.n_layers; ++l) {
            for (std::int64_t which = 0; which < 2; ++which) {
                const float* w = model.layers[l].w + which * dim * dim;
                direct({w, 1, dim, dim, dim, nullptr}, rows, kv_rows(model, f.dkv, l, which, first * model.n_z + r),
                       dim, b.sums.data, b.sums.ld, begin, nullptr);
                begin = Begin::kAdd;
            }
        }
        for (std::int64_t i = 0; i < rows; ++i) {
            float* to = b.dz.row((r + i) / model.n_z) + (r + i) % model.n_z * dim;
            for_vectors(dim, [&](auto get, auto put) { put(to, get(b.sums.row(i)) * f.dkv_scale); });
        }
    }
    if (f.returns != nullptr) add_return_gradient(f, first, m, b);
    if (f.dz != nullptr) {
        for (std::int64_t p = 0; p < m; ++p) {
            for_vectors(d,
                        [&](auto get, auto put) { put(b.dz.row(p), get(b.dz.row(p)) + get(f.dz + (first + p) * d)); });
        }
    }
    for (std::int64_t p = 0; p < m; ++p) {
        for (std::int64_t v = 0; v < model.n_z; ++v) {
            float* row = b.dz.row(p) + v * dim;
            const float* z = f.z + (first + p) * d + v * dim;
            Vec along{};
            for_vectors(dim, [&](auto get, auto) { along += get(row) * get(z); });
            const float projection = sum(along) / static_cast<float>(dim);
            const float scale = f.scale[(first + p) * model.n_z + v];
            for_vectors(dim, [&](auto get, auto put) { put(row, (get(row) - get(z) * projection) * scale); });
        }
    }
    if (f.du != nullptr) {
        for (std::int64_t p = 0; p < m; ++p) convert(b.dz.row(p), d, f.du + (first + p) * d);
    }
    if (model.w1 != nullptr) {
        direct({model.w2, 1, model.hidden, model.hidden, d, nullptr}, m, b.dz.data, b.dz.ld, b.hidden.data, b.hidden.ld,
               Begin::kZero, nullptr);
        for (std::int64_t p = 0; p < m; ++p) {
            const float* before = f.before + (first + p) * model.hidden;
            for_vectors(model.hidden, [&](auto get, auto put) {
                put(b.hidden.row(p), get(b.hidden.row(p)) * silu_slope(get(before)));
            });
            if (f.dbefore == nullptr) continue;
            const std::int64_t o = (first + p) * model.hidden;
            convert(b.hidden.row(p), model.hidden, f.dbefore + o);
            for_vectors(model.hidden, [&](auto get, auto put) { put(f.active + o, silu(get(before))); });
        }
    }
    if (f.gradient == nullptr) return;
    if (model.w1 != nullptr) {
        direct({model.w1, 1, d, d, model.hidden, nullptr}, m, b.hidden.data, b.hidden.ld, b.dz.data, b.dz.ld,
               Begin::kAdd, nullptr);
    }
    for (std::int64_t p = 0; p < m; ++p) {
        const std::int64_t o = (first + p) * d;
        for_vectors(d, [&](auto get, auto put) { put(f.gradient + o, get(b.dz.row(p)) + get(f.z0 + o)); });
    }
}

// Outputs of a task.
constexpr std::int64_t kOutputs = 64;

// Sums of OUTS outputs over VECTORS vectors, in registers. get(v) is what for_vectors() calls `get`, of vector v.
template <int OUTS, int VECTORS, typename Row, typename Get, typename Put>
inline void outer_tile(std::int64_t rows, const float* a, std::int64_t lda, Row&& row, Get&& get, Put&& put, float* out,
                       std::int64_t ld_out) {
    Vec sums[OUTS][VECTORS] = {};
    for (std::int64_t r = 0; r < rows; ++r) {
        const auto at = row(r);
        Vec x[VECTORS];
        for (int v = 0; v < VECTORS; ++v) x[v] = at(get(v));
        for (int o = 0; o < OUTS; ++o) {
            const float factor = a[r * lda + o];
            for (int v = 0; v < VECTORS; ++v) sums[o][v] = sums[o][v] + x[v] * factor;
        }
    }
    for (int o = 0; o < OUTS; ++o) {
        for (int v = 0; v < VECTORS; ++v) put(v)(out + o * ld_out, sums[o][v]);
    }
}

template <int OUTS, typename Row>
void outer_outputs(std::int64_t rows, const float* a, std::int64_t lda, std::int64_t n_b, Row&& row, float* out,
                   std::int64_t ld_out) {
    constexpr int kVectors = kLanes >= 16 ? 4 : 2;
    std::int64_t i = 0;
    for (; i + kVectors * kLanes <= n_b; i += kVectors * kLanes) {
        outer_tile<OUTS, kVectors>(
            rows, a, lda, row, [i](int v) { return [i = i + v * kLanes](const float* p) { return load(p + i); }; },
            [i](int v) { return [i = i + v * kLanes](float* p, Vec x) { store(p + i, x); }; }, out, ld_out);
    }
    for (; i + kLanes <= n_b; i += kLanes) {
        outer_tile<OUTS, 1>(
            rows, a, lda, row, [i](int) { return [i](const float* p) { return load(p + i); }; },
            [i](int) { return [i](float* p, Vec x) { store(p + i, x); }; }, out, ld_out);
    }
    if (i == n_b) return;
    const std::int64_t left = n_b - i;
    outer_tile<OUTS, 1>(
        rows, a, lda, row, [i, left](int) { return [i, left](const float* p) { return load_first(p + i, left); }; },
        [i, left](int) { return [i, left](float* p, Vec x) { store_first(p + i, x, left); }; }, out, ld_out);
}

// out[o][n_b], o in [first, last), rows ld_out apart, = the sum over rows of a[row][o] times row(row)(get) [n_b];
// sums[o] that of a alone. Rows are added in order.
template <typename Row>
void outer(std::int64_t rows, const float* a, std::int64_t lda, std::int64_t first, std::int64_t last, std::int64_t n_b,
           Row&& row, float* out, std::int64_t ld_out, float* sums) {
    constexpr int kOuts = 4;
    std::int64_t o = first;
    for (; o + kOuts <= last; o += kOuts) {
        outer_outputs<kOuts>(rows, a + o, lda, n_b, row, out + o * ld_out, ld_out);
    }
    for (; o < last; ++o) outer_outputs<1>(rows, a + o, lda, n_b, row, out + o * ld_out, ld_out);
    for (o = first; o < last; ++o) {
        float total = 0.0F;
        for (std::int64_t r = 0; r < rows; ++r) total += a[r * lda + o];
        sums[o] = total;
    }
}

// Keys (or values) of one layer: outputs [first, last) of the 2 D, of which a task has either or both.
void layer_weights(const SeedWeights& f, std::int64_t l, std::int64_t first, std::int64_t last) {
    const SeedModel& m = f.model;
    const std::int64_t dim = m.dim;
    const float* position = m.layers[l].position;
    const auto row = [&](std::int64_t r) {
        return [z = f.z + r * dim, p = position + r % m.n_z * dim](auto get) { return get(z) + get(p); };
    };
    for (std::int64_t which = 0; which < 2; ++which) {
        const std::int64_t from = max_of(first - which * dim, 0);
        const std::int64_t to = min_of(last - which * dim, dim);
        if (from >= to) continue;
        outer(m.n_plans * m.n_z, kv_rows(m, f.dkv, l, which, 0), dim, from, to, dim, row,
              f.dlayers[3 * l] + which * dim * dim, dim, f.dlayers[3 * l + 1] + which * dim);
    }
}

// The positions are added to the plan: their gradient is that of its map's input, summed over plans.
void position_gradient(const SeedWeights& f, std::int64_t l, std::int64_t v) {
    const SeedModel& m = f.model;
    Arena sizes;
    const Room measured_sum(sizes, 1, m.dim), measured(sizes, 1, m.dim);
    static_cast<void>(measured_sum);
    static_cast<void>(measured);
    Arena arena(sizes.used());
    const Room total(arena, 1, m.dim), out(arena, 1, m.dim);
    for (std::int64_t which = 0; which < 2; ++which) {
        std::memset(total.data, 0, static_cast<std::size_t>(m.dim) * sizeof(float));
        for (std::int64_t p = 0; p < m.n_plans; ++p) {
            const float* row = kv_rows(m, f.dkv, l, which, p * m.n_z + v);
            for_vectors(m.dim, [&](auto get, auto put) { put(total.data, get(total.data) + get(row)); });
        }
        direct({m.layers[l].w + which * m.dim * m.dim, 1, m.dim, m.dim, m.dim, nullptr}, 1, total.data, total.ld,
               out.data, out.ld, which == 0 ? Begin::kZero : Begin::kAdd, nullptr);
    }
    std::memcpy(f.dlayers[3 * l + 2] + v * m.dim, out.data, static_cast<std::size_t>(m.dim) * sizeof(float));
}

void move_task(const SeedMove& f, std::int64_t p) {
    Arena sizes;
    sizes.take<float>(round_up(f.d, philox::kBatch));
    Arena arena(sizes.used());
    float* noise = arena.take<float>(round_up(f.d, philox::kBatch));
    philox::normals(f.seed0, f.seed1, static_cast<std::uint32_t>(f.ids[p * f.id_stride]),
                    static_cast<std::uint32_t>(f.steps[p * f.step_stride]), 0, f.d, noise);
    const float* g = f.gradient + p * f.d;
    float* z0 = f.z0 + p * f.d;
    Vec squares{};
    for_vectors(f.d, [&](auto get, auto) { squares += get(g) * get(g); });
    const double scale = __builtin_sqrt(static_cast<double>(f.d));
    const float norm = __builtin_sqrtf(sum(squares));
    const double longest = 2 * f.max_drift_ratio * scale / static_cast<double>(norm > kLeastNorm ? norm : kLeastNorm);
    // A norm that is no number leaves none behind.
    const auto s = static_cast<float>(longest >= f.step_size ? f.step_size : longest) + 0.0F * norm;
    for_vectors(f.d, [&](auto get, auto put) { put(z0, get(z0) - get(g) * (0.5F * s * s) + get(noise) * s); });
    f.size[p] = s;
    f.ratio[p] = s * norm / static_cast<float>(2 * scale);
}

// Steps of a task.
constexpr std::int64_t kSteps = 1024;

template <typename T>
void errors_task(const ActionErrors& f, std::int64_t first, std::int64_t last, double* squares) {
    const T* y = static_cast<const T*>(f.y) + first * f.act_dim;
    const float* actions = f.actions + first * f.act_dim;
    T* dy = f.dy == nullptr ? nullptr : static_cast<T*>(f.dy) + first * f.act_dim;
    const std::int64_t n = (last - first) * f.act_dim;
    if (squares != nullptr) {
        for (std::int64_t j = 0; j < f.act_dim; ++j) squares[j] = 0.0;
    }
    std::int64_t column = 0;
    std::int64_t row = first;
    for (std::int64_t i = 0; i < n; i += kLanes) {
        const std::int64_t width = min_of(kLanes, n - i);
        const bool whole = width == kLanes;
        // tanh y = 2 sigmoid(2 y) - 1
        const Vec mean = 2.0F * sigmoid(2.0F * (whole ? load(y + i) : load_first(y + i, width))) - 1.0F;
        const Vec error = mean - (whole ? load(actions + i) : load_first(actions + i, width));
        Vec gradient = error * (1.0F - mean * mean);
        const Vec square = error * error;
        for (std::int64_t k = 0; k < width; ++k) {
            const bool counts = f.counts == nullptr || f.counts[row];
            gradient[k] = counts ? gradient[k] * f.scale[column] : 0.0F;
            if (counts && squares != nullptr) squares[column] += static_cast<double>(square[k]);
            if (++column == f.act_dim) {
                column = 0;
                ++row;
            }
        }
        if (dy != nullptr) {
            if (whole) {
                store(dy + i, gradient);
            } else {
                store_first(dy + i, gradient, width);
            }
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Losses of the return models

constexpr float kLeastLogVariance = -8.0F;
constexpr float kMostLogVariance = 4.0F;

// Hands out parts of given memory; without any it measures.
class Parts {
  public:
    explicit Parts(void* base) : base_(static_cast<char*>(base)) {}

    template <typename T>
    T* take(std::int64_t n) {
        T* p = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + used_);
        used_ += static_cast<std::size_t>(round_up(n * static_cast<std::int64_t>(sizeof(T)), 64));
        return p;
    }

    std::size_t used() const { return used_; }

  private:
    char* base_;
    std::size_t used_ = 0;
};

// What tasks of plans leave to those of weights. Rows: the plans with dropout, then the same without.
struct ReturnRows {
    std::int64_t n, n_plans, ld1, ld2;
    float *active1, *active2, *d1, *d2;  // [E][2 P][ld]
    float* d_out;    // [E][2 P], with respect to the mean of a row with dropout, the v of one without
    double* losses;  // [n_tasks][2]

    ReturnRows(Parts& parts, const ReturnLosses& f)
        : n(2 * f.n_plans), n_plans(f.n_plans), ld1(round_up(f.hidden1, kLanes)), ld2(round_up(f.hidden2, kLanes)) {
        active1 = parts.take<float>(f.n_members * n * ld1);
        d1 = parts.take<float>(f.n_members * n * ld1);
        active2 = parts.take<float>(f.n_members * n * ld2);
        d2 = parts.take<float>(f.n_members * n * ld2);
        d_out = parts.take<float>(f.n_members * n);
        losses = parts.take<double>(2 * n_tasks(f.n_plans));
    }
};

struct ReturnScratch {
    Room x, before1, before2, active1, active2, d1, d2, dz;

    ReturnScratch(Arena& arena, const ReturnLosses& f)
        : x(arena, kRows, f.d + f.n_obs),
          before1(arena, kRows, f.hidden1),
          before2(arena, kRows, f.hidden2),
          active1(arena, kRows, f.hidden1),
          active2(arena, kRows, f.hidden2),
          d1(arena, kRows, f.hidden1),
          d2(arena, kRows, f.hidden2),
          dz(arena, kPlans, f.d) {}
};

static_assert(2 * kPlans == kRows, "a task's plans with and without dropout are one product");

// active = silu(before), times the mask for the first m of 2 m rows.
void activate(std::int64_t m, std::int64_t n, const Room& before, const float* mask, const Room& active) {
    for (std::int64_t i = 0; i < 2 * m; ++i) {
        const float* factors = i < m && mask != nullptr ? mask + i * n : nullptr;
        for_vectors(n, [&](auto get, auto put) {
            const Vec x = silu(get(before.row(i)));
            put(active.row(i), factors == nullptr ? x : x * get(factors));
        });
    }
}

// d *= the slope at `before`, and the mask.
void deactivate(std::int64_t m, std::int64_t n, const Room& before, const float* mask, const Room& d) {
    for (std::int64_t i = 0; i < 2 * m; ++i) {
        const float* factors = i < m && mask != nullptr ? mask + i * n : nullptr;
        for_vectors(n, [&](auto get, auto put) {
            const Vec x = get(d.row(i)) * silu_slope(get(before.row(i)));
            put(d.row(i), factors == nullptr ? x : x * get(factors));
        });
    }
}

void return_task(const ReturnLosses& f, const ReturnRows& rows, std::int64_t task) {
    const std::int64_t first = task * kPlans;
    const std::int64_t m = min_of(kPlans, f.n_plans - first);
    const std::int64_t n_in = f.d + f.n_obs;
    const bool backward = f.dz != nullptr || f.dw1 != nullptr;
    Arena sizes;
    const ReturnScratch measured(sizes, f);
    static_cast<void>(measured);
    Arena arena(sizes.used());
    const ReturnScratch b(arena, f);
    for (std::int64_t i = 0; i < 2 * m; ++i) {
        const std::int64_t p = first + i % m;
        std::memcpy(b.x.row(i), f.z + p * f.d, static_cast<std::size_t>(f.d) * sizeof(float));
        if (f.n_obs > 0) {
            std::memcpy(b.x.row(i) + f.d, f.context + p * f.context_stride,
                        static_cast<std::size_t>(f.n_obs) * sizeof(float));
        }
    }
    double mean_loss = 0.0;
    double variance_loss = 0.0;
    for (std::int64_t e = 0; e < f.n_members; ++e) {
        const float* w1 = f.w1 + e * f.hidden1 * n_in;
        const float* w2 = f.w2 + e * f.hidden2 * f.hidden1;
        const float* w3 = f.w3 + e * 2 * f.hidden2;
        const float* mask1 = f.mask1 == nullptr ? nullptr : f.mask1 + (e * f.n_plans + first) * f.hidden1;
        const float* mask2 = f.mask2 == nullptr ? nullptr : f.mask2 + (e * f.n_plans + first) * f.hidden2;
        direct({w1, n_in, 1, f.hidden1, n_in, nullptr}, 2 * m, b.x.data, b.x.ld, b.before1.data, b.before1.ld,
               Begin::kBias, f.b1 + e * f.hidden1);
        activate(m, f.hidden1, b.before1, mask1, b.active1);
        direct({w2, f.hidden1, 1, f.hidden2, f.hidden1, nullptr}, 2 * m, b.active1.data, b.active1.ld, b.before2.data,
               b.before2.ld, Begin::kBias, f.b2 + e * f.hidden2);
        activate(m, f.hidden2, b.before2, mask2, b.active2);
        for (std::int64_t i = 0; i < 2 * m; ++i) {
            const std::int64_t p = first + i % m;
            Vec means{};
            Vec variances{};
            for_vectors(f.hidden2, [&](auto get, auto) {
                means += get(b.active2.row(i)) * get(w3);
                variances += get(b.active2.row(i)) * get(w3 + f.hidden2);
            });
            const float error = sum(means) + f.b3[2 * e] - f.y[p];
            float d_out;
            if (i < m) {
                mean_loss += static_cast<double>(f.seen[p]) * static_cast<double>(error * error);
                d_out = f.factors[0] * 2.0F * f.seen[p] * error;
            } else {
                const float free = sum(variances) + f.b3[2 * e + 1];
                const float v = free < kLeastLogVariance  ? kLeastLogVariance
                                : free > kMostLogVariance ? kMostLogVariance
                                                          : free;
                const float relative = error * error * exp(broadcast(-v))[0];
                variance_loss += 0.5 * static_cast<double>(f.fitted[p]) * static_cast<double>(relative + v);
                d_out = v == free ? f.factors[1] * 0.5F * f.fitted[p] * (1.0F - relative) : 0.0F;
            }
            if (!backward) continue;
            rows.d_out[e * rows.n + (i < m ? 0 : f.n_plans) + p] = d_out;
            const float* w = i < m ? w3 : w3 + f.hidden2;
            for_vectors(f.hidden2, [&](auto get, auto put) { put(b.d2.row(i), get(w) * d_out); });
        }
        if (!backward) continue;
        deactivate(m, f.hidden2, b.before2, mask2, b.d2);
        direct({w2, 1, f.hidden1, f.hidden1, f.hidden2, nullptr}, 2 * m, b.d2.data, b.d2.ld, b.d1.data, b.d1.ld,
               Begin::kZero, nullptr);
        deactivate(m, f.hidden1, b.before1, mask1, b.d1);
        // The plan is held fixed where the variance is fitted.
        if (f.dz != nullptr) {
            direct({w1, 1, n_in, f.d, f.hidden1, nullptr}, m, b.d1.data, b.d1.ld, b.dz.data, b.dz.ld,
                   e == 0 ? Begin::kZero : Begin::kAdd, nullptr);
        }
        for (std::int64_t i = 0; i < 2 * m; ++i) {
            const std::int64_t row = e * rows.n + (i < m ? 0 : f.n_plans) + first + i % m;
            convert(b.active1.row(i), f.hidden1, rows.active1 + row * rows.ld1);
            convert(b.active2.row(i), f.hidden2, rows.active2 + row * rows.ld2);
            convert(b.d1.row(i), f.hidden1, rows.d1 + row * rows.ld1);
            convert(b.d2.row(i), f.hidden2, rows.d2 + row * rows.ld2);
        }
    }
    rows.losses[2 * task] = mean_loss;
    rows.losses[2 * task + 1] = variance_loss;
    if (f.dz != nullptr) {
        for (std::int64_t p = 0; p < m; ++p) convert(b.dz.row(p), f.d, f.dz + (first + p) * f.d);
    }
}

// Outputs [first, last) of the first layer of a member.
void return_first_layer(const ReturnLosses& f, const ReturnRows& rows, std::int64_t e, std::int64_t first,
                        std::int64_t last) {
    const std::int64_t n_in = f.d + f.n_obs;
    const float* d1 = rows.d1 + e * rows.n * rows.ld1;
    const auto z = [&](std::int64_t r) { return [p = f.z + r % f.n_plans * f.d](auto get) { return get(p); }; };
    float* dw = f.dw1 + e * f.hidden1 * n_in;
    outer(rows.n, d1, rows.ld1, first, last, f.d, z, dw, n_in, f.db1 + e * f.hidden1);
    if (f.n_obs == 0) return;
    const auto start = [&](std::int64_t r) {
        return [p = f.context + r % f.n_plans * f.context_stride](auto get) { return get(p); };
    };
    outer(rows.n, d1, rows.ld1, first, last, f.n_obs, start, dw + f.d, n_in, f.db1 + e * f.hidden1);
}

void return_second_layer(const ReturnLosses& f, const ReturnRows& rows, std::int64_t e, std::int64_t first,
                         std::int64_t last) {
    const float* active1 = rows.active1 + e * rows.n * rows.ld1;
    const auto row = [&](std::int64_t r) { return [p = active1 + r * rows.ld1](auto get) { return get(p); }; };
    outer(rows.n, rows.d2 + e * rows.n * rows.ld2, rows.ld2, first, last, f.hidden1, row,
          f.dw2 + e * f.hidden2 * f.hidden1, f.hidden1, f.db2 + e * f.hidden2);
}

// Its mean reads rows with dropout, its variance those without.
void return_heads(const ReturnLosses& f, const ReturnRows& rows, std::int64_t e) {
    for (std::int64_t head = 0; head < 2; ++head) {
        const std::int64_t first = e * rows.n + head * f.n_plans;
        const float* active2 = rows.active2 + first * rows.ld2;
        const auto row = [&](std::int64_t r) { return [p = active2 + r * rows.ld2](auto get) { return get(p); }; };
        outer(f.n_plans, rows.d_out + first, 1, 0, 1, f.hidden2, row, f.dw3 + (2 * e + head) * f.hidden2, f.hidden2,
              f.db3 + 2 * e + head);
    }
}

}  // namespace

std::size_t return_losses_bytes(const ReturnLosses& args) {
    Parts sizes(nullptr);
    const ReturnRows rows(sizes, args);
    static_cast<void>(rows);
    return sizes.used();
}

void return_losses(const ReturnLosses& args) {
    Parts parts(args.memory);
    const ReturnRows rows(parts, args);
    const std::int64_t n = n_tasks(args.n_plans);
    parallel_for(n, args.n_threads, [&](std::int64_t i) { return_task(args, rows, i); });
    args.losses[0] = args.losses[1] = 0.0;
    for (std::int64_t i = 0; i < n; ++i) {
        args.losses[0] += rows.losses[2 * i];
        args.losses[1] += rows.losses[2 * i + 1];
    }
    if (args.dw1 == nullptr) return;
    const auto n_ranges = [](std::int64_t outputs) { return (outputs + kOutputs - 1) / kOutputs; };
    const std::int64_t n1 = n_ranges(args.hidden1);
    const std::int64_t n2 = n_ranges(args.hidden2);
    parallel_for(args.n_members * (n1 + n2 + 1), args.n_threads, [&](std::int64_t i) {
        const std::int64_t e = i / (n1 + n2 + 1);
        i %= n1 + n2 + 1;
        if (i < n1) {
            return_first_layer(args, rows, e, i * kOutputs, min_of(args.hidden1, (i + 1) * kOutputs));
        } else if (i < n1 + n2) {
            i -= n1;
            return_second_layer(args, rows, e, i * kOutputs, min_of(args.hidden2, (i + 1) * kOutputs));
        } else {
            return_heads(args, rows, e);
        }
    });
}

void seed_plans(const SeedForward& args) {
    const std::int64_t n = args.model.n_plans;
    parallel_for(n_tasks(n), args.model.n_threads,
                 [&](std::int64_t i) { forward_task(args, i * kPlans, min_of(kPlans, n - i * kPlans)); });
}

void seed_gradient(const SeedGradient& args) {
    const std::int64_t n = args.model.n_plans;
    parallel_for(n_tasks(n), args.model.n_threads,
                 [&](std::int64_t i) { gradient_task(args, i * kPlans, min_of(kPlans, n - i * kPlans)); });
}

void seed_weights(const SeedWeights& args) {
    const SeedModel& m = args.model;
    const std::int64_t d = m.n_z * m.dim;
    const auto n_ranges = [](std::int64_t n) { return (n + kOutputs - 1) / kOutputs; };
    const std::int64_t n_w1 = m.w1 == nullptr ? 0 : n_ranges(m.hidden);
    const std::int64_t n_w2 = m.w1 == nullptr ? 0 : n_ranges(d);
    const std::int64_t n_layer = n_ranges(2 * m.dim);
    parallel_for(n_w1 + n_w2 + m.n_layers * (n_layer + m.n_z), m.n_threads, [&](std::int64_t i) {
        const auto first = [](std::int64_t range) { return range * kOutputs; };
        const auto last = [](std::int64_t range, std::int64_t n) { return min_of(n, (range + 1) * kOutputs); };
        if (i < n_w1) {
            const auto row = [&](std::int64_t p) { return [x = args.z0 + p * d](auto get) { return get(x); }; };
            outer(m.n_plans, args.dbefore, m.hidden, first(i), last(i, m.hidden), d, row, args.dw1, d, args.db1);
            return;
        }
        i -= n_w1;
        if (i < n_w2) {
            const auto row = [&](std::int64_t p) {
                return [x = args.active + p * m.hidden](auto get) { return get(x); };
            };
            outer(m.n_plans, args.du, d, first(i), last(i, d), m.hidden, row, args.dw2, m.hidden, args.db2);
            return;
        }
        i -= n_w2;
        if (i < m.n_layers * n_layer) {
            layer_weights(args, i / n_layer, first(i % n_layer), last(i % n_layer, 2 * m.dim));
        } else {
            i -= m.n_layers * n_layer;
            position_gradient(args, i / m.n_z, i % m.n_z);
        }
    });
}

void seed_move(const SeedMove& args) {
    parallel_for(args.n_plans, args.n_threads, [&](std::int64_t p) { move_task(args, p); });
}

void action_errors(const ActionErrors& args) {
    const std::int64_t n = (args.n + kSteps - 1) / kSteps;
    Arena sizes;
    sizes.take<double>(max_of(1, n * args.act_dim));
    Arena arena(sizes.used());
    double* partials = arena.take<double>(max_of(1, n * args.act_dim));
    parallel_for(n, args.n_threads, [&](std::int64_t i) {
        double* squares = args.squares == nullptr ? nullptr : partials + i * args.act_dim;
        const std::int64_t last = min_of(args.n, (i + 1) * kSteps);
        if (args.bf16) {
            errors_task<Bf16>(args, i * kSteps, last, squares);
        } else {
            errors_task<float>(args, i * kSteps, last, squares);
        }
    });
    if (args.squares == nullptr) return;
    for (std::int64_t j = 0; j < args.act_dim; ++j) {
        args.squares[j] = 0.0;
        for (std::int64_t i = 0; i < n; ++i) args.squares[j] += partials[i * args.act_dim + j];
    }
}

}  // namespace GAC_FAST_ISA
}  // namespace gac_fast
