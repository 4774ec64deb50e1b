// What sources that fill and read tile registers share. For per-ISA sources alone, as simd.h.
#pragma once

#include "simd.h"

namespace gac_fast {
namespace GAC_FAST_ISA {

// GCC's tile intrinsics do not say that they touch memory.
inline void memory_barrier() { asm volatile("" ::: "memory"); }

#if defined(__AVX512F__)
// Swaps the blocks of S x S that lie across the diagonal.
template <int S>
inline void swap_blocks(Vec (&rows)[kLanes]) {
    const IntVec lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const auto upper = (__m512i)((lane & S) != 0 ? lane + (kLanes - S) : lane);
    const auto lower = (__m512i)((lane & S) != 0 ? lane + kLanes : lane + S);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
        if ((i & S) != 0) continue;
        const auto top = (__m512)rows[i];
        const auto bottom = (__m512)rows[i + S];
        rows[i] = (Vec)_mm512_permutex2var_ps(top, upper, bottom);
        rows[i + S] = (Vec)_mm512_permutex2var_ps(top, lower, bottom);
    }
}

inline void transpose(Vec (&rows)[kLanes]) {
    swap_blocks<1>(rows);
    swap_blocks<2>(rows);
    swap_blocks<4>(rows);
    swap_blocks<8>(rows);
}
#endif

}  // namespace GAC_FAST_ISA
}  // namespace gac_fast
