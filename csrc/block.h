// What a decoder layer does to each token alone: everything between two window attentions, in one pass over tiles of
// tokens, forward and backward.
//
// Every norm's scale and offset are folded into the matrix behind it, so that a norm is (x - mean) / std and its result
// both operand and what the backward reads. Rows of T (float, or bfloat16 bits) are padded: to round_up(n, 32) elements
// for width D (ld_dim), the MLP (ld_hidden) and H * n_z (ld_plan).
#pragma once

#include <cstddef>
#include <cstdint>

#include "isa.h"

namespace gac_fast {

// One linear map: weight [n_out][n_in] (rows `stride` apart) and bias [n_out].
struct BlockLinear {
    const float* weight;
    std::int64_t stride;
    const float* bias;
    std::int64_t n_out, n_in;
};

enum BlockMap { kBlockO, kBlockPlanQ, kBlockPlanO, kBlockIn, kBlockOut, kBlockNext, kBlockMaps };

// The maps of a layer, packed; kBlockO is null for a layer without it.
struct BlockPacks {
    std::int64_t dim, hidden, n_next;
    bool bf16, has_o;
    const void* forward[kBlockMaps];
    const void* transposed[kBlockMaps];  // null where packed for the forward alone
    const float* bias[kBlockMaps];       // padded to 32
};

// Tokens [first, first + count) of one sequence.
struct BlockTile {
    std::int64_t sequence, first, count;
};

// [B][n_z][H][d], elements of a head side by side; strides in elements.
struct BlockPlan {
    const void* data;
    bool bf16;
    std::int64_t stride_b, stride_z, stride_h;
};

struct BlockShape {
    std::int64_t n_tokens, n_sequences, n_tiles, n_z, n_heads;
    const BlockTile* tiles;
    const std::int64_t* first_tile;  // [n_sequences + 1]
    int n_threads;
};

struct BlockForward {
    BlockShape shape;
    const BlockPacks* packs;
    const float* x;
    std::int64_t x_stride;
    const void* attended;  // T, null where the layer has no kBlockO
    std::int64_t attended_stride;
    BlockPlan k, v;
    void* plan_packs;  // block_plan_bytes()
    float* x_out;      // [N][D]
    void* y;           // T [N][n_next]
    // For the backward, all null without one. Two norms, one over each other's square root; the plan's softmax.
    void* normed1;  // T [N][ld_dim]
    void* normed2;  // T [N][ld_dim]
    float* rstd;    // [N][2]
    float* probs;   // [N][H * n_z]
    float* q;       // [N][ld_dim], float alone: in bfloat16 computing q and hidden again costs less than reading them
    float* hidden;  // [N][ld_hidden], float alone
};

// What products over all tokens need: the gradients of the maps' outputs and their inputs, T [N][ld].
struct BlockOperands {
    void *dx1, *dq, *dx2, *dhidden, *dx3;
    void *attended_plan, *activated, *normed3;
    float* dbias;           // [sum of n_out] in the order of BlockMap, without kBlockO where there is none
    float* dbias_partials;  // [n_tiles][sum of n_out]
};

struct BlockBackward {
    BlockShape shape;
    const BlockPacks* packs;
    const float* dx_out;  // null for zero
    std::int64_t dx_out_stride;
    const void* dy;  // T, null for zero
    std::int64_t dy_stride;
    const float* x_out;
    const void* normed1;
    const void* normed2;
    const float* rstd;
    const float* probs;
    const float* q;
    const float* hidden;
    BlockPlan k, v;
    void* plan_packs;
    float* plan_partials;           // [n_tiles][2][n_z][D]
    float* dx;                      // [N][every][D], null where neither it nor dattended is wanted
    void* dattended;                // T [N][every][D], or null
    std::int64_t every;             // the first of so many rows is the token's, the others become zero
    float *dplan_k, *dplan_v;       // [B][n_z][D]
    const BlockOperands* operands;  // null where no weight wants a gradient
};

// Most tokens of a tile.
constexpr std::int64_t kBlockTile = 64;

// Two hashes that tell contents apart; they depend on the path that made them.
struct BlockFingerprint {
    std::uint64_t first, second;
};

GAC_FAST_DECLARE(void block_fingerprint(const float* x, std::int64_t n, BlockFingerprint* state);
                 std::size_t block_pack_bytes(bool bf16, std::int64_t n_out, std::int64_t n_in);
                 void block_fold(const BlockLinear& map, const float* norm_w, const float* norm_b, float* weight,
                                 float* bias);
                 void block_pack(bool bf16, const BlockLinear& map, bool transposed, void* packed);
                 std::size_t block_plan_bytes(const BlockShape& shape, std::int64_t dim, bool bf16);
                 void block_forward(const BlockForward& args); void block_backward(const BlockBackward& args);)

}  // namespace gac_fast
