// A small pool of threads for loops over independent tiles.
#pragma once

#include <cstdint>

namespace gac_fast {

// How long a worker without work stays awake, in microseconds.
constexpr std::int64_t kWorkersSpin = 200;

// Calls task(context, i) for every i in [0, n), by at most n_threads threads, the calling one among them. Which thread
// takes which i is left open: a result must not depend on it. The first exception of a task comes back to the caller
// (tasks not yet begun are then skipped). Several threads may call at once; inside a task, and in the child of a fork
// before its first call, the loop runs or begins anew without the old threads.
void parallel_for_each(std::int64_t n, int n_threads, void (*task)(void* context, std::int64_t i), void* context);

}  // namespace gac_fast
