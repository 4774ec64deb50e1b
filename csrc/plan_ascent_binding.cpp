// Takes NumPy arrays, checks them, releases the GIL and infers the plans.
#include <pybind11/pybind11.h>

#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "aligned_memory.h"
#include "bindings.h"
#include "check.h"
#include "gil.h"
#include "plan_ascent.h"

namespace py = pybind11;

namespace gac_fast {
namespace {

// What the tasks of one call share; it stays for the next call of this thread.
void* shared_memory(std::size_t bytes) {
    thread_local AlignedMemory buffer;
    thread_local std::size_t size = 0;
#if defined(GAC_FAST_ASAN)
    // Anew and exact every time, as in scratch.cpp.
    size = 0;
#endif
    if (bytes > size) {
        buffer.reset();
        size = 0;
        buffer = allocate_aligned(bytes);
        size = bytes;
    }
    return buffer.get();
}

// A float32 array without gaps.
const float* dense(const py::array& array, const std::vector<std::int64_t>& shape, const char* name) {
    check_dtype<float>(array, name);
    check_shape(array, shape, name);
    if (!(array.flags() & py::array::c_style)) fail(name, "a contiguous array", "a strided one");
    check_aligned(array, name);
    return static_cast<const float*>(array.data());
}

float* dense_output(py::array& array, const std::vector<std::int64_t>& shape, const char* name) {
    const float* data = dense(array, shape, name);
    check_writeable(array, name);
    return const_cast<float*>(data);
}

// The arrays that pointers go into, held for the call: a sequence may make them on demand, or be changed meanwhile.
using Held = std::vector<py::array>;

Held items(const py::sequence& arrays, const char* name) {
    Held held;
    for (std::size_t i = 0; i < arrays.size(); ++i) {
        const py::object item = arrays[i];
        held.push_back(array_of(item, (std::string(name) + "[" + std::to_string(i) + "]").c_str()));
    }
    return held;
}

void check_number(double value, bool may_be_infinite, bool may_be_negative, const char* name) {
    if (std::isnan(value) || (std::isinf(value) && !may_be_infinite) || (value < 0 && !may_be_negative)) {
        fail(name, std::string(may_be_negative ? "a finite number" : "a number of at least 0"), std::to_string(value));
    }
}

void take_prior(const Held& weights, PlanAscent& args) {
    const std::int64_t d = args.n_z * args.dim;
    if (weights.size() == 0) return;
    if (weights.size() != 4) {
        fail("prior_weights", "w1, b1, w2, b2 or nothing", std::to_string(weights.size()) + " arrays");
    }
    const py::array& w1 = weights[0];
    args.prior_w1 = dense(w1, {kAny, d}, "prior_weights.w1");
    args.prior_hidden = w1.shape(0);
    if (args.prior_hidden == 0) fail("prior_weights.w1", "at least 1 hidden unit", "0");
    args.prior_b1 = dense(weights[1], {args.prior_hidden}, "prior_weights.b1");
    args.prior_w2 = dense(weights[2], {d, args.prior_hidden}, "prior_weights.w2");
    args.prior_b2 = dense(weights[3], {d}, "prior_weights.b2");
}

void take_returns(const Held& weights, PlanAscent& args) {
    if (weights.size() != 6) {
        fail("return_weights", "w1, b1, w2, b2, w3, b3", std::to_string(weights.size()) + " arrays");
    }
    const py::array& w1 = weights[0];
    args.w1 = dense(w1, {kAny, kAny, args.n_z * args.dim + args.n_obs}, "return_weights.w1");
    const std::int64_t e = args.n_members = w1.shape(0);
    args.hidden1 = w1.shape(1);
    const py::array& w2 = weights[2];
    args.w2 = dense(w2, {e, kAny, args.hidden1}, "return_weights.w2");
    args.hidden2 = w2.shape(1);
    if (e == 0 || args.hidden1 == 0 || args.hidden2 == 0) {
        fail("return_weights", "at least 1 member and 1 hidden unit in each layer",
             shape_text({e, args.hidden1, args.hidden2}));
    }
    args.b1 = dense(weights[1], {e, args.hidden1}, "return_weights.b1");
    args.b2 = dense(weights[3], {e, args.hidden2}, "return_weights.b2");
    args.w3 = dense(weights[4], {e, 2, args.hidden2}, "return_weights.w3");
    args.b3 = dense(weights[5], {e, 2}, "return_weights.b3");
}

void take_context(const py::object& context, PlanAscent& args) {
    args.n_starts = 1;
    if (context.is_none()) return;
    const py::array array = array_of(context, "context");
    check_dtype<float>(array, "context");
    check_shape(array, {args.n_plans, kAny, kAny}, "context");
    if (array.shape(1) == 0 || array.shape(2) == 0)
        fail("context", "starts with features", shape_text(shape_of(array)));
    if (array.size() > 0 && array.shape(2) > 1 && array.strides(2) != array.itemsize()) {
        fail("context", "rows of neighbouring elements",
             "an element stride of " + std::to_string(array.strides(2)) + " bytes");
    }
    check_aligned(array, "context");
    const auto itemsize = static_cast<std::int64_t>(sizeof(float));
    args.n_starts = array.shape(1);
    args.n_obs = array.shape(2);
    args.context = static_cast<const float*>(array.data());
    args.context_plan_stride = array.strides(0) / itemsize;
    args.context_start_stride = array.strides(1) / itemsize;
}

// Checks all that ascent and Langevin steps have in common.
PlanAscent common(const Held& prior_weights, const Held& return_weights, const py::array& z0, const py::object& context,
                  py::array& seeds, py::array& mean, py::array& std, std::int64_t dim, std::int64_t n_steps,
                  double step_size, bool bf16, int n_threads, std::int64_t tile) {
    PlanAscent args{};
    const auto rows = rows_view<float>(z0, kAny, kAny, "z0");
    if (dim < 1 || rows.columns < 1 || rows.columns % dim != 0) {
        fail("dim", "a divisor of the " + std::to_string(rows.columns) + " columns of z0", std::to_string(dim));
    }
    args.n_plans = rows.rows;
    args.dim = dim;
    args.n_z = rows.columns / dim;
    args.z0 = rows.data;
    args.z0_stride = rows.stride;
    take_context(context, args);
    take_prior(prior_weights, args);
    take_returns(return_weights, args);
    args.seeds = dense_output(seeds, {args.n_plans, rows.columns}, "seeds");
    args.mean = dense_output(mean, {args.n_plans}, "mean");
    args.std = dense_output(std, {args.n_plans}, "std");
    if (n_steps < 0) fail("n_steps", "at least 0", std::to_string(n_steps));
    check_number(step_size, false, true, "step_size");
    if (n_threads < 1) fail("n_threads", "at least 1", std::to_string(n_threads));
    if (tile < 0) fail("tile", "at least 0", std::to_string(tile));
    args.n_steps = n_steps;
    args.step_size = step_size;
    args.bf16 = bf16;
    args.n_threads = n_threads;
    args.tile = tile;
    return args;
}

void run(PlanAscent& args) {
    const GilRelease release;
    const Isa isa = active_isa();
    args.shared = shared_memory(GAC_FAST_DISPATCH(isa, plan_ascent_shared_bytes(args)));
    GAC_FAST_DISPATCH(isa, plan_ascent(args));
}

void ascent(const py::sequence& prior_weights, const py::sequence& return_weights, const py::array& z0,
            const py::object& context, py::array seeds, py::array mean, py::array std, std::int64_t dim,
            std::int64_t n_steps, double step_size, double kappa, double prior_weight, double radius, double max_norm,
            bool bf16, int n_threads, std::int64_t tile) {
    const Held prior = items(prior_weights, "prior_weights"), returns = items(return_weights, "return_weights");
    PlanAscent args =
        common(prior, returns, z0, context, seeds, mean, std, dim, n_steps, step_size, bf16, n_threads, tile);
    check_number(kappa, false, true, "kappa");
    check_number(prior_weight, false, true, "prior_weight");
    check_number(radius, true, false, "radius");
    check_number(max_norm, true, false, "max_norm");
    args.kappa = static_cast<float>(kappa);
    args.prior_weight = static_cast<float>(prior_weight);
    args.radius = radius;
    args.max_norm = max_norm;
    run(args);
}

void langevin(const py::sequence& prior_weights, const py::sequence& return_weights, const py::array& z0,
              const py::object& context, py::array seeds, py::array mean, py::array std, std::int64_t dim,
              std::int64_t n_steps, double step_size, const py::array& target, double max_drift_ratio,
              std::uint32_t seed0, std::uint32_t seed1, const py::array& plans, std::uint32_t first_step, bool bf16,
              int n_threads, std::int64_t tile) {
    const Held prior = items(prior_weights, "prior_weights"), returns = items(return_weights, "return_weights");
    PlanAscent args =
        common(prior, returns, z0, context, seeds, mean, std, dim, n_steps, step_size, bf16, n_threads, tile);
    args.langevin = true;
    args.target = dense(target, {args.n_plans}, "target");
    check_number(max_drift_ratio, true, false, "max_drift_ratio");
    const auto ids = vector_view<std::int64_t>(plans, args.n_plans, "plans");
    for (std::int64_t p = 0; p < ids.size; ++p) {
        if (ids[p] < 0 || ids[p] > INT64_C(0xFFFFFFFF)) {
            fail("plans", "values within [0, 2^32)", std::to_string(ids[p]) + " in row " + std::to_string(p));
        }
    }
    if (n_steps > INT64_C(0x100000000) - first_step) {
        fail("n_steps", "the steps to end below 2^32", std::to_string(n_steps) + " from " + std::to_string(first_step));
    }
    args.max_drift_ratio = max_drift_ratio;
    args.seed0 = seed0;
    args.seed1 = seed1;
    args.first_step = first_step;
    args.plan_ids = ids.data;
    args.plan_id_stride = ids.stride;
    run(args);
}

}  // namespace

void bind_plan_ascent(py::module_& m) {
    m.def("_plan_ascent", &ascent, py::arg("prior_weights"), py::arg("return_weights"), py::arg("z0"),
          py::arg("context"), py::arg("seeds"), py::arg("mean"), py::arg("std"), py::arg("dim"), py::arg("n_steps"),
          py::arg("step_size"), py::arg("kappa"), py::arg("prior_weight"), py::arg("radius"), py::arg("max_norm"),
          py::arg("bf16"), py::arg("n_threads") = 1, py::arg("tile") = 0);
    m.def("_plan_langevin", &langevin, py::arg("prior_weights"), py::arg("return_weights"), py::arg("z0"),
          py::arg("context"), py::arg("seeds"), py::arg("mean"), py::arg("std"), py::arg("dim"), py::arg("n_steps"),
          py::arg("step_size"), py::arg("target"), py::arg("max_drift_ratio"), py::arg("seed0"), py::arg("seed1"),
          py::arg("plans"), py::arg("first_step"), py::arg("bf16"), py::arg("n_threads") = 1, py::arg("tile") = 0);
}

}  // namespace gac_fast
