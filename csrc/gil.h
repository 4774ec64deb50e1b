// The interpreter lock of Python, let go for the length of a scope.
#pragma once

#include <Python.h>

#include <chrono>
#include <thread>

namespace gac_fast {

// As pybind11's gil_scoped_release, and safe in a daemon thread: an interpreter that ends stops such a thread where it
// takes the lock again, by unwinding its stack (pthread_exit), which a destructor answers with std::terminate.
class GilRelease {
  public:
    GilRelease() : state_(PyEval_SaveThread()) {}
    ~GilRelease() {
        try {
            PyEval_RestoreThread(state_);
        } catch (...) {
            // Nothing of Python may be touched from here on: wait for the process to end.
            for (;;) std::this_thread::sleep_for(std::chrono::hours(1));
        }
    }
    GilRelease(const GilRelease&) = delete;
    GilRelease& operator=(const GilRelease&) = delete;

  private:
    PyThreadState* state_;
};

}  // namespace gac_fast
