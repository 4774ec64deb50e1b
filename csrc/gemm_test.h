// The products of gemm.h as a function of their own, for the tests.
#pragma once

#include <cstdint>

#include "isa.h"

namespace gac_fast {

struct GemmTest {
    std::int64_t m, n_out, n_in;
    const float* x;     // [m][n_in]
    const float* w;     // [n_out][n_in], or [n_in][n_out] where `transposed`
    const float* bias;  // [n_out] or null
    float* y;           // [m][n_out]
    // Distances of rows, in elements; of elements for the bias.
    std::int64_t x_stride, w_stride, bias_stride, y_stride;
    bool transposed, add, bf16;
    int repeats;
};

GAC_FAST_DECLARE(void gemm_test(const GemmTest& test);)

}  // namespace gac_fast
