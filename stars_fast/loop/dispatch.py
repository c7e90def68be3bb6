"""Which loop runs a method, and the second policy that one needs."""

from __future__ import annotations

from typing import Any

from stars_fast.config import StarsConfig
from stars_fast.loading import load_policy
from stars_fast.loop.drafting import Drafting, SelfJudging
from stars_fast.loop.enumeration import Enumeration
from stars_fast.loop.heartbeat import Generation
from stars_fast.loop.populations import Populations, Trials
from stars_fast.methods import RSD, Enumerated, PersonaJudge, Population, Trial
from stars_fast.policy import Policy
from stars_fast.tree.model import vocabulary

_LOOPS: dict[type, type[Generation]] = {
    Trial: Trials,
    Population: Populations,
    Enumerated: Enumeration,
    PersonaJudge: SelfJudging,
}


def generation(config: StarsConfig, draft: Policy | None, *args: Any) -> Generation:
    """The loop of the config's method over ``args``, those of :class:`Generation`."""
    method = config.chosen_method
    if isinstance(method, RSD):
        assert draft is not None
        return Drafting(*args, draft=draft)
    loop = next((loop for kind, loop in _LOOPS.items() if isinstance(method, kind)), Generation)
    return loop(*args)


def draft_policy(draft: Any, kept: Policy | None, policy: Policy, tokenizer: Any) -> Policy:
    """``draft`` (a model, path or hub id) beside ``policy``; ``kept`` where it is that already.

    Raises
    ------
    ValueError
        Where the two do not have the same vocabulary.
    """
    if kept is not None and draft in (kept.model, kept.source):
        return kept
    model, own = load_policy(draft, None, policy.device)
    ids, ours = vocabulary(model), policy.vocab_size
    # Tables of one vocabulary may be padded to different sizes, if a tokenizer says how many ids are in use.
    same = ids == ours or (tokenizer is not None and len(tokenizer) <= min(ids, ours))
    if not same or (own is not None and tokenizer is not None and own.get_vocab() != tokenizer.get_vocab()):
        raise ValueError(
            f"draft: {type(model).__name__} has {ids} ids and the policy {ours}: their vocabularies must be the same"
        )
    made = Policy(model, policy.graphs.enabled, policy.torch_compile)
    made.source = draft
    return made
