// Products of up to four rows with a float32 matrix as it lies, in either direction: no packing, and one copy of the
// weights stays in the nearest caches where two would not. For per-ISA sources alone, as simd.h.
#pragma once

#include "gemm.h"

namespace gac_fast {
namespace GAC_FAST_ISA {

// y = x W^T with W[o][i] = w[o * stride_out + i * stride_in]; one of the strides is 1.
template <typename T>
struct Matrix {
    const float* w;
    std::int64_t stride_out, stride_in, n_out, n_in;
    const T* packed;  // null: read w itself
};

inline Vec load_up_to(const float* p, std::int64_t n) { return n >= kLanes ? load(p) : load_first(p, n); }

inline void store_up_to(float* p, Vec x, std::int64_t n) {
    if (n >= kLanes) {
        store(p, x);
    } else {
        store_first(p, x, n);
    }
}

// OUTS neighbouring outputs of ROWS rows: sums along the rows of W.
template <int ROWS, int OUTS>
void dot_block(const Matrix<float>& a, std::int64_t o, const float* x, std::int64_t ldx, float* y, std::int64_t ldy,
               Begin begin, const float* bias) {
    Vec sums[ROWS][OUTS] = {};
    const float* w = a.w + o * a.stride_out;
    std::int64_t i = 0;
    for (; i + kLanes <= a.n_in; i += kLanes) {
        Vec inputs[ROWS];
        for (int r = 0; r < ROWS; ++r) inputs[r] = load(x + r * ldx + i);
        for (int k = 0; k < OUTS; ++k) {
            const Vec weights = load(w + k * a.stride_out + i);
            for (int r = 0; r < ROWS; ++r) sums[r][k] += inputs[r] * weights;
        }
    }
    if (i < a.n_in) {
        for (int k = 0; k < OUTS; ++k) {
            const Vec weights = load_first(w + k * a.stride_out + i, a.n_in - i);
            for (int r = 0; r < ROWS; ++r) sums[r][k] += load_first(x + r * ldx + i, a.n_in - i) * weights;
        }
    }
    for (int r = 0; r < ROWS; ++r) {
        for (int k = 0; k < OUTS; ++k) {
            float* out = y + r * ldy + o + k;
            const float base = begin == Begin::kZero ? 0.0F : begin == Begin::kBias ? bias[o + k] : *out;
            *out = base + sum(sums[r][k]);
        }
    }
}

template <int ROWS>
void dot_rows(const Matrix<float>& a, const float* x, std::int64_t ldx, float* y, std::int64_t ldy, Begin begin,
              const float* bias) {
    constexpr int kOuts = ROWS == 1 ? 8 : 4;
    std::int64_t o = 0;
    for (; o + kOuts <= a.n_out; o += kOuts) dot_block<ROWS, kOuts>(a, o, x, ldx, y, ldy, begin, bias);
    for (; o < a.n_out; ++o) dot_block<ROWS, 1>(a, o, x, ldx, y, ldy, begin, bias);
}

// Adds COUNT rows of the transposed W at a time.
template <int ROWS, int COUNT>
void axpy_block(const Matrix<float>& a, std::int64_t i, const float* x, std::int64_t ldx, float* y, std::int64_t ldy) {
    const float* w = a.w + i * a.stride_in;
    Vec factors[ROWS][COUNT];
    for (int r = 0; r < ROWS; ++r) {
        for (int k = 0; k < COUNT; ++k) factors[r][k] = broadcast(x[r * ldx + i + k]);
    }
    for (std::int64_t o = 0; o < a.n_out; o += kLanes) {
        Vec weights[COUNT];
        for (int k = 0; k < COUNT; ++k) weights[k] = load_up_to(w + k * a.stride_in + o, a.n_out - o);
        for (int r = 0; r < ROWS; ++r) {
            Vec total = load(y + r * ldy + o);
            for (int k = 0; k < COUNT; ++k) total += factors[r][k] * weights[k];
            store(y + r * ldy + o, total);
        }
    }
}

template <int ROWS>
void axpy_rows(const Matrix<float>& a, const float* x, std::int64_t ldx, float* y, std::int64_t ldy, Begin begin,
               const float* bias) {
    if (begin != Begin::kAdd) {
        for (int r = 0; r < ROWS; ++r) {
            for (std::int64_t o = 0; o < a.n_out; o += kLanes) {
                store(y + r * ldy + o, begin == Begin::kBias ? load(bias + o) : Vec{});
            }
        }
    }
    std::int64_t i = 0;
    for (; i + 4 <= a.n_in; i += 4) axpy_block<ROWS, 4>(a, i, x, ldx, y, ldy);
    for (; i < a.n_in; ++i) axpy_block<ROWS, 1>(a, i, x, ldx, y, ldy);
}

template <int ROWS>
void direct_rows(const Matrix<float>& a, const float* x, std::int64_t ldx, float* y, std::int64_t ldy, Begin begin,
                 const float* bias) {
    (a.stride_in == 1 ? dot_rows<ROWS> : axpy_rows<ROWS>)(a, x, ldx, y, ldy, begin, bias);
}

inline void direct(const Matrix<float>& a, std::int64_t m, const float* x, std::int64_t ldx, float* y, std::int64_t ldy,
                   Begin begin, const float* bias) {
    switch (m) {
        case 1:
            return direct_rows<1>(a, x, ldx, y, ldy, begin, bias);
        case 2:
            return direct_rows<2>(a, x, ldx, y, ldy, begin, bias);
        case 3:
            return direct_rows<3>(a, x, ldx, y, ldy, begin, bias);
        default:
            return direct_rows<4>(a, x, ldx, y, ldy, begin, bias);
    }
}

}  // namespace GAC_FAST_ISA
}  // namespace gac_fast
