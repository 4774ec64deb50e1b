// Two objects that are made rarely and used at every step: the packed weights, which know when the model's have
// changed, and the validated memory of an actor's state.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <string>
#include <utility>
#include <vector>

#include "bindings.h"
#include "check.h"
#include "decode_step.h"
#include "gil.h"
#include "thread_pool.h"

namespace py = pybind11;

namespace gac_fast {
namespace {

constexpr std::int64_t kMostWidth = 256;
// More steps than any episode has, and few enough for exact angles.
constexpr std::int64_t kMostSteps = std::int64_t{1} << 40;

constexpr std::size_t kPerLayer = 18;

const float* contiguous(const py::array& array, const std::vector<std::int64_t>& shape, const std::string& name) {
    check_dtype<float>(array, name.c_str());
    check_shape(array, shape, name.c_str());
    if ((array.flags() & py::array::c_style) == 0) fail(name, "a contiguous array", "a strided one");
    check_aligned(array, name.c_str());
    return static_cast<const float*>(array.data());
}

LinearSource linear(const std::vector<py::array>& arrays, std::size_t i, std::int64_t n_out, std::int64_t n_in,
                    const std::string& name) {
    return {contiguous(arrays[i], {n_out, n_in}, name + " weight"), contiguous(arrays[i + 1], {n_out}, name + " bias")};
}

LinearSource norm(const std::vector<py::array>& arrays, std::size_t i, std::int64_t n, const std::string& name) {
    return {contiguous(arrays[i], {n}, name + " weight"), contiguous(arrays[i + 1], {n}, name + " bias")};
}

std::int64_t axis(const py::array& array, py::ssize_t i, const std::string& name) {
    if (array.ndim() <= i) fail(name, "at least " + std::to_string(i + 1) + " dimensions", shape_text(shape_of(array)));
    return array.shape(i);
}

// Says at each step whether a tensor's memory, its version or its first bytes are other ones than when it was made: the
// version counts changes in place, the bytes show those made through `.data`, which do not count.
class Watched {
  public:
    Watched(py::object tensor, py::array array) : tensor_(std::move(tensor)), array_(std::move(array)) {
        // Looked up once: of the 60 tensors of a decoder each is asked at every step.
        const py::type type = py::type::of(tensor_);
        if (!py::hasattr(type, "_version") || !py::hasattr(type, "data_ptr")) {
            fail("tensors", "torch tensors", std::string(py::str(type)));
        }
        version_of_ = type.attr("_version");
        data_ptr_of_ = type.attr("data_ptr");
        if (Py_TYPE(version_of_.ptr())->tp_descr_get == nullptr) fail("tensors", "torch tensors", "another kind");
        version_ = version();
        auto bytes = static_cast<std::size_t>(array_.nbytes());
        // Tensors made in inference mode count nothing: all of their bytes are compared.
        if (version_ >= 0) bytes = std::min<std::size_t>(bytes, 64);
        data_ = static_cast<const char*>(array_.data());
        sample_.assign(data_, data_ + bytes);
    }

    // The engine's own weights have driven all of this out of the near caches.
    void fetch() const {
        __builtin_prefetch(tensor_.ptr());
        __builtin_prefetch(data_);
        __builtin_prefetch(sample_.data());
    }

    bool changed() const {
        if (version() != version_) return true;
        const auto address = py::reinterpret_steal<py::object>(PyObject_CallOneArg(data_ptr_of_.ptr(), tensor_.ptr()));
        if (!address) throw py::error_already_set();
        if (PyLong_AsVoidPtr(address.ptr()) != data_) return true;
        return std::memcmp(data_, sample_.data(), sample_.size()) != 0;
    }

  private:
    std::int64_t version() const {
        PyObject* const descriptor = version_of_.ptr();
        PyObject* const type = reinterpret_cast<PyObject*>(Py_TYPE(tensor_.ptr()));
        const auto value =
            py::reinterpret_steal<py::object>(Py_TYPE(descriptor)->tp_descr_get(descriptor, tensor_.ptr(), type));
        if (!value) {
            if (!PyErr_ExceptionMatches(PyExc_RuntimeError)) throw py::error_already_set();
            PyErr_Clear();
            return -1;
        }
        return PyLong_AsLongLong(value.ptr());
    }

    py::object tensor_, version_of_, data_ptr_of_;
    py::array array_;
    const char* data_;
    std::int64_t version_ = -1;
    std::vector<char> sample_;
};

// Of any state's step.
std::atomic<std::int64_t> last_end{0};

std::int64_t microseconds_now() {
    const auto now = std::chrono::steady_clock::now().time_since_epoch();
    return std::chrono::duration_cast<std::chrono::microseconds>(now).count();
}

struct Release {
    void operator()(char* p) const { ::operator delete(p, std::align_val_t{64}); }
};

class DecodeWeights {
  public:
    DecodeWeights(const std::vector<py::object>& tensors, const std::vector<py::array>& arrays, std::int64_t n_heads,
                  double rope_base, bool reads_actions, bool bf16)
        : isa_(active_isa()), rotary_(1, 2.0) {
        const std::size_t embeddings = reads_actions ? 4 : 2;
        if (tensors.size() != arrays.size()) {
            fail("tensors", std::to_string(arrays.size()) + " as in arrays", std::to_string(tensors.size()));
        }
        if (arrays.size() < embeddings + 4 + kPerLayer || (arrays.size() - embeddings - 4) % kPerLayer != 0) {
            fail("arrays", "embeddings, 18 of each layer, norm and head", std::to_string(arrays.size()));
        }
        DecodeSizes& s = source_.sizes;
        s.n_layers = static_cast<std::int64_t>((arrays.size() - embeddings - 4) / kPerLayer);
        s.dim = axis(arrays[0], 0, "embed_state weight");
        s.obs_dim = axis(arrays[0], 1, "embed_state weight");
        s.n_heads = n_heads;
        s.hidden = axis(arrays[embeddings + 14], 0, "mlp_in weight");
        s.act_dim = axis(arrays[arrays.size() - 2], 0, "head weight");
        s.reads_actions = reads_actions;
        s.bf16 = bf16;
        if (n_heads < 1 || s.dim < 1 || s.dim % n_heads != 0) {
            fail("n_heads", "a divisor of the width " + std::to_string(s.dim), std::to_string(n_heads));
        }
        const std::int64_t width = s.dim / n_heads;
        if (width % 2 != 0 || width > kMostWidth) {
            fail("head width", "an even number up to 256", std::to_string(width));
        }
        if (s.obs_dim < 1) fail("embed_state weight", "at least one observation dimension", "none");
        if (s.act_dim < 1) fail("head weight", "at least one action dimension", "none");
        if (s.hidden < 1) fail("mlp_in weight", "at least one hidden unit", "none");
        if (!(rope_base > 0)) fail("rope_base", "a positive number", std::to_string(rope_base));

        source_.embed_state = linear(arrays, 0, s.dim, s.obs_dim, "embed_state");
        source_.embed_action = {nullptr, nullptr};
        if (reads_actions) source_.embed_action = linear(arrays, 2, s.dim, s.act_dim, "embed_action");
        std::vector<LayerSource> layers;
        for (std::int64_t l = 0; l < s.n_layers; ++l) {
            const std::size_t i = embeddings + static_cast<std::size_t>(l) * kPerLayer;
            const std::string name = "layer " + std::to_string(l) + " ";
            LayerSource layer;
            layer.norm1 = norm(arrays, i, s.dim, name + "norm1");
            layer.qkv = linear(arrays, i + 2, 3 * s.dim, s.dim, name + "qkv");
            layer.o = linear(arrays, i + 4, s.dim, s.dim, name + "out");
            layer.norm2 = norm(arrays, i + 6, s.dim, name + "norm2");
            layer.plan_q = linear(arrays, i + 8, s.dim, s.dim, name + "plan_q");
            layer.plan_o = linear(arrays, i + 10, s.dim, s.dim, name + "plan_out");
            layer.norm3 = norm(arrays, i + 12, s.dim, name + "norm3");
            layer.in = linear(arrays, i + 14, s.hidden, s.dim, name + "mlp_in");
            layer.out = linear(arrays, i + 16, s.dim, s.hidden, name + "mlp_out");
            layers.push_back(layer);
        }
        source_.norm = norm(arrays, arrays.size() - 4, s.dim, "norm");
        source_.head = linear(arrays, arrays.size() - 2, s.act_dim, s.dim, "head");
        source_.layers = layers.data();

        rotary_ = RotaryTable(width / 2, rope_base);
        // Before the weights are read: a change in between is then seen.
        for (std::size_t i = 0; i < arrays.size(); ++i) watched_.emplace_back(tensors[i], arrays[i]);
        {
            const GilRelease release;
            const std::size_t bytes = GAC_FAST_DISPATCH(isa_, decode_step_pack(source_, nullptr, nullptr));
            memory_.reset(static_cast<char*>(::operator new(bytes, std::align_val_t{64})));
            GAC_FAST_DISPATCH(isa_, decode_step_pack(source_, memory_.get(), &packed_));
        }
        source_.layers = nullptr;
    }

    // Whether the model's weights are other ones now, or another instruction set is asked for.
    bool stale() const {
        if (isa_ != active_isa()) return true;
        for (const Watched& w : watched_) w.fetch();
        return std::any_of(watched_.begin(), watched_.end(), [](const Watched& w) { return w.changed(); });
    }

    Isa isa() const { return isa_; }
    const PackedDecoder& packed() const { return packed_; }
    const RotaryTable& rotary() const { return rotary_; }

  private:
    Isa isa_;
    DecoderSource source_;
    PackedDecoder packed_;
    RotaryTable rotary_;
    std::vector<Watched> watched_;
    std::unique_ptr<char, Release> memory_;
};

class DecodeState {
  public:
    DecodeState(py::array ring_k, py::array ring_v, const py::array& plan_k, const py::array& plan_v, py::array steps,
                py::array last_action, const std::vector<py::array>& units) {
        bf16_ = !ring_k.dtype().equal(py::dtype::of<float>());
        if (bf16_) {
            check_dtype<std::int16_t>(ring_k, "ring_k");
            check_dtype<std::int16_t>(ring_v, "ring_v");
        }
        check_shape(ring_k, {kAny, kAny, kAny, kAny, kAny}, "ring_k");
        const std::vector<std::int64_t> ring = shape_of(ring_k);
        n_layers_ = ring[0];
        args_.n_rows = ring[1];
        args_.window = ring[2];
        n_heads_ = ring[3];
        width_ = ring[4];
        if (args_.n_rows < 1 || args_.window < 1) fail("ring_k", "rows and slots", shape_text(ring));
        args_.ring_k = whole(ring_k, ring, "ring_k");
        args_.ring_v = whole(ring_v, ring, "ring_v");
        args_.plan_k = contiguous(plan_k, {ring[0], ring[1], kAny, ring[3], ring[4]}, "plan_k");
        args_.n_z = plan_k.shape(2);
        if (args_.n_z < 1) fail("plan_k", "at least one plan vector", shape_text(shape_of(plan_k)));
        args_.plan_v = contiguous(plan_v, shape_of(plan_k), "plan_v");
        check_dtype<std::int64_t>(steps, "steps");
        args_.steps = static_cast<std::int64_t*>(whole(steps, {args_.n_rows}, "steps"));
        check_dtype<float>(last_action, "last_action");
        args_.last_action = static_cast<float*>(whole(last_action, {args_.n_rows, kAny}, "last_action"));
        act_dim_ = last_action.shape(1);
        keep_ = {std::move(ring_k), std::move(ring_v), plan_k, plan_v, std::move(steps), std::move(last_action)};
        args_.obs_mean = args_.obs_std = args_.action_mid = args_.action_half = nullptr;
        if (!units.empty()) {
            if (units.size() != 4) fail("units", "none or four arrays", std::to_string(units.size()));
            args_.obs_mean = contiguous(units[0], {kAny}, "obs_mean");
            obs_dim_ = units[0].shape(0);
            args_.obs_std = contiguous(units[1], {obs_dim_}, "obs_std");
            args_.action_mid = contiguous(units[2], {act_dim_}, "action_mid");
            args_.action_half = contiguous(units[3], {act_dim_}, "action_half");
            keep_.insert(keep_.end(), units.begin(), units.end());
        }
    }

    std::int64_t step(const DecodeWeights& weights, const py::array& observations, py::array& out, int n_threads) {
        const DecodeSizes& s = weights.packed().sizes;
        if (s.bf16 != bf16_) fail("ring_k", s.bf16 ? "bfloat16 rings" : "float32 rings", "the other kind");
        if (s.n_layers != n_layers_ || s.n_heads != n_heads_ || s.dim != n_heads_ * width_ || s.act_dim != act_dim_) {
            fail("state", "the layers, heads, width and actions of the weights", "others");
        }
        if (obs_dim_ != kAny && obs_dim_ != s.obs_dim) {
            fail("obs_mean", "shape " + shape_text({s.obs_dim}), shape_text({obs_dim_}));
        }
        DecodeStepArgs args = args_;
        args.doubles = observations.dtype().equal(py::dtype::of<double>());
        if (!args.doubles) check_dtype<float>(observations, "observations");
        check_shape(observations, {args.n_rows, s.obs_dim}, "observations");
        check_dtype<float>(out, "out");
        args.out = static_cast<float*>(whole(out, {args.n_rows, act_dim_}, "out"));
        args.observations = static_cast<const char*>(observations.data());
        args.row_bytes = observations.strides(0);
        args.element_bytes = observations.strides(1);
        for (std::int64_t p = 0; p < args.n_rows; ++p) {
            if (args.steps[p] < 0 || args.steps[p] > kMostSteps) {
                fail("steps", "between 0 and 2^40", std::to_string(args.steps[p]));
            }
        }
        args.weights = &weights.packed();
        args.rotary = &weights.rotary();
        args.n_threads = n_threads;
        const GilRelease release;
        args.soon_after = microseconds_now() - last_end.load() < kWorkersSpin;
        const std::int64_t row = GAC_FAST_DISPATCH(weights.isa(), decode_step(args));
        last_end.store(microseconds_now());
        return row;
    }

  private:
    static void* whole(py::array& array, const std::vector<std::int64_t>& shape, const char* name) {
        check_shape(array, shape, name);
        check_writeable(array, name);
        if ((array.flags() & py::array::c_style) == 0) fail(name, "a contiguous array", "a strided one");
        check_aligned(array, name);
        return array.mutable_data();
    }

    DecodeStepArgs args_{};
    std::int64_t n_layers_, n_heads_, width_, act_dim_;
    std::int64_t obs_dim_ = kAny;
    bool bf16_;
    std::vector<py::array> keep_;
};

}  // namespace

void bind_decode_step(py::module_& m) {
    py::class_<DecodeWeights>(m, "_DecodeWeights")
        .def(
            py::init<const std::vector<py::object>&, const std::vector<py::array>&, std::int64_t, double, bool, bool>(),
            py::arg("tensors"), py::arg("arrays"), py::arg("n_heads"), py::arg("rope_base"), py::arg("reads_actions"),
            py::arg("bf16"))
        .def("stale", &DecodeWeights::stale);
    py::class_<DecodeState>(m, "_DecodeState")
        .def(py::init<py::array, py::array, const py::array&, const py::array&, py::array, py::array,
                      const std::vector<py::array>&>(),
             py::arg("ring_k"), py::arg("ring_v"), py::arg("plan_k"), py::arg("plan_v"), py::arg("steps"),
             py::arg("last_action"), py::arg("units"))
        .def("step", &DecodeState::step, py::arg("weights"), py::arg("observations"), py::arg("out"),
             py::arg("n_threads"));
    // Whether each entry (dictionary, key, value) still holds that very value.
    m.def(
        "_same_entries",
        [](const py::list& entries) {
            for (const py::handle entry : entries) __builtin_prefetch(entry.ptr());
            for (const py::handle entry : entries) {
                if (PyTuple_Check(entry.ptr()) && PyTuple_GET_SIZE(entry.ptr()) == 3) {
                    __builtin_prefetch(PyTuple_GET_ITEM(entry.ptr(), 0));
                    __builtin_prefetch(PyTuple_GET_ITEM(entry.ptr(), 1));
                }
            }
            for (const py::handle entry : entries) {
                if (!PyTuple_Check(entry.ptr()) || PyTuple_GET_SIZE(entry.ptr()) != 3 ||
                    !PyDict_Check(PyTuple_GET_ITEM(entry.ptr(), 0))) {
                    throw std::invalid_argument("entries: expected tuples (dict, key, value), got another object");
                }
                PyObject* value =
                    PyDict_GetItemWithError(PyTuple_GET_ITEM(entry.ptr(), 0), PyTuple_GET_ITEM(entry.ptr(), 1));
                if (value == nullptr && PyErr_Occurred() != nullptr) throw py::error_already_set();
                if (value != PyTuple_GET_ITEM(entry.ptr(), 2)) return false;
            }
            return true;
        },
        py::arg("entries"));
}

}  // namespace gac_fast
