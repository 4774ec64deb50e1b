// Takes NumPy arrays, checks them, releases the GIL and makes the noise.
#include <pybind11/pybind11.h>

#include <cstdint>

#include "bindings.h"
#include "check.h"
#include "gil.h"
#include "philox_normal.h"

namespace py = pybind11;

namespace gac_fast {
namespace {

template <typename T, typename Fill>
void fill_philox(std::uint32_t seed0, std::uint32_t seed1, const py::array& plans, const py::array& step,
                 py::array& out, Fill fill) {
    const RowsView<T> out_view = writeable_rows_view<T>(out, kAny, kAny, "out");
    const auto plans_view = vector_view<std::int64_t>(plans, out_view.rows, "plans");
    const auto steps_view = vector_view<std::int64_t>(step, out_view.rows, "step");
    const GilRelease release;
    fill({seed0, seed1}, plans_view, steps_view, out_view);
}

void normals(std::uint32_t seed0, std::uint32_t seed1, const py::array& plans, const py::array& step, py::array out) {
    fill_philox<float>(seed0, seed1, plans, step, out, philox_normal);
}

void words(std::uint32_t seed0, std::uint32_t seed1, const py::array& plans, const py::array& step, py::array out) {
    fill_philox<std::int64_t>(seed0, seed1, plans, step, out, philox_words);
}

}  // namespace

void bind_philox_normal(py::module_& m) {
    m.def("_philox_normal", &normals, py::arg("seed0"), py::arg("seed1"), py::arg("plans"), py::arg("step"),
          py::arg("out"));
    m.def("_philox_words", &words, py::arg("seed0"), py::arg("seed1"), py::arg("plans"), py::arg("step"),
          py::arg("out"));
}

}  // namespace gac_fast
