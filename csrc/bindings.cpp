// The Python module stars_fast._C. No torch here: arrays come and go as numpy's.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <limits>

#include "ops.h"
#include "segment_tree.h"

namespace py = pybind11;

// An object made by __new__ alone, or by copy.copy, has memory and no tree in it. Nothing else would ask.
template <>
struct pybind11::detail::type_caster<stars_fast::SegmentTree> : type_caster_base<stars_fast::SegmentTree> {
    bool load(handle source, bool convert) {
        if (!type_caster_base::load(source, convert)) return false;
        if (static_cast<stars_fast::SegmentTree*>(value)->capacity() != 0) return true;
        throw type_error("this SegmentTree was never made: its __init__ was not called");
    }
};

namespace {

using stars_fast::SegmentTree;
using stars_fast::SlotsExhausted;
// No py::array::forcecast: a too wide integer is refused, not rounded.
using Counts = py::array_t<int64_t, py::array::c_style>;

// Asked for as it comes first, because numpy would round the floats of a list without a word.
Counts counts_of(const py::object& given, const char* what) {
    const py::array array = py::array::ensure(given);
    if (!array) throw py::type_error(std::string(what) + " is no array");
    if (array.ndim() != 1) {
        throw std::invalid_argument(std::string(what) + " has " + std::to_string(array.ndim()) +
                                    " dimensions, must have 1");
    }
    if (array.size() == 0) return Counts(0);
    const char kind = array.dtype().kind();
    if (kind != 'i' && kind != 'u') throw py::type_error(std::string(what) + " must hold integers");
    return Counts(array);
}

py::array_t<int32_t> slots(const SegmentTree& tree, SegmentTree::Node node) {
    const int64_t length = tree.length(node);
    py::array_t<int32_t> path(length);
    tree.copy_path(node, path.mutable_data() + length);
    return path;
}

py::tuple plan(SegmentTree& tree, const py::object& given_leaves, const py::object& given_rows,
               const py::object& given_slots, const py::object& given_ids) {
    const Counts leaves = counts_of(given_leaves, "leaves"), rows = counts_of(given_rows, "rows"),
                 new_slots = counts_of(given_slots, "new_slots"),
                 ids = given_ids.is_none() ? Counts(0) : counts_of(given_ids, "ids");
    const int64_t groups = leaves.size(), branches = new_slots.size();
    if (rows.size() != groups) {
        throw std::invalid_argument("leaves has " + std::to_string(groups) + " entries, rows has " +
                                    std::to_string(rows.size()));
    }
    auto layout = tree.layout(leaves.data(), rows.data(), groups, new_slots.data(), branches);
    if (!given_ids.is_none() && ids.size() != layout.tokens) {
        throw std::invalid_argument("ids has " + std::to_string(ids.size()) + " entries, but new_slots sums to " +
                                    std::to_string(layout.tokens));
    }
    for (int64_t t = 0; t < ids.size(); ++t) {
        if (ids.data()[t] < 0 || ids.data()[t] > std::numeric_limits<int32_t>::max()) {
            throw std::invalid_argument("ids[" + std::to_string(t) + "] is " + std::to_string(ids.data()[t]) +
                                        ", must be from 0 to 2^31 - 1");
        }
    }
    layout.size += ids.size();
    py::array_t<int64_t> nodes(branches);
    py::array_t<int32_t> packed(layout.size);
    tree.plan(layout, leaves.data(), rows.data(), new_slots.data(), nodes.mutable_data(), packed.mutable_data());
    std::copy_n(ids.data(), ids.size(), packed.mutable_data() + layout.ids);
    return py::make_tuple(nodes, packed, layout.trunk_width, layout.branch_width);
}

// Every call keeps the GIL: it takes microseconds, and the GIL is what keeps two threads off one tree.
void bind_segment_tree(py::module_& module) {
    py::register_exception<SlotsExhausted>(module, "SlotsExhausted", PyExc_RuntimeError);
    py::class_<SegmentTree>(module, "SegmentTree", "Who holds which slots; see stars_fast/_C.pyi.")
        .def(py::init<int64_t>(), py::arg("capacity"))
        .def("fork", &SegmentTree::fork, py::arg("parent") = SegmentTree::kNoNode)
        .def(
            "extend",
            [](SegmentTree& tree, SegmentTree::Node node, int64_t n) {
                return py::array_t<int32_t>(n, tree.extend(node, n));
            },
            py::arg("node"), py::arg("n"))
        .def("cut", &SegmentTree::cut, py::arg("node"), py::arg("length"))
        .def("shift", &SegmentTree::shift, py::arg("node"), py::arg("offset"))
        .def("retain", &SegmentTree::retain, py::arg("node"))
        .def("release", &SegmentTree::release, py::arg("node"))
        .def("release_all", &SegmentTree::release_all, py::arg("nodes"))
        .def("length", &SegmentTree::length, py::arg("node"))
        .def("slots", &slots, py::arg("node"))
        .def("plan", &plan, py::arg("leaves"), py::arg("rows"), py::arg("new_slots"),
             py::arg("ids") = py::none())
        .def_property_readonly("capacity", &SegmentTree::capacity)
        .def_property_readonly("free_slots", &SegmentTree::free_slots)
        .def_property_readonly("live_slots", &SegmentTree::live_slots)
        .def_property_readonly("nodes", &SegmentTree::nodes);
}

}  // namespace

PYBIND11_MODULE(_C, module) {
    module.doc() = "C++ parts of stars_fast: the tree of slots and the CPU kernels.";
    bind_segment_tree(module);
    bind_ops(module);
}
