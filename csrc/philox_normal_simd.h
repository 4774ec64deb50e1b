// Philox4x32-10 and Box-Muller on vectors, for per-ISA sources. Words lie in 64-bit lanes, which hold the products of
// 32-bit words; normals are made in double: the result is the float nearest to the exact normal, or the one beside it,
// whatever the word (near u = 1 a float32 logarithm would lose half of its digits).
#pragma once

#include "simd.h"

namespace gac_fast {
namespace GAC_FAST_ISA {
namespace philox {

constexpr int kCounters = kLanes / 2;  // that a vector holds
constexpr int kBatch = 4 * kCounters;  // normals of one round of vectors

typedef std::uint64_t WordVec __attribute__((vector_size(kCounters * 8)));
typedef double DoubleVec __attribute__((vector_size(kCounters * 8)));
typedef float NarrowVec __attribute__((vector_size(kCounters * 4)));
typedef std::uint64_t UnalignedWordVec __attribute__((vector_size(kCounters * 8), aligned(8), may_alias));

struct Words {
    WordVec w[4];
};

// Of the low halves.
inline WordVec multiply(WordVec a, WordVec b) {
#if defined(__AVX512F__)
    return (WordVec)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    return (WordVec)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#else
    return (a & 0xFFFFFFFFU) * (b & 0xFFFFFFFFU);
#endif
}

// At the counters (first + lane, plan, step, 0). The upper halves of the lanes are clear.
inline Words words(std::uint32_t seed0, std::uint32_t seed1, std::uint32_t plan, std::uint32_t step,
                   std::uint32_t first) {
    const WordVec low = WordVec{} + 0xFFFFFFFFU;
    const WordVec multiplier0 = WordVec{} + 0xD2511F53U;
    const WordVec multiplier1 = WordVec{} + 0xCD9E8D57U;
    WordVec c0{};
    // The word wraps around as the counter does.
    for (int i = 0; i < kCounters; ++i) c0[i] = static_cast<std::uint32_t>(first + static_cast<std::uint32_t>(i));
    WordVec c1 = WordVec{} + plan;
    WordVec c2 = WordVec{} + step;
    WordVec c3{};
    for (int round = 0; round < 10; ++round) {
        const WordVec product0 = multiply(c0, multiplier0);
        const WordVec product1 = multiply(c2, multiplier1);
        // Upper halves may fill up in between: the products do not read them.
        c0 = (product1 >> 32) ^ c1 ^ seed0;
        c1 = product1 & low;
        c2 = (product0 >> 32) ^ c3 ^ seed1;
        c3 = product0 & low;
        seed0 += 0x9E3779B9U;
        seed1 += 0xBB67AE85U;
    }
    return {{c0, c1, c2, c3}};
}

// Of integers below 2^52.
inline DoubleVec to_double(WordVec x) { return (DoubleVec)(x | 0x4330000000000000U) - 4503599627370496.0; }

inline DoubleVec reciprocal(DoubleVec x) {
#if defined(__AVX512F__)
    const DoubleVec y = (DoubleVec)_mm512_rcp14_pd((__m512d)x);
    return y * (2.0 - x * y);
#else
    return 1.0 / x;
#endif
}

inline DoubleVec root(DoubleVec x) {
#if defined(__AVX512F__)
    // The floor keeps zero away from the reciprocal root.
    const __m512d floor = _mm512_max_pd((__m512d)x, _mm512_set1_pd(1e-300));
    const DoubleVec y = (DoubleVec)_mm512_rsqrt14_pd(floor);
    return x * y * (1.5 - 0.5 * (DoubleVec)floor * y * y);
#elif defined(__AVX2__)
    return (DoubleVec)_mm256_sqrt_pd((__m256d)x);
#else
    for (int i = 0; i < kCounters; ++i) x[i] = __builtin_sqrt(x[i]);
    return x;
#endif
}

// -2 ln((word + 1) / 2^32), to 4e-9 of itself.
inline DoubleVec minus_two_log(WordVec word) {
    const WordVec bits = (WordVec)to_double(word + 1U);
    // x = 2^n m with m in [sqrt(1/2), sqrt(2)): what the bits lie above those of sqrt(1/2) counts the exponent.
    const WordVec above = bits - 0x3FE6A09E667F3BCDU;
    const DoubleVec n = to_double((above >> 52) & 0xFFFU);
    const DoubleVec m = (DoubleVec)((above & 0x000FFFFFFFFFFFFFU) + 0x3FE6A09E667F3BCDU);
    // ln m = 2 artanh(s)
    const DoubleVec s = (m - 1.0) * reciprocal(m + 1.0);
    const DoubleVec z = s * s;
    DoubleVec series = z * (1.0 / 11) + 1.0 / 9;
    series = series * z + 1.0 / 7;
    series = series * z + 1.0 / 5;
    series = series * z + 1.0 / 3;
    series = series * z + 1.0;
    return (32.0 - n) * (2 * 0.693147180559945309417) - 4.0 * s * series;
}

// radius * (cos, sin)(2 pi word / 2^32).
inline void on_circle(WordVec word, DoubleVec radius, DoubleVec* cosine, DoubleVec* sine) {
    const WordVec quarter = (word + (1U << 29)) >> 30;
    // Within an eighth of a turn of the nearest quarter.
    const DoubleVec r = (to_double(word) - to_double(quarter << 30)) * (6.283185307179586476925 / 4294967296.0);
    const DoubleVec z = r * r;
    DoubleVec s = z * (1.0 / 362880) - 1.0 / 5040;
    s = s * z + 1.0 / 120;
    s = s * z - 1.0 / 6;
    s = (s * z + 1.0) * r;
    DoubleVec c = 1.0 / 40320 - z * (1.0 / 3628800);
    c = c * z - 1.0 / 720;
    c = c * z + 1.0 / 24;
    c = c * z - 0.5;
    c = c * z + 1.0;
    const auto odd = (quarter & 1U) != 0;
    const WordVec swapped_c = odd ? (WordVec)s : (WordVec)c;
    const WordVec swapped_s = odd ? (WordVec)c : (WordVec)s;
    // Signs: the sine turns in the second half turn, the cosine in the middle two quarters.
    *cosine = radius * (DoubleVec)(swapped_c ^ (((quarter + 1U) & 2U) << 62));
    *sine = radius * (DoubleVec)(swapped_s ^ ((quarter & 2U) << 62));
}

// kBatch normals, those of the counters from `first` on.
inline void batch(std::uint32_t seed0, std::uint32_t seed1, std::uint32_t plan, std::uint32_t step, std::uint32_t first,
                  float* out) {
    const Words random = words(seed0, seed1, plan, step, first);
    DoubleVec x[4];
    for (int pair = 0; pair < 4; pair += 2) {
        const DoubleVec radius = root(minus_two_log(random.w[pair]));
        on_circle(random.w[pair + 1], radius, &x[pair], &x[pair + 1]);
    }
#if defined(__AVX512F__)
    __m512 pairs[2];
    for (int i = 0; i < 2; ++i) {
        const __m512 cosines = _mm512_castps256_ps512(_mm512_cvtpd_ps((__m512d)x[2 * i]));
        pairs[i] = _mm512_insertf32x8(cosines, _mm512_cvtpd_ps((__m512d)x[2 * i + 1]), 1);
    }
    const __m512i low = _mm512_setr_epi32(0, 8, 16, 24, 1, 9, 17, 25, 2, 10, 18, 26, 3, 11, 19, 27);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(4));
    store(out, (Vec)_mm512_permutex2var_ps(pairs[0], low, pairs[1]));
    store(out + kLanes, (Vec)_mm512_permutex2var_ps(pairs[0], high, pairs[1]));
#else
    NarrowVec narrow[4];
    for (int i = 0; i < 4; ++i) narrow[i] = __builtin_convertvector(x[i], NarrowVec);
    for (int lane = 0; lane < kCounters; ++lane) {
        for (int i = 0; i < 4; ++i) out[4 * lane + i] = narrow[i][lane];
    }
#endif
}

// Elements `first` (a multiple of 4) to first + n of a plan and step; writes beyond n up to a multiple of kBatch.
inline void normals(std::uint32_t seed0, std::uint32_t seed1, std::uint32_t plan, std::uint32_t step,
                    std::int64_t first, std::int64_t n, float* out) {
    for (std::int64_t i = 0; i < n; i += kBatch) {
        batch(seed0, seed1, plan, step, static_cast<std::uint32_t>((first + i) / 4), out + i);
    }
}

}  // namespace philox
}  // namespace GAC_FAST_ISA
}  // namespace gac_fast
