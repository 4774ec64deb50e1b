// Runs loops of the thread pool, for the tests.
#include <pybind11/pybind11.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>

#include "bindings.h"
#include "check.h"
#include "gil.h"
#include "thread_pool.h"

namespace py = pybind11;

namespace gac_fast {
namespace {

struct Loop {
    RowsView<std::int64_t> counts;
    int n_threads;
    std::chrono::microseconds work;
    std::int64_t fail_at;
    std::mutex mutex;
    std::set<std::thread::id> threads;
};

struct Row {
    Loop* loop;
    std::int64_t i;
};

void count(void* context, std::int64_t j) {
    const Row& row = *static_cast<Row*>(context);
    std::int64_t& n = row.loop->counts.row(row.i)[j];
    // Whatever the array held: modulo 2^64.
    n = static_cast<std::int64_t>(static_cast<std::uint64_t>(n) + 1U);
}

void count_row(void* context, std::int64_t i) {
    Loop& loop = *static_cast<Loop*>(context);
    if (i == loop.fail_at) throw std::out_of_range("index " + std::to_string(i));
    if (loop.work.count() > 0) {
        const auto end = std::chrono::steady_clock::now() + loop.work;
        while (std::chrono::steady_clock::now() < end) {
        }
        const std::lock_guard<std::mutex> lock(loop.mutex);
        loop.threads.insert(std::this_thread::get_id());
    }
    Row row{&loop, i};
    parallel_for_each(loop.counts.columns, loop.n_threads, count, &row);
}

std::int64_t run(py::array counts, int n_threads, std::int64_t work_us, std::int64_t fail_at, std::int64_t repeats) {
    if (work_us < 0 || work_us > 1'000'000) fail("work_us", "0 to 1000000", std::to_string(work_us));
    Loop loop{writeable_rows_view<std::int64_t>(counts, kAny, kAny, "counts"),
              n_threads,
              std::chrono::microseconds(work_us),
              fail_at,
              {},
              {}};
    const GilRelease release;
    for (std::int64_t i = 0; i < repeats; ++i) parallel_for_each(loop.counts.rows, n_threads, count_row, &loop);
    return static_cast<std::int64_t>(loop.threads.size());
}

struct Talk {
    std::int64_t n_turns;
    Meeting meeting;
    // Plain integers: who reads before another has written, or the other way round, adds up wrongly.
    std::int64_t said[kMostMembers] = {};
    std::int64_t heard[kMostMembers] = {};
    int size = 0;
};

void talk(void* context, int member, int size) {
    Talk& all = *static_cast<Talk*>(context);
    if (member == 0) all.size = size;
    for (std::int64_t turn = 1; turn <= all.n_turns; ++turn) {
        all.said[member] = turn * (member + 1);
        all.meeting.wait(member, size);
        for (int other = 0; other < size; ++other) all.heard[member] += all.said[other];
        all.meeting.wait(member, size);
    }
}

// Members of one run in which each tells all others something at every turn; 0 where no worker was awake.
int run_talk(int n_threads, std::int64_t n_turns) {
    if (n_turns < 0 || n_turns > 1'000'000) fail("n_turns", "0 to 1000000", std::to_string(n_turns));
    Talk all;
    all.n_turns = n_turns;
    const GilRelease release;
    if (!run_together(n_threads, talk, &all)) return 0;
    const std::int64_t expected = n_turns * (n_turns + 1) / 2 * all.size * (all.size + 1) / 2;
    for (int member = 0; member < all.size; ++member) {
        if (all.heard[member] != expected) throw std::runtime_error("a member met the others at the wrong time");
    }
    return all.size;
}

}  // namespace

void bind_thread_pool(py::module_& m) {
    m.def("_parallel_for", &run, py::arg("counts"), py::arg("n_threads"), py::arg("work_us") = 0,
          py::arg("fail_at") = -1, py::arg("repeats") = 1);
    m.def("_run_together", &run_talk, py::arg("n_threads"), py::arg("n_turns"));
    m.def("_together_runs", &together_runs);
}

}  // namespace gac_fast
