#include "scratch.h"

#include <memory>
#include <new>

namespace gac_fast {
namespace {

constexpr std::align_val_t kAlignment{64};

struct Release {
    void operator()(void* p) const { ::operator delete(p, kAlignment); }
};

}  // namespace

void* thread_scratch(std::size_t bytes) {
    thread_local std::unique_ptr<void, Release> buffer;
    thread_local std::size_t size = 0;
#if defined(GAC_FAST_ASAN)
    // Anew and exact every time: what lies beyond, and what the thread had before, is out of bounds.
    size = 0;
#endif
    if (bytes > size || buffer == nullptr) {
        buffer.reset();
        size = 0;
        buffer.reset(::operator new(bytes, kAlignment));
        size = bytes;
    }
    return buffer.get();
}

}  // namespace gac_fast
