// A linear map of every token, with or without the layer norm before it, forward and backward, in one pass over tiles
// of tokens. The norm's scale and offset are folded into the matrix, as in block.h.
#pragma once

#include <cstddef>
#include <cstdint>

#include "isa.h"

namespace gac_fast {

struct NormLinearMap {
    bool bf16, has_norm;  // operands of the product; a layer norm before it
    const float* weight;  // [n_out][n_in], rows `weight_stride` apart
    std::int64_t weight_stride;
    const float* bias;  // [n_out]
    std::int64_t n_out, n_in;
};

struct NormLinearForward {
    NormLinearMap map;
    std::int64_t n_tokens;
    const void* x;  // [N][n_in], in T where x_is_operand, else float
    std::int64_t x_stride;
    bool x_is_operand;
    const float* residual;  // [N][n_out], what is added to the map's result; null for none
    std::int64_t residual_stride;
    void* y;        // [N][n_out], T, with a residual float
    void* operand;  // T [N][round_up(n_in, 32)], what the backward reads; null without one, or where x itself is it
    float* rstd;    // [N], where there is a norm and a backward, else null
    void* packed;   // norm_linear_bytes()
    int n_threads;
};

struct NormLinearBackward {
    NormLinearMap map;
    std::int64_t n_tokens;
    const void* dy;  // [N][n_out], T, or float where dy_operand is given
    std::int64_t dy_stride;
    void* dy_operand;       // T [N][n_out], where dy goes as T; null where it is T
    const float* dx_start;  // [N][n_in], what is added to dx; null for none
    const void* operand;    // where there is a norm, as is
    const float* rstd;
    void* dx;            // [N][n_in], float, or T where x was; null where not wanted
    bool dx_is_operand;  // in T
    float* dbias;        // [n_out], null where not wanted
    float* dbias_partials;
    void* packed;
    int n_threads;
};

// Tokens of a tile.
constexpr std::int64_t kNormLinearTile = 64;

GAC_FAST_DECLARE(std::size_t norm_linear_bytes(const NormLinearMap& map);
                 void norm_linear(const NormLinearForward& args);
                 void norm_linear_backward(const NormLinearBackward& args);)

}  // namespace gac_fast
