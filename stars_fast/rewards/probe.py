"""A small network that reads the policy's own hidden state: scoring that costs the policy a token a candidate."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from stars_fast.methods.numbers import shown
from stars_fast.rewards.base import Completion, Reward, RewardPrompt
from stars_fast.tree.attention import evaluating, own_dtypes
from stars_fast.tree.lack import is_lack_of_memory


class HiddenStateProbe(Reward):
    """A network on the policy's last hidden state at the candidate's last token, as MARA's (arXiv 2505.19743).

    Parameters
    ----------
    probe : torch.nn.Module
        Takes ``[rows, H]``, the input of the policy's output embedding, in the probe's dtype and on its device. Gives
        ``[rows, 1]``, the reward, or ``[rows, 2]``, logits of rejection and acceptance, whose difference is the reward:
        the log-odds of acceptance.
    """

    needs_hidden_state = True

    def __init__(self, probe: nn.Module) -> None:
        if not isinstance(probe, nn.Module):
            raise TypeError(f"probe={shown(probe)} must be a torch.nn.Module")
        self.probe = probe
        self._evaluating: list[ExitStack] = []  # one of each call, all alike

    @torch.no_grad()
    @own_dtypes()
    def check_policy(self, policy: PreTrainedModel, tokenizer: Any) -> None:
        head: Any = policy.get_output_embeddings()
        width = getattr(head, "in_features", policy.config.get_text_config().hidden_size)
        with evaluating(self.probe):
            self._read(torch.zeros(1, width, device="cpu"))

    def begin(
        self, prompts: Sequence[RewardPrompt], max_new_tokens: int, rows: int, kv_cache_tokens: int | None
    ) -> None:
        self._evaluating.append(ExitStack())
        self._evaluating[-1].enter_context(evaluating(self.probe))

    def end(self) -> None:
        if self._evaluating:
            self._evaluating.pop().close()

    def score(self, completions: Sequence[Completion]) -> list[float]:
        states = [completion.hidden for completion in completions if completion.hidden is not None]
        if len(states) < len(completions):
            raise ValueError(
                "Completion.hidden is None: HiddenStateProbe is scored by engines that hand on the policy's hidden "
                "state (Reward.needs_hidden_state)"
            )
        return self._read(torch.stack(states))

    def _read(self, states: torch.Tensor) -> list[float]:
        """Rewards of hidden states ``[rows, H]``."""
        parameter = next(self.probe.parameters(), states)
        values = self._values(states.to(parameter.device, parameter.dtype)).float()  # [rows, 1 or 2]
        if values.dim() != 2 or values.shape[0] != len(states) or values.shape[1] not in (1, 2):
            raise ValueError(
                f"the probe gave {list(values.shape)} for {len(states)} rows: must be [rows, 1] or [rows, 2]"
            )
        rewards: list[float] = (values[:, -1] - values[:, 0] if values.shape[1] == 2 else values[:, 0]).tolist()
        return rewards

    def _values(self, states: torch.Tensor) -> torch.Tensor:
        try:
            values: torch.Tensor = self.probe(states)
        except RuntimeError as error:
            if is_lack_of_memory(error):
                raise
            raise ValueError(
                f"the probe does not take {list(states.shape)}, rows of the policy's hidden_size={states.shape[1]}: "
                f"{error}"
            ) from error
        return values
