#include "gemm_test.h"

#include "gemm.h"

namespace gac_fast {
namespace GAC_FAST_ISA {
namespace {

template <typename T>
void run(const GemmTest& t) {
    const std::int64_t ldx = round_up(t.n_in, kPairs);
    const std::int64_t ldy = round_up(t.n_out, kColumns);
    Arena arena;
    for (int pass = 0; pass < 2; ++pass) {
        T* packed = arena.take<T>(packed_size<T>(t.n_out, t.n_in));
        T* x = arena.take<T>(t.m * ldx);
        float* y = arena.take<float>(t.m * ldy);
        float* bias = arena.take<float>(ldy);
        if (pass == 0) {
            arena = Arena(arena.used());
            continue;
        }
        pack<T>(t.w, t.transposed ? 1 : t.w_stride, t.transposed ? t.w_stride : 1, t.n_out, t.n_in, packed);
        for (std::int64_t r = 0; r < t.m; ++r) {
            for (std::int64_t i = 0; i < ldx; ++i) {
                const float value = i < t.n_in ? t.x[r * t.x_stride + i] : 0.0F;
                convert(&value, 1, x + r * ldx + i);
            }
            for (std::int64_t o = 0; o < ldy; ++o) y[r * ldy + o] = o < t.n_out ? t.y[r * t.y_stride + o] : 0.0F;
        }
        for (std::int64_t o = 0; o < ldy; ++o)
            bias[o] = t.bias != nullptr && o < t.n_out ? t.bias[o * t.bias_stride] : 0.0F;
        const Begin begin = t.add ? Begin::kAdd : t.bias != nullptr ? Begin::kBias : Begin::kZero;
        {
            const TileScope tiles;
            for (int i = 0; i < t.repeats; ++i) {
                gemm<T>(t.m, t.n_out, t.n_in, x, ldx, packed, y, ldy, begin, bias);
            }
        }
        for (std::int64_t r = 0; r < t.m; ++r) {
            for (std::int64_t o = 0; o < t.n_out; ++o) t.y[r * t.y_stride + o] = y[r * ldy + o];
        }
    }
}

}  // namespace

void gemm_test(const GemmTest& test) {
    if (test.bf16) {
        run<Bf16>(test);
    } else {
        run<float>(test);
    }
}

}  // namespace GAC_FAST_ISA
}  // namespace gac_fast
