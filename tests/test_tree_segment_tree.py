"""The tree of slots: no leaks, no slot in two places, and nobody's path changed by anybody else."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from stars_fast.tree.segment_tree import SegmentTree, SlotsExhausted, TreePlan, plan


class ModelNode:
    """What a node is, without counts of references: it lives while a held node reaches it."""

    def __init__(self, parent: ModelNode | None, slots: Iterable[int] = ()) -> None:
        self.parent = parent
        self.slots = list(slots)
        self.holders = 0
        self.offset = 0 if parent is None else parent.offset

    def ancestry(self) -> list[ModelNode]:
        """Root first, this node last."""
        return [*(self.parent.ancestry() if self.parent else []), self]

    def path(self) -> list[int]:
        return [slot for node in self.ancestry() for slot in node.slots]

    def cut(self, length: int) -> ModelNode:
        """The deepest node whose path is the first ``length`` slots, or a new one: a root, or the top of a split."""
        ancestry = self.ancestry()
        ends = list(itertools.accumulate(len(node.slots) for node in ancestry))
        for node, end in zip(reversed(ancestry), reversed(ends), strict=True):
            if end == length:
                return node
        if length == 0:
            return ModelNode(None)
        node, end = next((node, end) for node, end in zip(ancestry, ends, strict=True) if end > length)
        upper = ModelNode(node.parent, node.slots[: length - end])
        upper.offset = node.offset
        node.parent, node.slots = upper, node.slots[length - end :]
        return upper


class TreeMachine(RuleBasedStateMachine):
    """Everything an engine does to a tree, in any order, compared with the model."""

    @initialize(capacity=st.integers(1, 60))
    def start(self, capacity: int) -> None:
        self.tree = SegmentTree(capacity)
        self.nodes: dict[int, ModelNode] = {}  # by name, the dead ones included

    def held(self) -> list[int]:
        return [name for name, node in self.nodes.items() if node.holders]

    def live(self) -> set[ModelNode]:
        return {node for name in self.held() for node in self.nodes[name].ancestry()}

    def live_slots(self) -> list[int]:
        return [slot for node in self.live() for slot in node.slots]

    def free(self) -> int:
        return self.tree.capacity - 1 - len(self.live_slots())

    def draw_held(self, data: st.DataObject) -> int:
        return data.draw(st.sampled_from(self.held()))

    def hold(self, name: int, node: ModelNode) -> int:
        """``name`` must be that of ``node``: its only one, and nobody else's."""
        assert self.nodes.setdefault(name, node) is node, "a name was given to another node"
        assert sum(named is node for named in self.nodes.values()) == 1, "a node was given a second name"
        node.holders += 1
        return name

    def take(self, slots: list[int]) -> list[int]:
        """Slots handed out must be real ones, and nobody else's."""
        assert len(set(slots)) == len(slots)
        assert all(0 < slot < self.tree.capacity for slot in slots)
        assert not set(slots) & set(self.live_slots())
        return slots

    def drop(self, name: int) -> None:
        self.tree.release(name)
        self.nodes[name].holders -= 1

    def branch_off(self, leaves: list[int], rows: list[int], new_slots: list[int]) -> TreePlan:
        """One heartbeat's plan, whose tables must be the model's."""
        ids = list(range(sum(new_slots)))
        made = plan(self.tree, leaves, rows, new_slots, "cpu", ids)
        assert made.ids.tolist() == ids
        assert made.query_indptr.tolist() == [0, *itertools.accumulate(new_slots)]
        for g, leaf in enumerate(leaves):
            path = self.nodes[leaf].path() if leaf != -1 else []
            assert made.trunk_slots[g].tolist() == path + [0] * (made.trunk_slots.shape[1] - len(path))
            assert made.trunk_len[g] == len(path)
            assert made.trunk_position[g] == len(path) + (self.nodes[leaf].offset if leaf != -1 else 0)
        assert made.branch_len.tolist() == new_slots
        assert made.group_indptr.tolist() == [0, *itertools.accumulate(rows)]
        parents = [leaf for leaf, count in zip(leaves, rows, strict=True) for _ in range(count)]
        for b, (name, leaf) in enumerate(zip(made.branches, parents, strict=True)):
            slots, padding = made.branch_slots[b, : new_slots[b]], made.branch_slots[b, new_slots[b] :]
            packed = slice(*made.query_indptr[b : b + 2])
            assert made.write_slots[packed].tolist() == slots.tolist()
            start = len(self.nodes[leaf].path()) + self.nodes[leaf].offset if leaf != -1 else 0
            assert made.positions[packed].tolist() == list(range(start, start + new_slots[b]))
            self.hold(name, ModelNode(self.nodes.get(leaf), self.take(slots.tolist())))
            assert not padding.any()
        return made

    @rule(data=st.data(), root=st.booleans())
    def fork(self, data: st.DataObject, root: bool) -> None:
        if root or not self.held():
            self.hold(self.tree.fork(), ModelNode(None))
        else:
            parent = self.draw_held(data)
            self.hold(self.tree.fork(parent), ModelNode(self.nodes[parent]))

    @precondition(lambda self: self.held())
    @rule(data=st.data(), count=st.integers(0, 12))
    def extend(self, data: st.DataObject, count: int) -> None:
        name = self.draw_held(data)
        node = self.nodes[name]
        if node.holders > 1 or any(live.parent is node for live in self.live()):
            with pytest.raises(ValueError, match=f"node {name} cannot grow"):
                self.tree.extend(name, count)
        elif count > self.free():
            with pytest.raises(SlotsExhausted, match=f"{count} slots requested, {self.free()} free"):
                self.tree.extend(name, count)
        else:
            node.slots += self.take(self.tree.extend(name, count).tolist())

    @precondition(lambda self: self.held())
    @rule(data=st.data())
    def cut(self, data: st.DataObject) -> None:
        name = self.draw_held(data)
        length = data.draw(st.integers(0, len(self.nodes[name].path())))
        self.hold(self.tree.cut(name, length), self.nodes[name].cut(length))

    @precondition(lambda self: self.held())
    @rule(data=st.data(), offset=st.integers(-20, 20))
    def shift(self, data: st.DataObject, offset: int) -> None:
        name = self.draw_held(data)
        node = self.nodes[name]
        if any(live.parent is node for live in self.live()):
            with pytest.raises(ValueError, match=f"cannot shift node {name}: it has"):
                self.tree.shift(name, offset)
        elif offset < -len(node.path()):
            with pytest.raises(ValueError, match=f"cannot shift node {name} by {offset}: must be from"):
                self.tree.shift(name, offset)
        else:
            self.tree.shift(name, offset)
            node.offset = offset

    @precondition(lambda self: self.held())
    @rule(data=st.data())
    def retain(self, data: st.DataObject) -> None:
        name = self.draw_held(data)
        self.tree.retain(name)
        self.nodes[name].holders += 1

    @precondition(lambda self: self.held())
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.drop(self.draw_held(data))

    @rule(data=st.data())
    def heartbeat(self, data: st.DataObject) -> None:
        """Plan for some requests; each commits one candidate, perhaps keeps another as its best, and drops the rest."""
        leaves = data.draw(st.lists(st.sampled_from([-1, *self.held()]), max_size=4, unique=True))
        rows = data.draw(st.lists(st.integers(0, 3), min_size=len(leaves), max_size=len(leaves)))
        new_slots = data.draw(st.lists(st.integers(0, 5), min_size=sum(rows), max_size=sum(rows)))
        if sum(new_slots) > self.free():
            with pytest.raises(SlotsExhausted):
                plan(self.tree, leaves, rows, new_slots, "cpu")
            return
        branches = iter(self.branch_off(leaves, rows, new_slots).branches)
        for leaf, count in zip(leaves, rows, strict=True):
            candidates = list(itertools.islice(branches, count))
            kept = data.draw(st.sets(st.sampled_from(candidates), min_size=1, max_size=2)) if candidates else set()
            for name in candidates:
                if name not in kept:
                    self.drop(name)
            if kept and leaf != -1:  # the reference moves from the leaf to the winner
                self.drop(leaf)

    @precondition(lambda self: self.held())
    @rule(data=st.data())
    def preempt(self, data: st.DataObject) -> None:
        """Keep the beginning of an answer, give the rest back."""
        leaf = self.draw_held(data)
        length = data.draw(st.integers(0, len(self.nodes[leaf].path())))
        self.hold(self.tree.cut(leaf, length), self.nodes[leaf].cut(length))
        self.drop(leaf)

    @precondition(lambda self: self.held())
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        name = self.draw_held(data)
        while self.nodes[name].holders:
            self.drop(name)

    @precondition(lambda self: len(self.nodes) > len(self.held()))
    @rule(data=st.data())
    def use_a_released_name(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from([name for name, node in self.nodes.items() if not node.holders]))
        tree = self.tree
        uses = [tree.release, tree.retain, tree.length, tree.slots, tree.fork, lambda name: tree.extend(name, 0)]
        uses += [lambda name: tree.cut(name, 0), lambda name: plan(tree, [name], [1], [0], "cpu")]
        uses += [lambda name: tree.shift(name, 0)]
        with pytest.raises(ValueError, match=f"node {name} is not held"):
            data.draw(st.sampled_from(uses))(name)

    @invariant()
    def tree_is_the_model(self) -> None:
        if not hasattr(self, "tree"):
            return
        live, slots = self.live(), self.live_slots()
        assert len(set(slots)) == len(slots), "a slot is in two nodes"
        assert self.tree.nodes == len(live)
        assert self.tree.live_slots == len(slots)
        assert self.tree.free_slots + self.tree.live_slots == self.tree.capacity - 1
        for name in self.held():
            path = self.nodes[name].path()
            assert self.tree.slots(name).tolist() == path
            assert self.tree.length(name) == len(path)

    def teardown(self) -> None:
        if not hasattr(self, "tree"):
            return
        for name in self.held():
            while self.nodes[name].holders:
                self.drop(name)
        assert self.tree.nodes == 0 and self.tree.live_slots == 0
        if self.tree.capacity > 1:  # every slot but 0 can still be had
            whole = self.tree.extend(self.tree.fork(), self.tree.capacity - 1)
            assert sorted(whole.tolist()) == list(range(1, self.tree.capacity))


TestTreeMachine = TreeMachine.TestCase
TestTreeMachine.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)


def grown(tree: SegmentTree, *lengths: int) -> list[int]:
    """A chain of nodes of these lengths, root first."""
    names = [-1]
    for length in lengths:
        names.append(tree.fork(names[-1]))
        tree.extend(names[-1], length)
    return names[1:]


def counts(tree: SegmentTree) -> tuple[int, int, int]:
    return tree.nodes, tree.live_slots, tree.free_slots


def test_exhausted_extend_leaves_the_tree_unchanged():
    tree = SegmentTree(8)
    (root,) = grown(tree, 4)
    before = counts(tree), tree.slots(root).tolist()
    with pytest.raises(SlotsExhausted, match=r"4 slots requested, 3 free, capacity 8"):
        tree.extend(root, 4)
    assert (counts(tree), tree.slots(root).tolist()) == before
    assert issubclass(SlotsExhausted, RuntimeError)
    tree.extend(root, 3)


def test_exhausted_plan_leaves_the_tree_unchanged():
    tree = SegmentTree(12)
    (root,) = grown(tree, 4)
    before = counts(tree)
    with pytest.raises(SlotsExhausted, match=r"8 slots requested, 7 free, capacity 12"):
        plan(tree, [root], [4], [2, 2, 2, 2], "cpu")
    assert counts(tree) == before
    tree.extend(root, 7)  # no child was left behind


@pytest.mark.parametrize(
    ("leaves", "rows", "new_slots", "message"),
    [
        ([0], [2], [1], r"rows sum to 2, but new_slots has 1"),
        ([0], [1, 1], [1, 1], r"leaves has 1 entries, rows has 2"),
        ([0, 7], [1, 1], [1, 1], r"node 7 is not held"),
        ([0, -2], [1, 1], [1, 1], r"node -2 is not held"),
        ([0], [-1], [], r"rows\[0\] is -1"),
        ([0], [2], [1, -3], r"new_slots\[1\] is -3"),
        (np.zeros((1, 1), np.int64), [1], [1], r"leaves has 2 dimensions"),
    ],
)
def test_refused_plan_names_the_fault_and_leaves_the_tree_unchanged(leaves, rows, new_slots, message):
    tree = SegmentTree(12)
    assert grown(tree, 4) == [0]
    before = counts(tree)
    with pytest.raises(ValueError, match=message):
        plan(tree, leaves, rows, new_slots, "cpu")
    assert counts(tree) == before


def test_plan_refuses_floats():
    tree = SegmentTree(12)
    with pytest.raises(TypeError):
        tree.plan([-1], [1], np.array([1.5]))


@pytest.mark.parametrize(
    "ids, message",
    [
        ([1, 2], "ids has 2 entries, but new_slots sums to 3"),
        ([1, -2, 3], r"ids\[1\] is -2, must be from 0 to 2\^31 - 1"),
        ([1, 2, 2**31], r"ids\[2\] is 2147483648"),
    ],
)
def test_a_plan_refuses_ids_that_do_not_fit(ids, message):
    tree = SegmentTree(12)
    with pytest.raises(ValueError, match=message):
        plan(tree, [-1], [2], [1, 2], "cpu", ids)
    assert tree.nodes == 0


def test_many_are_released_in_order_up_to_one_that_is_not_held():
    tree = SegmentTree(16)
    nodes = [tree.fork() for _ in range(4)]
    for node in nodes:
        tree.extend(node, 2)
    tree.release_all(nodes[:2])
    assert counts(tree) == (2, 4, 11)
    with pytest.raises(ValueError, match=f"node {nodes[0]} is not held"):
        tree.release_all([nodes[2], nodes[0], nodes[3]])
    assert counts(tree) == (1, 2, 13)
    tree.release_all([])


def test_double_release_is_refused():
    tree = SegmentTree(8)
    root, leaf = grown(tree, 2, 2)
    tree.release(root)
    with pytest.raises(ValueError, match=f"node {root} is not held"):
        tree.release(root)  # it lives on, but only for its child
    assert tree.length(leaf) == 4
    tree.release(leaf)
    with pytest.raises(ValueError, match=f"node {leaf} is not held"):
        tree.release(leaf)
    assert counts(tree) == (0, 0, 7)


def test_shared_nodes_do_not_grow():
    tree = SegmentTree(8)
    root, leaf = grown(tree, 1, 1)
    with pytest.raises(ValueError, match=r"1 holders and 1 children"):
        tree.extend(root, 1)
    tree.retain(leaf)
    with pytest.raises(ValueError, match=r"2 holders and 0 children"):
        tree.extend(leaf, 1)
    tree.release(leaf)
    tree.extend(leaf, 1)
    with pytest.raises(ValueError, match=r"cannot extend node .* by -1"):
        tree.extend(leaf, -1)


def test_cut_at_a_boundary_gives_the_deepest_node_that_ends_there():
    tree = SegmentTree(20)
    _, middle, empty, leaf = grown(tree, 3, 2, 0, 4)
    assert tree.cut(leaf, 5) == empty
    assert tree.cut(leaf, 9) == leaf
    assert tree.cut(middle, 5) == middle
    assert tree.nodes == 4


def test_cut_inside_a_node_keeps_every_path():
    tree = SegmentTree(20)
    root, leaf = grown(tree, 6, 4)
    sibling = tree.fork(root)
    paths = {name: tree.slots(name).tolist() for name in (root, leaf, sibling)}
    upper = tree.cut(leaf, 2)
    assert tree.slots(upper).tolist() == paths[root][:2]
    assert {name: tree.slots(name).tolist() for name in paths} == paths
    for name in paths:
        tree.release(name)
    assert counts(tree) == (1, 2, 17)


def test_cut_to_nothing_gives_an_empty_root():
    tree = SegmentTree(8)
    (root,) = grown(tree, 3)
    nothing = tree.cut(root, 0)
    assert tree.length(nothing) == 0 and tree.length(root) == 3
    tree.release(root)
    assert counts(tree) == (1, 0, 7)


@pytest.mark.parametrize("length", [-1, 4])
def test_cut_outside_the_path_is_refused(length):
    tree = SegmentTree(8)
    (root,) = grown(tree, 3)
    with pytest.raises(ValueError, match=f"to {length} tokens: it has 3"):
        tree.cut(root, length)


def test_a_long_chain_is_freed_at_once():
    tree = SegmentTree(200_001)
    *above, leaf = grown(tree, *[1] * 200_000)
    for name in above:
        tree.release(name)
    assert tree.live_slots == 200_000
    tree.release(leaf)
    assert counts(tree) == (0, 0, 200_000)


def test_slots_freed_together_come_back_in_order():
    tree = SegmentTree(40)
    first = grown(tree, 16)[0]
    slots = tree.slots(first).tolist()
    assert slots == list(range(1, 17))
    tree.release(first)
    assert tree.slots(grown(tree, 16)[0]).tolist() == slots


def test_branches_of_one_plan_go_on_from_the_positions_of_their_own_trunks():
    tree = SegmentTree(60)
    picture, text = grown(tree, 10)[0], grown(tree, 4)[0]
    tree.shift(picture, -7)
    made = plan(tree, [picture, text, -1], [2, 1, 1], [3, 3, 3, 3], "cpu")
    assert made.trunk_len.tolist() == [10, 4, 0]
    assert made.trunk_position.tolist() == [3, 4, 0]
    deeper = plan(tree, made.branches, [1] * 4, [1] * 4, "cpu")
    assert deeper.trunk_position.tolist() == [6, 6, 7, 3]
    halves = [tree.cut(picture, 8), picture, tree.cut(picture, 0)]
    assert plan(tree, halves, [1] * 3, [0] * 3, "cpu").trunk_position.tolist() == [1, 3, 0]


def test_an_offset_that_is_no_position_is_refused():
    tree = SegmentTree(12)
    (root,) = grown(tree, 4)
    for offset, message in ((-5, "by -5: must be from -4 to 2147483635"), (2**31 - 12, "by 2147483636: must be")):
        with pytest.raises(ValueError, match=message):
            tree.shift(root, offset)
    tree.shift(root, -4)
    (leaf,) = plan(tree, [root], [1], [1], "cpu").branches
    with pytest.raises(ValueError, match="it has 1 children, which have its offset"):
        tree.shift(root, 0)
    tree.release(root)
    assert plan(tree, [leaf], [1], [0], "cpu").trunk_position.tolist() == [1]


def test_plan_is_one_aligned_int32_buffer():
    tree = SegmentTree(100)
    roots = [grown(tree, length)[0] for length in (3, 5)]
    made = plan(tree, [*roots, -1], [2, 0, 1], np.array([4, 1, 7], np.int32), "cpu")
    names = ("trunk_slots", "trunk_len", "branch_slots", "branch_len", "group_indptr", "trunk_position")
    tensors = [getattr(made, name) for name in names]
    assert [tuple(tensor.shape) for tensor in tensors] == [(3, 5), (3,), (3, 7), (3,), (4,), (3,)]
    start = made.trunk_slots.data_ptr()
    offsets = [tensor.data_ptr() - start for tensor in tensors]
    assert offsets == [0, 64, 80, 176, 192, 208]  # bytes: each section begins at a multiple of 16
    assert {tensor.untyped_storage().data_ptr() for tensor in tensors} == {start}
    assert made.group_indptr.tolist() == [0, 2, 2, 3]


def test_plan_of_nothing_is_empty():
    made = plan(SegmentTree(4), [], [], [], "cpu")
    assert made.trunk_slots.shape == (0, 1) and made.branch_slots.shape == (0, 1)
    assert made.group_indptr.tolist() == [0] and made.branches == []


@pytest.mark.parametrize("capacity", [0, -5, 2**31])
def test_capacity_out_of_range_is_refused(capacity):
    with pytest.raises(ValueError, match=f"capacity is {capacity}"):
        SegmentTree(capacity)


def test_a_plan_whose_tables_cannot_be_sent_leaves_no_branches(monkeypatch):
    tree = SegmentTree(16)
    (leaf,) = plan(tree, [-1], [1], [3], "cpu").branches
    monkeypatch.setattr("stars_fast.tree.segment_tree.torch.from_numpy", lambda array: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        plan(tree, [leaf], [2], [4, 4], "cpu")
    assert (tree.nodes, tree.free_slots) == (1, 12)
