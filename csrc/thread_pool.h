// A small pool of threads for loops over independent tiles.
#pragma once

#include <atomic>
#include <cstdint>

namespace gac_fast {

// How long a worker without work stays awake, in microseconds.
constexpr std::int64_t kWorkersSpin = 200;

// Calls task(context, i) for every i in [0, n), by at most n_threads threads, the calling one among them. Which thread
// takes which i is left open: a result must not depend on it. The first exception of a task comes back to the caller
// (tasks not yet begun are then skipped). Several threads may call at once; inside a task, and in the child of a fork
// before its first call, the loop runs or begins anew without the old threads.
void parallel_for_each(std::int64_t n, int n_threads, void (*task)(void* context, std::int64_t i), void* context);

constexpr int kMostMembers = 16;

// Calls task(context, member, size) in `size` threads at the same time, 2 <= size <= n_threads, the calling one being
// member 0; they may wait for each other at a Meeting. Of workers only those that are awake take part, kMostMembers - 1
// at most; the others are woken for the next time. Where there is none, returns false and has called nothing. `task`
// does not throw.
bool run_together(int n_threads, void (*task)(void* context, int member, int size), void* context);

// How often run_together() has called anything, in this process.
std::int64_t together_runs();

// One of them for all members of one run.
class Meeting {
  public:
    Meeting();
    // Until all members have called it as often.
    void wait(int member, int size);

  private:
    struct alignas(64) Place {
        std::atomic<std::int64_t> turn{0};
    };
    Place places_[kMostMembers];
};

}  // namespace gac_fast
