// Takes NumPy arrays, checks them, releases the GIL and runs a decoder layer's token-local part. bfloat16 arrays come
// as int16.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "aligned_memory.h"
#include "bindings.h"
#include "block.h"
#include "check.h"
#include "gil.h"
#include "thread_pool.h"

namespace py = pybind11;

namespace gac_fast {
namespace {

constexpr std::int64_t kPad = 32;

std::int64_t padded(std::int64_t n) { return (n + kPad - 1) / kPad * kPad; }

constexpr const char* kMapNames[kBlockMaps] = {"o", "plan_q", "plan_o", "in", "out", "next"};
// Maps behind a norm.
constexpr std::array<BlockMap, 3> kNorms = {kBlockPlanQ, kBlockIn, kBlockNext};

// The maps of a layer in the layout of the path that was active when they were packed.
class BlockWeights {
  public:
    // norms: scales and offsets of the norms before plan_q, in and next, which are folded into these; or none.
    BlockWeights(const std::vector<py::object>& weights, const std::vector<py::object>& biases,
                 const std::vector<py::object>& norms, bool bf16, bool backward, int n_threads)
        : isa(active_isa()), backward_(backward) {
        for (const auto& [name, list] : {std::pair{"weights", &weights}, std::pair{"biases", &biases}}) {
            if (list->size() != kBlockMaps) {
                fail(name, std::to_string(kBlockMaps) + " arrays", std::to_string(list->size()));
            }
        }
        if (!norms.empty() && norms.size() != 2 * kNorms.size()) {
            fail("norms", std::to_string(2 * kNorms.size()) + " arrays or none", std::to_string(norms.size()));
        }
        packs.bf16 = bf16;
        packs.has_o = !weights[kBlockO].is_none();
        const py::array in = array_of(weights[kBlockIn], "weights.in");
        const py::array next = array_of(weights[kBlockNext], "weights.next");
        check_shape(in, {kAny, kAny}, "weights.in");
        check_shape(next, {kAny, in.shape(1)}, "weights.next");
        packs.dim = in.shape(1);
        packs.hidden = in.shape(0);
        packs.n_next = next.shape(0);
        if (packs.dim < 1 || packs.hidden < 1 || packs.n_next < 1) {
            fail("weights", "sizes of at least 1", shape_text({packs.dim, packs.hidden, packs.n_next}));
        }
        std::array<BlockLinear, kBlockMaps> maps{};
        for (int i = packs.has_o ? 0 : 1; i < kBlockMaps; ++i) {
            const std::int64_t n_out = i == kBlockIn ? packs.hidden : i == kBlockNext ? packs.n_next : packs.dim;
            const std::int64_t n_in = i == kBlockOut ? packs.hidden : packs.dim;
            const std::string name = std::string("weights.") + kMapNames[i];
            const std::string bias_name = std::string("biases.") + kMapNames[i];
            const auto w = rows_view<float>(array_of(weights[i], name.c_str()), n_out, n_in, name.c_str());
            const auto b = vector_view<float>(array_of(biases[i], bias_name.c_str()), n_out, bias_name.c_str());
            if (b.stride != 1 && n_out > 1) fail(bias_name, "neighbouring elements", "a strided array");
            maps[i] = {w.data, w.stride, b.data, n_out, n_in};
        }
        std::array<const float*, kBlockMaps> scales{}, offsets{};
        for (std::size_t i = 0; i < norms.size() / 2; ++i) {
            const BlockMap map = kNorms[i];
            scales[map] = norm_vector(norms[2 * i], std::string("norms.") + kMapNames[map] + ".w");
            offsets[map] = norm_vector(norms[2 * i + 1], std::string("norms.") + kMapNames[map] + ".b");
        }
        const GilRelease release;
        auto task = [&](std::int64_t i) {
            if (maps[i].weight == nullptr) return;
            BlockLinear map = maps[i];
            bias_[i].assign(static_cast<std::size_t>(padded(map.n_out)), 0.0F);
            packs.bias[i] = bias_[i].data();
            AlignedMemory folded;
            if (scales[i] != nullptr) {
                folded = allocate_aligned(static_cast<std::size_t>(map.n_out * map.n_in) * sizeof(float));
                auto* weight = static_cast<float*>(folded.get());
                GAC_FAST_DISPATCH(isa, block_fold(map, scales[i], offsets[i], weight, bias_[i].data()));
                map.weight = weight;
                map.stride = map.n_in;
            } else {
                std::memcpy(bias_[i].data(), map.bias, static_cast<std::size_t>(map.n_out) * sizeof(float));
            }
            packs.forward[i] = pack(map, false, forward_[i]);
            if (backward) packs.transposed[i] = pack(map, true, transposed_[i]);
        };
        parallel_for_each(
            kBlockMaps, n_threads, [](void* context, std::int64_t i) { (*static_cast<decltype(task)*>(context))(i); },
            &task);
    }

    // What every call asks of them.
    void check(bool for_backward) const {
        if (isa != active_isa()) fail("weights", std::string("packs for ") + isa_name(active_isa()), isa_name(isa));
        if (for_backward && !backward_) fail("weights", "packs for the backward", "packs for the forward alone");
    }

    std::int64_t n_bias() const { return (packs.has_o ? 4 : 3) * packs.dim + packs.hidden + packs.n_next; }

    BlockPacks packs{};
    Isa isa;

  private:
    const float* norm_vector(const py::object& object, const std::string& name) const {
        const auto view = vector_view<float>(array_of(object, name.c_str()), packs.dim, name.c_str());
        if (view.stride != 1 && packs.dim > 1) fail(name, "neighbouring elements", "a strided array");
        return view.data;
    }

    const void* pack(const BlockLinear& map, bool transposed, AlignedMemory& memory) const {
        const std::int64_t n_out = transposed ? map.n_in : map.n_out;
        const std::int64_t n_in = transposed ? map.n_out : map.n_in;
        memory = allocate_aligned(GAC_FAST_DISPATCH(isa, block_pack_bytes(packs.bf16, n_out, n_in)));
        GAC_FAST_DISPATCH(isa, block_pack(packs.bf16, map, transposed, memory.get()));
        return memory.get();
    }

    bool backward_;
    std::array<AlignedMemory, kBlockMaps> forward_, transposed_;
    std::array<std::vector<float>, kBlockMaps> bias_;
};

// Of arrays without gaps.
std::pair<std::uint64_t, std::uint64_t> fingerprint(const std::vector<py::array>& arrays) {
    std::vector<std::pair<const float*, std::int64_t>> contents;
    for (const py::array& array : arrays) {
        check_dtype<float>(array, "arrays");
        if (!(array.flags() & py::array::c_style)) fail("arrays", "arrays without gaps", "a strided one");
        check_aligned(array, "arrays");
        contents.emplace_back(static_cast<const float*>(array.data()), array.size());
    }
    BlockFingerprint state{0, 0};
    const Isa isa = active_isa();
    const GilRelease release;
    for (const auto& [data, n] : contents) GAC_FAST_DISPATCH(isa, block_fingerprint(data, n, &state));
    return {state.first, state.second};
}

// ---------------------------------------------------------------------------------------------------------------------
// Arguments of a call

// Rows of float, or of bfloat16 as int16.
template <typename View>
struct AnyRows {
    View data;
    std::int64_t stride;
};

AnyRows<const void*> rows_of(const py::object& object, bool bf16, std::int64_t rows, std::int64_t columns,
                             const char* name) {
    if (object.is_none()) return {nullptr, 0};
    const py::array array = array_of(object, name);
    if (bf16) {
        const auto view = rows_view<std::int16_t>(array, rows, columns, name);
        return {view.data, view.stride};
    }
    const auto view = rows_view<float>(array, rows, columns, name);
    return {view.data, view.stride};
}

// Rows without gaps.
template <typename T>
T* dense_rows(const py::object& object, std::int64_t rows, std::int64_t columns, const char* name) {
    if (object.is_none()) return nullptr;
    py::array array = array_of(object, name);
    const auto view = writeable_rows_view<T>(array, rows, columns, name);
    if (rows > 1 && view.stride != columns) {
        fail(name, "rows without gaps", "a row stride of " + std::to_string(view.stride));
    }
    return view.data;
}

void* dense_rows(const py::object& object, bool bf16, std::int64_t rows, std::int64_t columns, const char* name) {
    if (bf16) return dense_rows<std::int16_t>(object, rows, columns, name);
    return dense_rows<float>(object, rows, columns, name);
}

void need(const py::object& object, const char* name) {
    if (object.is_none()) fail(name, "an array", "None");
}

BlockPlan plan_of(const py::array& array, std::int64_t n_sequences, std::int64_t n_z, std::int64_t n_heads,
                  std::int64_t width, const char* name) {
    const bool bf16 = array.dtype().equal(py::dtype::of<std::int16_t>());
    if (!bf16) check_dtype<float>(array, name);
    check_shape(array, {n_sequences, n_z, n_heads, width}, name);
    const auto item = static_cast<std::int64_t>(array.itemsize());
    if (array.size() > 0 && width > 1 && array.strides(3) != item) {
        fail(name, "neighbouring elements within a head", "a stride of " + std::to_string(array.strides(3)) + " bytes");
    }
    check_aligned(array, name);
    return {array.data(), bf16, array.strides(0) / item, array.strides(1) / item, array.strides(2) / item};
}

// The tokens of each sequence cut into tiles.
struct Call {
    BlockShape shape{};
    BlockPlan k{}, v{};
    std::vector<BlockTile> tiles;
    std::vector<std::int64_t> first_tile;
    AlignedMemory plan_packs;

    Call(const BlockWeights& weights, std::int64_t n_tokens, const py::array& plan_k, const py::array& plan_v,
         const py::array& cu_seqlens, int n_threads) {
        const std::int64_t dim = weights.packs.dim;
        check_shape(plan_k, {kAny, kAny, kAny, kAny}, "plan_k");
        const std::int64_t n_sequences = plan_k.shape(0);
        shape.n_tokens = n_tokens;
        shape.n_sequences = n_sequences;
        shape.n_z = plan_k.shape(1);
        shape.n_heads = plan_k.shape(2);
        shape.n_threads = n_threads;
        if (shape.n_z < 1) fail("plan_k", "at least 1 plan vector", std::to_string(shape.n_z));
        if (shape.n_heads < 1 || shape.n_heads * plan_k.shape(3) != dim) {
            fail("plan_k", "heads that fill a width of " + std::to_string(dim), shape_text(shape_of(plan_k)));
        }
        k = plan_of(plan_k, n_sequences, shape.n_z, shape.n_heads, plan_k.shape(3), "plan_k");
        v = plan_of(plan_v, n_sequences, shape.n_z, shape.n_heads, plan_k.shape(3), "plan_v");
        const auto cu = vector_view<std::int64_t>(cu_seqlens, n_sequences + 1, "cu_seqlens");
        if (cu[0] != 0) fail("cu_seqlens", "a first offset of 0", std::to_string(cu[0]));
        if (cu[n_sequences] != n_tokens) {
            fail("cu_seqlens", "a last offset of " + std::to_string(n_tokens), std::to_string(cu[n_sequences]));
        }
        first_tile.reserve(static_cast<std::size_t>(n_sequences) + 1);
        for (std::int64_t b = 0; b < n_sequences; ++b) {
            first_tile.push_back(static_cast<std::int64_t>(tiles.size()));
            if (cu[b + 1] < cu[b] || cu[b + 1] > n_tokens) {
                fail("cu_seqlens", "offsets that rise to " + std::to_string(n_tokens),
                     std::to_string(cu[b]) + " before " + std::to_string(cu[b + 1]));
            }
            // Tiles of nearly equal size.
            const std::int64_t length = cu[b + 1] - cu[b];
            const std::int64_t n = (length + kBlockTile - 1) / kBlockTile;
            for (std::int64_t i = 0; i < n; ++i) {
                const std::int64_t first = length * i / n;
                tiles.push_back({b, cu[b] + first, length * (i + 1) / n - first});
            }
        }
        first_tile.push_back(static_cast<std::int64_t>(tiles.size()));
        shape.tiles = tiles.data();
        shape.first_tile = first_tile.data();
        shape.n_tiles = static_cast<std::int64_t>(tiles.size());
        plan_packs = allocate_aligned(GAC_FAST_DISPATCH(weights.isa, block_plan_bytes(shape, dim, weights.packs.bf16)));
    }
};

std::int64_t n_rows(const py::array& x, const char* name) {
    check_shape(x, {kAny, kAny}, name);
    return x.shape(0);
}

void forward(const BlockWeights& weights, const py::array& x, const py::object& attended, const py::array& plan_k,
             const py::array& plan_v, const py::array& cu_seqlens, const py::object& x_out, const py::object& y,
             const py::object& normed1, const py::object& normed2, const py::object& rstd, const py::object& probs,
             const py::object& q, const py::object& hidden, int n_threads) {
    weights.check(false);
    const BlockPacks& p = weights.packs;
    const std::int64_t n = n_rows(x, "x");
    const Call call(weights, n, plan_k, plan_v, cu_seqlens, n_threads);
    BlockForward f{};
    f.shape = call.shape;
    f.packs = &p;
    const auto x_view = rows_view<float>(x, n, p.dim, "x");
    f.x = x_view.data;
    f.x_stride = x_view.stride;
    if (p.has_o == attended.is_none()) {
        fail("attended", p.has_o ? "an array for weights with W_o" : "None for weights without W_o",
             p.has_o ? "None" : "an array");
    }
    const auto attended_view = rows_of(attended, p.bf16, n, p.dim, "attended");
    f.attended = attended_view.data;
    f.attended_stride = attended_view.stride;
    f.k = call.k;
    f.v = call.v;
    f.plan_packs = call.plan_packs.get();
    need(x_out, "x_out");
    need(y, "y");
    f.x_out = dense_rows<float>(x_out, n, p.dim, "x_out");
    f.y = dense_rows(y, p.bf16, n, p.n_next, "y");
    f.normed1 = dense_rows(normed1, p.bf16, n, padded(p.dim), "normed1");
    f.normed2 = dense_rows(normed2, p.bf16, n, padded(p.dim), "normed2");
    f.rstd = dense_rows<float>(rstd, n, 2, "rstd");
    f.probs = dense_rows<float>(probs, n, f.shape.n_heads * f.shape.n_z, "probs");
    const bool saves = !normed1.is_none();
    for (const auto* other : {&normed2, &rstd, &probs}) {
        if (other->is_none() == saves) fail("normed1", "all arrays for the backward or none", "some");
    }
    if ((q.is_none() || hidden.is_none()) == (saves && !p.bf16)) {
        fail("q and hidden", "arrays for a float32 backward, None else", "others");
    }
    f.q = dense_rows<float>(q, n, padded(p.dim), "q");
    f.hidden = dense_rows<float>(hidden, n, padded(p.hidden), "hidden");
    const GilRelease release;
    GAC_FAST_DISPATCH(weights.isa, block_forward(f));
}

void backward(const BlockWeights& weights, const py::object& dx_out, const py::object& dy, const py::array& x_out,
              const py::object& normed1, const py::object& normed2, const py::object& rstd, const py::object& probs,
              const py::object& q, const py::object& hidden, const py::array& plan_k, const py::array& plan_v,
              const py::array& cu_seqlens, const py::object& dx, const py::object& dattended, const py::object& dplan_k,
              const py::object& dplan_v, const std::vector<py::object>& operands, const py::object& dbias,
              int n_threads) {
    weights.check(true);
    const BlockPacks& p = weights.packs;
    const std::int64_t n = n_rows(x_out, "x_out");
    const std::int64_t ld = padded(p.dim);
    const Call call(weights, n, plan_k, plan_v, cu_seqlens, n_threads);
    const BlockShape& s = call.shape;
    BlockBackward f{};
    f.shape = s;
    f.packs = &p;
    const auto dx_out_view = rows_of(dx_out, false, n, p.dim, "dx_out");
    f.dx_out = static_cast<const float*>(dx_out_view.data);
    f.dx_out_stride = dx_out_view.stride;
    const auto dy_view = rows_of(dy, p.bf16, n, p.n_next, "dy");
    f.dy = dy_view.data;
    f.dy_stride = dy_view.stride;
    for (const auto& [name, object] :
         {std::pair{"normed1", &normed1}, std::pair{"normed2", &normed2}, std::pair{"rstd", &rstd},
          std::pair{"probs", &probs}, std::pair{"dplan_k", &dplan_k}, std::pair{"dplan_v", &dplan_v}}) {
        need(*object, name);
    }
    if (!p.bf16) {
        need(q, "q");
        need(hidden, "hidden");
    }
    f.x_out = dense_rows<float>(x_out, n, p.dim, "x_out");
    f.normed1 = dense_rows(normed1, p.bf16, n, ld, "normed1");
    f.normed2 = dense_rows(normed2, p.bf16, n, ld, "normed2");
    f.rstd = dense_rows<float>(rstd, n, 2, "rstd");
    f.probs = dense_rows<float>(probs, n, s.n_heads * s.n_z, "probs");
    if (!p.bf16) {
        f.q = dense_rows<float>(q, n, ld, "q");
        f.hidden = dense_rows<float>(hidden, n, padded(p.hidden), "hidden");
    }
    f.k = call.k;
    f.v = call.v;
    f.plan_packs = call.plan_packs.get();
    f.dplan_k = dense_rows<float>(dplan_k, s.n_sequences, s.n_z * p.dim, "dplan_k");
    f.dplan_v = dense_rows<float>(dplan_v, s.n_sequences, s.n_z * p.dim, "dplan_v");
    f.every = 1;
    if (!dx.is_none() && p.dim > 0) {
        const py::array array = array_of(dx, "dx");
        check_shape(array, {n, kAny}, "dx");
        f.every = std::max<std::int64_t>(1, array.shape(1) / p.dim);
    }
    f.dx = dense_rows<float>(dx, n, f.every * p.dim, "dx");
    f.dattended = dense_rows(dattended, p.bf16, n, f.every * p.dim, "dattended");
    if ((f.dx != nullptr && p.has_o) != (f.dattended != nullptr) && n > 0) {
        fail("dattended", "an array where dx is wanted and there is W_o, None else", "another");
    }
    const std::vector<std::int64_t> widths = {p.dim, p.dim, p.dim, p.hidden, p.dim, p.dim, p.hidden, p.dim};
    BlockOperands out{};
    void** const slots[] = {&out.dx1,           &out.dq,        &out.dx2,    &out.dhidden, &out.dx3,
                            &out.attended_plan, &out.activated, &out.normed3};
    AlignedMemory bias_partials;
    if (!operands.empty()) {
        if (operands.size() != widths.size()) fail("operands", "8 arrays or none", std::to_string(operands.size()));
        for (std::size_t i = 0; i < widths.size(); ++i) {
            const std::string name = "operands[" + std::to_string(i) + "]";
            need(operands[i], name.c_str());
            *slots[i] = dense_rows(operands[i], p.bf16, n, padded(widths[i]), name.c_str());
        }
        need(dx, "dx");
        need(dbias, "dbias");
        py::array array = array_of(dbias, "dbias");
        check_writeable(array, "dbias");
        const auto view = vector_view<float>(array, weights.n_bias(), "dbias");
        if (view.stride != 1 && view.size > 1) fail("dbias", "neighbouring elements", "a strided array");
        out.dbias = static_cast<float*>(array.mutable_data());
        bias_partials = allocate_aligned(static_cast<std::size_t>(s.n_tiles * weights.n_bias()) * sizeof(float));
        out.dbias_partials = static_cast<float*>(bias_partials.get());
        f.operands = &out;
    }
    const AlignedMemory partials =
        allocate_aligned(static_cast<std::size_t>(s.n_tiles * 2 * s.n_z * p.dim) * sizeof(float));
    f.plan_partials = static_cast<float*>(partials.get());
    const GilRelease release;
    GAC_FAST_DISPATCH(weights.isa, block_backward(f));
}

}  // namespace

void bind_block(py::module_& m) {
    py::class_<BlockWeights>(m, "_BlockWeights")
        .def(py::init<const std::vector<py::object>&, const std::vector<py::object>&, const std::vector<py::object>&,
                      bool, bool, int>(),
             py::arg("weights"), py::arg("biases"), py::arg("norms"), py::arg("bf16"), py::arg("backward"),
             py::arg("n_threads"));
    m.def("_block_fingerprint", &fingerprint, py::arg("arrays"));
    m.def("_block", &forward, py::arg("weights"), py::arg("x"), py::arg("attended"), py::arg("plan_k"),
          py::arg("plan_v"), py::arg("cu_seqlens"), py::arg("x_out"), py::arg("y"), py::arg("normed1"),
          py::arg("normed2"), py::arg("rstd"), py::arg("probs"), py::arg("q"), py::arg("hidden"), py::arg("n_threads"));
    m.def("_block_backward", &backward, py::arg("weights"), py::arg("dx_out"), py::arg("dy"), py::arg("x_out"),
          py::arg("normed1"), py::arg("normed2"), py::arg("rstd"), py::arg("probs"), py::arg("q"), py::arg("hidden"),
          py::arg("plan_k"), py::arg("plan_v"), py::arg("cu_seqlens"), py::arg("dx"), py::arg("dattended"),
          py::arg("dplan_k"), py::arg("dplan_v"), py::arg("operands"), py::arg("dbias"), py::arg("n_threads"));
}

}  // namespace gac_fast
