// Causal window attention over packed sequences with rotary positions, forward and backward.
#pragma once

#include <cstdint>

#include "isa.h"

namespace gac_fast {

// [N, H, d] of float32 or bfloat16; neighbouring elements of a head lie next to each other.
struct HeadsView {
    const void* data;
    std::int64_t token_stride, head_stride;  // in elements
};

struct WriteableHeadsView {
    void* data;
    std::int64_t token_stride, head_stride;
};

// Queries [first, last) of the sequence [begin, end): one task per head.
struct QueryChunk {
    std::int64_t sequence, begin, end, first, last;
};

struct WindowAttention {
    std::int64_t n_tokens, n_heads, width, window;
    bool bf16;
    const QueryChunk* chunks;
    std::int64_t n_chunks;
    const float* turns;             // [row][2][width / 2] cosines and sines, or null: no rotation
    const std::int64_t* turn_rows;  // [N] row of each token
    HeadsView q, k, v;
    int n_threads;
};

struct WindowAttentionForward {
    WindowAttention in;
    WriteableHeadsView out;
    float* softmax;  // [2, H, N] maximum of the scores, reciprocal of the sum of exponentials of what is below it
};

struct WindowAttentionBackward {
    WindowAttention in;
    HeadsView d_out;
    const float* softmax;
    WriteableHeadsView d_q, d_k, d_v;
};

GAC_FAST_DECLARE(void window_attention(const WindowAttentionForward& op);
                 void window_attention_backward(const WindowAttentionBackward& op);)

}  // namespace gac_fast
