// The Python face of the C++ engine: takes NumPy arrays, checks them, releases the GIL and calls the op.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>

#include "build_info.h"
#include "check.h"
#include "pack_batch.h"
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
    const py::gil_scoped_release release;
    fill({seed0, seed1}, plans_view, steps_view, out_view);
}

void bind_philox_normal(std::uint32_t seed0, std::uint32_t seed1, const py::array& plans, const py::array& step,
                        py::array out) {
    fill_philox<float>(seed0, seed1, plans, step, out, philox_normal);
}

void bind_philox_words(std::uint32_t seed0, std::uint32_t seed1, const py::array& plans, const py::array& step,
                       py::array out) {
    fill_philox<std::int64_t>(seed0, seed1, plans, step, out, philox_words);
}

std::int64_t bind_packed_length(const py::array& cu_seqlens, const py::array& indices, std::int64_t n_steps) {
    const auto cu_view = vector_view<std::int64_t>(cu_seqlens, kAny, "cu_seqlens");
    const auto indices_view = vector_view<std::int64_t>(indices, kAny, "indices");
    const py::gil_scoped_release release;
    return packed_length(cu_view, indices_view, n_steps);
}

void bind_pack_batch(const py::array& observations, const py::array& actions, const py::array& cu_seqlens,
                     const py::array& indices, py::array out_observations, py::array out_actions,
                     py::array out_cu_seqlens) {
    const auto obs_view = rows_view<float>(observations, kAny, kAny, "observations");
    const auto act_view = rows_view<float>(actions, obs_view.rows, kAny, "actions");
    const auto cu_view = vector_view<std::int64_t>(cu_seqlens, kAny, "cu_seqlens");
    const auto indices_view = vector_view<std::int64_t>(indices, kAny, "indices");
    const std::int64_t n = packed_length(cu_view, indices_view, obs_view.rows);
    const auto out_obs_view = writeable_rows_view<float>(out_observations, n, obs_view.columns, "out_observations");
    const auto out_act_view = writeable_rows_view<float>(out_actions, n, act_view.columns, "out_actions");
    check_writeable(out_cu_seqlens, "out_cu_seqlens");
    if (vector_view<std::int32_t>(out_cu_seqlens, indices_view.size + 1, "out_cu_seqlens").stride != 1) {
        fail("out_cu_seqlens", "neighbouring elements", "a strided array");
    }
    auto* out_cu = static_cast<std::int32_t*>(out_cu_seqlens.mutable_data());
    const py::gil_scoped_release release;
    pack_batch(obs_view, act_view, cu_view, indices_view, out_obs_view, out_act_view, out_cu);
}

}  // namespace
}  // namespace gac_fast

PYBIND11_MODULE(_C, m) {
    m.doc() = "The C++ engine of gac_fast; use it through gac_fast.ops.";
    m.def("_build_info", [] {
        py::dict info;
        for (const auto& [name, text] : gac_fast::build_info()) info[py::str(name)] = text;
        return info;
    });
    m.def("_philox_normal", &gac_fast::bind_philox_normal, py::arg("seed0"), py::arg("seed1"), py::arg("plans"),
          py::arg("step"), py::arg("out"));
    m.def("_philox_words", &gac_fast::bind_philox_words, py::arg("seed0"), py::arg("seed1"), py::arg("plans"),
          py::arg("step"), py::arg("out"));
    m.def("_packed_length", &gac_fast::bind_packed_length, py::arg("cu_seqlens"), py::arg("indices"),
          py::arg("n_steps"));
    m.def("_pack_batch", &gac_fast::bind_pack_batch, py::arg("observations"), py::arg("actions"), py::arg("cu_seqlens"),
          py::arg("indices"), py::arg("out_observations"), py::arg("out_actions"), py::arg("out_cu_seqlens"));
}
