// Takes NumPy arrays, checks them, releases the GIL and runs the part of a posterior step that is not the decoder.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "aligned_memory.h"
#include "attention_views.h"
#include "bindings.h"
#include "check.h"
#include "gil.h"
#include "seed_plans.h"

namespace py = pybind11;

namespace gac_fast {
namespace {

using Arrays = std::vector<py::array>;

// Floats of a shape, without gaps.
const float* dense(const py::array& array, const std::vector<std::int64_t>& shape, const std::string& name) {
    check_dtype<float>(array, name.c_str());
    check_shape(array, shape, name.c_str());
    if (!(array.flags() & py::array::c_style)) fail(name, "an array without gaps", "a strided one");
    check_aligned(array, name.c_str());
    return static_cast<const float*>(array.data());
}

float* writeable(py::array& array, const std::vector<std::int64_t>& shape, const std::string& name) {
    check_writeable(array, name.c_str());
    return const_cast<float*>(dense(array, shape, name));
}

void check_count(const Arrays& list, std::size_t size, const std::string& name) {
    if (list.size() != size) fail(name, std::to_string(size) + " arrays", std::to_string(list.size()));
}

// prior: w1, b1, w2, b2, or nothing for the identity. layers: w, b, position of each.
SeedModel model_of(const Arrays& prior, const std::vector<Arrays>& layers, const py::array& z0,
                   std::vector<SeedLayer>* list, int n_threads) {
    SeedModel m{};
    check_shape(z0, {kAny, kAny, kAny}, "z0");
    m.n_plans = z0.shape(0);
    m.n_z = z0.shape(1);
    m.dim = z0.shape(2);
    const std::int64_t d = m.n_z * m.dim;
    if (d < 1) fail("z0", "plans of at least one value", shape_text(shape_of(z0)));
    if (!prior.empty()) {
        check_count(prior, 4, "prior");
        check_shape(prior[0], {kAny, d}, "prior.w1");
        m.hidden = prior[0].shape(0);
        if (m.hidden < 1) fail("prior.w1", "at least 1 hidden unit", "0");
        m.w1 = dense(prior[0], {m.hidden, d}, "prior.w1");
        m.b1 = dense(prior[1], {m.hidden}, "prior.b1");
        m.w2 = dense(prior[2], {d, m.hidden}, "prior.w2");
        m.b2 = dense(prior[3], {d}, "prior.b2");
    }
    for (std::size_t l = 0; l < layers.size(); ++l) {
        const std::string name = "layers[" + std::to_string(l) + "]";
        check_count(layers[l], 3, name);
        list->push_back({dense(layers[l][0], {2 * m.dim, m.dim}, name + ".w"),
                         dense(layers[l][1], {2 * m.dim}, name + ".b"),
                         dense(layers[l][2], {m.n_z, m.dim}, name + ".position")});
    }
    m.n_layers = static_cast<std::int64_t>(list->size());
    m.layers = list->data();
    m.n_threads = std::max(1, n_threads);
    return m;
}

std::vector<std::int64_t> kv_shape(const SeedModel& m) { return {m.n_layers, 2, m.n_plans, m.n_z, m.dim}; }

void plans(const Arrays& prior, const std::vector<Arrays>& layers, const py::array& z0, py::array before, py::array z,
           py::array scale, py::array kv, int n_threads) {
    std::vector<SeedLayer> list;
    SeedForward f{};
    f.model = model_of(prior, layers, z0, &list, n_threads);
    const SeedModel& m = f.model;
    f.z0 = dense(z0, shape_of(z0), "z0");
    f.before = writeable(before, {m.n_plans, m.hidden}, "before");
    f.z = writeable(z, shape_of(z0), "z");
    f.scale = writeable(scale, {m.n_plans, m.n_z}, "scale");
    f.kv = writeable(kv, kv_shape(m), "kv");
    const GilRelease release;
    GAC_FAST_DISPATCH(active_isa(), seed_plans(f));
}

// w1, b1, w2, b2, w3, b3; `counts` is what the argument of r.weight is called.
SeedReturns returns_of(const Arrays& list, const std::string& name, const py::object& context, const py::array& y,
                       const py::array& weight, const char* counts, const SeedModel& m) {
    SeedReturns r{};
    check_count(list, 6, name);
    const auto part = [&](const char* which) { return name + "." + which; };
    check_shape(list[0], {kAny, kAny, kAny}, part("w1").c_str());
    check_shape(list[2], {kAny, kAny, kAny}, part("w2").c_str());
    r.n_members = list[0].shape(0);
    r.hidden1 = list[0].shape(1);
    r.hidden2 = list[2].shape(1);
    if (r.n_members < 1 || r.hidden1 < 1 || r.hidden2 < 1) {
        fail(name, "at least one member and one unit in each layer", shape_text({r.n_members, r.hidden1, r.hidden2}));
    }
    const std::int64_t d = m.n_z * m.dim;
    if (!context.is_none()) {
        const auto view = rows_view<float>(array_of(context, "context"), m.n_plans, kAny, "context");
        r.n_obs = view.columns;
        r.context = view.data;
        r.context_stride = view.stride;
    }
    r.w1 = dense(list[0], {r.n_members, r.hidden1, d + r.n_obs}, part("w1"));
    r.b1 = dense(list[1], {r.n_members, r.hidden1}, part("b1"));
    r.w2 = dense(list[2], {r.n_members, r.hidden2, r.hidden1}, part("w2"));
    r.b2 = dense(list[3], {r.n_members, r.hidden2}, part("b2"));
    r.w3 = dense(list[4], {r.n_members, 2, r.hidden2}, part("w3"));
    r.b3 = dense(list[5], {r.n_members, 2}, part("b3"));
    r.y = dense(y, {m.n_plans}, "y");
    r.weight = dense(weight, {m.n_plans}, counts);
    return r;
}

void gradient(const Arrays& prior, const std::vector<Arrays>& layers, const Arrays& returns, const py::object& context,
              const py::array& y, const py::array& weight, const py::array& z0, const py::array& before,
              const py::array& z, const py::array& scale, const py::array& dkv, double dkv_scale, py::array out,
              int n_threads) {
    std::vector<SeedLayer> list;
    SeedGradient f{};
    f.model = model_of(prior, layers, z0, &list, n_threads);
    const SeedModel& m = f.model;
    const SeedReturns model_of_returns = returns_of(returns, "returns", context, y, weight, "weight", m);
    f.returns = &model_of_returns;
    f.z0 = dense(z0, shape_of(z0), "z0");
    f.before = dense(before, {m.n_plans, m.hidden}, "before");
    f.z = dense(z, shape_of(z0), "z");
    f.scale = dense(scale, {m.n_plans, m.n_z}, "scale");
    f.dkv = dense(dkv, kv_shape(m), "dkv");
    f.dkv_scale = static_cast<float>(dkv_scale);
    f.gradient = writeable(out, shape_of(z0), "gradient");
    const GilRelease release;
    GAC_FAST_DISPATCH(active_isa(), seed_gradient(f));
}

// Of a loss: from the gradients at z (or None) and at keys and values to those of all weights, dprior like prior and
// dlayers like layers.
void weights(const Arrays& prior, const std::vector<Arrays>& layers, const py::array& z0, const py::array& before,
             const py::array& z, const py::array& scale, const py::array& dkv, const py::object& dz, Arrays dprior,
             std::vector<Arrays> dlayers, int n_threads) {
    std::vector<SeedLayer> list;
    SeedGradient f{};
    f.model = model_of(prior, layers, z0, &list, n_threads);
    const SeedModel& m = f.model;
    const std::int64_t d = m.n_z * m.dim;
    f.z0 = dense(z0, shape_of(z0), "z0");
    f.before = dense(before, {m.n_plans, m.hidden}, "before");
    f.z = dense(z, shape_of(z0), "z");
    f.scale = dense(scale, {m.n_plans, m.n_z}, "scale");
    f.dkv = dense(dkv, kv_shape(m), "dkv");
    f.dkv_scale = 1.0F;
    if (!dz.is_none()) f.dz = dense(array_of(dz, "dz"), shape_of(z0), "dz");
    check_count(dprior, prior.size(), "dprior");
    SeedWeights w{};
    if (!dprior.empty()) {
        w.dw1 = writeable(dprior[0], {m.hidden, d}, "dprior.w1");
        w.db1 = writeable(dprior[1], {m.hidden}, "dprior.b1");
        w.dw2 = writeable(dprior[2], {d, m.hidden}, "dprior.w2");
        w.db2 = writeable(dprior[3], {d}, "dprior.b2");
    }
    if (dlayers.size() != layers.size()) {
        fail("dlayers", std::to_string(layers.size()) + " lists", std::to_string(dlayers.size()));
    }
    std::vector<float*> pointers;
    for (std::size_t l = 0; l < dlayers.size(); ++l) {
        const std::string name = "dlayers[" + std::to_string(l) + "]";
        check_count(dlayers[l], 3, name);
        pointers.push_back(writeable(dlayers[l][0], {2 * m.dim, m.dim}, name + ".w"));
        pointers.push_back(writeable(dlayers[l][1], {2 * m.dim}, name + ".b"));
        pointers.push_back(writeable(dlayers[l][2], {m.n_z, m.dim}, name + ".position"));
    }
    const auto n_hidden = static_cast<std::size_t>(m.n_plans * m.hidden);
    std::vector<float> du(static_cast<std::size_t>(m.n_plans * d)), dbefore(n_hidden), active(n_hidden);
    f.du = du.data();
    f.dbefore = dbefore.data();
    f.active = active.data();
    w.model = m;
    w.z0 = f.z0;
    w.active = f.active;
    w.z = f.z;
    w.dkv = f.dkv;
    w.du = f.du;
    w.dbefore = f.dbefore;
    w.dlayers = pointers.data();
    const GilRelease release;
    GAC_FAST_DISPATCH(active_isa(), seed_gradient(f));
    GAC_FAST_DISPATCH(active_isa(), seed_weights(w));
}

// masks: factors of dropout of both hidden layers, or nothing. dz and dweights (like weights): where gradients of
// factors[0] losses[0] + factors[1] losses[1] go, None and nothing where they are not wanted.
void losses(const Arrays& weights, const py::array& z, const py::object& context, const py::array& y,
            const py::array& seen, const py::array& fitted, const Arrays& masks, py::array out, double factor_mean,
            double factor_variance, const py::object& dz, Arrays dweights, int n_threads) {
    ReturnLosses f{};
    check_shape(z, {kAny, kAny, kAny}, "z");
    SeedModel sizes{};
    sizes.n_plans = z.shape(0);
    sizes.n_z = z.shape(1);
    sizes.dim = z.shape(2);
    f.n_plans = sizes.n_plans;
    f.d = sizes.n_z * sizes.dim;
    if (f.d < 1) fail("z", "plans of at least one value", shape_text(shape_of(z)));
    const SeedReturns r = returns_of(weights, "weights", context, y, seen, "seen", sizes);
    f.n_members = r.n_members;
    f.hidden1 = r.hidden1;
    f.hidden2 = r.hidden2;
    f.n_obs = r.n_obs;
    f.w1 = r.w1;
    f.b1 = r.b1;
    f.w2 = r.w2;
    f.b2 = r.b2;
    f.w3 = r.w3;
    f.b3 = r.b3;
    f.z = dense(z, shape_of(z), "z");
    f.context = r.context;
    f.context_stride = r.context_stride;
    f.y = r.y;
    f.seen = r.weight;
    f.fitted = dense(fitted, {f.n_plans}, "fitted");
    if (!masks.empty()) {
        check_count(masks, 2, "masks");
        f.mask1 = dense(masks[0], {f.n_members, f.n_plans, f.hidden1}, "masks[0]");
        f.mask2 = dense(masks[1], {f.n_members, f.n_plans, f.hidden2}, "masks[1]");
    }
    check_writeable(out, "losses");
    const auto out_view = vector_view<double>(out, 2, "losses");
    if (out_view.stride != 1) fail("losses", "neighbouring elements", "a strided array");
    f.losses = static_cast<double*>(out.mutable_data());
    f.factors[0] = static_cast<float>(factor_mean);
    f.factors[1] = static_cast<float>(factor_variance);
    if (!dz.is_none()) {
        py::array array = array_of(dz, "dz");
        f.dz = writeable(array, shape_of(z), "dz");
    }
    if (!dweights.empty()) {
        check_count(dweights, 6, "dweights");
        f.dw1 = writeable(dweights[0], {f.n_members, f.hidden1, f.d + f.n_obs}, "dweights.w1");
        f.db1 = writeable(dweights[1], {f.n_members, f.hidden1}, "dweights.b1");
        f.dw2 = writeable(dweights[2], {f.n_members, f.hidden2, f.hidden1}, "dweights.w2");
        f.db2 = writeable(dweights[3], {f.n_members, f.hidden2}, "dweights.b2");
        f.dw3 = writeable(dweights[4], {f.n_members, 2, f.hidden2}, "dweights.w3");
        f.db3 = writeable(dweights[5], {f.n_members, 2}, "dweights.b3");
    }
    f.n_threads = std::max(1, n_threads);
    const GilRelease release;
    const AlignedMemory memory = allocate_aligned(GAC_FAST_DISPATCH(active_isa(), return_losses_bytes(f)));
    f.memory = memory.get();
    GAC_FAST_DISPATCH(active_isa(), return_losses(f));
}

VectorView<std::int64_t> words(const py::array& array, std::int64_t size, const char* name) {
    const auto view = vector_view<std::int64_t>(array, size, name);
    for (std::int64_t i = 0; i < size; ++i) {
        if (view[i] < 0 || view[i] >= std::int64_t{1} << 32) {
            fail(name, "values within [0, 2^32)", std::to_string(view[i]) + " at position " + std::to_string(i));
        }
    }
    return view;
}

void move(py::array z0, const py::array& gradient, double step_size, double max_drift_ratio, std::uint32_t seed0,
          std::uint32_t seed1, const py::array& ids, const py::array& steps, py::array size, py::array ratio,
          int n_threads) {
    SeedMove f{};
    check_shape(z0, {kAny, kAny, kAny}, "z0");
    f.n_plans = z0.shape(0);
    f.d = z0.shape(1) * z0.shape(2);
    if (f.d < 1) fail("z0", "plans of at least one value", shape_text(shape_of(z0)));
    if (f.d > std::int64_t{1} << 34) fail("z0", "at most 2^34 values of a plan", std::to_string(f.d));
    f.z0 = writeable(z0, shape_of(z0), "z0");
    f.gradient = dense(gradient, shape_of(z0), "gradient");
    if (!(step_size >= 0.0) || std::isinf(step_size)) {
        fail("step_size", "a finite number of at least 0", std::to_string(step_size));
    }
    if (!(max_drift_ratio >= 0.0)) {
        fail("max_drift_ratio", "a number of at least 0", std::to_string(max_drift_ratio));
    }
    f.step_size = step_size;
    f.max_drift_ratio = max_drift_ratio;
    f.seed0 = seed0;
    f.seed1 = seed1;
    const auto id_view = words(ids, f.n_plans, "ids");
    const auto step_view = words(steps, f.n_plans, "steps");
    f.ids = id_view.data;
    f.id_stride = id_view.stride;
    f.steps = step_view.data;
    f.step_stride = step_view.stride;
    f.size = writeable(size, {f.n_plans}, "size");
    f.ratio = writeable(ratio, {f.n_plans}, "ratio");
    f.n_threads = std::max(1, n_threads);
    const GilRelease release;
    GAC_FAST_DISPATCH(active_isa(), seed_move(f));
}

// squares: float64 [act_dim], or None; dy like y, or None.
void errors(const py::array& y, const py::array& actions, const py::object& counts, const py::array& scale,
            const py::object& dy, const py::object& squares, int n_threads) {
    ActionErrors f{};
    f.bf16 = is_bf16(y, "y");
    check_shape(y, {kAny, kAny}, "y");
    f.n = y.shape(0);
    f.act_dim = y.shape(1);
    const auto rows = [&](const py::array& array, const char* name) {
        if (is_bf16(array, name) != f.bf16) fail(name, "the dtype of y", std::string(py::str(array.dtype())));
        check_shape(array, {f.n, f.act_dim}, name);
        if (!(array.flags() & py::array::c_style)) fail(name, "an array without gaps", "a strided one");
        check_aligned(array, name);
        return array.data();
    };
    f.y = rows(y, "y");
    f.actions = dense(actions, {f.n, f.act_dim}, "actions");
    if (!counts.is_none()) {
        const py::array array = array_of(counts, "counts");
        const auto view = vector_view<bool>(array, f.n, "counts");
        if (view.stride != 1 && f.n > 1) fail("counts", "neighbouring elements", "a strided array");
        f.counts = view.data;
    }
    f.scale = dense(scale, {f.act_dim}, "scale");
    if (!dy.is_none()) {
        py::array array = array_of(dy, "dy");
        check_writeable(array, "dy");
        rows(array, "dy");
        f.dy = array.mutable_data();
    }
    if (!squares.is_none()) {
        py::array array = array_of(squares, "squares");
        check_writeable(array, "squares");
        const auto view = vector_view<double>(array, f.act_dim, "squares");
        if (view.stride != 1 && f.act_dim > 1) fail("squares", "neighbouring elements", "a strided array");
        f.squares = static_cast<double*>(array.mutable_data());
    }
    f.n_threads = std::max(1, n_threads);
    const GilRelease release;
    GAC_FAST_DISPATCH(active_isa(), action_errors(f));
}

}  // namespace

void bind_seed_plans(py::module_& m) {
    m.def("_seed_plans", &plans, py::arg("prior"), py::arg("layers"), py::arg("z0"), py::arg("before"), py::arg("z"),
          py::arg("scale"), py::arg("kv"), py::arg("n_threads"));
    m.def("_seed_gradient", &gradient, py::arg("prior"), py::arg("layers"), py::arg("returns"), py::arg("context"),
          py::arg("y"), py::arg("weight"), py::arg("z0"), py::arg("before"), py::arg("z"), py::arg("scale"),
          py::arg("dkv"), py::arg("dkv_scale"), py::arg("gradient"), py::arg("n_threads"));
    m.def("_seed_weights", &weights, py::arg("prior"), py::arg("layers"), py::arg("z0"), py::arg("before"),
          py::arg("z"), py::arg("scale"), py::arg("dkv"), py::arg("dz"), py::arg("dprior"), py::arg("dlayers"),
          py::arg("n_threads"));
    m.def("_seed_move", &move, py::arg("z0"), py::arg("gradient"), py::arg("step_size"), py::arg("max_drift_ratio"),
          py::arg("seed0"), py::arg("seed1"), py::arg("ids"), py::arg("steps"), py::arg("size"), py::arg("ratio"),
          py::arg("n_threads"));
    m.def("_return_losses", &losses, py::arg("weights"), py::arg("z"), py::arg("context"), py::arg("y"),
          py::arg("seen"), py::arg("fitted"), py::arg("masks"), py::arg("losses"), py::arg("factor_mean"),
          py::arg("factor_variance"), py::arg("dz"), py::arg("dweights"), py::arg("n_threads"));
    m.def("_action_errors", &errors, py::arg("y"), py::arg("actions"), py::arg("counts"), py::arg("scale"),
          py::arg("dy"), py::arg("squares"), py::arg("n_threads"));
}

}  // namespace gac_fast
