// Checks of arrays at the boundary to Python. Each throws std::invalid_argument (ValueError in Python) with one
// sentence that names the argument, what was expected and what came. None depends on NDEBUG.
#pragma once

#include <pybind11/numpy.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace gac_fast {

// In a shape: any size.
constexpr std::int64_t kAny = -1;

inline std::string shape_text(const std::vector<std::int64_t>& shape) {
    std::string text = "(";
    for (std::size_t i = 0; i < shape.size(); ++i) {
        text += (i ? ", " : "") + (shape[i] == kAny ? std::string("*") : std::to_string(shape[i]));
    }
    return text + ")";
}

inline std::vector<std::int64_t> shape_of(const pybind11::array& array) {
    return {array.shape(), array.shape() + array.ndim()};
}

[[noreturn]] inline void fail(const std::string& name, const std::string& expected, const std::string& actual) {
    throw std::invalid_argument(name + ": expected " + expected + ", got " + actual);
}

template <typename T>
void check_dtype(const pybind11::array& array, const char* name) {
    const pybind11::dtype expected = pybind11::dtype::of<T>();
    if (!array.dtype().equal(expected)) {
        fail(name, "dtype " + std::string(pybind11::str(expected)), std::string(pybind11::str(array.dtype())));
    }
}

inline void check_shape(const pybind11::array& array, const std::vector<std::int64_t>& expected, const char* name) {
    const std::vector<std::int64_t> actual = shape_of(array);
    bool matches = actual.size() == expected.size();
    for (std::size_t i = 0; matches && i < actual.size(); ++i) {
        matches = expected[i] == kAny || expected[i] == actual[i];
    }
    if (!matches) fail(name, "shape " + shape_text(expected), shape_text(actual));
}

// Elements of a row lie next to each other; rows may be any distance apart. Needs two dimensions.
inline void check_rows_contiguous(const pybind11::array& array, const char* name) {
    if (array.size() > 0 && array.shape(1) > 1 && array.strides(1) != array.itemsize()) {
        fail(name, "rows of neighbouring elements",
             "an element stride of " + std::to_string(array.strides(1)) + " bytes");
    }
}

// Whole elements at addresses of elements, as the pointers of a view take for granted.
inline void check_aligned(const pybind11::array& array, const char* name) {
    if (array.size() == 0) return;
    for (pybind11::ssize_t i = 0; i < array.ndim(); ++i) {
        if (array.shape(i) > 1 && array.strides(i) % array.itemsize() != 0) {
            fail(name, "strides of whole elements", std::to_string(array.strides(i)) + " bytes");
        }
    }
    if (reinterpret_cast<std::uintptr_t>(array.data()) % static_cast<std::uintptr_t>(array.itemsize()) != 0) {
        fail(name, "aligned elements", "some between two addresses");
    }
}

// An argument that may be None, where it is not.
inline pybind11::array array_of(const pybind11::object& object, const char* name) {
    if (!pybind11::isinstance<pybind11::array>(object)) {
        fail(name, "an array", std::string(pybind11::str(pybind11::type::handle_of(object))));
    }
    return pybind11::reinterpret_borrow<pybind11::array>(object);
}

inline void check_writeable(const pybind11::array& array, const char* name) {
    if (!array.writeable()) fail(name, "a writeable array", "a read-only one");
}

// A one-dimensional array as pointer, size and stride in elements; the array must outlive the view.
template <typename T>
struct VectorView {
    const T* data;
    std::int64_t size;
    std::int64_t stride;

    T operator[](std::int64_t i) const { return data[i * stride]; }
};

// A two-dimensional array whose rows are contiguous.
template <typename T>
struct RowsView {
    T* data;
    std::int64_t rows;
    std::int64_t columns;
    std::int64_t stride;

    T* row(std::int64_t i) const { return data + i * stride; }
};

template <typename T>
VectorView<T> vector_view(const pybind11::array& array, std::int64_t size, const char* name) {
    check_dtype<T>(array, name);
    check_shape(array, {size}, name);
    check_aligned(array, name);
    const auto itemsize = static_cast<std::int64_t>(sizeof(T));
    return {static_cast<const T*>(array.data()), array.shape(0), array.strides(0) / itemsize};
}

template <typename T>
RowsView<const T> rows_view(const pybind11::array& array, std::int64_t rows, std::int64_t columns, const char* name) {
    check_dtype<T>(array, name);
    check_shape(array, {rows, columns}, name);
    check_rows_contiguous(array, name);
    check_aligned(array, name);
    const auto itemsize = static_cast<std::int64_t>(sizeof(T));
    return {static_cast<const T*>(array.data()), array.shape(0), array.shape(1), array.strides(0) / itemsize};
}

template <typename T>
RowsView<T> writeable_rows_view(pybind11::array& array, std::int64_t rows, std::int64_t columns, const char* name) {
    check_dtype<T>(array, name);
    check_shape(array, {rows, columns}, name);
    check_rows_contiguous(array, name);
    check_aligned(array, name);
    check_writeable(array, name);
    const auto itemsize = static_cast<std::int64_t>(sizeof(T));
    return {static_cast<T*>(array.mutable_data()), array.shape(0), array.shape(1), array.strides(0) / itemsize};
}

}  // namespace gac_fast
