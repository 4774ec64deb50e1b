// Rows of tokens between products: norms and their gradients, biases, operands. For per-ISA sources alone, as simd.h.
#pragma once

#include "gemm.h"

namespace gac_fast {
namespace GAC_FAST_ISA {

constexpr float kNormEps = 1e-5F;

template <typename T>
constexpr bool kIsFloat = false;
template <>
constexpr bool kIsFloat<float> = true;

inline std::int64_t padded(std::int64_t n) { return round_up(n, kColumns); }

// f(i, load, store) over the vectors of a row of n: load(p) and store(p, x) take a pointer to the row's first element.
template <typename F>
inline void for_vectors(std::int64_t n, F&& f) {
    std::int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        f([i](const auto* p) { return load(p + i); }, [i](auto* p, Vec x) { store(p + i, x); });
    }
    if (i < n) {
        f([i, n](const auto* p) { return load_first(p + i, n - i); },
          [i, n](auto* p, Vec x) { store_first(p + i, x, n - i); });
    }
}

template <typename T>
void zero_pad(T* row, std::int64_t n, std::int64_t ld) {
    for (; n < ld; ++n) row[n] = T{};
}

// The products of bfloat16 start from zero, and whoever reads them next adds the bias: starting from it would write
// and read all of y once more. float has it in registers.
template <typename T>
constexpr Begin kMapBegin = kIsFloat<T> ? Begin::kBias : Begin::kZero;

// to[rows][ldt] = from[rows][ldf] of a map of T, with its bias, pads zero.
template <typename T>
void finish_rows(std::int64_t rows, std::int64_t n, const float* from, std::int64_t ldf, const float* bias, T* to,
                 std::int64_t ldt, bool pads) {
    for (std::int64_t r = 0; r < rows; ++r) {
        for_vectors(n, [&](auto get, auto put) {
            put(to + r * ldt, kIsFloat<T> ? get(from + r * ldf) : get(from + r * ldf) + get(bias));
        });
        if (pads) zero_pad(to + r * ldt, n, padded(n));
    }
}

// to[rows][ldt] = from[rows][ldf], pads zero.
template <typename To, typename From>
void copy_rows(std::int64_t rows, std::int64_t n, const From* from, std::int64_t ldf, To* to, std::int64_t ldt) {
    for (std::int64_t r = 0; r < rows; ++r) {
        convert(from + r * ldf, n, to + r * ldt);
        zero_pad(to + r * ldt, n, padded(n));
    }
}

// Rows of T as the operand of a product over n: as they lie where their pads are, else copied into `space`.
template <typename T>
const T* operand(std::int64_t rows, std::int64_t n, const T* x, std::int64_t ldx, T* space, std::int64_t* ld) {
    if (kIsFloat<T> || n % kPairs == 0) {
        *ld = ldx;
        return x;
    }
    *ld = padded(n);
    copy_rows(rows, n, x, ldx, space, *ld);
    return space;
}

// x += bias (null for none), then out = (x - mean) / std over each row, pads zero; 1 / std to rstd[r * rstd_stride].
template <typename T>
void normalise(std::int64_t rows, std::int64_t n, const float* bias, float* x, std::int64_t ldx, T* out,
               std::int64_t ldo, float* rstd, std::int64_t rstd_stride) {
    for (std::int64_t r = 0; r < rows; ++r) {
        float* row = x + r * ldx;
        Vec total{};
        for_vectors(n, [&](auto get, auto put) {
            Vec v = get(row);
            if (bias != nullptr) {
                v += get(bias);
                put(row, v);
            }
            total += v;
        });
        const float mean = sum(total) / static_cast<float>(n);
        Vec squares{};
        std::int64_t i = 0;
        for (; i + kLanes <= n; i += kLanes) {
            const Vec d = load(row + i) - mean;
            squares += d * d;
        }
        float square = sum(squares);
        for (; i < n; ++i) square += (row[i] - mean) * (row[i] - mean);
        const float scale = 1.0F / __builtin_sqrtf(square / static_cast<float>(n) + kNormEps);
        rstd[r * rstd_stride] = scale;
        for_vectors(n, [&](auto get, auto put) { put(out + r * ldo, (get(row) - mean) * scale); });
        zero_pad(out + r * ldo, n, padded(n));
    }
}

// dx += the gradient of a norm whose result `normed` had the gradient g; operand = dx in T, pads zero.
template <typename T>
void add_norm_gradient(std::int64_t rows, std::int64_t n, const float* g, std::int64_t ldg, const T* normed,
                       std::int64_t ldn, const float* rstd, std::int64_t rstd_stride, float* dx, std::int64_t ldx,
                       T* dx_operand, std::int64_t ldo) {
    for (std::int64_t r = 0; r < rows; ++r) {
        const float* g_row = g + r * ldg;
        const T* n_row = normed + r * ldn;
        Vec total{};
        Vec along{};
        for_vectors(n, [&](auto get, auto) {
            const Vec x = get(g_row);
            total += x;
            along += x * get(n_row);
        });
        const float mean = sum(total) / static_cast<float>(n);
        const float projection = sum(along) / static_cast<float>(n);
        const float scale = rstd[r * rstd_stride];
        float* d_row = dx + r * ldx;
        T* o_row = dx_operand + r * ldo;
        for_vectors(n, [&](auto get, auto put) {
            const Vec d = get(d_row) + (get(g_row) - mean - get(n_row) * projection) * scale;
            put(d_row, d);
            put(o_row, d);
        });
        zero_pad(o_row, n, padded(n));
    }
}

// sums[n] = the sums of the columns.
template <typename T>
void sum_columns(std::int64_t rows, std::int64_t n, const T* x, std::int64_t ldx, float* sums) {
    for_vectors(n, [&](auto get, auto put) {
        Vec total{};
        for (std::int64_t r = 0; r < rows; ++r) total += get(x + r * ldx);
        put(sums, total);
    });
}

template <typename T>
T* at(void* p, std::int64_t i) {
    return static_cast<T*>(p) + i;
}

template <typename T>
const T* at(const void* p, std::int64_t i) {
    return static_cast<const T*>(p) + i;
}

// total[n] = the sum of partials [first, last) in their order.
inline void sum_partials(const float* partials, std::int64_t first, std::int64_t last, std::int64_t stride,
                         std::int64_t n, float* total) {
    for_vectors(n, [&](auto get, auto put) {
        Vec sums{};
        for (std::int64_t i = first; i < last; ++i) sums += get(partials + i * stride);
        put(total, sums);
    });
}

}  // namespace GAC_FAST_ISA
}  // namespace gac_fast
