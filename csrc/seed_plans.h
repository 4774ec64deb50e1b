// From plan seeds to what the decoder's layers read of a plan, and the gradient of the seeds' energy back: everything
// of a Langevin step of the posterior that is not the decoder. In float32; plans are independent of each other.
#pragma once

#include <cstddef>
#include <cstdint>

#include "isa.h"

namespace gac_fast {

// A layer's map of the plan to keys and values: [2 D][D], [2 D], and positions [n_z][D]. All without gaps.
struct SeedLayer {
    const float *w, *b, *position;
};

// U(z0) and the layers' maps.
struct SeedModel {
    std::int64_t n_plans, n_z, dim;
    // [hidden][d], [hidden], [d][hidden], [d] with d = n_z * dim; null for the identity.
    std::int64_t hidden;
    const float *w1, *b1, *w2, *b2;
    std::int64_t n_layers;
    const SeedLayer* layers;
    int n_threads;
};

struct SeedForward {
    SeedModel model;
    const float* z0;  // [P][d]
    float* before;    // [P][hidden], the hidden units before their activation
    float* z;         // [P][d]
    float* scale;     // [P][n_z], one over the norms
    float* kv;        // [L][2][P][n_z][D]
};

// w_i [E][out][in], b_i [E][out].
struct SeedReturns {
    std::int64_t n_members, hidden1, hidden2, n_obs;
    const float *w1, *b1, *w2, *b2, *w3, *b3;
    const float* context;  // [P], rows context_stride apart; null where n_obs = 0
    std::int64_t context_stride;
    const float *y, *weight;  // [P], the return and what its halved mean squared error counts
};

struct SeedGradient {
    SeedModel model;
    const SeedReturns* returns;  // null for none
    const float *z0, *before, *z, *scale;
    const float* dkv;
    float dkv_scale;  // what the gradient of keys and values counts
    const float* dz;  // [P][d], what comes from elsewhere; null for none
    float* gradient;  // [P][d], of the seeds' energy, or null
    // [P][d] and [P][hidden], the gradients before the norm and of the hidden units, and the units' activations; or
    // null.
    float *du, *dbefore, *active;
};

// The gradients of all weights of a model, from what SeedGradient gave.
struct SeedWeights {
    SeedModel model;
    const float *z0, *z, *dkv, *du, *dbefore, *active;
    float *dw1, *db1, *dw2, *db2;
    float* const* dlayers;  // [L][3]: w, b, position
};

// z0 <- z0 - (s^2 / 2) gradient + s * noise, s = step_size or less: |drift| <= max_drift_ratio |noise|.
struct SeedMove {
    std::int64_t n_plans, d;
    const float* gradient;
    float* z0;
    double step_size, max_drift_ratio;
    std::uint32_t seed0, seed1;
    const std::int64_t *ids, *steps;  // [P] of the noise, within [0, 2^32), strides in elements
    std::int64_t id_stride, step_stride;
    float *size, *ratio;  // [P], s and |drift| / |noise| as taken
    int n_threads;
};

// Of mean actions tanh(y): the sums of (a - tanh y)^2 by dimension, and the gradient of half of each.
struct ActionErrors {
    std::int64_t n, act_dim;
    bool bf16;      // y and dy
    const void* y;  // [n][act_dim]
    const float* actions;
    const bool* counts;  // [n], steps that count; null for all
    const float* scale;  // [act_dim], of dy
    void* dy;            // null where it is not wanted
    double* squares;     // [act_dim], null where they are not wanted
    int n_threads;
};

// Losses of the return models' mean, with dropout, and of their variance, without, the plan and the errors held fixed:
//   mean = sum over members and plans of seen (y - r)^2,
//   variance = sum of fitted ((y - r)^2 exp(-v) + v) / 2, v the logarithm of the variance within its range.
struct ReturnLosses {
    std::int64_t n_plans, d, n_members, hidden1, hidden2, n_obs;
    const float *w1, *b1, *w2, *b2, *w3, *b3;
    const float* z;        // [P][d]
    const float* context;  // [P], rows context_stride apart
    std::int64_t context_stride;
    const float *y, *seen, *fitted;  // [P]
    const float *mask1, *mask2;      // [E][P][hidden], factors of dropout; null for none
    double* losses;                  // [2]
    // Of factors[0] mean + factors[1] variance: with respect to z, and to the weights; null where they are not wanted.
    float factors[2];
    float* dz;
    float *dw1, *db1, *dw2, *db2, *dw3, *db3;
    void* memory;  // return_losses_bytes(), on a boundary of 64
    int n_threads;
};

GAC_FAST_DECLARE(std::size_t return_losses_bytes(const ReturnLosses& args);
                 void return_losses(const ReturnLosses& args);)

GAC_FAST_DECLARE(void seed_plans(const SeedForward& args); void seed_gradient(const SeedGradient& args);
                 void seed_weights(const SeedWeights& args); void seed_move(const SeedMove& args);
                 void action_errors(const ActionErrors& args);)

}  // namespace gac_fast
