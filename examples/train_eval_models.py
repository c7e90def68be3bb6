"""Train the models that ``benchmarks/eval`` compares decoding methods with: two tasks, a few models each.

Sentiment continues film reviews with the demonstration policy.  Harmlessness answers messages with a dialogue
policy that is fine-tuned from it, on safe and unsafe answers alike.  For each task there are

* a guide and a judge: critics of unfinished text, trained on two halves of the labelled data, with other seeds and
  of another size, so that a judge never saw what taught the guide;
* ``good``: the policy after a little supervised fine-tuning on what is good in the guide's half.  Against the policy
  it gives the implicit reward log(good / policy), standing in for a model trained with DPO;
* ``draft``: the policy's embeddings and first layer, fine-tuned, for methods with a cheaper proposer;
* ``probe``: a small network on the policy's hidden states, taught by the guide, for methods that accept tokens by it.

All start from the demonstration policy in ``stars_fast.demo``.  About half an hour on one CPU core::

    python examples/train_eval_models.py --out eval_models

A step does the same work on any machine; an interrupted run goes on from its checkpoints with the same command.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from critics import (
    fit_teacher,
    give_vocabulary,
    judge,
    judge_all,
    labelled_batches,
    new_reward,
    padded,
    reward_loss,
)
from probes import train_probe
from safetensors.torch import save_file
from training import (
    EOS,
    Batch,
    by_steps,
    encode,
    export,
    fit,
    one_line,
    packed_rows,
    policy_loss,
    read_reviews,
    read_rows,
    steps_done,
    tensor,
)
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from stars_fast import demo

GUIDE, JUDGE, HELD = 0, 1, 2  # who learns from a row; nobody learns from the held ones
HELD_REVIEWS = 2000
LONGEST = 160  # tokens of a message with its answer
ROW = 255  # tokens of a packed row, less one
Critic = LlamaForSequenceClassification


@dataclass
class Labelled:
    """Tokenised texts, whether each is good, and whose they are."""

    docs: list[np.ndarray]
    labels: np.ndarray  # 1 good, 0 bad
    owner: np.ndarray  # GUIDE, JUDGE or HELD

    def of(self, owner: int) -> tuple[list[np.ndarray], np.ndarray]:
        places = np.flatnonzero(self.owner == owner)
        return [self.docs[i] for i in places], self.labels[places]

    def good(self, owner: int) -> list[np.ndarray]:
        docs, labels = self.of(owner)
        return [doc for doc, label in zip(docs, labels, strict=True) if label]


# ------------------------------------------------------------------------------------------ data
def reviews(args: argparse.Namespace, tokenizer: Any) -> Labelled:
    """Labelled film reviews: some held, the others dealt to guide and judge in turn."""
    rows = read_reviews(args.imdb, "train", args.seed)
    owner = np.where(np.arange(len(rows)) < HELD_REVIEWS, HELD, np.arange(len(rows)) % 2)
    return Labelled(encode(tokenizer, [text for text, _ in rows]), np.array([label for _, label in rows]), owner)


def answers(args: argparse.Namespace, tokenizer: Any) -> Labelled:
    """DiaSafety's answers, a few long ones left out. All answers to one message have one owner."""
    rows = read_rows(args.diasafety, "train", args.seed)
    docs = encode(tokenizer, [exchange(row["context"], row["response"]) for row in rows])
    kept = [i for i, doc in enumerate(docs) if len(doc) <= LONGEST]
    rows = [rows[i] for i in kept]
    return Labelled(
        [docs[i] for i in kept],
        np.array([row["label"] == "Safe" for row in rows], int),
        np.array([owner_of(row["context"]) for row in rows]),
    )


def exchange(message: str, answer: str) -> str:
    """A message and its answer, as the dialogue policy reads and writes them."""
    return f"{one_line(message)}\n{one_line(answer)}"


def owner_of(message: str) -> int:
    """A tenth of the messages is held, the others are halved."""
    part = hashlib.blake2b(message.encode(), digest_size=8).digest()[0] % 20
    return HELD if part < 2 else part % 2


def dialogues(args: argparse.Namespace, tokenizer: Any) -> list[np.ndarray]:
    """Last exchanges of the chosen and the rejected dialogues."""
    texts = []
    for source in args.hh:
        for row in read_rows(source, "test", args.seed):
            texts += [last_exchange(row["chosen"]), last_exchange(row["rejected"])]
    return encode(tokenizer, texts)


def last_exchange(dialogue: str) -> str:
    before, _, answer = dialogue.rpartition("\n\nAssistant:")
    return exchange(before.rpartition("\n\nHuman:")[2], answer)


# ---------------------------------------------------------------------------------------- models
def first_layers(policy: LlamaForCausalLM, layers: int, kind: Any) -> Any:
    """A smaller model that starts from a policy's embeddings and first layers."""
    shape = {**policy.config.to_dict(), "num_hidden_layers": layers, "num_labels": 1}
    for derived in ("layer_types", "architectures", "id2label", "label2id"):
        shape.pop(derived, None)
    model = kind(type(policy.config)(**shape))
    model.load_state_dict(policy.state_dict(), strict=False)
    return model


def token_batches(docs: list[np.ndarray], seed: int) -> Callable[[], Batch]:
    rows = packed_rows(docs, seed, ROW)
    return lambda: (tensor(np.stack([next(rows) for _ in range(8)])),)


def answer_batches(docs: list[np.ndarray], labels: np.ndarray, seed: int) -> Iterator[Batch]:
    """Yield, for ever, padded texts with their label at every position; half of them lose ``</s>``."""
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(len(docs))
        # Neighbours in length share a batch, for little padding; a little noise keeps them from always being the same.
        by_length = sorted(order, key=lambda i: len(docs[i]) + rng.integers(4))
        chunks = np.array_split(by_length, max(1, len(docs) // 32))
        for chunk in [chunks[i] for i in rng.permutation(len(chunks))]:
            texts = [docs[i][:-1] if docs[i][-1] == EOS and rng.random() < 0.5 else docs[i] for i in chunk]
            goals = [np.full(len(text), 0.03 + 0.94 * labels[i]) for i, text in zip(chunk, texts, strict=True)]
            yield tensor(padded(texts)), tensor(padded(goals, 0), np.float32), tensor([len(text) for text in texts])


class Workshop:
    """Trains one model after the other; a finished one is loaded, not trained again."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.policy, _, self.tokenizer = demo.load()

    def train(self, name: str, model: Any, batches: Any, loss: Any, steps: int, lr: float, check: Any) -> Any:
        """Train up to a number of steps, export, and note what ``check`` finds. Returns the model, in float32."""
        checkpoint = self.args.work / f"{name.replace('/', '-')}.pt"
        target = self.args.out / name
        if (target / "training.json").exists():
            return type(model).from_pretrained(target, dtype=torch.float32)
        if (done := steps_done(checkpoint, True)) < steps:
            # A resumed run must not meet the same rows in the same order again.
            draw = batches(seed=self.args.seed + done)
            report = lambda: json.dumps(check(model))  # noqa: E731
            fit(model, draw, partial(loss, model), report, by_steps(steps), lr, checkpoint, True)
        state = export(model, checkpoint, target, torch.float32)
        self.tokenizer.save_pretrained(target)
        model.eval()
        size = sum(parameter.numel() for parameter in model.parameters())
        found = {"parameters": size, "steps": state["steps"], "tokens": state["tokens"], **check(model)}
        (target / "training.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        return model

    def probe(self, name: str, policy: Any, guide: Any, docs: list[np.ndarray], held: list[np.ndarray]) -> None:
        """Train and save the network that accepts or rejects tokens, unless it is there."""
        target = self.args.out / f"{name}.safetensors"
        if not target.exists():
            probe, found = train_probe(policy.eval(), guide.eval(), docs, held, 3, self.args.seed)
            save_file(probe.state_dict(), target)
            target.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

    def tune(self, name: str, model: Any, docs: list[np.ndarray], held: list[np.ndarray], steps: int) -> Any:
        """Next-token training."""
        batches = lambda seed: token_batches(docs, seed)  # noqa: E731
        loss = lambda model, batch: policy_loss(model, batch[0])  # noqa: E731
        return self.train(name, model, batches, loss, steps, 1e-3, lambda model: {"held_loss": held_loss(model, held)})


@torch.no_grad()
def held_loss(model: LlamaForCausalLM, docs: list[np.ndarray]) -> float:
    """Mean next-token loss in nats, packed like the training rows."""
    draw = token_batches(docs, 0)
    return float(np.mean([policy_loss(model, draw()[0]).item() for _ in range(12)]))


def accuracy(model: Critic, docs: list[np.ndarray], labels: np.ndarray) -> dict[str, float]:
    return {"held_accuracy": float((judge(model, docs) * (2 * labels - 1) > 0).mean())}


def prefix_accuracy(model: Critic, docs: list[np.ndarray], labels: np.ndarray) -> dict[str, float]:
    return {name: found[0] for name, found in judge_all(model, docs, labels).items()}


# ----------------------------------------------------------------------------------------- tasks
def sentiment(shop: Workshop) -> None:
    """Guide and judge of reviews, ``good``, and the draft."""
    args = shop.args
    data = reviews(args, shop.tokenizer)
    held = data.of(HELD)
    unlabelled = encode(shop.tokenizer, [text for text, _ in read_reviews(args.unlabelled, "unsupervised", args.seed)])
    check = lambda model: prefix_accuracy(model, held[0][:600], held[1][:600])  # noqa: E731

    def train_critic(name: str, owner: int, model: Critic, longest: int | None, steps: int, lr: float) -> Critic:
        def batches(seed: int) -> Callable[[], Batch]:
            docs, labels = data.of(owner)
            teacher = fit_teacher(docs, labels)
            if owner == GUIDE:
                give_vocabulary(model, shop.policy, teacher)
            docs = [doc[:longest] for doc in docs + unlabelled[owner::2]]
            labels = np.concatenate([labels, np.full(len(docs) - len(labels), -1)])
            return partial(next, labelled_batches(docs, labels, teacher, seed + owner))

        return shop.train(name, model, batches, reward_loss, steps, lr, check)

    torch.manual_seed(args.seed)
    guide = train_critic("sentiment/guide", GUIDE, new_reward(), None, 500, 3e-3)
    torch.manual_seed(args.seed + 1)
    train_critic("sentiment/judge", JUDGE, first_layers(shop.policy, 3, Critic), LONGEST, 250, 1e-3)
    good = first_layers(shop.policy, shop.policy.config.num_hidden_layers, LlamaForCausalLM)
    shop.tune("sentiment/good", good, data.good(GUIDE), [d for d, y in zip(*held, strict=True) if y], 120)
    shop.tune("sentiment/draft", first_layers(shop.policy, 1, LlamaForCausalLM), unlabelled, held[0], 150)
    shop.probe("sentiment/probe", shop.policy, guide, data.of(GUIDE)[0][:1200], held[0][:200])


def harmlessness(shop: Workshop) -> None:
    """The dialogue policy, then the same four models on its own ground."""
    args = shop.args
    data = answers(args, shop.tokenizer)
    held = data.of(HELD)
    spoken = data.of(GUIDE)[0] + data.of(JUDGE)[0] + [doc[:LONGEST] for doc in dialogues(args, shop.tokenizer)]
    whole = first_layers(shop.policy, shop.policy.config.num_hidden_layers, LlamaForCausalLM)
    policy = shop.tune("harmlessness/policy", whole, spoken, held[0], 550)

    def train_critic(name: str, owner: int, layers: int, steps: int) -> Critic:
        torch.manual_seed(args.seed + owner)
        batches = lambda seed: partial(next, answer_batches(*data.of(owner), seed + owner))  # noqa: E731
        model = first_layers(policy, layers, Critic)
        return shop.train(name, model, batches, reward_loss, steps, 1e-3, lambda model: accuracy(model, *held))

    guide = train_critic("harmlessness/guide", GUIDE, 2, 400)
    train_critic("harmlessness/judge", JUDGE, 3, 400)
    good = first_layers(policy, policy.config.num_hidden_layers, LlamaForCausalLM)
    shop.tune("harmlessness/good", good, data.good(GUIDE), [d for d, y in zip(*held, strict=True) if y], 120)
    shop.tune("harmlessness/draft", first_layers(policy, 1, LlamaForCausalLM), spoken, held[0], 150)
    shop.probe("harmlessness/probe", policy, guide, data.of(GUIDE)[0][:3000], held[0][:400])


def main() -> None:
    """Train the tasks asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--imdb", default="stanfordnlp/imdb", help="JSON lines with `text`, `label`, or a hub id")
    parser.add_argument("--unlabelled", default="stanfordnlp/imdb", help="JSON lines with `text`, or a hub id")
    parser.add_argument("--diasafety", default="thu-coai/diasafety", help="`context`, `response`, `label`, or a hub id")
    parser.add_argument("--hh", nargs="*", default=["Anthropic/hh-rlhf"], help="`chosen`, `rejected`, or hub ids")
    parser.add_argument("--out", type=Path, default=Path("eval_models"), help="where the models go")
    parser.add_argument("--work", type=Path, default=Path("eval_models_work"), help="checkpoints")
    parser.add_argument("--task", choices=["all", "sentiment", "harmlessness"], default="all")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    args.work.mkdir(parents=True, exist_ok=True)
    shop = Workshop(args)
    if args.task in ("all", "sentiment"):
        sentiment(shop)
    if args.task in ("all", "harmlessness"):
        harmlessness(shop)


if __name__ == "__main__":
    main()
