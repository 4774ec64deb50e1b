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
#include "decode_step_watch.h"
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
        for (std::size_t i = 0; i < arrays.size(); ++i) watched_.add(tensors[i], arrays[i]);
        watched_.add_to(lines_);
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
        fetch();
        return changed();
    }

    void fetch() const { lines_.fetch(); }
    bool changed() const { return isa_ != active_isa() || watched_.changed(); }

    Isa isa() const { return isa_; }
    const PackedDecoder& packed() const { return packed_; }
    const RotaryTable& rotary() const { return rotary_; }

  private:
    Isa isa_;
    DecoderSource source_;
    PackedDecoder packed_;
    RotaryTable rotary_;
    WatchedTensors watched_;
    Lines lines_;
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

    void check(const DecodeWeights& weights) const {
        const DecodeSizes& s = weights.packed().sizes;
        if (s.bf16 != bf16_) fail("ring_k", s.bf16 ? "bfloat16 rings" : "float32 rings", "the other kind");
        if (s.n_layers != n_layers_ || s.n_heads != n_heads_ || s.dim != n_heads_ * width_ || s.act_dim != act_dim_) {
            fail("state", "the layers, heads, width and actions of the weights", "others");
        }
        if (obs_dim_ != kAny && obs_dim_ != s.obs_dim) {
            fail("obs_mean", "shape " + shape_text({s.obs_dim}), shape_text({obs_dim_}));
        }
    }

    std::int64_t step(const DecodeWeights& weights, const py::array& observations, py::array& out, int n_threads) {
        check(weights);
        DecodeStepArgs args = args_;
        args.doubles = observations.dtype().equal(py::dtype::of<double>());
        if (!args.doubles) check_dtype<float>(observations, "observations");
        check_shape(observations, {args.n_rows, weights.packed().sizes.obs_dim}, "observations");
        check_dtype<float>(out, "out");
        args.out = static_cast<float*>(whole(out, {args.n_rows, act_dim_}, "out"));
        args.observations = static_cast<const char*>(observations.data());
        args.row_bytes = observations.strides(0);
        args.element_bytes = observations.strides(1);
        if (const std::int64_t row = bad_row(); row >= 0) {
            fail("steps", "between 0 and 2^40", std::to_string(args_.steps[row]));
        }
        return run(weights, args, n_threads);
    }

    // Once checked: `args` is what args() gave, with observations and `out`.
    static std::int64_t run(const DecodeWeights& weights, DecodeStepArgs& args, int n_threads) {
        args.weights = &weights.packed();
        args.rotary = &weights.rotary();
        args.n_threads = n_threads;
        const GilRelease release;
        args.soon_after = microseconds_now() - last_end.load() < kWorkersSpin;
        const std::int64_t row = GAC_FAST_DISPATCH(weights.isa(), decode_step(args));
        last_end.store(microseconds_now());
        return row;
    }

    const DecodeStepArgs& args() const { return args_; }

    // The first one at an impossible step, or -1.
    std::int64_t bad_row() const {
        for (std::int64_t p = 0; p < args_.n_rows; ++p) {
            if (args_.steps[p] < 0 || args_.steps[p] > kMostSteps) return p;
        }
        return -1;
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

// ---------------------------------------------------------------------------------------------------------------------
// A step like the one before

// All of a step in one call, with results that were allocated before: between two steps the engine's weights and rings
// have driven Python, NumPy and torch out of the near caches, and each thing of theirs that is touched is waited for.
// Answers None, and has done nothing, where anything is not as it was: whoever calls then goes the long way.
class DecodeAgain {
  public:
    DecodeAgain(py::object owner, const py::list& entries, py::object weights, py::object state, py::object outputs,
                const py::dict& surroundings)
        : owner_(std::move(owner)),
          entries_(entries),
          weights_object_(std::move(weights)),
          state_object_(std::move(state)),
          make_outputs_(std::move(outputs)),
          weights_(weights_object_.cast<DecodeWeights&>()),
          state_(state_object_.cast<DecodeState&>()) {
        state_.check(weights_);
        forced_ = surroundings["forced"];
        environment_ = surroundings["environment"];
        variable_ = surroundings["variable"];
        counts_ = surroundings["counts"];
        count_ = surroundings["count"];
        local_ = surroundings["local"];
        n_threads_ = surroundings["n_threads"];
        tensor_ = surroundings["tensor"];
        array_ = surroundings["array"];
        attribute_ = py::str("n_threads");
        if (!PyContextVar_CheckExact(forced_.ptr()) || !PyDict_CheckExact(environment_.ptr()) ||
            !PyDict_Check(counts_.ptr())) {
            fail("surroundings", "a context variable and dictionaries", "other objects");
        }
        exchange_ = exchange_of(tensor_);
        is_negative_ = tensor_.attr("is_neg");
        entries_.add_to(lines_);
        lines_.add(this, sizeof(*this));
        lines_.add(&weights_, sizeof(weights_));
        lines_.add(&state_, sizeof(state_));
        lines_.add(state_.args().steps, 1);
        for (const py::object* object :
             {&forced_, &environment_, &counts_, &count_, &local_, &n_threads_, &tensor_, &array_, &attribute_}) {
            lines_.add(object->ptr(), 64);
        }
        for (const py::object* dict : {&environment_, &counts_}) {
            lines_.add(reinterpret_cast<const PyDictObject*>(dict->ptr())->ma_keys, 512);
        }
        if (exchange_ != nullptr) lines_.add(reinterpret_cast<const void*>(exchange_->view), kCode);
        if (PyCFunction_Check(n_threads_.ptr())) {
            lines_.add(reinterpret_cast<const void*>(PyCFunction_GET_FUNCTION(n_threads_.ptr())), kCode);
        }
    }

    PyObject* call(PyObject* const* arguments, Py_ssize_t n) {
        if (n != 3) fail("arguments", "owner, observations and n_threads", std::to_string(n));
        lines_.fetch();
        weights_.fetch();
        DecodeStepArgs args = state_.args();
        if (arguments[0] != owner_.ptr() || !goes_to_this_engine() || !read(arguments[1], args) || !entries_.same() ||
            weights_.changed() || state_.bad_row() >= 0) {
            Py_RETURN_NONE;
        }
        std::vector<Output>& outputs = is_tensor(arguments[1]) ? tensors_ : arrays_;
        if (outputs.empty() && !allocate(outputs, is_tensor(arguments[1]))) Py_RETURN_NONE;
        const int n_threads = threads(arguments[2]);
        Output output = std::move(outputs.back());
        outputs.pop_back();
        args.out = output.data;
        // Before the engine drives all of this away once more.
        count(1);
        if (DecodeState::run(weights_, args, n_threads) >= 0) {
            count(-1);
            outputs.push_back(std::move(output));
            Py_RETURN_NONE;
        }
        return output.object.release().ptr();
    }

  private:
    static constexpr std::size_t kCode = 512;  // of a function, as much as is worth fetching

    struct Output {
        py::object object;
        float* data;
    };

    bool is_tensor(PyObject* observations) const { return Py_IS_TYPE(observations, type(tensor_)); }

    static PyTypeObject* type(const py::object& object) { return reinterpret_cast<PyTypeObject*>(object.ptr()); }

    bool goes_to_this_engine() const {
        PyObject* found = nullptr;
        if (PyContextVar_Get(forced_.ptr(), nullptr, &found) != 0) throw py::error_already_set();
        const auto forced = py::reinterpret_steal<py::object>(found);
        if (forced && !forced.is_none()) {
            return PyUnicode_Check(forced.ptr()) && PyUnicode_CompareWithASCIIString(forced.ptr(), "cpp") == 0;
        }
        const int set = PyDict_Contains(environment_.ptr(), variable_.ptr());
        if (set < 0) throw py::error_already_set();
        return set == 0;
    }

    // What the step reads of observations that it takes as they are.
    bool read(PyObject* observations, DecodeStepArgs& args) const {
        const std::int64_t obs_dim = weights_.packed().sizes.obs_dim;
        if (is_tensor(observations)) {
            TensorView view;
            if (!view_of(observations, view)) return false;
            if (view.n_dims != 2 || view.shape[0] != args.n_rows || view.shape[1] != obs_dim) return false;
            // A tensor may stand for the negative of what lies in its memory, if that is a part of complex numbers.
            if (view.strides[1] != 1 || view.strides[0] != obs_dim) {
                const auto negative =
                    py::reinterpret_steal<py::object>(PyObject_CallOneArg(is_negative_.ptr(), observations));
                if (!negative) throw py::error_already_set();
                if (negative.ptr() != Py_False) return false;
            }
            args.doubles = view.type_bits == 64;
            args.observations = view.data + view.byte_offset;
            args.element_bytes = view.strides[1] * (view.type_bits / 8);
            args.row_bytes = view.strides[0] * (view.type_bits / 8);
            return true;
        }
        if (!Py_IS_TYPE(observations, type(array_))) return false;
        const auto array = py::reinterpret_borrow<py::array>(observations);
        const py::dtype dtype = array.dtype();
        args.doubles = dtype.num() == py::detail::npy_api::NPY_DOUBLE_;
        if ((!args.doubles && dtype.num() != py::detail::npy_api::NPY_FLOAT_) || dtype.byteorder() != '=') return false;
        if (array.ndim() != 2 || array.shape(0) != args.n_rows || array.shape(1) != obs_dim) return false;
        args.observations = static_cast<const char*>(array.data());
        args.row_bytes = array.strides(0);
        args.element_bytes = array.strides(1);
        return true;
    }

    // Of a float tensor on the CPU.
    bool view_of(PyObject* tensor, TensorView& view) const {
        if (exchange_ == nullptr) return false;
        if (exchange_->view(tensor, &view) != 0) {
            PyErr_Clear();
            return false;
        }
        return view.device_type == kCpu && view.type_code == kFloat && view.lanes == 1 &&
               (view.type_bits == 32 || view.type_bits == 64);
    }

    bool allocate(std::vector<Output>& outputs, bool tensors) {
        const py::list made = make_outputs_(tensors);
        for (const py::handle object : made) {
            TensorView view{};
            if (!tensors) {
                view.data = static_cast<char*>(py::reinterpret_borrow<py::array>(object).mutable_data());
            } else if (!view_of(object.ptr(), view)) {
                return false;
            }
            outputs.push_back(
                {py::reinterpret_borrow<py::object>(object), reinterpret_cast<float*>(view.data + view.byte_offset)});
        }
        return !outputs.empty();
    }

    int threads(PyObject* given) const {
        const auto number = [](const py::object& object) {
            if (!object) throw py::error_already_set();
            const long n = PyLong_AsLong(object.ptr());
            if (n == -1 && PyErr_Occurred() != nullptr) throw py::error_already_set();
            return static_cast<int>(n);
        };
        int n = number(py::reinterpret_borrow<py::object>(given));
        if (n == 0) n = number(py::reinterpret_steal<py::object>(PyObject_GetAttr(local_.ptr(), attribute_.ptr())));
        if (n == 0) n = number(py::reinterpret_steal<py::object>(PyObject_CallNoArgs(n_threads_.ptr())));
        return n;
    }

    void count(std::int64_t change) const {
        PyObject* before = PyDict_GetItemWithError(counts_.ptr(), count_.ptr());
        if (before == nullptr && PyErr_Occurred() != nullptr) throw py::error_already_set();
        const std::int64_t n = before == nullptr ? 0 : PyLong_AsLongLong(before);
        const py::int_ after(n + change);
        if (PyDict_SetItem(counts_.ptr(), count_.ptr(), after.ptr()) != 0) throw py::error_already_set();
    }

    py::object owner_;
    WatchedEntries entries_;
    py::object weights_object_, state_object_, make_outputs_;
    DecodeWeights& weights_;
    DecodeState& state_;
    py::object forced_, environment_, variable_, counts_, count_, local_, n_threads_, tensor_, array_, attribute_;
    py::object is_negative_;
    const TensorExchange* exchange_ = nullptr;
    std::vector<Output> tensors_, arrays_;
    Lines lines_;
};

constexpr const char* kDecodeAgain = "gac_fast._DecodeAgain";

PyObject* call_decode_again(PyObject* self, PyObject* const* arguments, Py_ssize_t n) {
    try {
        auto* again = static_cast<DecodeAgain*>(PyCapsule_GetPointer(self, kDecodeAgain));
        return again == nullptr ? nullptr : again->call(arguments, n);
    } catch (py::error_already_set& error) {
        error.restore();
    } catch (const std::invalid_argument& error) {
        PyErr_SetString(PyExc_ValueError, error.what());
    } catch (const std::exception& error) {
        PyErr_SetString(PyExc_RuntimeError, error.what());
    }
    return nullptr;
}

// A function of C: those of pybind11 touch more memory than all the rest.
py::object make_decode_again(py::object owner, const py::list& entries, py::object weights, py::object state,
                             py::object outputs, const py::dict& surroundings) {
    static PyMethodDef definition{"decode_again",
                                  reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(call_decode_again)),
                                  METH_FASTCALL, nullptr};
    auto again = std::make_unique<DecodeAgain>(std::move(owner), entries, std::move(weights), std::move(state),
                                               std::move(outputs), surroundings);
    const py::capsule self(again.get(), kDecodeAgain, [](PyObject* capsule) {
        delete static_cast<DecodeAgain*>(PyCapsule_GetPointer(capsule, kDecodeAgain));
    });
    again.release();
    return py::reinterpret_steal<py::object>(PyCFunction_NewEx(&definition, self.ptr(), nullptr));
}

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
    m.def("_decode_again", &make_decode_again, py::arg("owner"), py::arg("entries"), py::arg("weights"),
          py::arg("state"), py::arg("outputs"), py::arg("surroundings"));
}

}  // namespace gac_fast
