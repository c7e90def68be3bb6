"""Pools of all models on a device fill the share of its memory that they may take, and no more."""

from types import SimpleNamespace

import pytest
import torch
from conftest import sum_reward, tiny_policy

from stars_fast import StarsEngine
from stars_fast.policy.policy import Policy
from stars_fast.policy.reader import Reader
from stars_fast.tree import memory
from stars_fast.tree.passes import Pass, PassShape

GIB = 1 << 30


def test_pools_of_both_models_and_everything_else_fill_the_share_and_no_more():
    """Llama-2-7B with a reward model of its size, bfloat16, on 139 GiB."""
    total, weights, rows = 139 * GIB, 2 * 13 * GIB, 256
    token = 32 * 32 * (128 + 128) * 2
    workspace = memory.workspace_bytes(rows, 32000, 4096, 11008, 2) + memory.workspace_bytes(rows, 0, 4096, 11008, 2)
    for utilization in (0.3, 0.9, 1.0):
        tokens = memory.pool_tokens(total, weights, workspace, [token, token], utilization)
        used = weights + workspace + 2 * tokens * token
        assert used <= utilization * total < used + 2 * token
    assert 90_000 < memory.pool_tokens(total, weights, workspace, [token, token], 0.9) < 110_000


def test_a_device_that_is_full_already_has_room_for_no_tokens():
    assert memory.pool_tokens(100, 95, 0, [1], 0.9) == 0


def test_logits_and_activations_are_set_aside():
    assert memory.workspace_bytes(8, 1000, 0, 0, 2) == 8 * 1000 * 4 * 2
    assert memory.workspace_bytes(0, 1000, 64, 256, 2) == 16384 * (8 * 64 + 4 * 256) * 2
    assert memory.workspace_bytes(8, 1000, 64, 256, 2, 1024) == 8 * 1000 * 4 * 2 + 1024 * (8 * 64 + 4 * 256) * 2


def test_what_graphs_keep_to_themselves_is_counted():
    policy = Policy(tiny_policy(64, hidden=32))
    launched = memory._workspace(policy, 8, 100_000)
    policy.graphs.enabled = True
    config = policy.model.config
    captured = memory.workspace_bytes(8, 64, 32, config.intermediate_size, 4, 1024)
    shapes = list(PassShape.usual(256, True, 8))
    outputs = sum(shape.rows for shape in shapes) * 64 * 4  # logits, in float32
    tables = sum(shape.groups for shape in shapes) + 3 * 16  # a trunk's slots each, in int32
    assert memory._workspace(policy, 8, 100_000) == launched + captured + outputs + tables * 2**17 * 4
    assert memory._workspace(policy, 8, 1) == launched + captured + outputs + tables * 256 * 4


def test_tables_of_captured_passes_are_counted_as_they_are_made():
    model, room = Policy(tiny_policy(64, hidden=32)), 2048
    model.graphs.enabled = True
    model._make_room(room)
    made = [Pass(model, shape).plan for shape in PassShape.usual(room, True, 16)]
    made += [Reader(model, 16, groups, 2, room, 8).plan for groups in (1, 4, 16)]  # as requests end
    held = sum(plan.trunk_slots.nbytes for plan in made)
    counted = memory._workspace(model, 16, 1)
    assert counted == memory._workspace(model, 16, room)  # tables are never made narrower again
    model.trunk_room = 0
    tables = (counted - memory._workspace(model, 16, 1)) * room // (room - 256)
    assert held <= tables <= 1.1 * held


class FakeModel:
    """What the arithmetic asks of a tree model."""

    def __init__(self, device, bytes_per_token, slots=1):
        self.device, self.bytes_per_token, self.vocab_size = torch.device(device), bytes_per_token, 1000
        self.pool, self.dtype = SimpleNamespace(slots=slots), torch.bfloat16
        self.model = self.body = None
        self.trunk_room = 0
        self.graphs = SimpleNamespace(enabled=True)
        self.text_config = SimpleNamespace(hidden_size=64, intermediate_size=256)


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of 1 GiB with 200 MB of weights, on which the models' own pools are the only other thing."""
    models = []

    def free(device):
        return GIB - 200_000_000 - sum(m.pool.slots * m.bytes_per_token for m in models if m.device == device)

    monkeypatch.setattr(memory, "free_bytes", free)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free(device), GIB))
    return models


def test_both_models_get_equally_many_tokens_however_often_a_device_is_divided(gpu):
    gpu += [FakeModel("cuda:0", 3000), FakeModel("cuda:0", 1000)]
    sizes = []
    for _ in range(3):
        memory.divide_devices(gpu, 8, 0.9)
        for model in gpu:
            model.pool.slots = memory.default_tokens(model, rows=10**6, tokens_per_row=100) + 1
            sizes.append(model.pool.slots)
            assert memory._bounds[model] + 1 == model.pool.slots  # not kept only because it is there
    assert len(set(sizes)) == 1
    used = 200_000_000 + sizes[0] * 4000 + sum(memory._workspace(model, 8, 1) for model in gpu)
    assert 0.89 * GIB < used < 0.9 * GIB + 4000


def test_a_call_that_wants_less_takes_less_and_one_row_is_always_tried(gpu, small_pools):
    gpu.append(FakeModel("cuda:0", 1000))
    memory.divide_devices(gpu, 8, 0.9)
    assert memory.default_tokens(gpu[0], rows=2, tokens_per_row=100) == 200
    memory.divide_devices(gpu, 8, 0.1)
    assert memory.default_tokens(gpu[0], rows=20, tokens_per_row=100) == 100


def test_there_is_room_for_who_comes_later_where_memory_has_it(gpu):
    gpu.append(FakeModel("cuda:0", 1000))
    memory.divide_devices(gpu, 8, 0.9)
    assert memory.default_tokens(gpu[0], rows=2, tokens_per_row=100) == 4096


def test_devices_are_divided_one_by_one(gpu):
    gpu += [FakeModel("cuda:0", 1000), FakeModel("cuda:1", 1000)]
    memory.divide_devices(gpu, 8, 0.9)
    alone = memory.default_tokens(gpu[0], 10**6, 1)
    memory.divide_devices([gpu[0], FakeModel("cuda:0", 1000)], 8, 0.9)
    assert memory.default_tokens(gpu[1], 10**6, 1) == alone > 1.9 * memory.default_tokens(gpu[0], 10**6, 1)


def test_all_models_on_a_cpu_share_what_one_would_get(monkeypatch):
    models = [FakeModel("cpu", size) for size in (3000, 1000, 1000)]
    monkeypatch.setattr(
        memory, "free_bytes", lambda device: GIB - sum(m.pool.slots * m.bytes_per_token for m in models)
    )
    sizes = []
    for _ in range(2):
        memory.divide_devices(models, 8, 0.9)
        for model in models:
            model.pool.slots = memory.default_tokens(model, rows=10**6, tokens_per_row=100) + 1
        sizes.append([model.pool.slots for model in models])
    assert sizes[0] == sizes[1] == [sizes[0][0]] * 3
    assert 0.39 * GIB < sum(m.pool.slots * m.bytes_per_token for m in models) < 0.4 * GIB + 5000


# What a machine has


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine with these files under its root."""
    monkeypatch.setattr(memory, "_ROOT", tmp_path)

    def put(**files):
        for path, text in files.items():
            path = tmp_path / path.replace("__", "/").replace("memory_", "memory.")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return memory.free_bytes(torch.device("cpu"))

    return put


LINUX = {"proc__meminfo": "MemTotal:  33554432 kB\nMemAvailable:  16777216 kB\nHugePages_Total: 0\n"}


def test_linux_says_what_is_available(machine):
    assert machine(**LINUX) == 16 * GIB


def test_a_container_leaves_its_limit_and_files_that_may_be_dropped_count_as_free(machine):
    group = "sys__fs__cgroup__"
    own = LINUX | {"proc__self__cgroup": "0::/\n", f"{group}memory_max": "max\n", f"{group}memory_current": str(GIB)}
    assert machine(**own) == 16 * GIB
    own |= {f"{group}memory_max": str(4 * GIB), f"{group}memory_stat": f"anon 5\ninactive_file {GIB // 2}\n"}
    assert machine(**own) == 3.5 * GIB
    assert machine(**own | {f"{group}memory_current": str(5 * GIB)}) == 0


def test_the_least_of_nested_groups_is_what_counts(machine):
    outer, inner = "sys__fs__cgroup__a.slice__", "sys__fs__cgroup__a.slice__b.scope__"
    files = {f"{outer}memory_max": 2 * GIB, f"{outer}memory_current": GIB, f"{inner}memory_max": 3 * GIB}
    files |= {f"{inner}memory_current": GIB, "proc__self__cgroup": "0::/a.slice/b.scope\n"}
    assert machine(**LINUX, **{path: str(text) for path, text in files.items()}) == GIB


@pytest.mark.parametrize("seen_as", ["", "docker__f00__"], ids=["as the top", "by its path"])
def test_groups_of_the_first_version_count_too(machine, seen_as):
    group = f"sys__fs__cgroup__memory__{seen_as}"
    files = {f"{group}memory_limit_in_bytes": str(3 * GIB), f"{group}memory_usage_in_bytes": str(GIB)}
    assert machine(**LINUX, **files, proc__self__cgroup="5:cpu,memory:/docker/f00\n0::/\n") == 2 * GIB


def test_macos_shares_its_physical_memory_and_an_unknown_machine_has_a_little(machine, monkeypatch):
    sizes = {"SC_PHYS_PAGES": 1 << 21, "SC_PAGE_SIZE": 1 << 14}

    def sysconf(name):
        if name not in sizes:
            raise ValueError("unrecognized configuration name")
        return sizes[name]

    monkeypatch.setattr("os.sysconf", sysconf)
    assert machine() == 16 * GIB
    sizes.clear()
    assert machine() == 4 * GIB
    monkeypatch.delattr("os.sysconf")
    assert machine() == 4 * GIB


@pytest.mark.parametrize("share", [0, -0.5, 1.01, float("nan")])
def test_a_share_of_memory_lies_between_nothing_and_everything(policy32, share):
    with pytest.raises(ValueError, match=r"gpu_memory_utilization=.*\(0, 1\]"):
        StarsEngine(policy32, sum_reward, gpu_memory_utilization=share)


@pytest.mark.parametrize("share", [True, "most"])
def test_a_share_of_memory_is_a_number(policy32, share):
    with pytest.raises(TypeError, match=f"gpu_memory_utilization={share!r} must be a number"):
        StarsEngine(policy32, sum_reward, gpu_memory_utilization=share)
