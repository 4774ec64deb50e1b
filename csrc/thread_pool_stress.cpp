// Drives the thread pool hard, for ThreadSanitizer (`make sanitize`). Exit status 0 where every loop came out right.
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "thread_pool.h"

namespace {

// Plain integers, each written by whoever takes its index: ThreadSanitizer sees a lost happens-before.
struct Loop {
    std::vector<std::int64_t> counts;
    std::int64_t fail_at = -1;
    int nested_threads = 0;

    void run(int n_threads) {
        const auto task = [](void* context, std::int64_t i) {
            Loop& loop = *static_cast<Loop*>(context);
            if (i == loop.fail_at) throw std::runtime_error(std::to_string(i));
            if (loop.nested_threads > 0) {
                Loop inner;
                inner.counts.resize(3);
                inner.run(loop.nested_threads);
            }
            loop.counts[static_cast<std::size_t>(i)] += 1;
        };
        gac_fast::parallel_for_each(static_cast<std::int64_t>(counts.size()), n_threads, task, this);
    }
};

// Members that hear of each other at every turn, beside loops of other callers; true where all heard all.
struct Talk {
    gac_fast::Meeting meeting;
    std::int64_t said[gac_fast::kMostMembers] = {};
    std::int64_t heard[gac_fast::kMostMembers] = {};
    int size = 0;

    bool run(int n_threads) {
        const auto task = [](void* context, int member, int size) {
            Talk& all = *static_cast<Talk*>(context);
            if (member == 0) all.size = size;
            for (std::int64_t turn = 1; turn <= 20; ++turn) {
                all.said[member] = turn;
                all.meeting.wait(member, size);
                for (int other = 0; other < size; ++other) all.heard[member] += all.said[other];
                all.meeting.wait(member, size);
            }
        };
        if (!gac_fast::run_together(n_threads, task, this)) return true;
        for (int member = 0; member < size; ++member) {
            if (heard[member] != 210 * size) return false;
        }
        return true;
    }
};

bool drive(int number, int n_turns) {
    for (int turn = 0; turn < n_turns; ++turn) {
        const int n_threads = 1 + (number + turn) % 6;
        Loop loop;
        loop.counts.resize(static_cast<std::size_t>((number * 7 + turn) % 23));
        loop.nested_threads = turn % 3;
        for (int repeat = 0; repeat < 5; ++repeat) {
            loop.run(n_threads);
            if (!Talk().run(n_threads)) return false;
        }
        for (const std::int64_t count : loop.counts) {
            if (count != 5) return false;
        }
        if (loop.counts.empty()) continue;
        loop.fail_at = turn % static_cast<std::int64_t>(loop.counts.size());
        try {
            loop.run(n_threads);
            return false;
        } catch (const std::runtime_error& error) {
            if (error.what() != std::to_string(loop.fail_at)) return false;
        }
    }
    return true;
}

}  // namespace

int main() {
    std::atomic<int> n_wrong{0};
    for (const int n_callers : {1, 2, 8}) {
        std::vector<std::thread> callers;
        for (int number = 0; number < n_callers; ++number) {
            callers.emplace_back([&n_wrong, number] { n_wrong += drive(number, 400) ? 0 : 1; });
        }
        for (std::thread& caller : callers) caller.join();
    }
    std::printf("thread_pool_stress: %d of 11 callers went wrong\n", n_wrong.load());
    return n_wrong.load() == 0 ? 0 : 1;
}
