// All steps of the inference of plans: gradient ascent in a trust region, or Langevin steps towards a target return.
#pragma once

#include <cstddef>
#include <cstdint>

#include "isa.h"

namespace gac_fast {

// Rows of all matrices lie next to each other, except those of z0 and context.
struct PlanAscent {
    std::int64_t n_plans, n_z, dim;
    // U: [prior_hidden][d], [prior_hidden], [d][prior_hidden], [d] with d = n_z * dim; null for the identity.
    std::int64_t prior_hidden;
    const float *prior_w1, *prior_b1, *prior_w2, *prior_b2;
    // r: w_i [n_members][n_out][n_in], b_i [n_members][n_out].
    std::int64_t n_members, hidden1, hidden2;
    const float *w1, *b1, *w2, *b2, *w3, *b3;
    // First states [n_plans][n_starts][n_obs]; n_starts = 1 and n_obs = 0 where the return model takes none. Plans of
    // stride 0 share their starts.
    std::int64_t n_starts, n_obs, context_plan_stride, context_start_stride;
    const float* context;
    const float* z0;
    std::int64_t z0_stride;
    float* seeds;  // [n_plans][d]
    float* mean;
    float* std;
    std::int64_t n_steps;
    double step_size;
    // Of the ascent.
    float kappa, prior_weight;
    double radius, max_norm;
    // Of the Langevin steps.
    bool langevin;
    const float* target;  // [n_plans] standardised
    double max_drift_ratio;
    std::uint32_t seed0, seed1, first_step;
    const std::int64_t* plan_ids;  // [n_plans], plan_id_stride apart, within [0, 2^32)
    std::int64_t plan_id_stride;
    // How.
    bool bf16;
    int n_threads;
    std::int64_t tile;  // most plans that one task takes; 0 chooses
    void* shared;       // plan_ascent_shared_bytes() on a boundary of 64: what all tasks read
};

GAC_FAST_DECLARE(std::size_t plan_ascent_shared_bytes(const PlanAscent& args);)
GAC_FAST_DECLARE(void plan_ascent(const PlanAscent& args);)

}  // namespace gac_fast
