// Gradients of the weights of linear maps: products of two arrays over all of their rows, several maps at once.
#pragma once

#include <cstddef>
#include <cstdint>

#include "isa.h"

namespace gac_fast {

// dw[n_out][n_in] = the sum over rows of dy[n_out] x[n_in]. Strides in elements.
struct WeightGradient {
    std::int64_t n_out, n_in;
    const void* dy;
    std::int64_t dy_stride;
    const void* x;
    std::int64_t x_stride;
    float* dw;
    // Where the map stands behind a norm folded into it: dw is then the gradient of the map's own matrix `w`
    // [n_out][n_in], and those of the norm's scale and offset go to dnorm_w and dnorm_b. `db` [n_out] is the gradient
    // of the map's bias. Null where there is none.
    const float *w, *db, *norm_w, *norm_b;
    float *dnorm_w, *dnorm_b;
};

struct WeightGradients {
    bool bf16;  // dy and x, else float
    std::int64_t n_rows;
    const WeightGradient* maps;
    std::int64_t n_maps;
    void* partials;  // weight_gradients_bytes(), on a boundary of 64
    int n_threads;
};

// The sums run over fixed ranges of rows, which are added in order: the same bits for any number of threads.
GAC_FAST_DECLARE(std::size_t weight_gradients_bytes(const WeightGradients& args);
                 void weight_gradients(const WeightGradients& args);)

}  // namespace gac_fast
