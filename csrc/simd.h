// Vectors of the widest registers of the path being compiled, and the few functions on them that the ops share. For
// per-ISA sources alone (isa.h says why all of it lives in their namespace).
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(GAC_FAST_ASAN)
#include <sanitizer/asan_interface.h>
#endif

#include "scratch.h"
#include "thread_pool.h"

#ifndef GAC_FAST_ISA
#error "simd.h is for sources that are compiled once per instruction set"
#endif

namespace gac_fast {
namespace GAC_FAST_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef std::int32_t IntVec __attribute__((vector_size(kLanes * 4)));
typedef float UnalignedVec __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));

// A bfloat16: the upper half of a float.
struct Bf16 {
    std::uint16_t bits;
};

inline std::int64_t round_up(std::int64_t n, std::int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
inline std::int64_t min_of(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
inline std::int64_t max_of(std::int64_t a, std::int64_t b) { return a > b ? a : b; }

// Not Vec{} + x, which is an addition: it turns -0 into 0.
inline Vec broadcast(float x) { return x - Vec{}; }
inline Vec load(const float* p) { return *reinterpret_cast<const UnalignedVec*>(p); }
inline void store(float* p, Vec x) { *reinterpret_cast<UnalignedVec*>(p) = x; }

// The first n lanes, 0 < n < kLanes; the others are zero.
inline Vec load_first(const float* p, std::int64_t n) {
#if defined(__AVX512F__)
    return (Vec)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1U << n) - 1U), p);
#else
    Vec x{};
    std::memcpy(&x, p, static_cast<std::size_t>(n) * sizeof(float));
    return x;
#endif
}

inline void store_first(float* p, Vec x, std::int64_t n) {
#if defined(__AVX512F__)
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1U << n) - 1U), (__m512)x);
#else
    std::memcpy(p, &x, static_cast<std::size_t>(n) * sizeof(float));
#endif
}

inline Vec max_of(Vec a, Vec b) {
#if defined(__AVX512F__)
    return (Vec)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (Vec)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return a > b ? a : b;
#endif
}

inline Vec min_of(Vec a, Vec b) {
#if defined(__AVX512F__)
    return (Vec)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (Vec)_mm256_min_ps((__m256)a, (__m256)b);
#else
    return a < b ? a : b;
#endif
}

inline float sum(Vec x) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)x);
#else
    float total = 0;
    for (int i = 0; i < kLanes; ++i) total += x[i];
    return total;
#endif
}

inline float max_lane(Vec x) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)x);
#else
    float top = x[0];
    for (int i = 1; i < kLanes; ++i) top = x[i] > top ? x[i] : top;
    return top;
#endif
}

// About 2 ulp. Below -87.3 the result stays at e^-87.3 (1.2e-38), above 88 at e^88; NaN stays NaN.
inline Vec exp(Vec x) {
    x = max_of(broadcast(-87.33654F), min_of(broadcast(88.0F), x));
    // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits.
    const Vec shifted = x * 1.44269504F + 12582912.0F;
    const Vec n = shifted - 12582912.0F;
    const Vec r = (x - n * 0.693359375F) - n * -2.12194440e-4F;
    Vec p = r * 1.9875691500e-4F + 1.3981999507e-3F;
    p = p * r + 8.3334519073e-3F;
    p = p * r + 4.1665795894e-2F;
    p = p * r + 1.6666665459e-1F;
    p = p * r + 5.0000001201e-1F;
    p = p * r * r + r + 1.0F;
    const IntVec scale = ((IntVec)shifted << 23) + (127 << 23);
    return p * (Vec)scale;
}

inline Vec reciprocal(Vec x) {
#if defined(__AVX512F__)
    const Vec y = (Vec)_mm512_rcp14_ps((__m512)x);
    return y * (2.0F - x * y);
#else
    return 1.0F / x;
#endif
}

inline Vec sigmoid(Vec x) { return reciprocal(1.0F + exp(-x)); }
inline Vec silu(Vec x) { return x * sigmoid(x); }

// d silu / dx.
inline Vec silu_slope(Vec x) {
    const Vec s = sigmoid(x);
    return s * (1.0F + x * (1.0F - s));
}

inline float to_float(Bf16 x) {
    const std::uint32_t bits = static_cast<std::uint32_t>(x.bits) << 16;
    float y;
    std::memcpy(&y, &bits, sizeof(y));
    return y;
}

// To nearest, ties to even; NaN stays NaN.
inline Bf16 to_bf16(float x) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, sizeof(bits));
    if ((bits & 0x7FFFFFFFU) > 0x7F800000U) return {static_cast<std::uint16_t>(bits >> 16 | 0x40U)};
    return {static_cast<std::uint16_t>((bits + 0x7FFFU + (bits >> 16 & 1U)) >> 16)};
}

inline Vec load(const Bf16* p) {
#if defined(__AVX512F__)
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16);
#elif defined(__AVX2__)
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return (Vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16);
#else
    Vec x;
    for (int i = 0; i < kLanes; ++i) x[i] = to_float(p[i]);
    return x;
#endif
}

inline void store(Bf16* p, Vec x) {
#if defined(__AVX512BF16__)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh((__m512)x));
#elif defined(__AVX512F__)
    const __m512i bits = (__m512i)x;
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i top = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd), 16);
    const __mmask16 nan = _mm512_cmp_ps_mask((__m512)x, (__m512)x, _CMP_UNORD_Q);
    top = _mm512_mask_mov_epi32(top, nan, _mm512_set1_epi32(0x7FC0));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(top));
#else
    for (int i = 0; i < kLanes; ++i) p[i] = to_bf16(x[i]);
#endif
}

inline Vec load_first(const Bf16* p, std::int64_t n) {
    Bf16 lanes[kLanes] = {};
    std::memcpy(lanes, p, static_cast<std::size_t>(n) * sizeof(Bf16));
    return load(lanes);
}

inline void store_first(Bf16* p, Vec x, std::int64_t n) {
    Bf16 lanes[kLanes];
    store(lanes, x);
    std::memcpy(p, lanes, static_cast<std::size_t>(n) * sizeof(Bf16));
}

inline float to_float(float x) { return x; }

// y[i] = x[i], for any pair of float and Bf16.
template <typename To, typename From>
inline void convert(const From* x, std::int64_t n, To* y) {
    std::int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(y + i, load(x + i));
    if (i < n) store_first(y + i, load_first(x + i, n - i), n - i);
}

// Hands out parts of one thread's scratch memory, each on a boundary of 64 bytes. One at a time per thread: a task that
// holds an Arena must not start another. Measure first: Arena sizes; sizes.take<float>(n)...; then
// Arena arena(sizes.used()) and the same calls again.
class Arena {
  public:
    Arena() = default;
    explicit Arena(std::size_t bytes) : base_(static_cast<char*>(thread_scratch(bytes))) {}

    template <typename T>
    T* take(std::int64_t n) {
        T* p = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + used_);
        const std::int64_t bytes = n * static_cast<std::int64_t>(sizeof(T));
#if defined(GAC_FAST_ASAN)
        // A gap behind every part, that nobody may touch.
        const std::int64_t whole = round_up(bytes, 64) + 64;
        if (p != nullptr) __asan_poison_memory_region(reinterpret_cast<char*>(p) + bytes, whole - bytes);
#else
        const std::int64_t whole = round_up(bytes, 64);
#endif
        used_ += static_cast<std::size_t>(whole);
        return p;
    }

    std::size_t used() const { return used_; }

  private:
    char* base_ = nullptr;
    std::size_t used_ = 0;
};

// parallel_for_each with a lambda: f(i) for i in [0, n).
template <typename F>
inline void parallel_for(std::int64_t n, int n_threads, F&& f) {
    parallel_for_each(
        n, n_threads, [](void* context, std::int64_t i) { (*static_cast<F*>(context))(i); },
        const_cast<void*>(static_cast<const void*>(&f)));
}

}  // namespace GAC_FAST_ISA
}  // namespace gac_fast
