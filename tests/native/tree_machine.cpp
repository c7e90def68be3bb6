// The tree of slots against a model of it that has no free lists and no names to reuse: random calls, right and wrong
// ones, compared after each. Usage: tree_machine [steps [seed]]
#include <algorithm>
#include <iterator>
#include <random>
#include <unordered_map>
#include <vector>

#include "expect.h"
#include "segment_tree.h"

using stars_fast::SegmentTree;
using Node = SegmentTree::Node;

namespace {

constexpr int64_t kHuge[] = {-1, -7, INT64_MIN, int64_t{1} << 31, int64_t{1} << 40, INT64_MAX, INT64_MAX - 1};

struct Shadow {
    Shadow* parent = nullptr;
    std::vector<int32_t> own;
    int handles = 1, children = 0;
    int64_t offset = 0;

    std::vector<int32_t> path() const {
        std::vector<int32_t> all = parent == nullptr ? std::vector<int32_t>{} : parent->path();
        all.insert(all.end(), own.begin(), own.end());
        return all;
    }
    int64_t start() const { return parent == nullptr ? 0 : parent->length(); }
    int64_t length() const { return start() + static_cast<int64_t>(own.size()); }
};

class Machine {
public:
    Machine(int64_t capacity, uint64_t seed) : tree_(capacity), random_(seed), owned_(capacity) {}

    void step() {
        switch (below(17)) {
            case 0: case 1: fork(); break;
            case 2: case 3: case 4: extend(); break;
            case 5: case 6: cut(); break;
            case 7: retain(); break;
            case 8: case 9: case 10: release(); break;
            case 11: release_all(); break;
            case 12: case 13: plan(); break;
            case 14: hostile_name(); break;
            case 15: shift(); break;
            default: hostile_plan();
        }
        if (held_.size() > 24) release();
        EXPECT(tree_.nodes() == nodes_ && tree_.live_slots() == live_);
        EXPECT(tree_.free_slots() + live_ == tree_.capacity() - 1);
        if (!held_.empty()) compare(any());
    }

    void finish() {
        while (!held_.empty()) release();
        EXPECT(tree_.nodes() == 0 && tree_.live_slots() == 0);
    }

private:
    int64_t below(int64_t count) { return static_cast<int64_t>(random_() % static_cast<uint64_t>(count)); }
    Node any() { return names_[below(static_cast<int64_t>(names_.size()))]; }

    void compare(Node name) {
        const std::vector<int32_t> path = held_.at(name)->path();
        EXPECT(tree_.length(name) == static_cast<int64_t>(path.size()));
        std::vector<int32_t> got(path.size());
        tree_.copy_path(name, got.data() + got.size());
        EXPECT(got == path);
    }

    void hold(Node name, Shadow* shadow) {
        EXPECT(held_.emplace(name, shadow).second);
        names_.push_back(name);
    }

    void hold_new(Node name, Shadow* shadow) {  // a name is never given to a second node
        const Node* const end = std::begin(gone_) + std::min(gone_count_, kRemembered);
        EXPECT(std::find(std::cbegin(gone_), end, name) == end);
        hold(name, shadow);
    }

    Shadow* made(Shadow* parent) {
        Shadow* const shadow = new Shadow;
        shadow->parent = parent;
        if (parent != nullptr) {
            ++parent->children;
            shadow->offset = parent->offset;
        }
        ++nodes_;
        return shadow;
    }

    void take(Shadow* shadow, const int32_t* slots, int64_t count) {
        for (int64_t i = 0; i < count; ++i) {
            EXPECT(slots[i] > 0 && slots[i] < tree_.capacity() && !owned_[slots[i]]);
            owned_[slots[i]] = true;
            shadow->own.push_back(slots[i]);
        }
        live_ += count;
    }

    void drop(Node name) {  // one holder less
        Shadow* shadow = held_.at(name);
        if (--shadow->handles == 0) {
            held_.erase(name);
            names_.erase(std::find(names_.begin(), names_.end(), name));
            gone_[gone_count_++ % kRemembered] = name;
        }
        while (shadow != nullptr && shadow->handles == 0 && shadow->children == 0) {
            Shadow* const parent = shadow->parent;
            for (const int32_t slot : shadow->own) owned_[slot] = false;
            live_ -= static_cast<int64_t>(shadow->own.size());
            if (parent != nullptr) --parent->children;
            delete shadow;
            --nodes_;
            shadow = parent;
        }
    }

    void fork() {
        const bool root = held_.empty() || below(4) == 0;
        const Node parent = root ? SegmentTree::kNoNode : any();
        const Node name = tree_.fork(parent);
        hold_new(name, made(root ? nullptr : held_.at(parent)));
    }

    void extend() {
        if (held_.empty()) return;
        const Node name = any();
        Shadow* const shadow = held_.at(name);
        const int64_t count = below(8) == 0 ? kHuge[below(7)] : below(9);
        const bool right = count >= 0 && count <= tree_.free_slots() && shadow->handles == 1 && shadow->children == 0;
        const int32_t* slots = nullptr;
        EXPECT(refuses([&] { slots = tree_.extend(name, count); }) == !right);
        if (right) take(shadow, slots, count);
    }

    void cut() {
        if (held_.empty()) return;
        const Node name = any();
        Shadow* at = held_.at(name);
        const int64_t full = at->length(), length = below(8) == 0 ? kHuge[below(7)] : below(full + 2);
        Node got = -1;
        EXPECT(refuses([&] { got = tree_.cut(name, length); }) == (length < 0 || length > full));
        if (length < 0 || length > full) return;
        while (at != nullptr && at->length() != length && at->start() >= length) at = at->parent;
        if (at != nullptr && at->length() == length) {  // a node ends there
            ++at->handles;
            const auto known = held_.find(got);
            if (known == held_.end()) {
                EXPECT(at->handles == 1);
                hold(got, at);
            } else {
                EXPECT(known->second == at);
            }
        } else if (at == nullptr) {
            hold_new(got, made(nullptr));
        } else {
            Shadow* const upper = made(at->parent);
            upper->offset = at->offset;
            const int64_t kept = length - at->start();
            upper->own.assign(at->own.begin(), at->own.begin() + kept);
            at->own.erase(at->own.begin(), at->own.begin() + kept);
            if (at->parent != nullptr) --at->parent->children;
            at->parent = upper;
            upper->children = 1;
            hold_new(got, upper);
        }
    }

    void shift() {
        if (held_.empty()) return;
        const Node name = any();
        Shadow* const shadow = held_.at(name);
        const int64_t offset = below(8) == 0 ? kHuge[below(7)] : below(50) - 25;
        const int64_t most = INT32_MAX - tree_.capacity();
        const bool right = shadow->children == 0 && offset >= -shadow->length() && offset <= most;
        EXPECT(refuses([&] { tree_.shift(name, offset); }) == !right);
        if (right) shadow->offset = offset;
    }

    void retain() {
        if (held_.empty()) return;
        const Node name = any();
        tree_.retain(name);
        ++held_.at(name)->handles;
    }

    void release() {
        if (held_.empty()) return;
        const Node name = any();
        tree_.release(name);
        drop(name);
    }

    void release_all() {
        std::vector<Node> nodes;
        for (int64_t i = below(4); i > 0 && !held_.empty(); --i) nodes.push_back(any());
        std::unordered_map<Node, int> left;
        size_t right = 0;  // how many come before one that is not held any more
        while (right < nodes.size() && left[nodes[right]]++ < held_.at(nodes[right])->handles) ++right;
        EXPECT(refuses([&] { tree_.release_all(nodes); }) == (right < nodes.size()));
        for (size_t i = 0; i < right; ++i) drop(nodes[i]);
    }

    struct Heartbeat {
        std::vector<Node> leaves;
        std::vector<int64_t> rows, slots;
        bool right = true;
    };

    Heartbeat heartbeat() {
        Heartbeat beat;
        int64_t wanted = 0;
        for (int64_t g = below(4); g > 0; --g) {
            beat.leaves.push_back(held_.empty() || below(5) == 0 ? SegmentTree::kNoNode : any());
            beat.rows.push_back(below(4));
            for (int64_t r = beat.rows.back(); r > 0; --r) {
                beat.slots.push_back(below(5));
                wanted += beat.slots.back();
            }
        }
        beat.right = wanted <= tree_.free_slots();
        return beat;
    }

    bool refused(Heartbeat& beat, SegmentTree::Layout& layout) {
        const auto groups = static_cast<int64_t>(beat.leaves.size()), rows = static_cast<int64_t>(beat.slots.size());
        return refuses([&] {
            layout = tree_.layout(beat.leaves.data(), beat.rows.data(), groups, beat.slots.data(), rows);
        });
    }

    void plan() {
        Heartbeat beat = heartbeat();
        SegmentTree::Layout layout{};
        EXPECT(refused(beat, layout) == !beat.right);
        if (!beat.right) return;
        std::vector<Node> nodes(beat.slots.size());
        std::vector<int32_t> packed(layout.size, -1);
        tree_.plan(layout, beat.leaves.data(), beat.rows.data(), beat.slots.data(), nodes.data(), packed.data());
        size_t b = 0;
        EXPECT(packed[layout.group_indptr] == 0);
        for (size_t g = 0; g < beat.leaves.size(); ++g) {
            Shadow* const leaf = beat.leaves[g] == SegmentTree::kNoNode ? nullptr : held_.at(beat.leaves[g]);
            const std::vector<int32_t> trunk = leaf == nullptr ? std::vector<int32_t>{} : leaf->path();
            expect_line(packed.data() + g * layout.trunk_width, trunk, layout.trunk_width);
            EXPECT(packed[layout.trunk_len + g] == static_cast<int64_t>(trunk.size()));
            const int64_t offset = leaf == nullptr ? 0 : leaf->offset;
            EXPECT(packed[layout.trunk_position + g] == static_cast<int64_t>(trunk.size()) + offset);
            for (const size_t last = b + beat.rows[g]; b < last; ++b) {
                Shadow* const branch = made(leaf);
                const int32_t* const slots = packed.data() + layout.branch_slots + b * layout.branch_width;
                take(branch, slots, beat.slots[b]);
                expect_line(slots, branch->own, layout.branch_width);
                EXPECT(packed[layout.branch_len + b] == beat.slots[b]);
                const int32_t from = packed[layout.query_indptr + b], to = packed[layout.query_indptr + b + 1];
                EXPECT(to - from == beat.slots[b]);
                EXPECT(std::equal(slots, slots + beat.slots[b], packed.data() + layout.write_slots + from));
                for (int32_t t = from; t < to; ++t) {
                    EXPECT(packed[layout.positions + t] == packed[layout.trunk_position + g] + t - from);
                }
                hold_new(nodes[b], branch);
            }
            EXPECT(packed[layout.group_indptr + g + 1] == static_cast<int64_t>(b));
        }
        for (const Node name : nodes) {
            if (below(3) == 0) continue;
            tree_.release(name);
            drop(name);
        }
    }

    static void expect_line(const int32_t* line, const std::vector<int32_t>& slots, int64_t width) {
        EXPECT(std::equal(slots.begin(), slots.end(), line));
        EXPECT(std::all_of(line + slots.size(), line + width, [](int32_t slot) { return slot == 0; }));
    }

    void hostile_name() {
        const Node wrong = gone_count_ > 0 && below(2) == 0
                               ? gone_[below(static_cast<int64_t>(std::min(gone_count_, kRemembered)))]
                               : static_cast<Node>(random_() >> below(64));
        if (held_.count(wrong) != 0) return;
        EXPECT(refuses([&] { tree_.extend(wrong, 1); }) && refuses([&] { tree_.cut(wrong, 0); }));
        EXPECT(refuses([&] { tree_.shift(wrong, 0); }));
        EXPECT(refuses([&] { tree_.retain(wrong); }) && refuses([&] { tree_.release(wrong); }));
        EXPECT(refuses([&] { tree_.length(wrong); }) && refuses([&] { tree_.copy_path(wrong, nullptr); }));
        if (wrong != SegmentTree::kNoNode) EXPECT(refuses([&] { tree_.fork(wrong); }));
    }

    void hostile_plan() {
        Heartbeat beat = heartbeat();
        const int64_t wrong = kHuge[below(7)];
        if (beat.slots.empty()) return;
        auto& into = below(2) == 0 ? beat.rows : beat.slots;
        into[below(static_cast<int64_t>(into.size()))] = wrong;
        SegmentTree::Layout layout{};
        EXPECT(refused(beat, layout));
    }

    static constexpr size_t kRemembered = 256;

    SegmentTree tree_;
    std::mt19937_64 random_;
    std::vector<bool> owned_;
    std::unordered_map<Node, Shadow*> held_;
    std::vector<Node> names_;
    Node gone_[kRemembered] = {};
    size_t gone_count_ = 0;
    int64_t nodes_ = 0, live_ = 0;
};

}  // namespace

int main(int count, char** arguments) {
    const int64_t steps = count > 1 ? std::atoll(arguments[1]) : 1'000'000;
    const uint64_t seed = count > 2 ? std::strtoull(arguments[2], nullptr, 10) : 1;
    constexpr int64_t kCapacities[] = {1, 9, 40, 200};
    constexpr int64_t kLife = 20'000;  // steps of one tree
    for (int64_t done = 0, trees = 0; done < steps; ++trees) {
        Machine machine(kCapacities[trees % 4], seed + static_cast<uint64_t>(trees));
        for (int64_t last = std::min(steps, done + kLife); done < last; ++done) machine.step();
        machine.finish();
    }
    std::printf("%lld steps as the model\n", static_cast<long long>(steps));
}
