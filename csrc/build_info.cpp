#include "build_info.h"

#include "isa.h"

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

std::string compiled_isas() {
    std::string names;
    for (const Isa isa : {Isa::kPortable, Isa::kAvx2, Isa::kAvx512, Isa::kAmx}) {
        if (isa_compiled(isa)) names += (names.empty() ? "" : " ") + std::string(isa_name(isa));
    }
    return names;
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
        {"isa", compiled_isas()},
        {"cpu", cpu_features()},
    };
}

}  // namespace gac_fast
