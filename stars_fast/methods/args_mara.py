"""Methods that choose among the policy's likely next tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from stars_fast.methods.base import Enumerated, Scored, Scorer, SettingsT
from stars_fast.methods.numbers import shown


@dataclass(frozen=True)
class Args(Enumerated):
    """The next token by likelihood and reward: ``arg max_v log pi(v | x, y) + weight * r(x, y v)`` over the ``top_k``
    likeliest v (ARGS, arXiv 2402.01694).

    The paper adds the reward to the logit, which differs from the log-probability by a constant per position: the same
    choice. With a ``temperature`` the token is drawn from the softmax of the sum over it (ARGS-stochastic) instead.
    Likelihoods are those after logits processors of transformers, where a call has any: they are an answer's
    ``sampling_logprobs``. Temperature, filters and repetition penalty of StarsConfig do not apply. ``top_k`` is at
    least 1, ``weight`` lies in [0, 1e30], ``temperature`` is 0 or lies in [1e-6, 1e30].
    """

    name: ClassVar[str] = "args"
    has_target: ClassVar[bool] = False
    most: ClassVar[str] = "top_k"
    top_k: int = 10
    weight: float = 1.5
    temperature: float = 0.0

    def __post_init__(self) -> None:
        self._check_integer("top_k")
        self._check_real("weight", 0.0, 1e30)
        self._check_real("temperature", 0.0, 1e30)
        if 0.0 < self.temperature < 1e-6:
            raise ValueError(f"args: temperature={self.temperature} must be 0, or lie in [1e-06, 1e+30]")

    def rule(self, config: SettingsT) -> SettingsT:
        return super().rule(config.replace(target_reward=float("inf"), base_reward=None))

    def check(self, reward: Scorer) -> None:
        super().check(reward)
        if reward.reads_text:
            raise ValueError(
                f"method='args' scores every likely next token, {self.top_k} a position: a function of text would see "
                "half words and characters, thousands of times an answer. Give a reward model, or a "
                "stars_fast.rewards.Reward where the function is fit for it"
            )

    def passes(self, drawn: int, committed: int) -> tuple[int, int]:
        """Likely tokens are looked at without running the policy over them."""
        return committed, 0

    def tokens(self, logits: Any) -> list[int]:
        top: list[int] = logits.topk(min(self.top_k, logits.shape[0])).indices.tolist()
        return top

    def values(self, candidates: Sequence[Scored]) -> list[float]:
        rewards = [self.weight * candidate.reward if self.weight else 0.0 for candidate in candidates]  # not 0 * -inf
        sums = [candidate.draw.sampling_logprobs[0] + r for candidate, r in zip(candidates, rewards, strict=True)]
        if not self.temperature:
            return sums
        # Gumbel-max: the largest of these is a draw from the softmax.
        return [value / self.temperature + c.gumbel for value, c in zip(sums, candidates, strict=True)]


@dataclass(frozen=True)
class Mara(Enumerated):
    """The likeliest token that a small network accepts (MARA, arXiv 2505.19743).

    The ``top_k`` likeliest tokens, after ``temperature`` and ``top_p``, are looked at in descending probability. The
    first that ``mlp`` accepts is taken; the likeliest where it accepts none. Temperature, filters and repetition
    penalty of StarsConfig do not apply; ``sampling_logprobs`` are as under :class:`Args`. The reward model only scores
    the finished answer, for the output. The network is in evaluation mode while it is asked.

    ``top_k`` is at least 1, ``temperature`` lies in [1e-6, 1e30], ``top_p`` in (0, 1].

    Parameters
    ----------
    mlp : torch.nn.Module
        ``[rows, hidden] -> [rows, 2]``: logits of reject and accept from the policy's last hidden state at the token
        (in the paper hidden -> 1024 -> 256 -> 2).
    """

    name: ClassVar[str] = "mara"
    scores_unfinished: ClassVar[bool] = False
    has_target: ClassVar[bool] = False
    needs_hidden_state: ClassVar[bool] = True
    most: ClassVar[str] = "top_k"
    mlp: Any = None
    top_k: int = 40
    top_p: float = 0.95
    temperature: float = 0.8

    def __post_init__(self) -> None:
        self._check_integer("top_k")
        self._check_real("temperature", 1e-6, 1e30)
        self._check_real("top_p", 0.0, 1.0, open_below=True)
        if self.mlp is not None and not callable(self.mlp):
            raise TypeError(f"mara: mlp={shown(self.mlp)} must be a torch.nn.Module from [rows, hidden] to [rows, 2]")

    def rule(self, config: SettingsT) -> SettingsT:
        return super().rule(config.replace(target_reward=0.0, alpha=1.0))

    def check(self, reward: Scorer) -> None:
        super().check(reward)
        if not callable(self.mlp):
            raise ValueError(
                "method='mara' needs the network that accepts or rejects: StarsConfig(method=Mara(mlp=...)), a "
                "torch.nn.Module from [rows, hidden] to [rows, 2]"
            )

    @property
    def networks(self) -> Sequence[Any]:
        return (self.mlp,)

    def tokens(self, logits: Any) -> list[int]:
        top = (logits / self.temperature).softmax(0).topk(min(self.top_k, logits.shape[0]))
        kept = top.values / top.values.sum()
        likelier = (kept.cumsum(0) - kept).tolist()  # what those before a token weigh
        ids: list[int] = top.indices.tolist()
        if self.top_p == 1.0:  # a sum may come to that before its last term
            return [token for token, weight in zip(ids, kept.tolist(), strict=True) if weight > 0] or ids[:1]
        return ids[:1] + [token for token, mass in zip(ids[1:], likelier[1:], strict=True) if mass < self.top_p]

    def values(self, candidates: Sequence[Scored]) -> list[float]:
        import torch

        states = [candidate.completion.hidden for candidate in candidates]
        hidden = torch.stack([state for state in states if state is not None])  # [rows, H]
        weight = next(iter(getattr(self.mlp, "parameters", lambda: ())()), hidden)
        reject, accept = self.mlp(hidden.to(weight.device, weight.dtype)).float().unbind(1)
        return torch.where(accept > reject, 0.0, -torch.inf).tolist()
