// Takes NumPy arrays, checks them, releases the GIL and makes the noise.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "bindings.h"
#include "check.h"
#include "gil.h"
#include "philox_normal.h"

namespace py = pybind11;

namespace gac_fast {
namespace {

void check_counter_words(const VectorView<std::int64_t>& values, const char* name) {
    for (std::int64_t p = 0; p < values.size; ++p) {
        if (values[p] < 0 || values[p] > INT64_C(0xFFFFFFFF)) {
            fail(name, "values within [0, 2^32)", std::to_string(values[p]) + " in row " + std::to_string(p));
        }
    }
}

template <typename T>
Philox<T> checked(std::uint32_t seed0, std::uint32_t seed1, const py::array& plans, const py::array& step,
                  py::array& out, int n_threads) {
    const RowsView<T> rows = writeable_rows_view<T>(out, kAny, kAny, "out");
    const auto plans_view = vector_view<std::int64_t>(plans, rows.rows, "plans");
    const auto steps_view = vector_view<std::int64_t>(step, rows.rows, "step");
    if (n_threads < 1) fail("n_threads", "at least 1", std::to_string(n_threads));
    // Every id is checked before the first write: bad input leaves the output as it was.
    check_counter_words(plans_view, "plans");
    check_counter_words(steps_view, "step");
    return {seed0,     seed1,     plans_view.data, steps_view.data, plans_view.stride, steps_view.stride,
            rows.data, rows.rows, rows.columns,    rows.stride,     n_threads};
}

void normals(std::uint32_t seed0, std::uint32_t seed1, const py::array& plans, const py::array& step, py::array out,
             int n_threads) {
    const auto args = checked<float>(seed0, seed1, plans, step, out, n_threads);
    const GilRelease release;
    GAC_FAST_DISPATCH(active_isa(), philox_normal(args));
}

void words(std::uint32_t seed0, std::uint32_t seed1, const py::array& plans, const py::array& step, py::array out,
           int n_threads) {
    const auto args = checked<std::int64_t>(seed0, seed1, plans, step, out, n_threads);
    const GilRelease release;
    GAC_FAST_DISPATCH(active_isa(), philox_words(args));
}

}  // namespace

void bind_philox_normal(py::module_& m) {
    m.def("_philox_normal", &normals, py::arg("seed0"), py::arg("seed1"), py::arg("plans"), py::arg("step"),
          py::arg("out"), py::arg("n_threads") = 1);
    m.def("_philox_words", &words, py::arg("seed0"), py::arg("seed1"), py::arg("plans"), py::arg("step"),
          py::arg("out"), py::arg("n_threads") = 1);
}

}  // namespace gac_fast
