// y = x W^T (+ b): products with a weight matrix that was packed once, in float32 and in bfloat16 with float32 sums.
#pragma once

#include <cstdint>

#include "simd.h"

namespace gac_fast {
namespace GAC_FAST_ISA {

// Columns of a packed matrix are padded to this; rows of y must have room for round_up(n_out, kColumns) values, of
// which those from n_out on are left undefined.
constexpr std::int64_t kColumns = 32;
// Rows of a bfloat16 x must have room for round_up(n_in, kPairs) values, those from n_in on zero. (float x: n_in.)
constexpr std::int64_t kPairs = 32;

// Elements that pack() writes, T = float or Bf16.
template <typename T>
std::int64_t packed_size(std::int64_t n_out, std::int64_t n_in);

// Packs W[o][i] = w[o * stride_out + i * stride_in]; swapped strides pack the transpose. `packed` on a boundary of 64
// bytes.
template <typename T>
void pack(const float* w, std::int64_t stride_out, std::int64_t stride_in, std::int64_t n_out, std::int64_t n_in,
          T* packed);

// How y begins.
enum class Begin {
    kZero,  // y = x W^T
    kBias,  // y = x W^T + bias; bias has room for round_up(n_out, kColumns) values
    kAdd,   // y += x W^T
};

// y[m][n_out] from x[m][n_in], rows ldx and ldy elements apart. The sum over n_in of an element does not depend on m,
// in either type: a row comes out bit for bit the same whatever rows are beside it. (It does depend on the path.)
// A bfloat16 product runs inside a TileScope.
template <typename T>
void gemm(std::int64_t m, std::int64_t n_out, std::int64_t n_in, const T* x, std::int64_t ldx, const T* packed,
          float* y, std::int64_t ldy, Begin begin, const float* bias = nullptr);

// Sets up the tile registers of this thread, and frees them at the end; nothing where there are none.
class TileScope {
  public:
    TileScope();
    ~TileScope();
    TileScope(const TileScope&) = delete;
    TileScope& operator=(const TileScope&) = delete;
};

}  // namespace GAC_FAST_ISA
}  // namespace gac_fast
