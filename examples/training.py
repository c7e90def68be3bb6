"""What the training scripts share: reading texts, packing them, fitting on a budget, small Llama configurations."""

from __future__ import annotations

import contextlib
import json
import lzma
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BOS, EOS, PAD = 0, 1, 2  # the ids that the special tokens get, being first in the vocabulary
VOCAB, LENGTH = 4096, 384
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Batch = tuple[torch.Tensor, ...]
State = dict[str, float]
Budget = Callable[[State], float]  # how much of a run is done, from 0 to 1


def read_rows(source: str, split: str, seed: int) -> list[dict[str, Any]]:
    """Read rows from JSON lines (``.xz`` or plain) or from the hub, in a random order."""
    if Path(source).exists():
        opener: Any = lzma.open if source.endswith(".xz") else open
        with opener(source, "rt", encoding="utf-8") as lines:
            rows: Any = [json.loads(line) for line in lines]
    else:
        from datasets import load_dataset  # only needed without local files

        rows = load_dataset(source, split=split)
    return [rows[int(i)] for i in np.random.default_rng(seed).permutation(len(rows))]


def one_line(text: str) -> str:
    """Squeeze line breaks, HTML's too: they carry little in these texts, and one-line samples are easier to show."""
    return re.sub(r"(<br\s*/?>|\s)+", " ", text).strip()


def read_reviews(source: str, split: str, seed: int) -> list[tuple[str, int]]:
    """Reviews with their labels, -1 where there is none."""
    return [(one_line(row["text"]), int(row.get("label", -1))) for row in read_rows(source, split, seed)]


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[np.ndarray]:
    """Tokenise texts as ``<s> ... </s>``, two bytes per token."""
    encodings = tokenizer.backend_tokenizer.encode_batch(texts)
    return [np.array([*e.ids, EOS], dtype=np.uint16) for e in encodings]


def packed_rows(docs: list[np.ndarray], seed: int, length: int = LENGTH) -> Iterator[np.ndarray]:
    """Yield, for ever, rows of ``length + 1`` tokens that each start at a document's start.

    Short documents are followed by others; what does not fit is dropped, so the model mostly
    learns openings and endings, which is what it is used for.
    """
    rng = np.random.default_rng(seed)
    row, room = [], length + 1
    while True:
        for i in rng.permutation(len(docs)):
            row.append(docs[i][:room])
            room -= len(row[-1])
            if room == 0:
                yield np.concatenate(row)
                row, room = [], length + 1


def tensor(array: Any, kind: Any = np.int64) -> torch.Tensor:
    """Move an array to the device."""
    return torch.from_numpy(np.asarray(array).astype(kind)).to(DEVICE)


def schedule(progress: float) -> float:
    """Learning-rate factor: short warm-up, plateau, long linear decay to zero."""
    return min(1.0, (progress + 1e-4) / 0.01, max(0.0, (1.0 - progress) / 0.6))


def steps_done(checkpoint: Path, resume: bool) -> int:
    """Count the steps of the run to be resumed, if any."""
    return int(torch.load(checkpoint)["state"]["steps"]) if resume and checkpoint.exists() else 0


def make_optimizers(model: torch.nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for embeddings, norms and the scoring head."""
    named = list(model.named_parameters())
    matrices = [p for n, p in named if p.ndim == 2 and ".layers." in n]
    others = [p for n, p in named if not (p.ndim == 2 and ".layers." in n)]
    muon = torch.optim.Muon(matrices, lr=lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.0)
    for optimizer in (muon, adam):
        for group in optimizer.param_groups:
            group["peak"] = lr
    return [muon, adam]


def by_clock(minutes: float) -> Budget:
    """End on time on any machine; two runs agree closely but not bit for bit."""
    return lambda state: state["seconds"] / (60 * minutes)


def by_steps(steps: int) -> Budget:
    """Do the same work on any machine."""
    return lambda state: state["steps"] / steps


def fit(
    model: torch.nn.Module,
    batches: Callable[[], Batch],
    loss_of: Callable[[Batch], torch.Tensor],
    evaluate: Callable[[], str],
    budget: Budget,
    lr: float,
    checkpoint: Path,
    resume: bool,
) -> None:
    """Train until the budget is used up, with a checkpoint and an evaluation every four minutes."""
    optimizers = make_optimizers(model, lr)
    state: State = {"seconds": 0.0, "steps": 0, "tokens": 0, "loss": float("nan")}
    if resume and checkpoint.exists():
        saved = torch.load(checkpoint, map_location=DEVICE)
        model.load_state_dict(saved["model"])
        for optimizer, values in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(values)
        state = saved["state"]

    def save() -> None:
        parts = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers], "state": state}
        torch.save(parts, checkpoint.with_suffix(".tmp"))
        checkpoint.with_suffix(".tmp").replace(checkpoint)

    began = time.monotonic() - state["seconds"]
    next_save = state["seconds"] + 60.0
    model.train()
    while (progress := budget(state)) < 1:
        batch = batches()
        loss = loss_of(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * schedule(progress)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        value = loss.item()
        old = state["loss"]
        state["loss"] = value if old != old else 0.99 * old + 0.01 * value
        state["steps"] += 1
        state["tokens"] += batch[0].numel()
        state["seconds"] = time.monotonic() - began
        if state["seconds"] >= next_save or budget(state) >= 1:
            model.eval()
            print(f"{checkpoint.stem} {state} {evaluate()}", flush=True)
            save()
            model.train()
            began = time.monotonic() - state["seconds"]  # measuring does not count
            next_save = state["seconds"] + 240.0


def autocast() -> contextlib.AbstractContextManager[None]:
    """bfloat16 matrix products: more than twice as fast, also on recent CPUs."""
    return torch.autocast(DEVICE, torch.bfloat16)


def config(hidden: int, layers: int, inner: int, heads: int, **more: Any) -> LlamaConfig:
    """Shared part of the two configurations."""
    return LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
        **more,
    )


def next_token_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy; packed rows have no padding."""
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def policy_loss(model: LlamaForCausalLM, rows: torch.Tensor) -> torch.Tensor:
    """Next-token loss of packed rows."""
    with autocast():
        logits = model(rows[:, :-1], use_cache=False).logits
    return next_token_loss(logits, rows[:, 1:])


@torch.no_grad()
def policy_held_out(model: LlamaForCausalLM, docs: list[np.ndarray]) -> float:
    """Mean next-token loss on held-out reviews, packed like the training rows."""
    rows = packed_rows(docs, seed=0)
    count = sum(min(len(d), LENGTH) for d in docs) // (LENGTH * 16)
    batches = [tensor(np.stack([next(rows) for _ in range(16)])) for _ in range(count)]
    return float(np.mean([policy_loss(model, b).item() for b in batches]))


def export(model: Any, checkpoint: Path, target: Path, dtype: torch.dtype) -> State:
    """Write a checkpoint's model as safetensors; return how far its training went."""
    saved = torch.load(checkpoint, map_location=DEVICE)
    model.load_state_dict(saved["model"])
    model = model.to(dtype)
    model.config.use_cache = True
    if isinstance(model, LlamaForCausalLM):
        model.generation_config = GenerationConfig(bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD)
    model.save_pretrained(target)
    return dict(saved["state"])
