// Takes NumPy arrays, checks them, releases the GIL, draws and packs.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "bindings.h"
#include "check.h"
#include "gil.h"
#include "pack_batch.h"

namespace py = pybind11;

namespace gac_fast {
namespace {

// Trajectories and groups of four steps are numbered by one counter word.
constexpr std::int64_t kMostElements = INT64_C(1) << 32;

template <typename T>
T* writeable_vector(py::array& array, std::int64_t size, const char* name) {
    const auto view = vector_view<T>(array, size, name);
    check_writeable(array, name);
    if (view.size > 1 && view.stride != 1) {
        fail(name, "neighbouring elements", "an element stride of " + std::to_string(array.strides(0)) + " bytes");
    }
    return static_cast<T*>(array.mutable_data());
}

std::int64_t length_of(const py::array& cu_seqlens, const py::array& indices, std::int64_t n_steps) {
    const auto cu_view = vector_view<std::int64_t>(cu_seqlens, kAny, "cu_seqlens");
    const auto indices_view = vector_view<std::int64_t>(indices, kAny, "indices");
    const GilRelease release;
    return total_count(find_spans(cu_view, indices_view, n_steps));
}

void pack(const py::array& observations, const py::array& actions, const py::array& cu_seqlens,
          const py::array& indices, py::array out_observations, py::array out_actions, py::array out_cu_seqlens,
          py::array out_positions, py::array out_sequence) {
    const auto obs_view = rows_view<float>(observations, kAny, kAny, "observations");
    const auto act_view = rows_view<float>(actions, obs_view.rows, kAny, "actions");
    const auto cu_view = vector_view<std::int64_t>(cu_seqlens, kAny, "cu_seqlens");
    const auto indices_view = vector_view<std::int64_t>(indices, kAny, "indices");
    const auto spans = find_spans(cu_view, indices_view, obs_view.rows);
    const std::int64_t n = total_count(spans);
    const PackedViews out{
        writeable_rows_view<float>(out_observations, n, obs_view.columns, "out_observations"),
        writeable_rows_view<float>(out_actions, n, act_view.columns, "out_actions"),
        writeable_vector<std::int32_t>(out_cu_seqlens, static_cast<std::int64_t>(spans.size()) + 1, "out_cu_seqlens"),
        writeable_vector<std::int64_t>(out_positions, n, "out_positions"),
        writeable_vector<std::int64_t>(out_sequence, n, "out_sequence"),
    };
    const GilRelease release;
    pack_batch(obs_view, act_view, spans, out);
}

void draw(std::uint32_t seed0, std::uint32_t seed1, std::uint64_t number, const py::array& weights, py::array out) {
    const auto weights_view = vector_view<double>(weights, kAny, "weights");
    if (weights_view.size > kMostElements) {
        fail("weights", "at most 2^32 trajectories", std::to_string(weights_view.size));
    }
    auto* ids = writeable_vector<std::int64_t>(out, kAny, "out");
    const std::int64_t n = out.shape(0);
    const GilRelease release;
    draw_trajectories({seed0, seed1}, number, weights_view, n, ids);
}

void drop(std::uint32_t seed0, std::uint32_t seed1, std::uint64_t number, std::uint64_t threshold, py::array out) {
    if (threshold > UINT64_C(1) << 32) fail("threshold", "at most 2^32", std::to_string(threshold));
    auto* mask = writeable_vector<bool>(out, kAny, "out");
    const std::int64_t n = out.shape(0);
    if (n / 4 >= kMostElements) fail("out", "fewer than 2^34 steps", std::to_string(n));
    const GilRelease release;
    drop_steps({seed0, seed1}, number, threshold, n, mask);
}

}  // namespace

void bind_pack_batch(py::module_& m) {
    m.def("_packed_length", &length_of, py::arg("cu_seqlens"), py::arg("indices"), py::arg("n_steps"));
    m.def("_pack_batch", &pack, py::arg("observations"), py::arg("actions"), py::arg("cu_seqlens"), py::arg("indices"),
          py::arg("out_observations"), py::arg("out_actions"), py::arg("out_cu_seqlens"), py::arg("out_positions"),
          py::arg("out_sequence"));
    m.def("_draw_trajectories", &draw, py::arg("seed0"), py::arg("seed1"), py::arg("number"), py::arg("weights"),
          py::arg("out"));
    m.def("_drop_steps", &drop, py::arg("seed0"), py::arg("seed1"), py::arg("number"), py::arg("threshold"),
          py::arg("out"));
}

}  // namespace gac_fast
