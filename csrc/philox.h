// Philox4x32-10 (Salmon et al. 2011), one counter at a time; for sources that are compiled once.
#pragma once

#include <array>
#include <cstdint>

namespace gac_fast {

// Four random words of a counter under a key.
inline std::array<std::uint32_t, 4> philox4x32(std::array<std::uint32_t, 2> key, std::array<std::uint32_t, 4> counter) {
    const auto high = [](std::uint64_t x) { return static_cast<std::uint32_t>(x >> 32); };
    const auto low = [](std::uint64_t x) { return static_cast<std::uint32_t>(x); };
    for (int round = 0; round < 10; ++round) {
        const std::uint64_t product0 = UINT64_C(0xD2511F53) * counter[0];
        const std::uint64_t product1 = UINT64_C(0xCD9E8D57) * counter[2];
        counter = {high(product1) ^ counter[1] ^ key[0], low(product1), high(product0) ^ counter[3] ^ key[1],
                   low(product0)};
        key = {key[0] + 0x9E3779B9, key[1] + 0xBB67AE85};
    }
    return counter;
}

}  // namespace gac_fast
