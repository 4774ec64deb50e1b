// Takes NumPy arrays, checks them, releases the GIL and sums weight gradients. bfloat16 arrays come as int16.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <tuple>
#include <vector>

#include "aligned_memory.h"
#include "attention_views.h"
#include "bindings.h"
#include "check.h"
#include "gil.h"
#include "weight_gradient.h"

namespace py = pybind11;

namespace gac_fast {
namespace {

template <typename T>
void set_rows(const py::array& dy, const py::array& x, std::int64_t n_rows, const std::string& name,
              WeightGradient* map) {
    const auto dy_view = rows_view<T>(dy, n_rows, kAny, (name + ".dy").c_str());
    const auto x_view = rows_view<T>(x, n_rows, kAny, (name + ".x").c_str());
    map->n_out = dy_view.columns;
    map->n_in = x_view.columns;
    map->dy = dy_view.data;
    map->dy_stride = dy_view.stride;
    map->x = x_view.data;
    map->x_stride = x_view.stride;
}

// Without gaps.
float* vector_of(py::array& array, std::int64_t size, const std::string& name) {
    const auto view = vector_view<float>(array, size, name.c_str());
    if (view.stride != 1 && size > 1) fail(name, "neighbouring elements", "a strided array");
    return static_cast<float*>(const_cast<float*>(view.data));
}

float* writeable_vector_of(py::array& array, std::int64_t size, const std::string& name) {
    check_writeable(array, name.c_str());
    return vector_of(array, size, name);
}

// w [out, in], db [out], norm_w, norm_b, dnorm_w and dnorm_b [in] of a map behind a norm.
void set_norm(std::vector<py::array>& norm, const std::string& name, WeightGradient* map) {
    if (norm.empty()) return;
    if (norm.size() != 6) fail(name, "6 arrays or none", std::to_string(norm.size()));
    const auto w = rows_view<float>(norm[0], map->n_out, map->n_in, (name + ".w").c_str());
    if (w.stride != map->n_in && map->n_out > 1) fail(name + ".w", "rows without gaps", "a strided array");
    map->w = w.data;
    map->db = vector_of(norm[1], map->n_out, name + ".db");
    map->norm_w = vector_of(norm[2], map->n_in, name + ".norm_w");
    map->norm_b = vector_of(norm[3], map->n_in, name + ".norm_b");
    map->dnorm_w = writeable_vector_of(norm[4], map->n_in, name + ".dnorm_w");
    map->dnorm_b = writeable_vector_of(norm[5], map->n_in, name + ".dnorm_b");
}

// (dy [N, out], x [N, in], dw [out, in], what set_norm() takes) of every map.
void run(std::vector<std::tuple<py::array, py::array, py::array, std::vector<py::array>>> maps, int n_threads) {
    std::vector<WeightGradient> list;
    WeightGradients args{};
    for (auto& [dy, x, dw, norm] : maps) {
        const std::string name = "maps[" + std::to_string(list.size()) + "]";
        const bool bf16 = is_bf16(dy, (name + ".dy").c_str());
        if (list.empty()) {
            check_shape(dy, {kAny, kAny}, (name + ".dy").c_str());
            args.bf16 = bf16;
            args.n_rows = dy.shape(0);
        } else if (bf16 != args.bf16) {
            fail(name + ".dy", "the dtype of the first map", std::string(py::str(dy.dtype())));
        }
        WeightGradient map{};
        if (bf16) {
            set_rows<std::int16_t>(dy, x, args.n_rows, name, &map);
        } else {
            set_rows<float>(dy, x, args.n_rows, name, &map);
        }
        py::array out = dw;
        const auto dw_view = writeable_rows_view<float>(out, map.n_out, map.n_in, (name + ".dw").c_str());
        if (dw_view.stride != map.n_in && map.n_out > 1) fail(name + ".dw", "rows without gaps", "a strided array");
        map.dw = dw_view.data;
        set_norm(norm, name + ".norm", &map);
        if (map.n_out > 0 && map.n_in > 0) list.push_back(map);
    }
    args.maps = list.data();
    args.n_maps = static_cast<std::int64_t>(list.size());
    args.n_threads = n_threads;
    const Isa isa = active_isa();
    const GilRelease release;
    const std::size_t bytes = GAC_FAST_DISPATCH(isa, weight_gradients_bytes(args));
    const AlignedMemory partials = allocate_aligned(bytes);
    args.partials = partials.get();
    GAC_FAST_DISPATCH(isa, weight_gradients(args));
}

}  // namespace

void bind_weight_gradient(py::module_& m) { m.def("_weight_gradients", &run, py::arg("maps"), py::arg("n_threads")); }

}  // namespace gac_fast
