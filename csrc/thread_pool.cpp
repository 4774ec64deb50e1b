#include "thread_pool.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__unix__)
#include <pthread.h>
#endif
#if defined(__linux__)
#include <sched.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace gac_fast {
namespace {

constexpr int kMostWorkers = 255;
// A loop that follows soon finds its workers awake. Twice what waking one costs: on a virtual machine 40 us in the call
// that wakes, 60 us until the worker begins, and a caller that goes on with cold branch predictors.
constexpr std::chrono::microseconds kSpin{kWorkersSpin};

void pause() {
#if defined(__x86_64__)
    _mm_pause();
#else
    std::this_thread::yield();
#endif
}

// How long a caller of run_together() waits for workers to join: those that are awake need half a microsecond.
constexpr std::chrono::microseconds kJoin{4};

template <typename Done>
bool spin_until(Done done, std::chrono::microseconds time = kSpin) {
    const auto end = std::chrono::steady_clock::now() + time;
    do {
        for (int i = 0; i < 32; ++i) {
            if (done()) return true;
            pause();
        }
    } while (std::chrono::steady_clock::now() < end);
    return false;
}

int this_cpu() {
#if defined(__linux__)
    return sched_getcpu();
#else
    return -1;
#endif
}

// Keeps a worker off the processor of the thread that it works for. The kernel often wakes it there, though others are
// idle (a virtual one that has slept for long does not count as such), and leaves the two where they are for tens of
// milliseconds. Of what the worker was allowed, one processor is taken away until it meets a caller on another one.
class Aside {
  public:
    void step([[maybe_unused]] int cpu, [[maybe_unused]] int n_threads) {
#if defined(__linux__)
        cpu_set_t now;
        if (sched_getaffinity(0, sizeof(now), &now) != 0) return;
        // Whoever else has set it since is right.
        if (!CPU_EQUAL(&now, &left_)) allowed_ = now;
        if (CPU_COUNT(&allowed_) < n_threads) return;
        cpu_set_t left = allowed_;
        CPU_CLR(static_cast<unsigned>(cpu), &left);
        if (sched_setaffinity(0, sizeof(left), &left) == 0) left_ = left;
#endif
    }

  private:
#if defined(__linux__)
    cpu_set_t allowed_{}, left_{};
#endif
};

thread_local bool inside_task = false;

struct Job {
    std::int64_t n;
    void (*task)(void*, std::int64_t);
    void* context;
    std::atomic<std::int64_t> next{0};
    std::atomic<bool> failed{false};
    std::exception_ptr error;  // written by the one that set `failed`
    int wanted;                // workers that may still join; under the pool's mutex
    int n_threads;
    int cpu;  // where the caller runs, -1 where that is not known
    // Workers inside; changed under the pool's mutex, read without it while spinning.
    std::atomic<int> active{0};
    // Of run_together(), in place of `task`; `size` is 0 until it is settled who takes part.
    void (*part)(void*, int, int) = nullptr;
    std::atomic<int> joined{0};
    std::atomic<int> size{0};

    void take_part(int member) {
        while (size.load(std::memory_order_acquire) == 0) pause();
        inside_task = true;
        part(context, member, size.load(std::memory_order_relaxed));
        inside_task = false;
    }

    void work() {
        inside_task = true;
        for (std::int64_t i = next.fetch_add(1); i < n; i = next.fetch_add(1)) {
            try {
                task(context, i);
            } catch (...) {
                if (!failed.exchange(true)) error = std::current_exception();
                next.store(n);
            }
        }
        inside_task = false;
    }
};

class Pool {
  public:
    void run(Job& job, int n_workers) {
        remember(job);
        int n_wanted;
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            grow(n_workers);
            n_wanted = job.wanted = std::min(n_workers, n_started_);
            jobs_.push_back(&job);
            n_open_.fetch_add(n_wanted);
        }
        // One each: to wake more would cost the others their sleep.
        for (int i = 0; i < n_wanted; ++i) work_.notify_one();
        job.work();
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            close(job);
            jobs_.erase(std::find(jobs_.begin(), jobs_.end(), &job));
        }
        wait_for_workers(job);
    }

    bool run_together(Job& job, int n_workers) {
        remember(job);
        int n_wanted;
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            grow(n_workers);
            n_wanted = job.wanted = std::min(n_workers, n_started_);
            jobs_.push_back(&job);
            n_open_.fetch_add(n_wanted);
        }
        spin_until([&job, n_wanted] { return job.joined.load(std::memory_order_relaxed) == n_wanted; }, kJoin);
        int n_missing;
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            n_missing = job.wanted;
            close(job);
            jobs_.erase(std::find(jobs_.begin(), jobs_.end(), &job));
        }
        job.size.store(1 + job.joined.load(std::memory_order_relaxed), std::memory_order_release);
        for (int i = 0; i < n_missing; ++i) work_.notify_one();
        if (job.size.load(std::memory_order_relaxed) == 1) return false;
        together_runs_.fetch_add(1, std::memory_order_relaxed);
        job.take_part(0);
        wait_for_workers(job);
        return true;
    }

    std::int64_t together_runs() const { return together_runs_.load(std::memory_order_relaxed); }

  private:
    void remember(const Job& job) {
        last_cpu_.store(job.cpu, std::memory_order_relaxed);
        last_n_threads_.store(job.n_threads, std::memory_order_relaxed);
    }

    void wait_for_workers(Job& job) {
        const auto done = [&job] { return job.active.load(std::memory_order_acquire) == 0; };
        // The last worker may still hold the mutex for its notification; it touches the job no more.
        if (spin_until(done)) return;
        std::unique_lock<std::mutex> lock(mutex_);
        done_.wait(lock, done);
    }

    void grow(int n_workers) {
        while (n_started_ < std::min(n_workers, kMostWorkers)) {
            try {
                // Detached: at exit they sleep, and the pool is never destroyed.
                std::thread([this] { serve(); }).detach();
            } catch (const std::system_error&) {
                return;  // fewer threads do the same work
            }
            ++n_started_;
        }
    }

    // Under the mutex, as are the next two.
    void close(Job& job) {
        n_open_.fetch_sub(job.wanted);
        job.wanted = 0;
    }

    Job* join(int& member) {
        for (Job* job : jobs_) {
            if (job->next.load() >= job->n) close(*job);
            if (job->wanted == 0) continue;
            --job->wanted;
            n_open_.fetch_sub(1);
            job->active.fetch_add(1);
            member = 1 + job->joined.fetch_add(1);
            return job;
        }
        return nullptr;
    }

    void leave(Job& job) {
        // Under the mutex, so that a caller about to wait cannot miss it.
        if (job.active.fetch_sub(1, std::memory_order_release) == 1) done_.notify_all();
    }

    void serve() {
        Aside aside;
        for (;;) {
            Job* job = nullptr;
            int member = 0;
            spin_until([this, &job, &member, &aside, tries = 0]() mutable {
                // Who shares the processor of a caller is not there before the caller has to wait.
                if (++tries % 64 == 1) {
                    const int cpu = last_cpu_.load(std::memory_order_relaxed);
                    if (cpu >= 0 && this_cpu() == cpu) aside.step(cpu, last_n_threads_.load(std::memory_order_relaxed));
                }
                if (n_open_.load() == 0) return false;
                const std::lock_guard<std::mutex> lock(mutex_);
                job = join(member);
                return job != nullptr;
            });
            if (job == nullptr) {
                std::unique_lock<std::mutex> lock(mutex_);
                job = join(member);
                if (job == nullptr) {
                    work_.wait(lock);
                    job = join(member);
                }
            }
            // Too late, or woken for what comes next.
            if (job == nullptr) continue;
            if (job->cpu >= 0 && this_cpu() == job->cpu) aside.step(job->cpu, job->n_threads);
            if (job->part != nullptr) {
                job->take_part(member);
            } else {
                job->work();
            }
            const std::lock_guard<std::mutex> lock(mutex_);
            leave(*job);
        }
    }

    std::mutex mutex_;
    std::condition_variable work_;
    std::condition_variable done_;
    std::vector<Job*> jobs_;
    std::atomic<int> n_open_{0};  // sum of `wanted` over the jobs; changed under the mutex
    int n_started_ = 0;
    std::atomic<std::int64_t> together_runs_{0};
    // Of the last caller.
    std::atomic<int> last_cpu_{-1};
    std::atomic<int> last_n_threads_{0};
};

std::atomic<Pool*> the_pool{nullptr};

// A child of fork has none of the threads, and a mutex in an unknown state: it leaves the pool behind.
void forget_pool() {
    the_pool.store(nullptr);
    inside_task = false;
}

#if defined(__unix__)
// When the library is loaded: a fork in the middle of the first call would find it half done.
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, forget_pool);
#endif

Pool& pool() {
    Pool* found = the_pool.load();
    if (found == nullptr) {
        Pool* made = new Pool;
        if (the_pool.compare_exchange_strong(found, made)) return *made;
        delete made;
    }
    return *found;
}

}  // namespace

void parallel_for_each(std::int64_t n, int n_threads, void (*task)(void* context, std::int64_t i), void* context) {
    const auto n_workers = static_cast<int>(std::min<std::int64_t>(n_threads, n)) - 1;
    if (n_workers <= 0 || inside_task) {
        for (std::int64_t i = 0; i < n; ++i) task(context, i);
        return;
    }
    Job job{};
    job.n = n;
    job.task = task;
    job.context = context;
    job.n_threads = n_workers + 1;
    job.cpu = this_cpu();
    pool().run(job, n_workers);
    if (job.error) std::rethrow_exception(job.error);
}

bool run_together(int n_threads, void (*task)(void* context, int member, int size), void* context) {
    const int n_workers = std::min(n_threads, kMostMembers) - 1;
    if (n_workers <= 0 || inside_task) return false;
    Job job{};
    job.n = 1;
    job.part = task;
    job.context = context;
    job.n_threads = n_workers + 1;
    job.cpu = this_cpu();
    return pool().run_together(job, n_workers);
}

std::int64_t together_runs() { return pool().together_runs(); }

Meeting::Meeting() = default;

void Meeting::wait(int member, int size) {
    // A member that was sent off its processor comes back sooner where another makes room.
    constexpr int kTries = 1 << 15;
    const std::int64_t turn = places_[member].turn.load(std::memory_order_relaxed) + 1;
    places_[member].turn.store(turn, std::memory_order_release);
    for (int other = 0; other < size; ++other) {
        for (int tries = 0; places_[other].turn.load(std::memory_order_acquire) < turn;) {
            if (++tries % kTries == 0) std::this_thread::yield();
        }
    }
}

}  // namespace gac_fast
