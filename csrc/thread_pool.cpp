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

template <typename Done>
bool spin_until(Done done) {
    const auto end = std::chrono::steady_clock::now() + kSpin;
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
        const auto done = [&job] { return job.active.load(std::memory_order_acquire) == 0; };
        // The last worker may still hold the mutex for its notification; it touches the job no more.
        if (spin_until(done)) return;
        std::unique_lock<std::mutex> lock(mutex_);
        done_.wait(lock, done);
    }

  private:
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

    Job* join() {
        for (Job* job : jobs_) {
            if (job->next.load() >= job->n) close(*job);
            if (job->wanted == 0) continue;
            --job->wanted;
            n_open_.fetch_sub(1);
            job->active.fetch_add(1);
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
            spin_until([this, &job] {
                if (n_open_.load() == 0) return false;
                const std::lock_guard<std::mutex> lock(mutex_);
                job = join();
                return job != nullptr;
            });
            if (job == nullptr) {
                std::unique_lock<std::mutex> lock(mutex_);
                work_.wait(lock, [this, &job] { return (job = join()) != nullptr; });
            }
            if (job->cpu >= 0 && this_cpu() == job->cpu) aside.step(job->cpu, job->n_threads);
            job->work();
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

}  // namespace gac_fast
