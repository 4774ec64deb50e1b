// What this module was built with and what the processor at hand offers.
#pragma once

#include <string>
#include <utility>
#include <vector>

namespace gac_fast {

// Pairs of name and text: version, compiler, standard, isa (the paths compiled in), cpu (what of the wider instruction
// sets this processor has).
std::vector<std::pair<std::string, std::string>> build_info();

}  // namespace gac_fast
