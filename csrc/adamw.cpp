#include "adamw.h"

#include "simd.h"

namespace gac_fast {
namespace GAC_FAST_ISA {
namespace {

// Elements of a task.
constexpr std::int64_t kRange = 32768;

inline Vec root(Vec x) {
#if defined(__AVX512F__)
    return (Vec)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__)
    return (Vec)_mm256_sqrt_ps((__m256)x);
#else
    for (int i = 0; i < kLanes; ++i) x[i] = __builtin_sqrtf(x[i]);
    return x;
#endif
}

// The range of elements that a task is: tasks go through one parameter after the other.
struct Range {
    const AdamWParameter* parameter;
    std::int64_t first, n;
};

std::int64_t n_ranges(const AdamWParameter& p) { return (p.n + kRange - 1) / kRange; }

Range range_of(const AdamW& args, std::int64_t task) {
    const AdamWParameter* p = args.parameters;
    while (task >= n_ranges(*p)) task -= n_ranges(*p++);
    const std::int64_t first = task * kRange;
    return {p, first, min_of(kRange, p->n - first)};
}

double squares(const float* x, std::int64_t n) {
    Vec sums[4] = {};
    std::int64_t i = 0;
    for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
        for (int k = 0; k < 4; ++k) {
            const Vec v = load(x + i + k * kLanes);
            sums[k] += v * v;
        }
    }
    double total = static_cast<double>(sum((sums[0] + sums[1]) + (sums[2] + sums[3])));
    for (; i < n; ++i) total += static_cast<double>(x[i]) * static_cast<double>(x[i]);
    return total;
}

void move(const AdamW& args, const Range& range, float clip) {
    const AdamWParameter& p = *range.parameter;
    // Written back only where it says something else.
    const bool clips = !(clip >= 1.0F);
    const auto one = [&](std::int64_t i, auto get, auto put) {
        Vec g = get(p.gradient + i);
        if (clips) {
            g *= clip;
            put(p.gradient + i, g);
        }
        Vec m = get(p.first + i);
        m += (g - m) * (1.0F - args.beta1);
        put(p.first + i, m);
        const Vec v = get(p.second + i) * args.beta2 + g * g * (1.0F - args.beta2);
        put(p.second + i, v);
        const Vec x = get(p.value + i) * p.decay;
        put(p.value + i, x - m * p.rate / (root(v) * p.scale + args.eps));
    };
    std::int64_t i = range.first;
    const std::int64_t last = range.first + range.n;
    for (; i + kLanes <= last; i += kLanes) {
        one(i, [](const float* x) { return load(x); }, [](float* x, Vec y) { store(x, y); });
    }
    if (i < last) {
        one(
            i, [n = last - i](const float* x) { return load_first(x, n); },
            [n = last - i](float* x, Vec y) { store_first(x, y, n); });
    }
}

}  // namespace

double adamw(const AdamW& args) {
    std::int64_t n = 0;
    for (std::int64_t i = 0; i < args.n_parameters; ++i) n += n_ranges(args.parameters[i]);
    double total = 0.0;
    {
        Arena sizes;
        sizes.take<double>(n);
        double* partials = Arena(sizes.used()).take<double>(n);
        parallel_for(n, args.n_threads, [&](std::int64_t task) {
            const Range range = range_of(args, task);
            partials[task] = squares(range.parameter->gradient + range.first, range.n);
        });
        for (std::int64_t i = 0; i < n; ++i) total += partials[i];
    }
    const double norm = __builtin_sqrt(total);
    // As torch.nn.utils.clip_grad_norm_.
    const auto clip = static_cast<float>(args.max_norm / (norm + 1e-6));
    parallel_for(n, args.n_threads, [&](std::int64_t task) { move(args, range_of(args, task), clip); });
    return norm;
}

}  // namespace GAC_FAST_ISA
}  // namespace gac_fast
