// The tree of slots: who holds the keys and values of which tokens. No tensors here, only integers.
#pragma once

#include <cstdint>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

namespace stars_fast {

class SlotsExhausted : public std::runtime_error {
   public:
    SlotsExhausted(int64_t requested, int64_t free, int64_t capacity);
};

// A node is a run of slots with a parent; its path is the slots from the root down to its own last one.
// A node lives while somebody holds it (handles) or a child needs it (children), and only holders may name it.
class SegmentTree {
   public:
    using Node = int64_t;
    static constexpr Node kNoNode = -1;

    explicit SegmentTree(int64_t capacity);

    // Zeros, so that memory in which no tree was made says so: its capacity is 0, that of a tree at least 1.
    static void* operator new(size_t size) {
        void* const memory = ::operator new(size);
        std::memset(memory, 0, size);
        return memory;
    }
    static void* operator new(size_t, void* place) noexcept { return place; }
    static void operator delete(void* memory) { ::operator delete(memory); }

    Node fork(Node parent);
    const int32_t* extend(Node node, int64_t count);  // the new slots, valid until the next call
    Node cut(Node node, int64_t length);
    void retain(Node node) { ++held(node).handles; }
    void release(Node node);
    void release_all(const std::vector<Node>& nodes);

    // The position of a token is its place in the path plus the offset of its node: pictures take other numbers of slots
    // and of positions. Children have their parent's.
    void shift(Node node, int64_t offset);

    int64_t length(Node node) const { return held(node).end(); }
    void copy_path(Node node, int32_t* end) const;  // writes the path into the length(node) places before `end`

    int64_t capacity() const { return capacity_; }
    int64_t free_slots() const { return static_cast<int64_t>(free_slots_.size()); }
    int64_t live_slots() const { return capacity_ - 1 - free_slots(); }
    int64_t nodes() const { return static_cast<int64_t>(entries_.size() - free_entries_.size()); }

    // One heartbeat: rows[g] children under leaves[g], child b new_slots[b] long. Sections of the packed array, in
    // order, each starting at a multiple of kAlign: trunk_slots [G, P], trunk_len [G], branch_slots [B, S],
    // branch_len [B], group_indptr [G + 1], trunk_position [G]; and of all T new tokens in one row: query_indptr
    // [B + 1], write_slots [T], positions [T], and ids [T] where those are given.
    struct Layout {
        int64_t groups, branches, tokens, trunk_width, branch_width;
        int64_t trunk_len, branch_slots, branch_len, group_indptr, trunk_position;  // trunk_slots begins at 0
        int64_t query_indptr, write_slots, positions, ids, size;
    };
    static constexpr int64_t kAlign = 4;  // 16 bytes: Triton compiles another variant for a less aligned pointer

    Layout layout(const int64_t* leaves, const int64_t* rows, int64_t groups, const int64_t* new_slots,
                  int64_t branches) const;  // without ids
    void plan(const Layout& layout, const int64_t* leaves, const int64_t* rows, const int64_t* new_slots,
              Node* branch_nodes, int32_t* packed);  // which writes no ids

   private:
    using Index = int32_t;
    static constexpr Index kNone = -1;
    // A node's name is its entry's index below its entry's generation, which grows whenever the entry is freed: a name
    // is never given to a second node. 24 bits let 16 million nodes live at once; the other 39 last 17 years of one
    // reuse a millisecond.
    static constexpr int kIndexBits = 24;

    struct Entry {
        std::vector<int32_t> slots;
        int64_t start = 0;  // length of the path above this node's own run
        int64_t offset = 0;
        int64_t generation = 0;
        int64_t handles = 0;  // references of callers
        Index parent = kNone;
        int32_t children = 0;

        int64_t end() const { return start + static_cast<int64_t>(slots.size()); }
    };

    const Entry& held(Node node) const;
    Entry& held(Node node) { return const_cast<Entry&>(static_cast<const SegmentTree*>(this)->held(node)); }
    static Index index(Node node) { return static_cast<Index>(node & ((Node{1} << kIndexBits) - 1)); }
    Node name(Index index) const { return (entries_[index].generation << kIndexBits) | index; }

    Index new_entry(Index parent, int64_t start);
    void free_entry(Index index);
    void free_unused(Index index);
    Index split(Index lower, int64_t length);
    const int32_t* append(Entry& entry, int64_t count);
    void require_slots(int64_t count) const;
    void require_entries(int64_t count) const;
    void write_path(Index index, int32_t* end) const;

    int64_t capacity_;
    std::vector<Entry> entries_;
    std::vector<Index> free_entries_;
    std::vector<int32_t> free_slots_;  // a stack whose top holds the lowest slots of the run freed last
};

}  // namespace stars_fast
