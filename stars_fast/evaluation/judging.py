"""Scores of finished responses by a reward that did not guide them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from stars_fast.rewards.base import Completion, Response, Reward, RewardPrompt, score_each
from stars_fast.tree.attention import own_dtypes


@torch.no_grad()
@own_dtypes()
def judged(
    judge: Reward, asked: Sequence[RewardPrompt], completions: Sequence[Sequence[int]], eos: Sequence[bool]
) -> list[tuple[float, str | None]]:
    """Reward, or NaN and the cause, of each finished response.

    Parameters
    ----------
    judge : Reward
        Need not share the policy's tokenizer, nor make sense of unfinished text.
    asked : sequence of RewardPrompt
        Of the call that the completions answer.
    completions : sequence of sequence of int
        Policy ids, without the prompt.
    eos : sequence of bool
        Whether a completion's last id is the EOS that ended it.
    """
    answers = [
        Completion(Response(prompt), list(tokens), finished=True, eos=ended, tokenizer=prompt.tokenizer)
        for prompt, tokens, ended in zip(asked, completions, eos, strict=True)
    ]
    longest = max(1, max(map(len, completions), default=1))
    try:
        judge.begin(asked, longest, len(asked), None)
        judge.open(asked, longest)
        scores = list(score_each(judge, answers))
        for answer in answers:
            judge.discard(answer)
            judge.close(answer.response)
        return scores
    finally:
        judge.end()
