// The arguments that the attention ops share, checked and taken apart at the boundary to Python.
#pragma once

#include <pybind11/numpy.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "check.h"
#include "window_attention.h"

namespace gac_fast {

// The dtype of float32 or bfloat16 heads; bfloat16 comes as int16.
inline bool is_bf16(const pybind11::array& array, const char* name) {
    if (array.dtype().equal(pybind11::dtype::of<std::int16_t>())) return true;
    if (array.dtype().equal(pybind11::dtype::of<float>())) return false;
    fail(name, "dtype float32 or int16 (bfloat16 bits)", std::string(pybind11::str(array.dtype())));
}

inline void check_heads(const pybind11::array& array, bool bf16, const std::vector<std::int64_t>& shape,
                        const char* name) {
    if (is_bf16(array, name) != bf16) {
        fail(name, std::string("dtype ") + (bf16 ? "int16" : "float32") + " as q",
             std::string(pybind11::str(array.dtype())));
    }
    check_shape(array, shape, name);
    const auto last = array.ndim() - 1;
    if (array.size() > 0 && array.strides(last) != array.itemsize()) {
        fail(name, "neighbouring elements in a head",
             "an element stride of " + std::to_string(array.strides(last)) + " bytes");
    }
    check_aligned(array, name);
}

inline void check_width(std::int64_t width) {
    if (width % 2 != 0 || width < 8 || width > 256) fail("q", "an even head width of 8 to 256", std::to_string(width));
}

inline HeadsView heads_view(const pybind11::array& array, bool bf16, const std::vector<std::int64_t>& shape,
                            const char* name) {
    check_heads(array, bf16, shape, name);
    return {array.data(), array.strides(0) / array.itemsize(), array.strides(1) / array.itemsize()};
}

inline WriteableHeadsView writeable_heads_view(pybind11::array& array, bool bf16,
                                               const std::vector<std::int64_t>& shape, const char* name) {
    check_heads(array, bf16, shape, name);
    check_writeable(array, name);
    return {array.mutable_data(), array.strides(0) / array.itemsize(), array.strides(1) / array.itemsize()};
}

// int32 or int64 [size].
inline std::vector<std::int64_t> integers(const pybind11::array& array, std::int64_t size, const char* name) {
    const bool wide = array.dtype().equal(pybind11::dtype::of<std::int64_t>());
    if (!wide && !array.dtype().equal(pybind11::dtype::of<std::int32_t>())) {
        fail(name, "dtype int32 or int64", std::string(pybind11::str(array.dtype())));
    }
    check_shape(array, {size}, name);
    check_aligned(array, name);
    std::vector<std::int64_t> values(static_cast<std::size_t>(array.shape(0)));
    const auto* data = static_cast<const char*>(array.data());
    for (std::size_t i = 0; i < values.size(); ++i) {
        const char* p = data + static_cast<pybind11::ssize_t>(i) * array.strides(0);
        values[i] = wide ? *reinterpret_cast<const std::int64_t*>(p) : *reinterpret_cast<const std::int32_t*>(p);
    }
    return values;
}

// Offsets that rise from 0 to n_tokens.
inline std::vector<std::int64_t> offsets(const pybind11::array& array, std::int64_t n_tokens) {
    const char* name = "cu_seqlens";
    std::vector<std::int64_t> values = integers(array, kAny, name);
    const auto at = [](std::size_t i) { return " at position " + std::to_string(i); };
    if (values.empty()) fail(name, "at least 1 offset", "0");
    if (values.front() != 0) fail(name, "0" + at(0), std::to_string(values.front()));
    for (std::size_t i = 1; i < values.size(); ++i) {
        if (values[i] < values[i - 1]) {
            fail(name, "offsets that do not fall",
                 std::to_string(values[i]) + at(i) + " after " + std::to_string(values[i - 1]));
        }
    }
    if (values.back() != n_tokens) {
        fail(name, std::to_string(n_tokens) + ", the number of tokens," + at(values.size() - 1),
             std::to_string(values.back()));
    }
    return values;
}

// Cuts every sequence into chunks of about `size` queries (whole multiples of `multiple`, but for the last).
inline std::vector<QueryChunk> query_chunks(const std::vector<std::int64_t>& cu_seqlens, std::int64_t size,
                                            std::int64_t multiple) {
    std::vector<QueryChunk> chunks;
    for (std::size_t i = 0; i + 1 < cu_seqlens.size(); ++i) {
        const std::int64_t begin = cu_seqlens[i], end = cu_seqlens[i + 1];
        if (begin == end) continue;
        const std::int64_t n = std::max<std::int64_t>(1, (end - begin) / size);
        const std::int64_t step = ((end - begin + n - 1) / n + multiple - 1) / multiple * multiple;
        for (std::int64_t first = begin; first < end; first += step) {
            chunks.push_back({static_cast<std::int64_t>(i), begin, end, first, std::min(end, first + step)});
        }
    }
    return chunks;
}

}  // namespace gac_fast
