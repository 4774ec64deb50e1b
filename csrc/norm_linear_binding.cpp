// Takes NumPy arrays, checks them, releases the GIL and maps tokens. bfloat16 arrays come as int16.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "aligned_memory.h"
#include "attention_views.h"
#include "bindings.h"
#include "check.h"
#include "gil.h"
#include "norm_linear.h"

namespace py = pybind11;

namespace gac_fast {
namespace {

std::int64_t padded(std::int64_t n) { return (n + 31) / 32 * 32; }

struct Rows {
    const void* data;
    std::int64_t stride;
};

Rows rows_of(const py::array& array, bool bf16, std::int64_t rows, std::int64_t columns, const char* name) {
    if (bf16) {
        const auto view = rows_view<std::int16_t>(array, rows, columns, name);
        return {view.data, view.stride};
    }
    const auto view = rows_view<float>(array, rows, columns, name);
    return {view.data, view.stride};
}

template <typename T>
T* dense_rows(py::array array, std::int64_t rows, std::int64_t columns, const char* name) {
    const auto view = writeable_rows_view<T>(array, rows, columns, name);
    if (rows > 1 && view.stride != columns)
        fail(name, "rows without gaps", "a row stride of " + std::to_string(view.stride));
    return view.data;
}

void* dense_rows(const py::array& array, bool bf16, std::int64_t rows, std::int64_t columns, const char* name) {
    if (bf16) return dense_rows<std::int16_t>(array, rows, columns, name);
    return dense_rows<float>(array, rows, columns, name);
}

float* dense_vector(const py::object& object, std::int64_t size, const char* name) {
    py::array array = array_of(object, name);
    const auto view = vector_view<float>(array, size, name);
    check_writeable(array, name);
    if (view.stride != 1 && view.size > 1) fail(name, "neighbouring elements", "a strided array");
    return static_cast<float*>(array.mutable_data());
}

NormLinearMap map_of(const py::array& weight, bool has_norm, bool bf16) {
    const auto view = rows_view<float>(weight, kAny, kAny, "weight");
    if (view.rows < 1 || view.columns < 1) fail("weight", "sizes of at least 1", shape_text(shape_of(weight)));
    NormLinearMap map{};
    map.bf16 = bf16;
    map.has_norm = has_norm;
    map.weight = view.data;
    map.weight_stride = view.stride;
    map.n_out = view.rows;
    map.n_in = view.columns;
    return map;
}

void forward(const py::array& weight, const py::array& bias, bool has_norm, bool bf16, const py::array& x,
             const py::object& residual, const py::array& y, const py::object& operand, const py::object& rstd,
             int n_threads) {
    NormLinearForward f{};
    f.map = map_of(weight, has_norm, bf16);
    const auto bias_view = vector_view<float>(bias, f.map.n_out, "bias");
    if (bias_view.stride != 1 && bias_view.size > 1) fail("bias", "neighbouring elements", "a strided array");
    f.map.bias = bias_view.data;
    check_shape(x, {kAny, f.map.n_in}, "x");
    f.n_tokens = x.shape(0);
    const bool x_bf16 = is_bf16(x, "x");
    if (x_bf16 && !bf16) fail("x", "dtype float32 for products of float32", "int16");
    f.x_is_operand = x_bf16 == bf16;
    const Rows x_rows = rows_of(x, x_bf16, f.n_tokens, f.map.n_in, "x");
    f.x = x_rows.data;
    f.x_stride = x_rows.stride;
    if (!residual.is_none()) {
        const auto view = rows_view<float>(array_of(residual, "residual"), f.n_tokens, f.map.n_out, "residual");
        f.residual = view.data;
        f.residual_stride = view.stride;
    }
    f.y = dense_rows(y, bf16 && residual.is_none(), f.n_tokens, f.map.n_out, "y");
    if (!operand.is_none()) {
        if (f.x_is_operand && !has_norm) fail("operand", "None where x is the operand", "an array");
        f.operand = dense_rows(array_of(operand, "operand"), bf16, f.n_tokens, padded(f.map.n_in), "operand");
    }
    if (!rstd.is_none()) f.rstd = dense_vector(rstd, f.n_tokens, "rstd");
    if (has_norm && operand.is_none() != rstd.is_none())
        fail("rstd", "an array beside operand, or neither", "one alone");
    f.n_threads = n_threads;
    const Isa isa = active_isa();
    const GilRelease release;
    const AlignedMemory packed = allocate_aligned(GAC_FAST_DISPATCH(isa, norm_linear_bytes(f.map)));
    f.packed = packed.get();
    GAC_FAST_DISPATCH(isa, norm_linear(f));
}

void backward(const py::array& weight, bool has_norm, bool bf16, const py::array& dy, const py::object& operand,
              const py::object& rstd, const py::object& dy_operand, const py::object& dx_start, const py::object& dx,
              const py::object& dbias, int n_threads) {
    NormLinearBackward f{};
    f.map = map_of(weight, has_norm, bf16);
    check_shape(dy, {kAny, f.map.n_out}, "dy");
    f.n_tokens = dy.shape(0);
    if (!dy_operand.is_none()) {
        if (!bf16) fail("dy_operand", "None for products of float32", "an array");
        f.dy_operand = dense_rows(array_of(dy_operand, "dy_operand"), true, f.n_tokens, f.map.n_out, "dy_operand");
    }
    const Rows dy_rows = rows_of(dy, bf16 && dy_operand.is_none(), f.n_tokens, f.map.n_out, "dy");
    f.dy = dy_rows.data;
    f.dy_stride = dy_rows.stride;
    if (has_norm) {
        f.operand = dense_rows(array_of(operand, "operand"), bf16, f.n_tokens, padded(f.map.n_in), "operand");
        f.rstd = dense_vector(rstd, f.n_tokens, "rstd");
    }
    if (!dx.is_none()) {
        const py::array array = array_of(dx, "dx");
        const bool dx_bf16 = is_bf16(array, "dx");
        if (dx_bf16 && !bf16) fail("dx", "dtype float32 for products of float32", "int16");
        f.dx_is_operand = dx_bf16 == bf16;
        f.dx = dense_rows(array, dx_bf16, f.n_tokens, f.map.n_in, "dx");
    }
    if (!dx_start.is_none()) {
        const auto view = rows_view<float>(array_of(dx_start, "dx_start"), f.n_tokens, f.map.n_in, "dx_start");
        if (view.stride != f.map.n_in && f.n_tokens > 1) {
            fail("dx_start", "rows without gaps", "a row stride of " + std::to_string(view.stride));
        }
        f.dx_start = view.data;
    }
    AlignedMemory partials;
    if (!dbias.is_none()) {
        f.dbias = dense_vector(dbias, f.map.n_out, "dbias");
        const std::int64_t n_tiles = (f.n_tokens + kNormLinearTile - 1) / kNormLinearTile;
        partials = allocate_aligned(static_cast<std::size_t>(n_tiles * f.map.n_out) * sizeof(float));
        f.dbias_partials = static_cast<float*>(partials.get());
    }
    f.n_threads = n_threads;
    const Isa isa = active_isa();
    const GilRelease release;
    const AlignedMemory packed = allocate_aligned(GAC_FAST_DISPATCH(isa, norm_linear_bytes(f.map)));
    f.packed = packed.get();
    GAC_FAST_DISPATCH(isa, norm_linear_backward(f));
}

}  // namespace

void bind_norm_linear(py::module_& m) {
    m.def("_norm_linear", &forward, py::arg("weight"), py::arg("bias"), py::arg("has_norm"), py::arg("bf16"),
          py::arg("x"), py::arg("residual"), py::arg("y"), py::arg("operand"), py::arg("rstd"), py::arg("n_threads"));
    m.def("_norm_linear_backward", &backward, py::arg("weight"), py::arg("has_norm"), py::arg("bf16"), py::arg("dy"),
          py::arg("operand"), py::arg("rstd"), py::arg("dy_operand"), py::arg("dx_start"), py::arg("dx"),
          py::arg("dbias"), py::arg("n_threads"));
}

}  // namespace gac_fast
