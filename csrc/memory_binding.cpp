// How the process keeps memory that it frees.
#include <pybind11/pybind11.h>

#if defined(__GLIBC__)
#include <malloc.h>
#endif

#include "bindings.h"

namespace gac_fast {
namespace {

// Blocks up to this size come from memory that stays with the process once it is freed; no more than the second number
// of free bytes stays at its end.
constexpr int kMostKept = 1 << 28;
constexpr int kMostFree = 1 << 30;

// Whether the C library could be told.
bool keep_freed_memory() {
#if defined(__GLIBC__)
    return mallopt(M_MMAP_THRESHOLD, kMostKept) == 1 && mallopt(M_TRIM_THRESHOLD, kMostFree) == 1;
#else
    return false;
#endif
}

}  // namespace

void bind_memory(pybind11::module_& m) { m.def("_keep_freed_memory", &keep_freed_memory); }

}  // namespace gac_fast
