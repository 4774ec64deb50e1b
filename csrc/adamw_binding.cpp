// Takes NumPy arrays, checks them, releases the GIL and moves the parameters.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "adamw.h"
#include "bindings.h"
#include "check.h"
#include "gil.h"

namespace py = pybind11;

namespace gac_fast {
namespace {

// Elements of an array of any shape without gaps.
float* dense(py::array& array, std::int64_t size, const std::string& name) {
    check_dtype<float>(array, name.c_str());
    if (size != kAny && array.size() != size) {
        fail(name, std::to_string(size) + " elements", std::to_string(array.size()));
    }
    if (!(array.flags() & py::array::c_style)) fail(name, "an array without gaps", "a strided one");
    check_aligned(array, name.c_str());
    check_writeable(array, name.c_str());
    return static_cast<float*>(array.mutable_data());
}

void check_count(const std::vector<py::array>& list, std::size_t size, const char* name) {
    if (list.size() != size) fail(name, std::to_string(size) + " arrays", std::to_string(list.size()));
}

double step(std::vector<py::array> values, std::vector<py::array> gradients, std::vector<py::array> first,
            std::vector<py::array> second, std::vector<py::array> steps, const std::vector<double>& decays,
            double learning_rate, double beta1, double beta2, double eps, double max_norm, int n_threads) {
    const std::size_t n = values.size();
    check_count(gradients, n, "gradients");
    check_count(first, n, "first");
    check_count(second, n, "second");
    check_count(steps, n, "steps");
    if (decays.size() != n) fail("decays", std::to_string(n) + " numbers", std::to_string(decays.size()));
    std::vector<AdamWParameter> parameters;
    std::vector<float*> counts;
    for (std::size_t i = 0; i < n; ++i) {
        const std::string at = "[" + std::to_string(i) + "]";
        AdamWParameter p{};
        p.n = values[i].size();
        p.value = dense(values[i], kAny, "values" + at);
        p.gradient = dense(gradients[i], p.n, "gradients" + at);
        p.first = dense(first[i], p.n, "first" + at);
        p.second = dense(second[i], p.n, "second" + at);
        counts.push_back(dense(steps[i], 1, "steps" + at));
        const double t = static_cast<double>(*counts.back()) + 1.0;
        p.decay = static_cast<float>(1.0 - learning_rate * decays[i]);
        p.rate = static_cast<float>(learning_rate / (1.0 - std::pow(beta1, t)));
        p.scale = static_cast<float>(1.0 / std::sqrt(1.0 - std::pow(beta2, t)));
        parameters.push_back(p);
    }
    const AdamW args{parameters.data(),         static_cast<std::int64_t>(n), max_norm,
                     static_cast<float>(beta1), static_cast<float>(beta2),    static_cast<float>(eps),
                     std::max(1, n_threads)};
    const GilRelease release;
    for (float* count : counts) *count += 1.0F;
    return GAC_FAST_DISPATCH(active_isa(), adamw(args));
}

}  // namespace

void bind_adamw(py::module_& m) {
    m.def("_adamw", &step, py::arg("values"), py::arg("gradients"), py::arg("first"), py::arg("second"),
          py::arg("steps"), py::arg("decays"), py::arg("learning_rate"), py::arg("beta1"), py::arg("beta2"),
          py::arg("eps"), py::arg("max_norm"), py::arg("n_threads"));
}

}  // namespace gac_fast
