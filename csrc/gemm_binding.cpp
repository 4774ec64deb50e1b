// Takes NumPy arrays and runs one packed product, for the tests.
#include <pybind11/pybind11.h>

#include <cstdint>

#include "bindings.h"
#include "check.h"
#include "gemm_test.h"
#include "gil.h"

namespace py = pybind11;

namespace gac_fast {
namespace {

void run(const py::array& x, const py::array& w, const py::object& bias, py::array y, bool transposed, bool add,
         bool bf16, int repeats) {
    const auto x_view = rows_view<float>(x, kAny, kAny, "x");
    auto y_view = writeable_rows_view<float>(y, x_view.rows, kAny, "y");
    const auto w_view = transposed ? rows_view<float>(w, x_view.columns, y_view.columns, "w")
                                   : rows_view<float>(w, y_view.columns, x_view.columns, "w");
    VectorView<float> bias_view{nullptr, 0, 0};
    if (!bias.is_none()) bias_view = vector_view<float>(array_of(bias, "bias"), y_view.columns, "bias");
    GemmTest test{};
    test.m = x_view.rows;
    test.n_out = y_view.columns;
    test.n_in = x_view.columns;
    test.x = x_view.data;
    test.w = w_view.data;
    test.bias = bias_view.data;
    test.y = y_view.data;
    test.x_stride = x_view.stride;
    test.w_stride = w_view.stride;
    test.bias_stride = bias_view.stride;
    test.y_stride = y_view.stride;
    test.transposed = transposed;
    test.add = add;
    test.bf16 = bf16;
    test.repeats = repeats;
    const GilRelease release;
    GAC_FAST_DISPATCH(active_isa(), gemm_test(test));
}

}  // namespace

void bind_gemm(py::module_& m) {
    m.def("_gemm", &run, py::arg("x"), py::arg("w"), py::arg("bias"), py::arg("y"), py::arg("transposed") = false,
          py::arg("add") = false, py::arg("bf16") = false, py::arg("repeats") = 1);
}

}  // namespace gac_fast
