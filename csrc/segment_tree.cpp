#include "segment_tree.h"

#include <algorithm>
#include <limits>
#include <numeric>

namespace stars_fast {

namespace {

// Freed entries keep their buffer, so that a heartbeat allocates no memory; a prompt's would be too much to keep.
constexpr size_t kKeptBuffer = 256;

std::string exhausted_message(int64_t requested, int64_t free, int64_t capacity) {
    return std::to_string(requested) + " slots requested, " + std::to_string(free) + " free, capacity " +
           std::to_string(capacity) + " (slot 0 is reserved)";
}

int64_t aligned(int64_t offset) {
    return (offset + SegmentTree::kAlign - 1) / SegmentTree::kAlign * SegmentTree::kAlign;
}

int64_t checked_count(int64_t count, const char* what, int64_t position) {
    if (count < 0 || count > std::numeric_limits<int32_t>::max()) {
        throw std::invalid_argument(std::string(what) + "[" + std::to_string(position) + "] is " +
                                    std::to_string(count) + ", not a count");
    }
    return count;
}

}  // namespace

SlotsExhausted::SlotsExhausted(int64_t requested, int64_t free, int64_t capacity)
    : std::runtime_error(exhausted_message(requested, free, capacity)) {}

SegmentTree::SegmentTree(int64_t capacity) : capacity_(capacity) {
    if (capacity < 1 || capacity > std::numeric_limits<int32_t>::max()) {
        throw std::invalid_argument("capacity is " + std::to_string(capacity) + ", must be from 1 to 2**31 - 1");
    }
    free_slots_.reserve(capacity - 1);
    for (int64_t slot = capacity - 1; slot > 0; --slot) {
        free_slots_.push_back(static_cast<int32_t>(slot));
    }
}

const SegmentTree::Entry& SegmentTree::held(Node node) const {
    if (node >= 0 && index(node) < static_cast<Index>(entries_.size())) {
        const Entry& entry = entries_[index(node)];
        if (entry.handles > 0 && name(index(node)) == node) {
            return entry;
        }
    }
    throw std::invalid_argument("node " + std::to_string(node) + " is not held: released already, or never made");
}

void SegmentTree::require_slots(int64_t count) const {
    if (count > free_slots()) {
        throw SlotsExhausted(count, free_slots(), capacity_);
    }
}

void SegmentTree::require_entries(int64_t count) const {
    if (count > (int64_t{1} << kIndexBits) - nodes()) {
        throw std::length_error(std::to_string(count) + " nodes requested, " + std::to_string(nodes()) +
                                " live, at most " + std::to_string(int64_t{1} << kIndexBits));
    }
}

SegmentTree::Index SegmentTree::new_entry(Index parent, int64_t start) {
    Index index;
    if (free_entries_.empty()) {
        index = static_cast<Index>(entries_.size());
        entries_.emplace_back();
    } else {
        index = free_entries_.back();
        free_entries_.pop_back();
    }
    Entry& entry = entries_[index];
    entry.start = start;
    entry.offset = parent == kNone ? 0 : entries_[parent].offset;
    entry.parent = parent;
    entry.handles = 1;
    entry.children = 0;
    if (parent != kNone) {
        ++entries_[parent].children;
    }
    return index;
}

void SegmentTree::free_entry(Index index) {
    Entry& entry = entries_[index];
    // Reversed: the next run handed out is ascending again, and the kernels read neighbours.
    free_slots_.insert(free_slots_.end(), entry.slots.rbegin(), entry.slots.rend());
    entry.slots.clear();
    if (entry.slots.capacity() > kKeptBuffer) {
        entry.slots.shrink_to_fit();
    }
    ++entry.generation;
    free_entries_.push_back(index);
}

// A loop, not a recursion: a long answer is a chain of as many nodes as it has segments.
void SegmentTree::free_unused(Index index) {
    while (index != kNone && entries_[index].handles == 0 && entries_[index].children == 0) {
        const Index parent = entries_[index].parent;
        free_entry(index);
        if (parent != kNone) {
            --entries_[parent].children;
        }
        index = parent;
    }
}

const int32_t* SegmentTree::append(Entry& entry, int64_t count) {
    const size_t old_size = entry.slots.size();
    entry.slots.insert(entry.slots.end(), free_slots_.rbegin(), free_slots_.rbegin() + count);
    free_slots_.resize(free_slots_.size() - count);
    return entry.slots.data() + old_size;
}

void SegmentTree::write_path(Index index, int32_t* end) const {
    for (; index != kNone; index = entries_[index].parent) {
        const std::vector<int32_t>& slots = entries_[index].slots;
        end = std::copy_backward(slots.begin(), slots.end(), end);
    }
}

// The upper node is new and the lower one keeps its name, so every name still stands for the same path.
SegmentTree::Index SegmentTree::split(Index lower, int64_t length) {
    const Index parent = entries_[lower].parent;
    const Index upper = new_entry(parent, entries_[lower].start);
    Entry& above = entries_[upper];
    Entry& below = entries_[lower];
    const auto boundary = below.slots.begin() + (length - below.start);
    above.slots.assign(below.slots.begin(), boundary);
    below.slots.erase(below.slots.begin(), boundary);
    above.offset = below.offset;
    below.start = length;
    below.parent = upper;
    above.children = 1;
    if (parent != kNone) {
        --entries_[parent].children;  // it counts the upper one now, no longer the lower one
    }
    return upper;
}

SegmentTree::Node SegmentTree::fork(Node parent) {
    require_entries(1);
    if (parent == kNoNode) {
        return name(new_entry(kNone, 0));
    }
    const int64_t start = held(parent).end();
    return name(new_entry(index(parent), start));
}

const int32_t* SegmentTree::extend(Node node, int64_t count) {
    Entry& entry = held(node);
    if (count < 0) {
        throw std::invalid_argument("cannot extend node " + std::to_string(node) + " by " + std::to_string(count) +
                                    " slots");
    }
    if (entry.handles != 1 || entry.children != 0) {
        throw std::invalid_argument("node " + std::to_string(node) + " cannot grow: it has " +
                                    std::to_string(entry.handles) + " holders and " +
                                    std::to_string(entry.children) + " children; fork it instead");
    }
    require_slots(count);
    return append(entry, count);
}

void SegmentTree::shift(Node node, int64_t offset) {
    Entry& entry = held(node);
    if (entry.children != 0) {
        throw std::invalid_argument("cannot shift node " + std::to_string(node) + ": it has " +
                                    std::to_string(entry.children) + " children, which have its offset");
    }
    // No path is longer than the capacity, so that no position overflows.
    const int64_t least = -entry.end(), most = std::numeric_limits<int32_t>::max() - capacity_;
    if (offset < least || offset > most) {
        throw std::invalid_argument("cannot shift node " + std::to_string(node) + " by " + std::to_string(offset) +
                                    ": must be from " + std::to_string(least) + " to " + std::to_string(most));
    }
    entry.offset = offset;
}

SegmentTree::Node SegmentTree::cut(Node node, int64_t length) {
    const int64_t full = held(node).end();
    if (length < 0 || length > full) {
        throw std::invalid_argument("cannot cut node " + std::to_string(node) + " to " + std::to_string(length) +
                                    " tokens: it has " + std::to_string(full));
    }
    Index at = index(node);
    while (at != kNone && entries_[at].end() != length && entries_[at].start >= length) {
        at = entries_[at].parent;
    }
    if (at != kNone && entries_[at].end() == length) {
        ++entries_[at].handles;
        return name(at);
    }
    require_entries(1);
    return name(at == kNone ? new_entry(kNone, 0) : split(at, length));
}

void SegmentTree::release(Node node) {
    --held(node).handles;
    free_unused(index(node));
}

void SegmentTree::release_all(const std::vector<Node>& nodes) {
    for (const Node node : nodes) release(node);
}

void SegmentTree::copy_path(Node node, int32_t* end) const {
    held(node);
    write_path(index(node), end);
}

SegmentTree::Layout SegmentTree::layout(const int64_t* leaves, const int64_t* rows, int64_t groups,
                                        const int64_t* new_slots, int64_t branches) const {
    Layout layout{};
    layout.groups = groups;
    layout.branches = branches;
    layout.trunk_width = layout.branch_width = 1;
    int64_t total_rows = 0, total_slots = 0;
    for (int64_t g = 0; g < groups; ++g) {
        if (leaves[g] != kNoNode) {
            layout.trunk_width = std::max(layout.trunk_width, held(leaves[g]).end());
        }
        total_rows += checked_count(rows[g], "rows", g);
    }
    if (total_rows != branches) {
        throw std::invalid_argument("rows sum to " + std::to_string(total_rows) + ", but new_slots has " +
                                    std::to_string(branches) + " entries");
    }
    for (int64_t b = 0; b < branches; ++b) {
        layout.branch_width = std::max(layout.branch_width, checked_count(new_slots[b], "new_slots", b));
        total_slots += new_slots[b];
    }
    require_slots(total_slots);
    require_entries(branches);
    layout.trunk_len = aligned(groups * layout.trunk_width);
    layout.branch_slots = aligned(layout.trunk_len + groups);
    layout.branch_len = aligned(layout.branch_slots + branches * layout.branch_width);
    layout.group_indptr = aligned(layout.branch_len + branches);
    layout.trunk_position = aligned(layout.group_indptr + groups + 1);
    layout.tokens = total_slots;
    layout.query_indptr = aligned(layout.trunk_position + groups);
    layout.write_slots = aligned(layout.query_indptr + branches + 1);
    layout.positions = aligned(layout.write_slots + total_slots);
    layout.ids = layout.size = aligned(layout.positions + total_slots);
    return layout;
}

void SegmentTree::plan(const Layout& layout, const int64_t* leaves, const int64_t* rows, const int64_t* new_slots,
                       Node* branch_nodes, int32_t* packed) {
    std::fill_n(packed, layout.size, 0);
    int32_t* trunk_slots = packed;
    int32_t* branch_slots = packed + layout.branch_slots;
    int32_t* write_slots = packed + layout.write_slots;
    int32_t* positions = packed + layout.positions;
    int64_t b = 0;
    for (int64_t g = 0; g < layout.groups; ++g, trunk_slots += layout.trunk_width) {
        const Index leaf = leaves[g] == kNoNode ? kNone : index(leaves[g]);
        const int64_t trunk_len = leaf == kNone ? 0 : entries_[leaf].end();
        write_path(leaf, trunk_slots + trunk_len);
        packed[layout.trunk_len + g] = static_cast<int32_t>(trunk_len);
        const auto position = static_cast<int32_t>(leaf == kNone ? 0 : trunk_len + entries_[leaf].offset);
        packed[layout.trunk_position + g] = position;
        for (const int64_t last = b + rows[g]; b < last; ++b, branch_slots += layout.branch_width) {
            const Index branch = new_entry(leaf, trunk_len);
            write_slots = std::copy_n(append(entries_[branch], new_slots[b]), new_slots[b], write_slots);
            std::copy_n(write_slots - new_slots[b], new_slots[b], branch_slots);
            std::iota(positions, positions + new_slots[b], position);
            positions += new_slots[b];
            packed[layout.branch_len + b] = static_cast<int32_t>(new_slots[b]);
            packed[layout.query_indptr + b + 1] = static_cast<int32_t>(write_slots - packed - layout.write_slots);
            branch_nodes[b] = name(branch);
        }
        packed[layout.group_indptr + g + 1] = static_cast<int32_t>(b);
    }
}

}  // namespace stars_fast
