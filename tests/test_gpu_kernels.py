"""What only a GPU can show of the kernels: how they round when compiled, and that graphs can hold them."""

import pytest
import torch
import torch.nn.functional as F
from test_sample_step import arguments, random_logits
from test_select_and_commit import WRITTEN, tables
from test_tree_attention import naive, tree

from stars_fast.ops import gather_logprobs, kv_append, sample_step, select_and_commit, tree_attention
from stars_fast.tree import prefill

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# A decode step and the scoring of a segment, at head sizes and sharing of real models.
TREES = {
    "decode": dict(group_rows=[8, 5, 1], trunk_lens=[700, 257, 64], branch_lens=[9] * 14, queries=[1] * 14),
    "scoring": dict(group_rows=[4, 2, 3], trunk_lens=[300, 65, 0], branch_lens=[16] * 9, queries=[16] * 9),
    "one long trunk": dict(group_rows=[8], trunk_lens=[3000], branch_lens=[5] * 8, queries=[1] * 8),
}
HEADS = {
    "64, 4 queries a key": dict(heads=8, kv_heads=2, d=64, dv=64),
    "128, 7 queries a key": dict(heads=14, kv_heads=2, d=128, dv=128),
    "128, 1 query a key": dict(heads=2, kv_heads=2, d=128, dv=128),
    "80": dict(heads=4, kv_heads=1, d=80, dv=80),
    "192 and 128": dict(heads=4, kv_heads=4, d=192, dv=128),
    "256, 8 queries a key": dict(heads=8, kv_heads=1, d=256, dv=256),
}


def to_cuda(case):
    return {name: x.to("cuda") if torch.is_tensor(x) else x for name, x in case.items()}


def per_row_attention(case):
    """Plain torch in the dtype of the case: each row attends to a copy of its trunk and its branch."""
    out = torch.zeros_like(case["out"])
    indptr, groups = case["query_indptr"].tolist(), case["group_indptr"].tolist()
    for b in range(len(indptr) - 1):
        g = sum(start <= b for start in groups) - 1
        length, count = int(case["branch_len"][b]), indptr[b + 1] - indptr[b]
        trunk = case["trunk_slots"][g, : case["trunk_len"][g]]
        slots = torch.cat((trunk, case["branch_slots"][b, :length])).long()
        q = case["q"][indptr[b] : indptr[b + 1]].transpose(0, 1)[None]
        k, v = (pool[slots].transpose(0, 1)[None] for pool in (case["k_pool"], case["v_pool"]))
        mask = torch.ones(count, len(slots), dtype=torch.bool, device=q.device).tril(len(slots) - count)
        attended = F.scaled_dot_product_attention(q, k, v, mask, scale=case["scale"], enable_gqa=True)
        out[indptr[b] : indptr[b + 1]] = attended[0].transpose(0, 1)
    return out


def rms(x):
    return x.double().square().mean().sqrt().item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("shape", TREES)
def test_attention_errs_little_more_than_plain_torch(shape, heads, dtype):
    """Three products of tf32 have float32's accuracy to within a factor of three: measured, 2.6 at most."""
    case = tree(**TREES[shape], **HEADS[heads], dtype=dtype)
    exact = naive(case).cuda()
    case = to_cuda(case)
    tree_attention(**case)
    plain = rms(per_row_attention(case).double() - exact)
    assert plain > 0
    assert rms(case["out"].double() - exact) <= (4 if dtype == torch.float32 else 2) * plain


@pytest.mark.parametrize("option", [dict(window=100), dict(softcap=1.0), dict(sinks=torch.linspace(-2, 2, 8))], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_takes_windows_soft_caps_and_sinks(option, dtype):
    for shape in TREES.values():
        case = tree(**shape, heads=8, kv_heads=2, d=128, dv=128, dtype=dtype)
        exact = naive(case, **option)
        case = to_cuda(case)
        tree_attention(**case, **to_cuda(option))
        tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
        torch.testing.assert_close(case["out"].double().cpu(), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("window", [0, 100])
def test_libraries_attend_to_fresh_texts_as_ours_does(window, heads, dtype):
    lengths = [300, 1, 64, 257]
    case = tree(
        group_rows=[1] * 4, trunk_lens=[0] * 4, branch_lens=lengths, queries=lengths, **HEADS[heads], dtype=dtype
    )
    exact = naive(case, window)[:-1]
    case = to_cuda(case)
    q = case["q"][:-1].transpose(0, 1).contiguous().transpose(0, 1)  # as layers give it
    slots = torch.cat([case["branch_slots"][i, :length] for i, length in enumerate(lengths)]).long()
    k, v = (case[pool][slots] for pool in ("k_pool", "v_pool"))
    shape = prefill.Shape.of(q, v, window, 0.0, None)
    serving = [one for one in prefill.libraries(q.device) if not prefill.refused(one, shape)]
    takes = dtype != torch.float32 and q.shape[2] == v.shape[2]
    assert bool(serving) == takes, prefill.in_words({shape}, q.device)
    for library in serving:
        out = library.attend(q, k, v, case["query_indptr"], 300, case["scale"], window, 0.0)
        tolerance = {torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
        torch.testing.assert_close(out.double().cpu(), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [500, 32_000, 151_936])
def test_identical_logits_draw_identical_tokens(vocab, dtype):
    rows = 64
    seen = torch.rand(rows, vocab, generator=torch.Generator().manual_seed(1)) < 0.1
    settings = dict(
        temperature=torch.linspace(0.5, 1.5, rows),
        top_k=torch.arange(rows) % 3 * 40,
        top_p=torch.tensor([1.0, 0.9]).repeat(rows // 2),
        min_p=torch.tensor([0.0, 0.0, 0.02, 0.0]).repeat(rows // 4),
        penalty=torch.tensor([1.0, 1.0, 1.0, 1.3]).repeat(rows // 4),
    )
    case = arguments(random_logits(rows, vocab).to(dtype), **settings, seen=seen, eos=(3,))
    on_gpu = to_cuda({name: x.clone() if torch.is_tensor(x) else x for name, x in case.items()})
    for _ in range(4):
        expected, actual = sample_step(**case), sample_step(**on_gpu)
        assert torch.equal(actual[0].cpu(), expected[0])
        for ours, theirs in zip(actual[1:], expected[1:], strict=True):
            torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-4, atol=1e-5)
        for name in ("position", "alive", "seen"):
            assert torch.equal(on_gpu[name].cpu(), case[name])


def test_selection_is_that_of_the_cpu():
    rewards = torch.randn(40, generator=torch.Generator().manual_seed(0)).tolist()
    for used in (0, 3, 5):
        case = tables([1, 4, 0, 35], rewards, attempts=[used] * 4, max_attempts=9)
        on_gpu = to_cuda(case)
        for ours, theirs in zip(select_and_commit(**on_gpu), select_and_commit(**case), strict=True):
            assert torch.equal(ours.cpu(), theirs)
        assert all(torch.equal(on_gpu[name].cpu(), case[name]) for name in WRITTEN)


def test_gathered_logprobs_are_those_of_the_cpu():
    for dtype in DTYPES:
        logits, tokens = random_logits(300, 32_001).to(dtype), torch.arange(300) * 100
        ours = gather_logprobs(logits.cuda(), tokens.cuda()).cpu()
        torch.testing.assert_close(ours, gather_logprobs(logits, tokens), rtol=1e-5, atol=1e-5)


def test_a_graph_that_holds_the_kernels_sees_new_lengths_and_slots():
    case = to_cuda(tree(**TREES["decode"], **HEADS["64, 4 queries a key"]))
    tokens = case["q"].shape[0]
    new = torch.randn(tokens, 2, 64, device="cuda")
    write = torch.zeros(tokens, dtype=torch.int32, device="cuda")

    def step():
        kv_append(new, new, case["k_pool"], case["v_pool"], write)
        tree_attention(**case)

    step()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    case["trunk_len"] -= torch.tensor([5, 0, 60], device="cuda", dtype=torch.int32)
    case["branch_len"] -= 3
    write[:2] = case["branch_slots"][:2, 0]
    case["out"].fill_(torch.nan)
    graph.replay()
    replayed = case["out"].clone()
    assert torch.equal(case["k_pool"][write[:2].long()], new[:2])
    torch.testing.assert_close(
        replayed.double().cpu(), naive({k: _cpu(v) for k, v in case.items()}), rtol=1e-4, atol=1e-5
    )


def _cpu(x):
    return x.cpu() if torch.is_tensor(x) else x
