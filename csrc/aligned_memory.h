// Memory on a boundary of 64 bytes, freed with its owner.
#pragma once

#include <cstddef>
#include <memory>
#include <new>

namespace gac_fast {

constexpr std::align_val_t kAlignedTo{64};

struct ReleaseAligned {
    void operator()(void* p) const { ::operator delete(p, kAlignedTo); }
};

using AlignedMemory = std::unique_ptr<void, ReleaseAligned>;

inline AlignedMemory allocate_aligned(std::size_t bytes) {
    return AlignedMemory(::operator new(bytes > 0 ? bytes : 64, kAlignedTo));
}

}  // namespace gac_fast
