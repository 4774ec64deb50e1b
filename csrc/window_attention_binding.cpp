// Takes NumPy arrays, checks them, releases the GIL and attends.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "attention_views.h"
#include "bindings.h"
#include "gil.h"
#include "rotary_table.h"
#include "window_attention.h"

namespace py = pybind11;

namespace gac_fast {
namespace {

// Queries per task, in windows: the backward works out one window more than it owns.
constexpr std::int64_t kWindowsPerChunk = 8;
constexpr std::int64_t kSmallestChunk = 512;
// A multiple of the queries that any path takes at once.
constexpr std::int64_t kChunkMultiple = 32;

struct Arguments {
    WindowAttention in{};
    std::vector<QueryChunk> chunks;
    RotaryRows rotary;
    std::vector<std::int64_t> shape;
};

Arguments arguments(const py::array& q, const py::array& k, const py::array& v, const py::array& cu_seqlens,
                    std::int64_t window, const py::object& positions, double rope_base, int n_threads) {
    Arguments args;
    WindowAttention& in = args.in;
    in.bf16 = is_bf16(q, "q");
    check_shape(q, {kAny, kAny, kAny}, "q");
    args.shape = shape_of(q);
    in.n_tokens = args.shape[0];
    in.n_heads = args.shape[1];
    in.width = args.shape[2];
    if (in.n_tokens >= std::int64_t{1} << 31) fail("q", "fewer than 2^31 tokens", std::to_string(in.n_tokens));
    check_width(in.width);
    in.q = heads_view(q, in.bf16, args.shape, "q");
    in.k = heads_view(k, in.bf16, args.shape, "k");
    in.v = heads_view(v, in.bf16, args.shape, "v");
    const std::vector<std::int64_t> cu = offsets(cu_seqlens, in.n_tokens);
    if (window < 1) fail("window", "at least 1 token", std::to_string(window));
    in.window = std::min(window, std::max<std::int64_t>(1, in.n_tokens));
    args.chunks = query_chunks(cu, std::max(kSmallestChunk, kWindowsPerChunk * in.window), kChunkMultiple);
    in.n_chunks = static_cast<std::int64_t>(args.chunks.size());
    if (!positions.is_none()) {
        if (!(rope_base > 0.0) || std::isinf(rope_base)) {
            fail("rope_base", "a positive number", std::to_string(rope_base));
        }
        args.rotary =
            rotary_rows(integers(array_of(positions, "positions"), in.n_tokens, "positions"), in.width, rope_base);
    }
    in.n_threads = std::max(1, n_threads);
    return args;
}

// The pointers into `args`, once it lies where it stays.
void point(Arguments& args) {
    args.in.chunks = args.chunks.data();
    args.in.turns = args.rotary.turns ? args.rotary.turns->data() : nullptr;
    args.in.turn_rows = args.rotary.rows.data();
}

template <typename Array>
auto softmax_view(Array& softmax, const WindowAttention& in) {
    check_dtype<float>(softmax, "softmax");
    check_shape(softmax, {2, in.n_heads, in.n_tokens}, "softmax");
    if (!(softmax.flags() & py::array::c_style)) fail("softmax", "a contiguous array", "a strided one");
    check_aligned(softmax, "softmax");
    return static_cast<const float*>(softmax.data());
}

void forward(const py::array& q, const py::array& k, const py::array& v, const py::array& cu_seqlens,
             std::int64_t window, const py::object& positions, double rope_base, py::array out, py::array softmax,
             int n_threads) {
    Arguments args = arguments(q, k, v, cu_seqlens, window, positions, rope_base, n_threads);
    point(args);
    const auto out_view = writeable_heads_view(out, args.in.bf16, args.shape, "out");
    check_writeable(softmax, "softmax");
    softmax_view(softmax, args.in);
    const WindowAttentionForward op{args.in, out_view, static_cast<float*>(softmax.mutable_data())};
    const GilRelease release;
    GAC_FAST_DISPATCH(active_isa(), window_attention(op));
}

void backward(const py::array& d_out, const py::array& q, const py::array& k, const py::array& v,
              const py::array& cu_seqlens, std::int64_t window, const py::object& positions, double rope_base,
              const py::array& softmax, py::array d_q, py::array d_k, py::array d_v, int n_threads) {
    Arguments args = arguments(q, k, v, cu_seqlens, window, positions, rope_base, n_threads);
    point(args);
    const bool bf16 = args.in.bf16;
    const WindowAttentionBackward op{args.in,
                                     heads_view(d_out, bf16, args.shape, "d_out"),
                                     softmax_view(softmax, args.in),
                                     writeable_heads_view(d_q, bf16, args.shape, "d_q"),
                                     writeable_heads_view(d_k, bf16, args.shape, "d_k"),
                                     writeable_heads_view(d_v, bf16, args.shape, "d_v")};
    const GilRelease release;
    GAC_FAST_DISPATCH(active_isa(), window_attention_backward(op));
}

}  // namespace

void bind_window_attention(py::module_& m) {
    m.def("_window_attention", &forward, py::arg("q"), py::arg("k"), py::arg("v"), py::arg("cu_seqlens"),
          py::arg("window"), py::arg("positions"), py::arg("rope_base"), py::arg("out"), py::arg("softmax"),
          py::arg("n_threads"));
    m.def("_window_attention_backward", &backward, py::arg("d_out"), py::arg("q"), py::arg("k"), py::arg("v"),
          py::arg("cu_seqlens"), py::arg("window"), py::arg("positions"), py::arg("rope_base"), py::arg("softmax"),
          py::arg("d_q"), py::arg("d_k"), py::arg("d_v"), py::arg("n_threads"));
}

}  // namespace gac_fast
