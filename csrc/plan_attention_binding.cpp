// Takes NumPy arrays, checks them, releases the GIL and attends.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "attention_views.h"
#include "bindings.h"
#include "gil.h"
#include "plan_attention.h"

namespace py = pybind11;

namespace gac_fast {
namespace {

constexpr std::int64_t kChunk = 512;
// A multiple of the queries that any path takes at once.
constexpr std::int64_t kChunkMultiple = 32;

struct Arguments {
    PlanAttention in{};
    std::vector<QueryChunk> chunks;
    std::vector<std::int64_t> q_shape, plan_shape;
};

PlanView plan_view(const py::array& array, bool bf16, const std::vector<std::int64_t>& shape, const char* name) {
    check_heads(array, bf16, shape, name);
    const auto size = array.itemsize();
    return {array.data(), array.strides(0) / size, array.strides(1) / size, array.strides(2) / size};
}

WriteablePlanView writeable_plan_view(py::array& array, bool bf16, const std::vector<std::int64_t>& shape,
                                      const char* name) {
    check_writeable(array, name);
    const PlanView view = plan_view(array, bf16, shape, name);
    return {array.mutable_data(), view.sequence_stride, view.vector_stride, view.head_stride};
}

Arguments arguments(const py::array& q, const py::array& k, const py::array& v, const py::array& cu_seqlens,
                    int n_threads) {
    Arguments args;
    PlanAttention& in = args.in;
    in.bf16 = is_bf16(q, "q");
    check_shape(q, {kAny, kAny, kAny}, "q");
    args.q_shape = shape_of(q);
    in.n_heads = args.q_shape[1];
    in.width = args.q_shape[2];
    check_width(in.width);
    in.q = heads_view(q, in.bf16, args.q_shape, "q");
    const std::vector<std::int64_t> cu = offsets(cu_seqlens, args.q_shape[0]);
    check_shape(k, {static_cast<std::int64_t>(cu.size()) - 1, kAny, in.n_heads, in.width}, "k");
    args.plan_shape = shape_of(k);
    in.n_plan_vectors = args.plan_shape[1];
    if (in.n_plan_vectors < 1) fail("k", "at least 1 plan vector per sequence", "0");
    in.k = plan_view(k, in.bf16, args.plan_shape, "k");
    in.v = plan_view(v, in.bf16, args.plan_shape, "v");
    args.chunks = query_chunks(cu, kChunk, kChunkMultiple);
    in.chunks = args.chunks.data();
    in.n_chunks = static_cast<std::int64_t>(args.chunks.size());
    in.n_threads = std::max(1, n_threads);
    return args;
}

void forward(const py::array& q, const py::array& k, const py::array& v, const py::array& cu_seqlens, py::array out,
             int n_threads) {
    const Arguments args = arguments(q, k, v, cu_seqlens, n_threads);
    const PlanAttentionForward op{args.in, writeable_heads_view(out, args.in.bf16, args.q_shape, "out")};
    const GilRelease release;
    GAC_FAST_DISPATCH(active_isa(), plan_attention(op));
}

void backward(const py::array& d_out, const py::array& q, const py::array& k, const py::array& v,
              const py::array& cu_seqlens, py::array d_q, py::array d_k, py::array d_v, int n_threads) {
    const Arguments args = arguments(q, k, v, cu_seqlens, n_threads);
    const bool bf16 = args.in.bf16;
    const std::int64_t n_sequences = args.plan_shape[0];
    std::vector<std::int64_t> first_chunks(static_cast<std::size_t>(n_sequences) + 1, 0);
    for (const QueryChunk& chunk : args.chunks) ++first_chunks[static_cast<std::size_t>(chunk.sequence) + 1];
    for (std::size_t i = 1; i < first_chunks.size(); ++i) first_chunks[i] += first_chunks[i - 1];
    const std::int64_t share = args.in.n_heads * 2 * args.in.n_plan_vectors * args.in.width;
    const std::unique_ptr<float[]> partial(new float[static_cast<std::size_t>(args.in.n_chunks * share)]);
    const PlanAttentionBackward op{args.in,
                                   heads_view(d_out, bf16, args.q_shape, "d_out"),
                                   writeable_heads_view(d_q, bf16, args.q_shape, "d_q"),
                                   writeable_plan_view(d_k, bf16, args.plan_shape, "d_k"),
                                   writeable_plan_view(d_v, bf16, args.plan_shape, "d_v"),
                                   n_sequences,
                                   first_chunks.data(),
                                   partial.get()};
    const GilRelease release;
    GAC_FAST_DISPATCH(active_isa(), plan_attention_backward(op));
}

}  // namespace

void bind_plan_attention(py::module_& m) {
    m.def("_plan_attention", &forward, py::arg("q"), py::arg("k"), py::arg("v"), py::arg("cu_seqlens"), py::arg("out"),
          py::arg("n_threads"));
    m.def("_plan_attention_backward", &backward, py::arg("d_out"), py::arg("q"), py::arg("k"), py::arg("v"),
          py::arg("cu_seqlens"), py::arg("d_q"), py::arg("d_k"), py::arg("d_v"), py::arg("n_threads"));
}

}  // namespace gac_fast
