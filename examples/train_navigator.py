"""Train a navigator (RL-of-Thoughts, arXiv 2505.14140) on sums whose steps can be done in several ways (steps.py).

A small policy learns to do the steps, to obey the blocks and to score its own text; then a Double-Dueling-DQN of 1.5
thousand parameters learns which block to choose, from answers that the engine draws; then it is compared with fixed
blocks and with plain answers that vote, beside the tokens that each takes::

    python examples/train_navigator.py

The paper says that the network is a Double-Dueling-DQN of fewer than 3,000 parameters; the sizes of its layers, what it
is trained with and the rewards' scale here are ours. In place of a process reward model stands what a step costs: an
answer that is right earns 1 at its end, and every token takes ``PRICE`` from that.
"""

from __future__ import annotations

import argparse
import copy
import random
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from steps import BLOCKS, CHARACTERS, OPERATIONS, QUESTIONS, lesson, problem, solved
from train_arithmetic import new_tokenizer
from training import PAD, by_steps, config, fit
from transformers import LlamaForCausalLM

from stars_fast import StarsConfig, StarsEngine, StarsOutput
from stars_fast.methods import Navigator

CONFIG = StarsConfig(max_new_tokens=200)
PRICE = 0.0005  # of a token, drawn or read for the choice
ROUNDS, TOGETHER, HELD = 150, 64, 600  # of learning to choose; answers in each; problems to compare on
Transition = tuple[list[float], int, float, list[float] | None]  # scores, block, reward, scores behind it


class Duel(torch.nn.Module):
    """Values of blocks from scores ``[..., 7]``: the state's, and what each adds to the mean (arXiv 1511.06581)."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.trunk = torch.nn.Sequential(
            torch.nn.Linear(len(QUESTIONS), width), torch.nn.ReLU(), torch.nn.Linear(width, width), torch.nn.ReLU()
        )
        self.value, self.advantage = torch.nn.Linear(width, 1), torch.nn.Linear(width, len(BLOCKS))

    def forward(self, scores: torch.Tensor) -> torch.Tensor:
        hidden = self.trunk(scores - 2)
        advantage = self.advantage(hidden)
        return self.value(hidden) + advantage - advantage.mean(-1, keepdim=True)


def navigator(network: Callable[[torch.Tensor], torch.Tensor]) -> Navigator:
    blocks, questions = list(BLOCKS), list(QUESTIONS)
    return Navigator(network, blocks, questions, steps=2 * OPERATIONS + 1, delimiter="\n", longest=40)


def always(block: str, hard: str | None = None) -> Callable[[torch.Tensor], torch.Tensor]:
    """One block, or another where the next step is hard (question e), until the answer is within reach (question f)."""

    def values(scores: torch.Tensor) -> torch.Tensor:
        named = dict(zip(QUESTIONS, scores.tolist(), strict=True))
        chosen = "T" if named["f"] > 2.5 else hard if hard and named["e"] > 2 else block
        return torch.tensor([float(one == chosen) for one in BLOCKS])

    return values


# The policy


def new_policy(tokenizer: Any) -> LlamaForCausalLM:
    """Give 0.1 million parameters."""
    settings = config(64, 3, 176, 4, head_dim=16)
    settings.vocab_size = len(tokenizer)
    model: Any = LlamaForCausalLM(settings)
    return model


def lessons(tokenizer: Any, chance: random.Random, count: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids ``[count, T]``, and what predicting each weighs."""
    rows, weighed = [], []
    for text, weights in (lesson(chance) for _ in range(count)):
        ends = text.endswith("\n")
        rows.append([*tokenizer(text).input_ids, *[tokenizer.eos_token_id] * ends])
        weighed.append([0.0, *weights, *[1.0] * ends])
    longest = max(map(len, rows))
    ids = torch.tensor([row + [PAD] * (longest - len(row)) for row in rows])
    return ids, torch.tensor([row + [0.0] * (longest - len(row)) for row in weighed])


def lesson_loss(model: Any, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    logits = model(ids[:, :-1], use_cache=False).logits
    losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    weights = weights[:, 1:].flatten()
    return (losses * weights).sum() / weights.sum()


# The navigator


def earned(out: StarsOutput, row: int, asked: str) -> list[Transition]:
    """What an answer to this problem has to teach: every step that was a choice."""
    told = [(segment.tokens, segment.scaffold) for segment in out.segments[row] if segment.scaffold is not None]
    found = list[Transition]()
    for place, (tokens, (instruction, block, state)) in enumerate(told):
        if state is not None:
            after = told[place + 1][1].state if place + 1 < len(told) else None
            cost = PRICE * (len(tokens) + len(instruction) + len(QUESTIONS))
            found.append((state, block, (after is None and solved(asked, (out.texts or [])[row])) - cost, after))
    return found


def learn(engine: StarsEngine, seed: int, rounds: int = ROUNDS) -> Duel:
    """Double DQN: the network chooses what follows, a copy of it that lags behind says what that is worth."""
    torch.manual_seed(seed)
    chance, network = random.Random(seed), Duel()
    lagging, memory = copy.deepcopy(network), list[Transition]()
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    for turn in range(rounds):
        curiosity = max(0.1, 1 - turn / (0.5 * rounds))

        def curious(scores: torch.Tensor, curiosity: float = curiosity) -> torch.Tensor:
            return torch.rand(len(BLOCKS)) if chance.random() < curiosity else network(scores)

        asked = [problem(chance) for _ in range(TOGETHER)]
        out = engine.generate(asked, CONFIG, method=navigator(curious), seed=chance.randrange(2**31))
        memory += [step for row, one in enumerate(asked) for step in earned(out, row, one)]
        for _ in range(60):
            improve(network, lagging, optimizer, chance.choices(memory[-12_000:], k=128))
        lagging.load_state_dict(network.state_dict())
        if turn % 25 == 24:
            right = sum(solved(one, text) for one, text in zip(asked, out.texts or [], strict=True)) / TOGETHER
            print(f"round {turn + 1}: {right:.2f} solved while {curiosity:.2f} of the blocks are random", flush=True)
    return network


def improve(network: Duel, lagging: Duel, optimizer: torch.optim.Optimizer, batch: Sequence[Transition]) -> None:
    """One step towards ``reward + lagging(after)[arg max network(after)]``."""
    states, blocks, rewards = (torch.tensor([step[i] for step in batch]) for i in range(3))
    after = torch.tensor([step[3] or step[0] for step in batch])
    goes_on = torch.tensor([float(step[3] is not None) for step in batch])
    with torch.no_grad():
        best = network(after).argmax(1, keepdim=True)
        goals = rewards + goes_on * lagging(after).gather(1, best)[:, 0]
    loss = F.smooth_l1_loss(network(states).gather(1, blocks[:, None])[:, 0], goals)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


# What it is worth


def told(name: str, right: float, written: float, read: float, used: str = "") -> None:
    print(f"{name:26} {right:6.3f} {written:8.1f} {read:8.1f} {written + read:8.1f}  {used}", flush=True)


def compare(engine: StarsEngine, network: Duel, held: Sequence[str], seed: int) -> None:
    """Print what is solved, and the tokens per problem: written, read beside them, and both."""
    print(f"{'':26} solved  written     read     both  blocks of an answer, on average")
    ways = {"navigator": network, "rule: D where it carries": always("R", "D")}
    ways |= {f"fixed: {block}, then T": always(block) for block in "RDB"}
    for name, way in ways.items():
        out = engine.generate(held, CONFIG, method=navigator(way), seed=seed)
        right = sum(solved(one, text) for one, text in zip(held, out.texts or [], strict=True)) / len(held)
        chosen = Counter(BLOCKS[s.scaffold.block] for row in out.segments for s in row if s.scaffold is not None)
        used = " ".join(f"{block} {chosen[block] / len(held):.2f}" for block in BLOCKS)
        told(name, right, out.stats["committed_tokens"] / len(held), out.stats["scaffold_tokens"] / len(held), used)
    most = 5
    out = engine.generate(held, CONFIG, method="vanilla", num_return_sequences=most, seed=seed)
    for votes in range(1, most + 1):
        right, tokens = 0, 0
        for place, one in enumerate(held):
            rows = range(place * most, place * most + votes)
            given = Counter((out.texts or [])[row].strip().rpartition("\n")[2] for row in rows)
            right += solved(one, given.most_common(1)[0][0])
            tokens += sum(len(out.completions[row]) for row in rows)
        told(f"no navigator, vote of {votes}", right / len(held), tokens / len(held), 0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("navigator_work"), help="checkpoints")
    parser.add_argument("--steps", type=int, default=2600, help="of training the policy")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="take the policy from its checkpoint")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    chance, tokenizer = random.Random(args.seed), new_tokenizer(CHARACTERS)
    policy, checkpoint = new_policy(tokenizer), args.work / "policy.pt"
    fit(
        policy,
        lambda: lessons(tokenizer, chance),
        lambda batch: lesson_loss(policy, *batch),
        lambda: "",
        by_steps(args.steps),
        5e-3,
        checkpoint,
        args.resume,
    )
    engine = StarsEngine(policy.eval(), lambda completions: [0.0] * len(completions), tokenizer=tokenizer)
    network = learn(engine, args.seed)
    print(f"{sum(weight.numel() for weight in network.parameters()):,} parameters choose")
    held = random.Random(args.seed + 1)
    compare(engine, network, [problem(held) for _ in range(HELD)], args.seed + 2)
    torch.save(network.state_dict(), args.work / "navigator.pt")


if __name__ == "__main__":
    main()
