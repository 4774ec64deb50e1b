// Memory for intermediate values: one buffer per thread, which grows and stays.
#pragma once

#include <cstddef>

namespace gac_fast {

// At least `bytes` bytes on a boundary of 64, private to the calling thread, undefined at first. Valid until the same
// thread asks again. Throws std::bad_alloc.
void* thread_scratch(std::size_t bytes);

}  // namespace gac_fast
