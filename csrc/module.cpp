// The Python face of the C++ engine.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>

#include "bindings.h"
#include "build_info.h"
#include "isa.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
    m.doc() = "The C++ engine of gac_fast; use it through gac_fast.ops.";
    m.def("_build_info", [] {
        py::dict info;
        for (const auto& [name, text] : gac_fast::build_info()) info[py::str(name)] = text;
        return info;
    });
    m.def("_isa", [] { return std::string(gac_fast::isa_name(gac_fast::active_isa())); });
    m.def("_isa_reason", &gac_fast::active_isa_reason);
    m.def("_isa_problems", &gac_fast::isa_problems);
    m.def("_use_isa", &gac_fast::use_isa, py::arg("name"));
    // os.environ passes its changes on, and raises and catches an exception for a variable that is not there.
    m.def(
        "_has_variable",
        [](const char* name) {
            const char* value = std::getenv(name);
            return value != nullptr && *value != '\0';
        },
        py::arg("name"));
    gac_fast::bind_adamw(m);
    gac_fast::bind_block(m);
    gac_fast::bind_decode_step(m);
    gac_fast::bind_gemm(m);
    gac_fast::bind_memory(m);
    gac_fast::bind_norm_linear(m);
    gac_fast::bind_pack_batch(m);
    gac_fast::bind_philox_normal(m);
    gac_fast::bind_plan_ascent(m);
    gac_fast::bind_plan_attention(m);
    gac_fast::bind_seed_plans(m);
    gac_fast::bind_thread_pool(m);
    gac_fast::bind_weight_gradient(m);
    gac_fast::bind_window_attention(m);
}
