"""Two small models to try the package with, offline: a writer of film reviews and its critic.

They were trained by ``examples/train_demo.py``; ``MODEL_CARD.md``, beside this module, says from
what and how well.  They are for demonstrations and tests only.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import (
        LlamaForCausalLM,
        LlamaForSequenceClassification,
        PreTrainedTokenizerFast,
    )

__all__ = ["FOLDER", "NAME", "PROMPTS", "load"]

NAME = "demo"
"""Stands for the models, and for their fit, where a path or a hub id could stand."""

FOLDER = Path(__file__).parent

PROMPTS: tuple[str, ...] = (
    "I watched this film last night with",
    "The first thing to say about this movie",
    "My sister told me that this",
    "After all the talk about the director",
    "This is one of those films that",
    "The story begins in a small town",
    "I had never heard of this movie",
    "The acting in this film is",
)
"""Short openings of film reviews, neither friendly nor hostile, for the policy to continue."""


def load() -> tuple[LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast]:
    """
    Load the demonstration models and their tokenizer from the installed package.

    Nothing is downloaded. Both models use the same tokenizer, which puts ``<s>`` in front of a
    text.

    Returns
    -------
    policy : transformers.LlamaForCausalLM
        Continues film reviews; float32, in evaluation mode, on the CPU.
    reward : transformers.LlamaForSequenceClassification
        Has a single logit, the log-odds that a film review, finished or not, is positive;
        float32, in evaluation mode, on the CPU.
    tokenizer : transformers.PreTrainedTokenizerFast
        The tokenizer of both, with distinct ``<s>``, ``</s>`` and ``<pad>``.

    Examples
    --------
    >>> from stars_fast import demo
    >>> policy, reward, tokenizer = demo.load()
    >>> inputs = tokenizer(demo.PROMPTS[0], return_tensors="pt")
    >>> reward(**inputs).logits.shape
    torch.Size([1, 1])
    """
    import torch
    from transformers import (
        LlamaForCausalLM,
        LlamaForSequenceClassification,
        PreTrainedTokenizerFast,
    )

    policy = LlamaForCausalLM.from_pretrained(FOLDER / "policy", dtype=torch.float32, local_files_only=True)
    reward = LlamaForSequenceClassification.from_pretrained(
        FOLDER / "reward", dtype=torch.float32, local_files_only=True
    )
    tokenizer = PreTrainedTokenizerFast.from_pretrained(FOLDER / "policy", local_files_only=True)
    return policy.eval(), reward.eval(), tokenizer
