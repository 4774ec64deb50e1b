#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#if GAC_FAST_X86 && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if GAC_FAST_X86
#include <cpuid.h>
#endif

namespace gac_fast {
namespace {

constexpr Isa kAll[] = {Isa::kPortable, Isa::kAvx2, Isa::kAvx512, Isa::kAmx};
constexpr const char* kVariable = "GAC_FAST_CPU_ISA";

#if GAC_FAST_X86
std::string missing(std::initializer_list<std::pair<bool, const char*>> features) {
    std::string names;
    for (const auto& [present, name] : features) {
        if (!present) names += (names.empty() ? "" : ", ") + std::string(name);
    }
    return names.empty() ? "" : "the processor lacks " + names;
}

// GCC 12 knows no names for the AMX bits, hence the words of leaf 7 themselves.
bool leaf7_bit(unsigned subleaf, int word, unsigned bit) {
    unsigned registers[4] = {};
    if (!__get_cpuid_count(7, subleaf, &registers[0], &registers[1], &registers[2], &registers[3])) return false;
    return (registers[word] >> bit & 1U) != 0;
}

// Linux gives a process the tile registers only on request.
std::string ask_for_tiles() {
#if defined(__linux__)
    constexpr long kRequestPermission = 0x1023;
    constexpr unsigned long kTileData = 18;
    if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) != 0) return "the system refuses the tile registers";
    return "";
#else
    return "tile registers are asked for on Linux alone";
#endif
}

std::string find_problem(Isa isa) {
    __builtin_cpu_init();
    switch (isa) {
        case Isa::kPortable:
            return "";
        case Isa::kAvx2:
            return missing(
                {{__builtin_cpu_supports("avx2") != 0, "avx2"}, {__builtin_cpu_supports("fma") != 0, "fma"}});
        case Isa::kAvx512:
            return missing({{__builtin_cpu_supports("avx2") != 0, "avx2"},
                            {__builtin_cpu_supports("fma") != 0, "fma"},
                            {__builtin_cpu_supports("avx512f") != 0, "avx512f"},
                            {__builtin_cpu_supports("avx512bw") != 0, "avx512bw"},
                            {__builtin_cpu_supports("avx512vl") != 0, "avx512vl"},
                            {__builtin_cpu_supports("avx512dq") != 0, "avx512dq"}});
        case Isa::kAmx: {
            const std::string below = find_problem(Isa::kAvx512);
            if (!below.empty()) return below;
            const std::string lacking = missing({{leaf7_bit(1, 0, 5), "avx512_bf16"},
                                                 {leaf7_bit(0, 3, 22), "amx_bf16"},
                                                 {leaf7_bit(0, 3, 24), "amx_tile"}});
            return lacking.empty() ? ask_for_tiles() : lacking;
        }
    }
    return "";
}
#else
std::string find_problem(Isa isa) { return isa == Isa::kPortable ? "" : "the processor is no x86-64"; }
#endif

Isa parse(const std::string& name, const std::string& source) {
    std::string known;
    for (const Isa isa : kAll) {
        if (name == isa_name(isa)) return isa;
        known += (known.empty() ? "" : ", ") + std::string(isa_name(isa));
    }
    throw std::invalid_argument(source + ": expected one of " + known + ", got '" + name + "'");
}

struct Choice {
    Isa isa;
    std::string reason;
};

Choice forced(const std::string& name, const std::string& source) {
    const Isa isa = parse(name, source);
    const std::string problem = isa_problem(isa);
    if (!problem.empty()) {
        throw std::runtime_error(source + " forces the " + name + " path, which cannot run: " + problem);
    }
    return {isa, "forced by " + source};
}

Choice best() {
    Choice choice{Isa::kPortable, "the widest that runs here"};
    for (const Isa isa : kAll) {
        if (isa_problem(isa).empty()) choice.isa = isa;
    }
    return choice;
}

// Thrown errors repeat at every use until the variable is right.
const Choice& at_start() {
    static const Choice choice = [] {
        const char* name = std::getenv(kVariable);
        return name == nullptr || *name == '\0' ? best() : forced(name, kVariable);
    }();
    return choice;
}

// Minus one: none forced.
std::atomic<int> forced_isa{-1};

}  // namespace

const char* isa_name(Isa isa) {
    switch (isa) {
        case Isa::kPortable:
            return "portable";
        case Isa::kAvx2:
            return "avx2";
        case Isa::kAvx512:
            return "avx512";
        case Isa::kAmx:
            return "amx";
    }
    return "";
}

bool isa_compiled(Isa isa) {
    switch (isa) {
        case Isa::kPortable:
            break;
        case Isa::kAvx2:
#if !GAC_FAST_X86 || defined(GAC_FAST_WITHOUT_AVX2)
            return false;
#else
            break;
#endif
        case Isa::kAvx512:
#if !GAC_FAST_X86 || defined(GAC_FAST_WITHOUT_AVX512)
            return false;
#else
            break;
#endif
        case Isa::kAmx:
#if !GAC_FAST_X86 || defined(GAC_FAST_WITHOUT_AMX)
            return false;
#else
            break;
#endif
    }
    return true;
}

std::string isa_problem(Isa isa) {
    if (GAC_FAST_X86 && !isa_compiled(isa)) return "this build leaves it out (GAC_FAST_ISAS)";
    static const std::string problems[] = {find_problem(Isa::kPortable), find_problem(Isa::kAvx2),
                                           find_problem(Isa::kAvx512), find_problem(Isa::kAmx)};
    return problems[static_cast<int>(isa)];
}

Isa active_isa() {
    const int isa = forced_isa.load(std::memory_order_relaxed);
    return isa >= 0 ? static_cast<Isa>(isa) : at_start().isa;
}

std::string active_isa_reason() {
    return forced_isa.load(std::memory_order_relaxed) >= 0 ? "forced by cpu_isa()" : at_start().reason;
}

std::string use_isa(const std::string& name) {
    const int wanted = name.empty() ? -1 : static_cast<int>(forced(name, "cpu_isa()").isa);
    const int former = forced_isa.exchange(wanted);
    return former < 0 ? "" : isa_name(static_cast<Isa>(former));
}

std::vector<std::pair<std::string, std::string>> isa_problems() {
    std::vector<std::pair<std::string, std::string>> problems;
    for (const Isa isa : kAll) problems.emplace_back(isa_name(isa), isa_problem(isa));
    return problems;
}

}  // namespace gac_fast
