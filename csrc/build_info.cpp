#include "build_info.h"

namespace gac_fast {
namespace {

std::string compiler() {
#if defined(__clang__)
    return "clang " __clang_version__;
#elif defined(__GNUC__)
    return "gcc " __VERSION__;
#elif defined(_MSC_VER)
    return "msvc " + std::to_string(_MSC_VER);
#else
    return "unknown";
#endif
}

std::string compiled_isa() {
#if defined(__AVX512F__)
    return "x86-64 avx512f";
#elif defined(__AVX2__)
    return "x86-64 avx2";
#elif defined(__x86_64__) || defined(_M_X64)
    return "x86-64 sse2";
#elif defined(__aarch64__)
    return "aarch64 neon";
#else
    return "generic";
#endif
}

std::string cpu_features() {
    std::string features;
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
    const auto add = [&features](bool present, const char* name) {
        if (present) features += (features.empty() ? "" : " ") + std::string(name);
    };
    add(__builtin_cpu_supports("avx2"), "avx2");
    add(__builtin_cpu_supports("fma"), "fma");
    add(__builtin_cpu_supports("avx512f"), "avx512f");
#endif
    return features.empty() ? "baseline" : features;
}

}  // namespace

std::vector<std::pair<std::string, std::string>> build_info() {
    return {
        {"version", GAC_FAST_VERSION},
        {"compiler", compiler()},
        {"standard", "C++" + std::to_string(__cplusplus / 100 % 100)},
        {"isa", compiled_isa()},
        {"cpu", cpu_features()},
    };
}

}  // namespace gac_fast
