// The instruction sets that the engine is compiled for. Every per-ISA source is compiled once for each of them, inside
// a namespace of that name (GAC_FAST_ISA), so that one binary serves all machines.
//
// Inside such sources use nothing inline from outside the namespace (no std containers, no shared inline functions):
// the linker keeps one copy of an inline function, and it may be one that this processor cannot run.
#pragma once

#include <string>
#include <utility>
#include <vector>

#if defined(__x86_64__) || defined(_M_X64)
#define GAC_FAST_X86 1
#else
#define GAC_FAST_X86 0
#endif

namespace gac_fast {

// Ordered: each includes the ones before it.
enum class Isa { kPortable, kAvx2, kAvx512, kAmx };

const char* isa_name(Isa isa);

// Whether this build holds a path.
bool isa_compiled(Isa isa);

// Why this build, this processor or its system cannot run a path; empty where it can.
std::string isa_problem(Isa isa);

// The best path that runs here, or the one that GAC_FAST_CPU_ISA (read at the first call) or use_isa() names. Throws
// what use_isa() throws while that variable is wrong.
Isa active_isa();

// Why active_isa() is what it is, in words.
std::string active_isa_reason();

// Forces a path by name for the whole process; the empty string goes back to the choice made at the start. Returns the
// name forced until now, the empty string for none. Throws std::invalid_argument on an unknown name,
// std::runtime_error where the path cannot run.
std::string use_isa(const std::string& name);

// All paths with isa_problem().
std::vector<std::pair<std::string, std::string>> isa_problems();

}  // namespace gac_fast

// Declares a function of every per-ISA namespace: GAC_FAST_DECLARE(void gemm(const float* x);)
// Calls the one of `isa`: GAC_FAST_DISPATCH(isa, gemm(x)).
#if GAC_FAST_X86
#define GAC_FAST_DECLARE(...) \
    namespace portable {      \
    __VA_ARGS__               \
    }                         \
    namespace avx2 {          \
    __VA_ARGS__               \
    }                         \
    namespace avx512 {        \
    __VA_ARGS__               \
    }                         \
    namespace amx {           \
    __VA_ARGS__               \
    }
// A path that the build leaves out is never active: its name stands for another here.
#if defined(GAC_FAST_WITHOUT_AVX2)
#define GAC_FAST_PATH_AVX2 portable
#else
#define GAC_FAST_PATH_AVX2 avx2
#endif
#if defined(GAC_FAST_WITHOUT_AVX512)
#define GAC_FAST_PATH_AVX512 portable
#else
#define GAC_FAST_PATH_AVX512 avx512
#endif
#if defined(GAC_FAST_WITHOUT_AMX)
#define GAC_FAST_PATH_AMX portable
#else
#define GAC_FAST_PATH_AMX amx
#endif
#define GAC_FAST_DISPATCH(isa, ...)                                          \
    ((isa) == ::gac_fast::Isa::kAmx      ? GAC_FAST_PATH_AMX::__VA_ARGS__    \
     : (isa) == ::gac_fast::Isa::kAvx512 ? GAC_FAST_PATH_AVX512::__VA_ARGS__ \
     : (isa) == ::gac_fast::Isa::kAvx2   ? GAC_FAST_PATH_AVX2::__VA_ARGS__   \
                                         : portable::__VA_ARGS__)
#else
#define GAC_FAST_DECLARE(...) \
    namespace portable {      \
    __VA_ARGS__               \
    }
#define GAC_FAST_DISPATCH(isa, ...) (static_cast<void>(isa), portable::__VA_ARGS__)
#endif
