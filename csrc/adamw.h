// One step of AdamW on all parameters of a model, after clipping the norm of their gradients.
#pragma once

#include <cstdint>

#include "isa.h"

namespace gac_fast {

// One parameter of n elements and what belongs to it.
struct AdamWParameter {
    std::int64_t n;
    float* value;
    float* gradient;
    float* first;  // moments
    float* second;
    float decay;  // what the value is multiplied by before
    float rate;   // the learning rate over 1 - beta1^t
    float scale;  // 1 / sqrt(1 - beta2^t)
};

struct AdamW {
    const AdamWParameter* parameters;
    std::int64_t n_parameters;
    double max_norm;
    float beta1, beta2, eps;
    int n_threads;
};

// The sum of the gradients' squares, over fixed ranges that are added in order: the same bits on any number of threads.
// Where its root exceeds max_norm, the gradients are scaled to it in place. Returns the root.
GAC_FAST_DECLARE(double adamw(const AdamW& args);)

}  // namespace gac_fast
