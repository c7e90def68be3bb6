"""Train a small policy that does sums in steps, for measuring guidance by a rule (``arithmetic.py``).

Problems are made here, so nothing is needed but time::

    python examples/train_arithmetic.py --out sums --minutes 8

The policy is meant to be wrong now and then: search has something to find only where some candidates are right. What it
gets right is printed at the end.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from arithmetic import CHARACTERS, problem, solved, worked
from tokenizers import Tokenizer, decoders, models, processors
from training import (
    BOS,
    DEVICE,
    by_clock,
    config,
    encode,
    export,
    fit,
    packed_rows,
    policy_loss,
    tensor,
)
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

PROBLEMS, HELD = 100_000, 200


def new_tokenizer(known: str = CHARACTERS) -> PreTrainedTokenizerFast:
    """A token for each character, ``<s>`` in front."""
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", "<pad>", *known])}
    characters = Tokenizer(models.BPE(vocabulary, merges=[]))
    characters.decoder = decoders.Fuse()
    characters.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=characters,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def new_policy() -> LlamaForCausalLM:
    """Give 0.6 million parameters."""
    settings = config(128, 3, 352, 4, head_dim=32)
    settings.vocab_size = 3 + len(CHARACTERS)
    model: Any = LlamaForCausalLM(settings)
    return model.to(DEVICE)


@torch.no_grad()
def accuracy(model: Any, tokenizer: PreTrainedTokenizerFast, problems: list[str]) -> float:
    """Share of problems solved by one sample each."""
    inputs = tokenizer(problems, return_tensors="pt", padding=True).to(DEVICE)
    ids = model.generate(**inputs, do_sample=True, max_new_tokens=80)[:, inputs["input_ids"].shape[1] :]
    return float(np.mean([solved(p, t) for p, t in zip(problems, tokenizer.batch_decode(ids, True), strict=True)]))


def main() -> None:
    """Train, export, measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("sums"), help="where the policy goes")
    parser.add_argument("--work", type=Path, default=Path("sums_work"), help="checkpoints")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    chance = random.Random(args.seed)
    problems = [problem(chance) for _ in range(PROBLEMS)]
    tokenizer, held = new_tokenizer(), problems[:HELD]
    rows = packed_rows(encode(tokenizer, [p + worked(p) for p in problems[HELD:]]), args.seed)
    torch.manual_seed(args.seed)
    model = new_policy()
    fit(
        model,
        lambda: (tensor(np.stack([next(rows) for _ in range(4)])),),
        lambda batch: policy_loss(model, batch[0]),
        lambda: f"solved {accuracy(model, tokenizer, held):.2f}",
        by_clock(args.minutes),
        5e-3,
        args.work / "policy.pt",
        args.resume,
    )
    state = export(new_policy(), args.work / "policy.pt", args.out, torch.float32)
    tokenizer.save_pretrained(args.out)
    policy = LlamaForCausalLM.from_pretrained(args.out).to(DEVICE).eval()
    print(f"{policy.num_parameters():,} parameters, {state['tokens'] / 1e6:.1f} million tokens,", end=" ")
    print(f"solved by one sample each: {accuracy(policy, tokenizer, held):.2f}")


if __name__ == "__main__":
    main()
