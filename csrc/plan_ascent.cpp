#include "plan_ascent.h"

#include "direct_products.h"
#include "gemm.h"
#include "philox_normal_simd.h"

namespace gac_fast {
namespace GAC_FAST_ISA {
namespace {

constexpr float kNormEps = 1e-5F;
constexpr float kLeastNorm = 1e-12F;
constexpr float kLeastLogVariance = -8.0F;
constexpr float kMostLogVariance = 4.0F;

// Up to this many rows a float32 product reads the caller's matrix in both directions: no packing, and one copy of
// the weights stays in the nearest caches where two would not.
constexpr std::int64_t kDirectRows = 4;
// Plans of a task, and rows of (plan, start) whose activations a task keeps at once.
template <typename T>
constexpr std::int64_t kMostPlans = sizeof(T) == 2 ? 32 : 48;
constexpr std::int64_t kMostStartRows = 256;

// ---------------------------------------------------------------------------------------------------------------------
// Products

// `m` rows of the `total` that all tasks have of this product. Rows of y and bias have room for whole vectors.
inline void multiply(const Matrix<float>& a, std::int64_t m, const float* x, std::int64_t ldx, float* y,
                     std::int64_t ldy, Begin begin, const float* bias = nullptr) {
    if (a.packed == nullptr) {
        direct(a, m, x, ldx, y, ldy, begin, bias);
    } else {
        gemm<float>(m, a.n_out, a.n_in, x, ldx, a.packed, y, ldy, begin, bias);
    }
}

inline void multiply(const Matrix<Bf16>& a, std::int64_t m, const Bf16* x, std::int64_t ldx, float* y, std::int64_t ldy,
                     Begin begin, const float* bias = nullptr) {
    gemm<Bf16>(m, a.n_out, a.n_in, x, ldx, a.packed, y, ldy, begin, bias);
}

// ---------------------------------------------------------------------------------------------------------------------
// What all tasks read

// Hands out parts of a given block; without one it measures.
class Block {
  public:
    explicit Block(void* base) : base_(static_cast<char*>(base)) {}

    template <typename T>
    T* take(std::int64_t n) {
        T* p = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + used_);
        used_ += static_cast<std::size_t>(round_up(n * static_cast<std::int64_t>(sizeof(T)), 64));
        return p;
    }

    bool measures() const { return base_ == nullptr; }
    std::size_t used() const { return used_; }

  private:
    char* base_;
    std::size_t used_ = 0;
};

// W and its transpose for the way back.
template <typename T>
struct Layer {
    Matrix<T> forward, back;
};

template <typename T>
struct Model {
    std::int64_t d, d_room, x_room, hidden_u, h1, h2, n_members, n_starts;
    // Members whose width fills whole panels have one first layer in common.
    std::int64_t n_first, first_out;
    bool has_prior, starts_apart;  // starts_apart: several starts per plan, whose part of layer one is added
    Layer<T> u1, u2;
    const float *u1_bias, *u2_bias;
    Layer<T>* r1;          // [n_first]
    Matrix<T>* r1_starts;  // [n_first]
    Layer<T>* r2;          // [n_members]
    const float *r1_bias, *r2_bias, *w3;
    const float* shared_starts;  // [n_starts][n_members * h1], or null
    std::int64_t room1() const { return n_members * h1; }
    std::int64_t room2() const { return n_members * h2; }
};

template <typename T>
Matrix<T> prepare(Block& block, const float* w, std::int64_t stride_out, std::int64_t stride_in, std::int64_t n_out,
                  std::int64_t n_in, std::int64_t total) {
    Matrix<T> a{w, stride_out, stride_in, n_out, n_in, nullptr};
    if (sizeof(T) == sizeof(float) && total <= kDirectRows) return a;
    T* packed = block.take<T>(packed_size<T>(n_out, n_in));
    if (!block.measures()) pack<T>(w, stride_out, stride_in, n_out, n_in, packed);
    a.packed = packed;
    return a;
}

// Of W [n_out][ld], whose first n_back columns are wanted on the way back.
template <typename T>
Layer<T> prepare_layer(Block& block, const float* w, std::int64_t ld, std::int64_t n_out, std::int64_t n_in,
                       std::int64_t n_back, std::int64_t total, bool with_back) {
    Layer<T> layer{};
    layer.forward = prepare<T>(block, w, ld, 1, n_out, n_in, total);
    if (with_back) layer.back = prepare<T>(block, w, 1, ld, n_back, n_out, total);
    return layer;
}

// Copies of n values, each `n_room` apart, with zeros between.
const float* prepare_rows(Block& block, const float* x, std::int64_t rows, std::int64_t n, std::int64_t n_room) {
    float* padded = block.take<float>(rows * n_room);
    if (block.measures()) return padded;
    for (std::int64_t r = 0; r < rows; ++r) {
        for (std::int64_t i = 0; i < n_room; ++i) padded[r * n_room + i] = i < n ? x[r * n + i] : 0.0F;
    }
    return padded;
}

template <typename T>
void start_operands(const PlanAscent& args, std::int64_t plan, std::int64_t start, T* x) {
    const std::int64_t room = round_up(args.n_obs, kPairs);
    convert(args.context + plan * args.context_plan_stride + start * args.context_start_stride, args.n_obs, x);
    for (std::int64_t i = args.n_obs; i < room; ++i) x[i] = T{};
}

template <typename T>
Model<T> prepare_model(const PlanAscent& args, Block& block) {
    Model<T> m{};
    const bool with_back = args.n_steps > 0;
    m.d = args.n_z * args.dim;
    m.d_room = round_up(m.d, kColumns);
    m.n_members = args.n_members;
    m.n_starts = args.n_starts;
    m.h1 = round_up(args.hidden1, kColumns);
    m.h2 = round_up(args.hidden2, kColumns);
    m.hidden_u = round_up(args.prior_hidden, kColumns);
    m.has_prior = args.prior_w1 != nullptr;
    m.starts_apart = args.n_starts > 1;
    const std::int64_t n_inputs = m.d + args.n_obs;
    const std::int64_t n_in = m.starts_apart ? m.d : n_inputs;
    const std::int64_t start_rows = args.n_plans * args.n_starts;
    m.x_room = round_up(n_in, kColumns);
    if (m.has_prior) {
        m.u1 = prepare_layer<T>(block, args.prior_w1, m.d, args.prior_hidden, m.d, m.d, args.n_plans, with_back);
        m.u2 = prepare_layer<T>(block, args.prior_w2, args.prior_hidden, m.d, args.prior_hidden, args.prior_hidden,
                                args.n_plans, with_back);
        m.u1_bias = prepare_rows(block, args.prior_b1, 1, args.prior_hidden, m.hidden_u);
        m.u2_bias = prepare_rows(block, args.prior_b2, 1, m.d, m.d_room);
    }
    m.n_first = args.hidden1 == m.h1 ? 1 : args.n_members;
    m.first_out = args.hidden1 * args.n_members / m.n_first;
    m.r1 = block.take<Layer<T>>(m.n_first);
    m.r1_starts = block.take<Matrix<T>>(m.n_first);
    m.r2 = block.take<Layer<T>>(m.n_members);
    for (std::int64_t e = 0; e < m.n_first; ++e) {
        const float* w = args.w1 + e * m.first_out * n_inputs;
        const auto layer = prepare_layer<T>(block, w, n_inputs, m.first_out, n_in, m.d, args.n_plans, with_back);
        Matrix<T> starts{};
        if (m.starts_apart) starts = prepare<T>(block, w + m.d, n_inputs, 1, m.first_out, args.n_obs, start_rows);
        if (block.measures()) continue;
        m.r1[e] = layer;
        m.r1_starts[e] = starts;
    }
    for (std::int64_t e = 0; e < m.n_members; ++e) {
        const auto layer = prepare_layer<T>(block, args.w2 + e * args.hidden2 * args.hidden1, args.hidden1,
                                            args.hidden2, args.hidden1, args.hidden1, start_rows, with_back);
        if (!block.measures()) m.r2[e] = layer;
    }
    m.r1_bias = prepare_rows(block, args.b1, m.n_members, args.hidden1, m.h1);
    m.r2_bias = prepare_rows(block, args.b2, m.n_members, args.hidden2, m.h2);
    m.w3 = prepare_rows(block, args.w3, 2 * m.n_members, args.hidden2, m.h2);
    if (m.starts_apart && args.context_plan_stride == 0) {
        const std::int64_t room = round_up(args.n_obs, kPairs);
        T* x = block.take<T>(args.n_starts * room);
        float* starts = block.take<float>(args.n_starts * m.room1());
        m.shared_starts = starts;
        if (block.measures()) return m;
        const TileScope tiles;
        for (std::int64_t g = 0; g < args.n_starts; ++g) start_operands(args, 0, g, x + g * room);
        for (std::int64_t e = 0; e < m.n_first; ++e) {
            multiply(m.r1_starts[e], args.n_starts, x, room, starts + e * m.h1, m.room1(), Begin::kZero);
        }
    }
    return m;
}

// ---------------------------------------------------------------------------------------------------------------------
// Passes over rows

template <typename T>
void zero(T* x, std::int64_t n) {
    for (std::int64_t i = 0; i < n; ++i) x[i] = T{};
}

// a = silu(x + add) with zeros up to whole panels, slope = its derivative there. `add` may be null, slope may be x.
template <typename T>
void activate(std::int64_t n, const float* x, const float* add, float* slope, T* a) {
    for (std::int64_t i = 0; i < n; i += kLanes) {
        Vec h = load_up_to(x + i, n - i);
        if (add != nullptr) h += load_up_to(add + i, n - i);
        const Vec s = sigmoid(h);
        const Vec active = h * s;
        store(a + i, active);
        store(slope + i, s + active * (1.0F - s));
    }
    const std::int64_t done = round_up(n, kLanes);
    zero(a + done, round_up(n, kColumns) - done);
}

// The head of one member: mean and log-variance of a = silu(x); x becomes the slope.
void read_head(std::int64_t n, float* x, const float* w_mean, const float* w_variance, float* mean, float* variance) {
    Vec means{};
    Vec variances{};
    for (std::int64_t i = 0; i < n; i += kLanes) {
        const Vec h = load_up_to(x + i, n - i);
        const Vec s = sigmoid(h);
        const Vec active = h * s;
        means += active * load(w_mean + i);
        variances += active * load(w_variance + i);
        store(x + i, s + active * (1.0F - s));
    }
    *mean += sum(means);
    *variance += sum(variances);
}

// g = slope * x with zeros up to whole panels.
template <typename T>
void scale_by_slope(std::int64_t n, const float* x, const float* slope, T* g) {
    for (std::int64_t i = 0; i < n; i += kLanes) store(g + i, load_up_to(x + i, n - i) * load(slope + i));
    const std::int64_t done = round_up(n, kLanes);
    zero(g + done, round_up(n, kColumns) - done);
}

float root(float x) { return __builtin_sqrtf(x); }

// max(x, least) that keeps NaN.
float at_least(float x, float least) { return x < least ? least : x; }

// Writes a value into a float row and, where they are two, into the operand row.
inline void store_both(float* p, Bf16* operand, Vec x, std::int64_t n) {
    store_up_to(p, x, n);
    if (n >= kLanes) {
        store(operand, x);
    } else {
        store_first(operand, x, n);
    }
}
inline void store_both(float* p, float*, Vec x, std::int64_t n) { store_up_to(p, x, n); }

// ---------------------------------------------------------------------------------------------------------------------
// One tile of plans through all steps

template <typename T>
class Tile {
  public:
    Tile(const PlanAscent& args, const Model<T>& model, std::int64_t most_plans)
        : args_(args), m_(model), chunk_(min_of(most_plans * model.n_starts, max_of(kMostStartRows, most_plans))) {
        // The second pass hands out what the first one measured.
        for (int pass = 0; pass < 2; ++pass) {
            take_buffers(most_plans);
            if (pass == 0) arena_ = Arena(arena_.used());
        }
    }

    void run(std::int64_t first, std::int64_t n) {
        const TileScope tiles;
        first_ = first;
        n_ = n;
        begin();
        for (std::int64_t step = 0; step < args_.n_steps; ++step) {
            forward();
            backward();
            for (std::int64_t p = 0; p < n_; ++p) {
                if (args_.langevin) {
                    diffuse(p, step);
                } else {
                    ascend(p, step);
                }
            }
        }
        forward();
        for (std::int64_t p = 0; p < n_; ++p) {
            float* out = args_.seeds + (first_ + p) * m_.d;
            for (std::int64_t i = 0; i < m_.d; i += kLanes) {
                store_up_to(out + i, load_up_to(z0_ + p * m_.d_room + i, m_.d - i), m_.d - i);
            }
            args_.mean[first_ + p] = mean_[p];
            args_.std[first_ + p] = std_[p];
        }
    }

  private:
    static constexpr bool kIsFloat = sizeof(T) == sizeof(float);

    void take_buffers(std::int64_t most_plans) {
        const std::int64_t start_rows = most_plans * m_.n_starts * m_.n_members;
        z0_ = arena_.take<float>(most_plans * m_.d_room);
        start_ = arena_.take<float>(most_plans * m_.d_room);
        g_ = arena_.take<float>(most_plans * m_.d_room);
        x_ = arena_.take<T>(most_plans * m_.x_room);
        // A float operand is the value itself.
        z0_operand_ = kIsFloat ? as_operand(z0_) : arena_.take<T>(most_plans * m_.d_room);
        g_operand_ = kIsFloat ? as_operand(g_) : z0_operand_;
        z_ = kIsFloat ? as_float(x_) : arena_.take<float>(most_plans * m_.d_room);
        ldz_ = kIsFloat ? m_.x_room : m_.d_room;
        rms_ = arena_.take<float>(most_plans * args_.n_z);
        slope_u_ = arena_.take<float>(most_plans * m_.hidden_u);
        active_u_ = arena_.take<T>(most_plans * m_.hidden_u);
        slope1_ = arena_.take<float>(chunk_ * m_.room1());
        active1_ = arena_.take<T>(chunk_ * m_.room1());
        slope2_ = arena_.take<float>(chunk_ * m_.room2());
        g2_ = arena_.take<T>(chunk_ * m_.h2);
        back_ = arena_.take<float>(max_of(chunk_ * m_.h1, most_plans * m_.hidden_u));
        if (m_.starts_apart) {
            plan_part_ = arena_.take<float>(most_plans * m_.room1());
            g1_ = arena_.take<float>(most_plans * m_.room1());
            if (m_.shared_starts == nullptr) starts_ = arena_.take<T>(chunk_ * round_up(args_.n_obs, kPairs));
        }
        const std::int64_t entries = round_up(start_rows, kLanes);
        means_ = arena_.take<float>(entries);
        variances_ = arena_.take<float>(entries);
        d_means_ = arena_.take<float>(entries);
        d_variances_ = arena_.take<float>(entries);
        mean_ = arena_.take<float>(most_plans);
        std_ = arena_.take<float>(most_plans);
        if (args_.langevin) noise_ = arena_.take<float>(round_up(m_.d, philox::kBatch));
    }

    static T* as_operand(float* p) { return reinterpret_cast<T*>(p); }
    static float* as_float(T* p) { return reinterpret_cast<float*>(p); }

    void begin() {
        for (std::int64_t p = 0; p < n_; ++p) {
            const float* source = args_.z0 + (first_ + p) * args_.z0_stride;
            float* z0 = z0_ + p * m_.d_room;
            zero(z0, m_.d_room);
            zero(start_ + p * m_.d_room, m_.d_room);
            zero(z0_operand_ + p * m_.d_room, m_.d_room);
            zero(x_ + p * m_.x_room, m_.x_room);
            for (std::int64_t i = 0; i < m_.d; i += kLanes) {
                const Vec value = load_up_to(source + i, m_.d - i);
                store_up_to(start_ + p * m_.d_room + i, value, m_.d - i);
                store_both(z0 + i, z0_operand_ + p * m_.d_room + i, value, m_.d - i);
            }
            if (args_.n_obs > 0 && !m_.starts_apart) {
                convert(args_.context + (first_ + p) * args_.context_plan_stride, args_.n_obs,
                        x_ + p * m_.x_room + m_.d);
            }
        }
    }

    void forward() {
        if (m_.has_prior) {
            multiply(m_.u1.forward, n_, z0_operand_, m_.d_room, slope_u_, m_.hidden_u, Begin::kBias, m_.u1_bias);
            for (std::int64_t p = 0; p < n_; ++p) {
                float* h = slope_u_ + p * m_.hidden_u;
                activate(args_.prior_hidden, h, nullptr, h, active_u_ + p * m_.hidden_u);
            }
            multiply(m_.u2.forward, n_, active_u_, m_.hidden_u, g_, m_.d_room, Begin::kBias, m_.u2_bias);
        }
        for (std::int64_t p = 0; p < n_; ++p) normalise(p);
        float* first = m_.starts_apart ? plan_part_ : slope1_;
        for (std::int64_t e = 0; e < m_.n_first; ++e) {
            multiply(m_.r1[e].forward, n_, x_, m_.x_room, first + e * m_.h1, m_.room1(), Begin::kBias,
                     m_.r1_bias + e * m_.h1);
        }
        const std::int64_t rows = n_ * m_.n_starts;
        for (std::int64_t row = 0; row < rows; row += chunk_) read_starts(row, min_of(chunk_, rows - row));
        for (std::int64_t p = 0; p < n_; ++p) find_moments(p);
    }

    // u = z0 + what U adds; z = u / rms.
    void normalise(std::int64_t p) {
        for (std::int64_t j = 0; j < args_.n_z; ++j) {
            const std::int64_t o = j * args_.dim;
            const float* z0 = z0_ + p * m_.d_room + o;
            const float* added = g_ + p * m_.d_room + o;
            float* z = z_ + p * ldz_ + o;
            Vec squares{};
            for (std::int64_t i = 0; i < args_.dim; i += kLanes) {
                const std::int64_t left = args_.dim - i;
                Vec u = load_up_to(z0 + i, left);
                if (m_.has_prior) u += load_up_to(added + i, left);
                squares += u * u;
                store_up_to(z + i, u, left);
            }
            const float scale = 1.0F / root(sum(squares) / static_cast<float>(args_.dim) + kNormEps);
            rms_[p * args_.n_z + j] = scale;
            for (std::int64_t i = 0; i < args_.dim; i += kLanes) {
                const std::int64_t left = args_.dim - i;
                store_both(z + i, x_ + p * m_.x_room + o + i, load_up_to(z + i, left) * scale, left);
            }
        }
    }

    // Layers one (its activation), two and three of `n` rows of (plan, start).
    void read_starts(std::int64_t row, std::int64_t n) {
        const std::int64_t room1 = m_.room1();
        const std::int64_t room2 = m_.room2();
        if (starts_ != nullptr) {
            const std::int64_t room = round_up(args_.n_obs, kPairs);
            for (std::int64_t i = 0; i < n; ++i) {
                start_operands(args_, first_ + (row + i) / m_.n_starts, (row + i) % m_.n_starts, starts_ + i * room);
            }
            for (std::int64_t e = 0; e < m_.n_first; ++e) {
                multiply(m_.r1_starts[e], n, starts_, room, slope1_ + e * m_.h1, room1, Begin::kZero);
            }
        }
        for (std::int64_t i = 0; i < n; ++i) {
            float* h = slope1_ + i * room1;
            const float* x = h;
            const float* add = nullptr;
            if (m_.starts_apart) {
                add = plan_part_ + (row + i) / m_.n_starts * room1;
                if (m_.shared_starts != nullptr) x = m_.shared_starts + (row + i) % m_.n_starts * room1;
            }
            for (std::int64_t e = 0; e < m_.n_first; ++e) {
                const std::int64_t o = e * m_.h1;
                activate(m_.first_out, x + o, add == nullptr ? nullptr : add + o, h + o, active1_ + i * room1 + o);
            }
        }
        for (std::int64_t e = 0; e < m_.n_members; ++e) {
            multiply(m_.r2[e].forward, n, active1_ + e * m_.h1, room1, slope2_ + e * m_.h2, room2, Begin::kBias,
                     m_.r2_bias + e * m_.h2);
            const float* w = m_.w3 + 2 * e * m_.h2;
            for (std::int64_t i = 0; i < n; ++i) {
                const std::int64_t entry = (row + i) * m_.n_members + e;
                means_[entry] = args_.b3[2 * e];
                variances_[entry] = args_.b3[2 * e + 1];
                read_head(args_.hidden2, slope2_ + i * room2 + e * m_.h2, w, w + m_.h2, means_ + entry,
                          variances_ + entry);
            }
        }
    }

    // Mixture moments, and the derivatives of the bound (or of minus the energy) by all means and log-variances.
    void find_moments(std::int64_t p) {
        const std::int64_t n = m_.n_starts * m_.n_members;
        const float* means = means_ + p * n;
        const float* logs = variances_ + p * n;
        float* d_means = d_means_ + p * n;
        float* d_logs = d_variances_ + p * n;
        double mean = 0;
        for (std::int64_t i = 0; i < n; ++i) mean += means[i];
        mean /= static_cast<double>(n);
        double variance = 0;
        for (std::int64_t i = 0; i < n; i += kLanes) {
            const std::int64_t left = min_of(kLanes, n - i);
            const Vec log_variance = load_up_to(logs + i, left);
            const Vec within =
                exp(max_of(broadcast(kLeastLogVariance), min_of(broadcast(kMostLogVariance), log_variance)));
            store_up_to(d_logs + i, within, left);
            for (std::int64_t k = i; k < i + left; ++k) {
                const double off = means[k] - mean;
                variance += d_logs[k] + off * off;
            }
        }
        const double std = __builtin_sqrt(variance / static_cast<double>(n));
        mean_[p] = static_cast<float>(mean);
        std_[p] = static_cast<float>(std);
        double by_mean = 1;
        double by_std = -static_cast<double>(args_.kappa);
        if (args_.langevin) {
            const double off = (static_cast<double>(args_.target[first_ + p]) - mean) / std;
            by_mean = off / std;
            by_std = (off * off - 1) / std;
        }
        const double each = by_std / (std * static_cast<double>(n));
        const double share = by_mean / static_cast<double>(n);
        for (std::int64_t i = 0; i < n; ++i) {
            d_means[i] = static_cast<float>(share + each * (means[i] - mean));
            // The clamp of the log-variance has no slope outside its range.
            const bool inside = logs[i] >= kLeastLogVariance && logs[i] <= kMostLogVariance;
            d_logs[i] = inside ? static_cast<float>(0.5 * each * d_logs[i]) : 0.0F;
        }
    }

    void backward() {
        const std::int64_t rows = n_ * m_.n_starts;
        if (m_.starts_apart) zero(g1_, n_ * m_.room1());
        for (std::int64_t row = 0; row < rows; row += chunk_) {
            const std::int64_t n = min_of(chunk_, rows - row);
            // Only the last chunk's activations are still there.
            if (rows > chunk_) read_starts(row, n);
            return_from_starts(row, n);
        }
        if (m_.starts_apart) {
            for (std::int64_t p = 0; p < n_; ++p) {
                for (std::int64_t e = 0; e < m_.n_first; ++e) {
                    const std::int64_t o = p * m_.room1() + e * m_.h1;
                    convert(g1_ + o, m_.first_out, active1_ + o);
                    zero(active1_ + o + m_.first_out, round_up(m_.first_out, kColumns) - m_.first_out);
                }
            }
        }
        for (std::int64_t e = 0; e < m_.n_first; ++e) {
            multiply(m_.r1[e].back, n_, active1_ + e * m_.h1, m_.room1(), g_, m_.d_room,
                     e == 0 ? Begin::kZero : Begin::kAdd);
        }
        for (std::int64_t p = 0; p < n_; ++p) return_through_norm(p);
        if (!m_.has_prior) return;
        multiply(m_.u2.back, n_, g_operand_, m_.d_room, back_, m_.hidden_u, Begin::kZero);
        for (std::int64_t p = 0; p < n_; ++p) {
            scale_by_slope(args_.prior_hidden, back_ + p * m_.hidden_u, slope_u_ + p * m_.hidden_u,
                           active_u_ + p * m_.hidden_u);
        }
        multiply(m_.u1.back, n_, active_u_, m_.hidden_u, g_, m_.d_room, Begin::kAdd);
    }

    // From the heads back to the first layers' inputs, summed over the starts of a plan where there are several.
    void return_from_starts(std::int64_t row, std::int64_t n) {
        for (std::int64_t e = 0; e < m_.n_members; ++e) {
            const float* w_mean = m_.w3 + 2 * e * m_.h2;
            const float* w_variance = w_mean + m_.h2;
            for (std::int64_t i = 0; i < n; ++i) {
                const float d_mean = d_means_[(row + i) * m_.n_members + e];
                const float d_log = d_variances_[(row + i) * m_.n_members + e];
                const float* slope = slope2_ + i * m_.room2() + e * m_.h2;
                T* g2 = g2_ + i * m_.h2;
                for (std::int64_t k = 0; k < args_.hidden2; k += kLanes) {
                    store(g2 + k, (d_mean * load(w_mean + k) + d_log * load(w_variance + k)) * load(slope + k));
                }
                const std::int64_t done = round_up(args_.hidden2, kLanes);
                zero(g2 + done, m_.h2 - done);
            }
            multiply(m_.r2[e].back, n, g2_, m_.h2, back_, m_.h1, Begin::kZero);
            for (std::int64_t i = 0; i < n; ++i) {
                const float* back = back_ + i * m_.h1;
                const float* slope = slope1_ + i * m_.room1() + e * m_.h1;
                if (!m_.starts_apart) {
                    scale_by_slope(args_.hidden1, back, slope, active1_ + i * m_.room1() + e * m_.h1);
                    continue;
                }
                float* g1 = g1_ + (row + i) / m_.n_starts * m_.room1() + e * m_.h1;
                for (std::int64_t k = 0; k < args_.hidden1; k += kLanes) {
                    store(g1 + k, load(g1 + k) + load_up_to(back + k, args_.hidden1 - k) * load(slope + k));
                }
            }
        }
    }

    // By u from by z = u / rms(u).
    void return_through_norm(std::int64_t p) {
        for (std::int64_t j = 0; j < args_.n_z; ++j) {
            const std::int64_t o = j * args_.dim;
            float* g = g_ + p * m_.d_room + o;
            const float* z = z_ + p * ldz_ + o;
            Vec along{};
            for (std::int64_t i = 0; i < args_.dim; i += kLanes) {
                along += load_up_to(g + i, args_.dim - i) * load_up_to(z + i, args_.dim - i);
            }
            const float mean = sum(along) / static_cast<float>(args_.dim);
            const float scale = rms_[p * args_.n_z + j];
            for (std::int64_t i = 0; i < args_.dim; i += kLanes) {
                const std::int64_t left = args_.dim - i;
                const Vec by_u = (load_up_to(g + i, left) - load_up_to(z + i, left) * mean) * scale;
                store_both(g + i, g_operand_ + p * m_.d_room + o + i, by_u, left);
            }
        }
    }

    // The whole gradient and its norm.
    float add_prior_part(std::int64_t p, float weight) {
        float* g = g_ + p * m_.d_room;
        const float* z0 = z0_ + p * m_.d_room;
        Vec squares{};
        for (std::int64_t i = 0; i < m_.d; i += kLanes) {
            const Vec by_z0 = load_up_to(g + i, m_.d - i) - weight * load(z0 + i);
            store(g + i, by_z0);
            squares += by_z0 * by_z0;
        }
        return root(sum(squares));
    }

    void ascend(std::int64_t p, std::int64_t step) {
        const double scale = __builtin_sqrt(static_cast<double>(m_.d));
        const double left_of_all = 1.0 - static_cast<double>(step) / static_cast<double>(args_.n_steps);
        const float norm = at_least(add_prior_part(p, args_.prior_weight), kLeastNorm);
        const float move = static_cast<float>(args_.step_size * left_of_all * scale) / norm;
        const float* g = g_ + p * m_.d_room;
        const float* start = start_ + p * m_.d_room;
        float* z0 = z0_ + p * m_.d_room;
        Vec offsets{};
        Vec squares{};
        for (std::int64_t i = 0; i < m_.d; i += kLanes) {
            const Vec z = load(z0 + i) + load(g + i) * move;
            const Vec offset = z - load(start + i);
            store(z0 + i, z);
            offsets += offset * offset;
            squares += z * z;
        }
        const float inside = static_cast<float>(args_.radius * scale) / at_least(root(sum(offsets)), kLeastNorm);
        if (!(inside >= 1.0F)) {
            squares = Vec{};
            for (std::int64_t i = 0; i < m_.d; i += kLanes) {
                const Vec origin = load(start + i);
                const Vec z = origin + (load(z0 + i) - origin) * inside;
                store(z0 + i, z);
                squares += z * z;
            }
        }
        const float within = static_cast<float>(args_.max_norm * scale) / at_least(root(sum(squares)), kLeastNorm);
        finish(p, within >= 1.0F ? 1.0F : within);
    }

    void diffuse(std::int64_t p, std::int64_t step) {
        const double scale = __builtin_sqrt(static_cast<double>(m_.d));
        const float norm = at_least(add_prior_part(p, 1.0F), kLeastNorm);
        const float longest = static_cast<float>(2 * args_.max_drift_ratio * scale) / norm;
        const auto size = static_cast<float>(args_.step_size);
        const float s = longest > size ? size : longest;
        const float drift = 0.5F * s * s;
        philox::normals(args_.seed0, args_.seed1,
                        static_cast<std::uint32_t>(args_.plan_ids[(first_ + p) * args_.plan_id_stride]),
                        args_.first_step + static_cast<std::uint32_t>(step), 0, m_.d, noise_);
        const float* g = g_ + p * m_.d_room;
        float* z0 = z0_ + p * m_.d_room;
        for (std::int64_t i = 0; i < m_.d; i += kLanes) {
            // g is the gradient of minus the energy.
            store(z0 + i, load(z0 + i) + load(g + i) * drift + load_up_to(noise_ + i, m_.d - i) * s);
        }
        finish(p, 1.0F);
    }

    // Scales the seed, clears what lies behind its end, and makes the operand.
    void finish(std::int64_t p, float scale) {
        float* z0 = z0_ + p * m_.d_room;
        for (std::int64_t i = 0; i < m_.d; i += kLanes) {
            store_both(z0 + i, z0_operand_ + p * m_.d_room + i, load_up_to(z0 + i, m_.d - i) * scale, m_.d - i);
        }
        zero(z0 + m_.d, m_.d_room - m_.d);
        zero(z0_operand_ + p * m_.d_room + m_.d, m_.d_room - m_.d);
    }

    const PlanAscent& args_;
    const Model<T>& m_;
    Arena arena_;
    std::int64_t first_ = 0;
    std::int64_t n_ = 0;
    std::int64_t chunk_;
    std::int64_t ldz_ = 0;
    float *z0_ = nullptr, *start_ = nullptr, *g_ = nullptr, *z_ = nullptr, *rms_ = nullptr;  // [plans][d]
    T *z0_operand_ = nullptr, *g_operand_ = nullptr, *x_ = nullptr;
    float* slope_u_ = nullptr;  // [plans][hidden_u]
    T* active_u_ = nullptr;
    float *slope1_ = nullptr, *slope2_ = nullptr;  // [rows][members * hidden]
    T *active1_ = nullptr, *g2_ = nullptr, *starts_ = nullptr;
    float *back_ = nullptr, *plan_part_ = nullptr, *g1_ = nullptr;
    float *means_ = nullptr, *variances_ = nullptr, *d_means_ = nullptr, *d_variances_ = nullptr;  // [rows][members]
    float *mean_ = nullptr, *std_ = nullptr, *noise_ = nullptr;
};

template <typename T>
void run(const PlanAscent& args) {
    if (args.n_plans == 0) return;
    Block block(args.shared);
    const Model<T> model = prepare_model<T>(args, block);
    const std::int64_t most =
        args.tile > 0 ? args.tile : max_of(1, min_of(kMostPlans<T>, kMostStartRows / args.n_starts));
    // Nearly equal tiles, and as many for each thread.
    std::int64_t n_tiles = (args.n_plans + most - 1) / most;
    if (args.tile == 0) n_tiles = min_of(args.n_plans, round_up(n_tiles, args.n_threads));
    const std::int64_t most_plans = (args.n_plans + n_tiles - 1) / n_tiles;
    parallel_for(n_tiles, args.n_threads, [&](std::int64_t i) {
        const std::int64_t first = args.n_plans * i / n_tiles;
        Tile<T>(args, model, most_plans).run(first, args.n_plans * (i + 1) / n_tiles - first);
    });
}

}  // namespace

std::size_t plan_ascent_shared_bytes(const PlanAscent& args) {
    Block block(nullptr);
    if (args.bf16) {
        prepare_model<Bf16>(args, block);
    } else {
        prepare_model<float>(args, block);
    }
    return block.used();
}

void plan_ascent(const PlanAscent& args) {
    if (args.bf16) {
        run<Bf16>(args);
    } else {
        run<float>(args);
    }
}

}  // namespace GAC_FAST_ISA
}  // namespace gac_fast
