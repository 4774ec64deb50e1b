// Attention of every token to the plan vectors of its own sequence, forward and backward.
#pragma once

#include <cstdint>

#include "isa.h"
#include "window_attention.h"

namespace gac_fast {

// [B, n_z, H, d]; neighbouring elements of a head lie next to each other.
struct PlanView {
    const void* data;
    std::int64_t sequence_stride, vector_stride, head_stride;  // in elements
};

struct WriteablePlanView {
    void* data;
    std::int64_t sequence_stride, vector_stride, head_stride;
};

struct PlanAttention {
    std::int64_t n_heads, width, n_plan_vectors;
    bool bf16;
    const QueryChunk* chunks;
    std::int64_t n_chunks;
    HeadsView q;
    PlanView k, v;
    int n_threads;
};

struct PlanAttentionForward {
    PlanAttention in;
    WriteableHeadsView out;
};

struct PlanAttentionBackward {
    PlanAttention in;
    HeadsView d_out;
    WriteableHeadsView d_q;
    WriteablePlanView d_k, d_v;
    std::int64_t n_sequences;
    const std::int64_t* first_chunks;  // [B + 1] chunks of each sequence
    float* partial;                    // [n_chunks, H, 2, n_z, d] shares of the gradients of k and v
};

GAC_FAST_DECLARE(void plan_attention(const PlanAttentionForward& op);
                 void plan_attention_backward(const PlanAttentionBackward& op);)

}  // namespace gac_fast
