// Whether the weights of a model are still those that were packed: of objects of Python, at every step of an actor, and
// with caches that the engine has just filled with other things.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "check.h"

namespace gac_fast {

// Places in memory that are read soon. Each alone would be waited for, a hundred nanoseconds and more; asked for
// together they come at once. Addresses may be stale or no addresses at all: a fetch of such a one does nothing.
class Lines {
  public:
    void add(const void* first, std::size_t bytes = 1) {
        const auto begin = reinterpret_cast<std::uintptr_t>(first) / kLine;
        const auto end = (reinterpret_cast<std::uintptr_t>(first) + bytes - 1) / kLine;
        for (std::uintptr_t line = begin; line <= end; ++line) {
            if (std::find(lines_.begin(), lines_.end(), line * kLine) == lines_.end()) lines_.push_back(line * kLine);
        }
    }

    void fetch() const {
        for (const std::uintptr_t line : lines_) __builtin_prefetch(reinterpret_cast<const void*>(line));
    }

  private:
    static constexpr std::uintptr_t kLine = 64;

    std::vector<std::uintptr_t> lines_;
};

// Entries (dictionary, key, value): whether each still holds that very value.
class WatchedEntries {
  public:
    explicit WatchedEntries(const pybind11::list& entries) {
        for (const pybind11::handle entry : entries) {
            if (!PyTuple_Check(entry.ptr()) || PyTuple_GET_SIZE(entry.ptr()) != 3 ||
                !PyDict_Check(PyTuple_GET_ITEM(entry.ptr(), 0))) {
                throw std::invalid_argument("entries: expected tuples (dict, key, value), got another object");
            }
            const auto item = [&entry](Py_ssize_t i) {
                return pybind11::reinterpret_borrow<pybind11::object>(PyTuple_GET_ITEM(entry.ptr(), i));
            };
            const pybind11::object dict = item(0);
            if (tables_.empty() || !tables_.back().dict.is(dict)) tables_.push_back({dict, 0, entries_.size()});
            entries_.push_back({item(1), item(2)});
        }
        for (Table& table : tables_) table.version = version(table.dict);
    }

    void add_to(Lines& lines) const {
        lines.add(tables_.data(), tables_.size() * sizeof(Table));
        for (const Table& table : tables_) lines.add(table.dict.ptr(), sizeof(PyDictObject));
    }

    // As they are now, which they may not have been before.
    bool same() {
        for (std::size_t i = 0; i < tables_.size(); ++i) {
            Table& table = tables_[i];
            const std::uint64_t now = version(table.dict);
            if (now != 0 && now == table.version) continue;
            const std::size_t end = i + 1 < tables_.size() ? tables_[i + 1].first : entries_.size();
            for (std::size_t k = table.first; k < end; ++k) {
                PyObject* value = PyDict_GetItemWithError(table.dict.ptr(), entries_[k].first.ptr());
                if (value == nullptr && PyErr_Occurred() != nullptr) throw pybind11::error_already_set();
                if (value != entries_[k].second.ptr()) {
                    table.version = 0;
                    return false;
                }
            }
            table.version = now;
        }
        return true;
    }

  private:
    struct Table {
        pybind11::object dict;
        std::uint64_t version;
        std::size_t first;  // of its entries
    };

    // Another number after every change of the dictionary; 0 where Python keeps none.
    static std::uint64_t version([[maybe_unused]] const pybind11::object& dict) {
#if PY_VERSION_HEX < 0x030C0000
        return reinterpret_cast<const PyDictObject*>(dict.ptr())->ma_version_tag;
#else
        return 0;
#endif
    }

    std::vector<Table> tables_;
    std::vector<std::pair<pybind11::object, pybind11::object>> entries_;
};

// Tensors as torch shows them to other libraries: the first part of the structures of DLPack 1.
struct TensorView {
    char* data;
    std::int32_t device_type, device_id, n_dims;
    std::uint8_t type_code, type_bits;
    std::uint16_t lanes;
    const std::int64_t* shape;
    const std::int64_t* strides;  // in elements
    std::uint64_t byte_offset;
};

struct TensorExchange {
    std::uint32_t major, minor;
    void* former;
    void *allocate, *from_object, *to_object;
    int (*view)(void* object, TensorView* view);
};

constexpr std::int32_t kCpu = 1;
constexpr std::uint8_t kFloat = 2;

// How tensors of this very type are shown; null where torch is too old for it.
inline const TensorExchange* exchange_of(const pybind11::object& type) {
    constexpr const char* kName = "dlpack_exchange_api";
    const pybind11::object found = pybind11::getattr(type, "__dlpack_c_exchange_api__", pybind11::none());
    if (PyCapsule_IsValid(found.ptr(), kName) == 0) return nullptr;
    const auto* exchange = static_cast<const TensorExchange*>(PyCapsule_GetPointer(found.ptr(), kName));
    return exchange->major == 1 ? exchange : nullptr;
}

// Says whether a tensor's memory, its version or its first bytes are other ones than when it was added: the version
// counts changes in place, the bytes show those made through `.data`, which do not count.
class WatchedTensors {
  public:
    void add(pybind11::object tensor, pybind11::array array) {
        // Looked up once: of the 60 tensors of a decoder each is asked at every step.
        const pybind11::type type = pybind11::type::of(tensor);
        if (!pybind11::hasattr(type, "_version") || !pybind11::hasattr(type, "data_ptr")) {
            fail("tensors", "torch tensors", std::string(pybind11::str(type)));
        }
        Item item{};
        item.tensor = tensor.ptr();
        item.version_of = keep(type.attr("_version"));
        item.data_ptr_of = keep(type.attr("data_ptr"));
        item.exchange = exchange_of(type);
        if (Py_TYPE(item.version_of)->tp_descr_get == nullptr) fail("tensors", "torch tensors", "another kind");
        item.version = version(item);
        item.n_bytes = static_cast<std::size_t>(array.nbytes());
        // Tensors made in inference mode count nothing: all of their bytes are compared.
        if (item.version >= 0) item.n_bytes = std::min<std::size_t>(item.n_bytes, 64);
        item.data = static_cast<const char*>(array.data());
        item.sample = samples_.size();
        samples_.insert(samples_.end(), item.data, item.data + item.n_bytes);
        items_.push_back(item);
        add_lines(tensor, item);
        keep(std::move(tensor));
        keep(std::move(array));
    }

    void add_to(Lines& lines) const {
        lines.add(items_.data(), items_.size() * sizeof(Item));
        // Many bytes in a row need no asking for.
        lines.add(samples_.data(), std::min<std::size_t>(samples_.size(), 64 * items_.size()));
        for (const auto& [first, bytes] : places_) lines.add(first, bytes);
    }

    bool changed() const {
        return std::any_of(items_.begin(), items_.end(), [this](const Item& item) {
            return version(item) != item.version || data_of(item) != item.data ||
                   std::memcmp(item.data, samples_.data() + item.sample, item.n_bytes) != 0;
        });
    }

  private:
    struct Item {
        PyObject *tensor, *version_of, *data_ptr_of;
        const TensorExchange* exchange;
        const char* data;
        std::int64_t version;
        std::size_t sample, n_bytes;
    };

    PyObject* keep(pybind11::object object) {
        kept_.push_back(std::move(object));
        return kept_.back().ptr();
    }

    // What an answer of torch reads: objects that its tensors name, and what these point to, among it the counter of
    // versions.
    void add_lines(const pybind11::object& tensor, const Item& item) {
        places_.emplace_back(item.tensor, 64);
        places_.emplace_back(item.data, 1);
        static constexpr std::size_t kObject = 128;  // smaller than those of torch
        const auto object_at = [this](const pybind11::object& address) -> const char* {
            const auto* p = static_cast<const char*>(PyLong_AsVoidPtr(address.ptr()));
            if (p == nullptr) throw pybind11::error_already_set();
            places_.emplace_back(p, kObject);
            return p;
        };
        try {
            const char* inner = object_at(tensor.attr("_cdata"));
            object_at(tensor.attr("untyped_storage")().attr("_cdata"));
            for (std::size_t i = sizeof(void*); i + sizeof(void*) <= kObject; i += sizeof(void*)) {
                const void* word;
                std::memcpy(&word, inner + i, sizeof(word));
                if (reinterpret_cast<std::uintptr_t>(word) >> 32 != 0) places_.emplace_back(word, 1);
            }
        } catch (pybind11::error_already_set&) {
            // Slower then.
        }
    }

    static std::int64_t version(const Item& item) {
        PyObject* const descriptor = item.version_of;
        PyObject* found;
        if (Py_IS_TYPE(descriptor, &PyGetSetDescr_Type)) {
            const PyGetSetDef* def = reinterpret_cast<PyGetSetDescrObject*>(descriptor)->d_getset;
            found = def->get(item.tensor, def->closure);
        } else {
            PyObject* const type = reinterpret_cast<PyObject*>(Py_TYPE(item.tensor));
            found = Py_TYPE(descriptor)->tp_descr_get(descriptor, item.tensor, type);
        }
        const auto value = pybind11::reinterpret_steal<pybind11::object>(found);
        if (!value) {
            if (!PyErr_ExceptionMatches(PyExc_RuntimeError)) throw pybind11::error_already_set();
            PyErr_Clear();
            return -1;
        }
        return PyLong_AsLongLong(value.ptr());
    }

    static const void* data_of(const Item& item) {
        TensorView view;
        if (item.exchange != nullptr && item.exchange->view(item.tensor, &view) == 0) {
            return view.data + view.byte_offset;
        }
        PyErr_Clear();
        PyObject* const found = PyObject_CallOneArg(item.data_ptr_of, item.tensor);
        const auto address = pybind11::reinterpret_steal<pybind11::object>(found);
        if (!address) throw pybind11::error_already_set();
        return PyLong_AsVoidPtr(address.ptr());
    }

    std::vector<Item> items_;
    std::vector<char> samples_;
    std::vector<pybind11::object> kept_;
    std::vector<std::pair<const void*, std::size_t>> places_;
};

}  // namespace gac_fast
