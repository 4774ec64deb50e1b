// Takes NumPy arrays, checks them, releases the GIL and packs.
#include <pybind11/pybind11.h>

#include <cstdint>

#include "bindings.h"
#include "check.h"
#include "gil.h"
#include "pack_batch.h"

namespace py = pybind11;

namespace gac_fast {
namespace {

std::int64_t length_of(const py::array& cu_seqlens, const py::array& indices, std::int64_t n_steps) {
    const auto cu_view = vector_view<std::int64_t>(cu_seqlens, kAny, "cu_seqlens");
    const auto indices_view = vector_view<std::int64_t>(indices, kAny, "indices");
    const GilRelease release;
    return packed_length(cu_view, indices_view, n_steps);
}

void pack(const py::array& observations, const py::array& actions, const py::array& cu_seqlens,
          const py::array& indices, py::array out_observations, py::array out_actions, py::array out_cu_seqlens) {
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
    const GilRelease release;
    pack_batch(obs_view, act_view, cu_view, indices_view, out_obs_view, out_act_view, out_cu);
}

}  // namespace

void bind_pack_batch(py::module_& m) {
    m.def("_packed_length", &length_of, py::arg("cu_seqlens"), py::arg("indices"), py::arg("n_steps"));
    m.def("_pack_batch", &pack, py::arg("observations"), py::arg("actions"), py::arg("cu_seqlens"), py::arg("indices"),
          py::arg("out_observations"), py::arg("out_actions"), py::arg("out_cu_seqlens"));
}

}  // namespace gac_fast
