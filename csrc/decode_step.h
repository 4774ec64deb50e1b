// One environment step of N environments through the whole decoder: embeddings, all layers on rings of keys and values,
// attention to the plan, action head.
#pragma once

#include <cstddef>
#include <cstdint>

#include "isa.h"
#include "rotary_table.h"

namespace gac_fast {

struct DecodeSizes {
    std::int64_t n_layers, dim, n_heads, hidden, obs_dim, act_dim;
    bool reads_actions;  // two tokens per step, a_{t-1} and s_t
    bool bf16;           // layers' weights, operands of their products and rings
};

// A linear map [out, in] and its bias [out], as the model holds them.
struct LinearSource {
    const float* w;
    const float* b;
};

struct LayerSource {
    LinearSource norm1, qkv, o, norm2, plan_q, plan_o, norm3, in, out;
};

struct DecoderSource {
    DecodeSizes sizes;
    LinearSource embed_state, embed_action, norm, head;
    const LayerSource* layers;
};

// The same, packed; vectors are padded with zeros to whole columns of a product. Embeddings and head stay in float32.
struct PackedLinear {
    const void* w;
    const float* b;
};

struct PackedNorm {
    const float* w;
    const float* b;
};

struct PackedLayer {
    PackedNorm norm1, norm2, norm3;
    PackedLinear q, kv, o, plan_q, plan_o, in, out;
};

struct PackedDecoder {
    DecodeSizes sizes;
    PackedLinear embed_state, embed_action, head;
    PackedNorm norm;
    const PackedLayer* layers;
};

struct DecodeStepArgs {
    const PackedDecoder* weights;
    const RotaryTable* rotary;
    std::int64_t n_rows, window, n_z;  // environments P, tokens W of a ring, plan vectors
    void* ring_k;                      // [L, P, W, H, d]
    void* ring_v;
    const float* plan_k;  // [L, P, n_z, H, d]
    const float* plan_v;
    std::int64_t* steps;  // [P]
    float* last_action;   // [P, act_dim]
    const char* observations;
    std::int64_t row_bytes, element_bytes;  // strides of the observations
    bool doubles;                           // they are float64
    const float* obs_mean;                  // null: observations and actions are normalised ones
    const float* obs_std;
    const float* action_mid;
    const float* action_half;
    float* out;  // [P, act_dim]
    int n_threads;
    bool soon_after;  // the last step, whichever it was, has just ended: threads that took part in it are awake
};

// Bytes that decode_step_pack() writes into `memory`, which lies on a boundary of 64; null counts them alone.
GAC_FAST_DECLARE(std::size_t decode_step_pack(const DecoderSource& source, char* memory, PackedDecoder* packed);)

// Feeds one step, advances `steps`, leaves the mean actions in `last_action` and, in units of the environment, in
// `out`. Returns the first environment whose observation is not finite, and then nothing was done; otherwise -1.
GAC_FAST_DECLARE(std::int64_t decode_step(const DecodeStepArgs& args);)

}  // namespace gac_fast
