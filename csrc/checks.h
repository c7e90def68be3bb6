// What callers hand over, checked before it is used to reach memory: a wrong argument is an error, never a crash.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <stdexcept>
#include <string>

namespace stars_fast {

[[noreturn]] inline void refuse(const std::string& what, int64_t value, int64_t low, int64_t high) {
    const std::string range = "must be from " + std::to_string(low) + " to " + std::to_string(high);
    throw std::invalid_argument(what + " is " + std::to_string(value) + ", " +
                                (high < low ? "but nothing may stand there" : range));
}

inline void check_value(const char* name, int64_t value, int64_t low, int64_t high) {
    if (value < low || value > high) refuse(name, value, low, high);
}

inline void check_sizes(std::initializer_list<int64_t> sizes) {
    for (const int64_t size : sizes) check_value("a size", size, 0, std::numeric_limits<int64_t>::max());
}

// Whether a value is outside. One pass without a branch, which compilers vectorise; who stands outside is asked after.
template <class Integer>
bool any_outside(const Integer* values, int64_t count, int64_t low, int64_t high) {
    using Limits = std::numeric_limits<Integer>;
    if (high < low) return count > 0;
    const Integer least = static_cast<Integer>(low);
    const Integer most = static_cast<Integer>(std::min<int64_t>(high, Limits::max()));
    Integer outside = 0;
    for (int64_t i = 0; i < count; ++i) outside |= (values[i] < least) | (values[i] > most);
    return outside != 0;
}

// Every one of the values from `low` to `high`. `row` is the table's line that they are the beginning of, if it is one.
template <class Integer>
void check_range(const char* name, const Integer* values, int64_t count, int64_t low, int64_t high, int64_t row = -1) {
    if (!any_outside(values, count, low, high)) return;
    for (int64_t i = 0; i < count; ++i) {
        if (values[i] >= low && values[i] <= high) continue;
        const std::string line = row < 0 ? "" : std::to_string(row) + ", ";
        refuse(std::string(name) + "[" + line + std::to_string(i) + "]", values[i], low, high);
    }
}

// Row pointers: `count` + 1 of them, that begin at 0, never fall, and end at `last` or before.
inline void check_offsets(const char* name, const int32_t* offsets, int64_t count, int64_t last) {
    int64_t least = 0, most = 0;
    for (int64_t i = 0; i <= count; ++i) {
        if (offsets[i] < least || offsets[i] > most) {
            refuse(std::string(name) + "[" + std::to_string(i) + "]", offsets[i], least, most);
        }
        least = offsets[i];
        most = last;
    }
}

// How many bytes such sizes make.
inline int64_t bytes_of(std::initializer_list<int64_t> sizes) {
    int64_t bytes = 1;
    for (const int64_t size : sizes) {
        if (__builtin_mul_overflow(bytes, size, &bytes)) throw std::invalid_argument("sizes that no memory has");
    }
    return bytes;
}

// A piece of memory and the argument that lies there.
struct Extent {
    const char* name;
    const void* first;
    int64_t bytes;

    bool overlaps(const Extent& other) const {
        const uintptr_t begin = reinterpret_cast<uintptr_t>(first), there = reinterpret_cast<uintptr_t>(other.first);
        return begin < there + other.bytes && there < begin + bytes && bytes > 0 && other.bytes > 0;
    }
};

// All of them exist, and those written (the first `written`) share no memory with any other.
inline void check_memory(std::initializer_list<Extent> extents, int64_t written) {
    const Extent* all = extents.begin();
    for (const Extent& extent : extents) {
        if (extent.first == nullptr && extent.bytes > 0) {  // a tensor whose storage was taken from it
            throw std::invalid_argument(std::string(extent.name) + " has no memory: its storage is empty");
        }
    }
    for (int64_t i = 0; i < written; ++i) {
        for (size_t j = i + 1; j < extents.size(); ++j) {
            if (all[i].overlaps(all[j])) {
                throw std::invalid_argument(std::string(all[i].name) + ", which is written, shares memory with " +
                                            all[j].name + "; pass a clone of one of them");
            }
        }
    }
}

}  // namespace stars_fast
