// One function per op that adds its functions to the module; each lies in <op>_binding.cpp.
#pragma once

#include <pybind11/pybind11.h>

namespace gac_fast {

void bind_adamw(pybind11::module_& m);
void bind_block(pybind11::module_& m);
void bind_decode_step(pybind11::module_& m);
void bind_gemm(pybind11::module_& m);
void bind_memory(pybind11::module_& m);
void bind_norm_linear(pybind11::module_& m);
void bind_pack_batch(pybind11::module_& m);
void bind_philox_normal(pybind11::module_& m);
void bind_plan_ascent(pybind11::module_& m);
void bind_plan_attention(pybind11::module_& m);
void bind_seed_plans(pybind11::module_& m);
void bind_thread_pool(pybind11::module_& m);
void bind_weight_gradient(pybind11::module_& m);
void bind_window_attention(pybind11::module_& m);

}  // namespace gac_fast
