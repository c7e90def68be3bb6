"""Train the two small demonstration models of ``stars_fast.demo`` from film reviews.

The policy continues a review from its first words; the reward gives the log-odds that a
(possibly unfinished) review is positive.  Everything, tokenizer included, is learned from the
Large Movie Review Dataset on an ordinary CPU in about an hour and a half::

    python examples/train_demo.py --out demo --minutes-policy 65 --minutes-reward 25

Schedules follow the clock, not a number of steps, so that training ends annealed and on time on
any machine; for that reason two runs agree closely but not bit for bit.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from critics import fit_teacher, give_vocabulary, judge, judge_all, labelled_batches, new_reward, reward_loss
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from training import (
    BOS,
    DEVICE,
    EOS,
    LENGTH,
    VOCAB,
    autocast,
    by_clock,
    config,
    encode,
    export,
    fit,
    packed_rows,
    policy_held_out,
    policy_loss,
    read_reviews,
    steps_done,
    tensor,
)
from transformers import LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

HELD_UNLABELLED, HELD_TRAIN = 500, 2000  # reviews set aside to measure with


@dataclass
class Corpus:
    """Tokenised reviews and labels, with the parts set aside to measure with."""

    unlabelled: list[np.ndarray]
    held_unlabelled: list[np.ndarray]
    train: list[np.ndarray]
    train_labels: np.ndarray
    held_train: list[np.ndarray]
    held_train_labels: np.ndarray
    test: list[np.ndarray]
    test_labels: np.ndarray
    shown: list[str]


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Learn a byte-level BPE that puts ``<s>`` in front of each text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="left",
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def load_corpus(args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> Corpus:
    """Read, shuffle, divide and tokenise the three sets of reviews."""
    unlabelled = read_reviews(args.unlabelled, "unsupervised", args.seed)
    train = read_reviews(args.train, "train", args.seed)
    test = read_reviews(args.prompts, "test", args.seed)[:2000]
    docs, labelled, tested = (encode(tokenizer, [text for text, _ in part]) for part in (unlabelled, train, test))
    labels, test_labels = (np.array([label for _, label in part]) for part in (train, test))
    return Corpus(
        unlabelled=docs[HELD_UNLABELLED:],
        held_unlabelled=docs[:HELD_UNLABELLED],
        train=labelled[HELD_TRAIN:],
        train_labels=labels[HELD_TRAIN:],
        held_train=labelled[:HELD_TRAIN],
        held_train_labels=labels[:HELD_TRAIN],
        test=tested,
        test_labels=test_labels,
        shown=[text for text, _ in test[:3]],
    )


def new_policy() -> LlamaForCausalLM:
    """Give 4.2 million parameters."""
    model: Any = LlamaForCausalLM(config(256, 5, 576, 4, head_dim=64))
    return model.to(DEVICE)


def train_policy(args: argparse.Namespace, corpus: Corpus) -> None:
    """Train the policy on everything but the reviews set aside for measuring it."""
    torch.manual_seed(args.seed)
    model = new_policy()
    checkpoint = args.work / "policy.pt"
    # A resumed run must not meet the same reviews in the same order again.
    seed = args.seed + steps_done(checkpoint, args.resume)
    rows = packed_rows(corpus.unlabelled + corpus.train + corpus.held_train, seed)
    step_loss = torch.compile(policy_loss) if args.compile else policy_loss
    fit(
        model,
        lambda: (tensor(np.stack([next(rows) for _ in range(16)])),),
        lambda batch: step_loss(model, batch[0]),
        lambda: f"held-out {policy_held_out(model, corpus.held_unlabelled):.4f}",
        by_clock(args.minutes_policy),
        5e-3,
        checkpoint,
        args.resume,
    )


def train_reward(args: argparse.Namespace, corpus: Corpus) -> None:
    """Train the reward on labels and on the teacher's opinions."""
    teacher = fit_teacher(corpus.train, corpus.train_labels)
    docs = corpus.train + corpus.unlabelled
    labels = np.concatenate([corpus.train_labels, np.full(len(corpus.unlabelled), -1)])
    torch.manual_seed(args.seed)
    model, policy = new_reward(), new_policy()
    policy.load_state_dict(torch.load(args.work / "policy.pt", map_location=DEVICE)["model"])
    give_vocabulary(model, policy, teacher)
    checkpoint = args.work / "reward.pt"
    seed = args.seed + steps_done(checkpoint, args.resume)
    batches = labelled_batches(docs, labels, teacher, seed)

    def report() -> str:  # on a few reviews, to lose little time
        right = 2 * corpus.held_train_labels[:400] - 1
        with autocast():
            views = [judge(model, [d[:n] for d in corpus.held_train[:400]]) for n in (65, LENGTH)]
        return " ".join(f"{(v * right > 0).mean():.3f}/{np.logaddexp(0, -v * right).mean():.3f}" for v in views)

    fit(
        model,
        lambda: next(batches),
        lambda batch: reward_loss(model, batch),
        report,
        by_clock(args.minutes_reward),
        3e-3,
        checkpoint,
        args.resume,
    )


def samples(policy: Any, tokenizer: PreTrainedTokenizerFast, texts: list[str], seed: int) -> list[str]:
    """Continue the first six words of each text by at most 96 tokens."""
    torch.manual_seed(seed)
    out = []
    for text in texts:
        opening = " ".join(text.split()[:6])
        inputs = tokenizer(opening, return_tensors="pt").to(DEVICE)
        ids = policy.generate(**inputs, do_sample=True, temperature=1.0, top_k=50, max_new_tokens=96)[0]
        rest = tokenizer.decode(ids, skip_special_tokens=True)[len(opening) :]
        out.append(f"**{opening}**{rest}" + ("" if ids[-1] == EOS else " ..."))
    return out


def write_card(args: argparse.Namespace, corpus: Corpus) -> None:
    """Export both models, load them back, measure them and write what was found."""
    policy_dir, reward_dir = args.out / "policy", args.out / "reward"
    p_state = export(new_policy(), args.work / "policy.pt", policy_dir, torch.float16)
    r_state = export(new_reward(), args.work / "reward.pt", reward_dir, torch.float16)
    policy: Any = LlamaForCausalLM.from_pretrained(policy_dir, dtype=torch.float32)
    reward: Any = LlamaForSequenceClassification.from_pretrained(reward_dir, dtype=torch.float32)
    policy, reward = policy.to(DEVICE).eval(), reward.to(DEVICE).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(policy_dir)
    tokenizer.save_pretrained(reward_dir)  # so that each folder is complete
    held = judge_all(reward, corpus.held_train, corpus.held_train_labels)
    test = judge_all(reward, corpus.test, corpus.test_labels)
    table = "\n".join(f"| {name} | {held[name][0]:.3f} | {held[name][1]:.3f} | {test[name][0]:.3f} |" for name in held)
    shown = "\n\n".join(f"> {s}" for s in samples(policy, tokenizer, corpus.shown, args.seed))
    card = CARD.format(
        p_params=policy.num_parameters(),
        r_params=reward.num_parameters(),
        vocab=VOCAB,
        length=LENGTH,
        threads=torch.get_num_threads(),
        p_tokens=p_state["tokens"] / 1e6,
        r_tokens=r_state["tokens"] / 1e6,
        p_minutes=p_state["seconds"] / 60,
        r_minutes=r_state["seconds"] / 60,
        p_train=p_state["loss"],
        p_held=policy_held_out(policy, corpus.held_unlabelled),
        held_docs=len(corpus.held_unlabelled),
        held_labelled=len(corpus.held_train),
        test_docs=len(corpus.test),
        table=table,
        samples=shown,
    )
    (args.out / "MODEL_CARD.md").write_text(card, encoding="utf-8")
    print(card)


CARD = """\
# Demonstration models

Two small models made by `examples/train_demo.py` for the demonstrations, tests and documentation
of `stars_fast`. They are far too small for anything else.

| | policy | reward |
|---|---|---|
| class | `LlamaForCausalLM` | `LlamaForSequenceClassification`, one output |
| task | continue a film review | log-odds that a review, finished or not, is positive |
| parameters | {p_params:,} | {r_params:,} |
| tokens seen in training | {p_tokens:.1f} million | {r_tokens:.1f} million, padding included |
| training time on {threads} (shared) CPU cores | {p_minutes:.0f} minutes | {r_minutes:.0f} minutes |

Both use one byte-level BPE tokenizer of {vocab} entries, which puts `<s>` in front of a text;
`</s>` ends a review and `<pad>` pads on the right. Training windows have {length} tokens, so do not
go much beyond that many positions. The weights are stored as float16.

## Data and licence

Large Movie Review Dataset v1.0 (hub id `stanfordnlp/imdb`): the unlabelled split for the tokenizer,
the unlabelled and the training split for both models. The reward also learns from the opinions that
a bag-of-n-grams logistic model, fitted to the labelled reviews, has of the unlabelled and of the
unfinished ones, and starts from the principal components of the policy's embeddings. The data come
without a stated licence and are offered for research; please cite

> Andrew L. Maas, Raymond E. Daly, Peter T. Pham, Dan Huang, Andrew Y. Ng and Christopher Potts.
> *Learning Word Vectors for Sentiment Analysis.* ACL 2011.

## Policy

Next-token loss (nats per token): {p_train:.3f} in training (running mean at the end), {p_held:.3f} on
{held_docs} reviews set aside. Three of its texts (temperature 1.0, top-k 50, opening in bold, not
selected):

{samples}

## Reward

Held out: {held_labelled} reviews of the training split, which share films with those trained on.
Test: {test_docs} reviews of the test split, whose films are new.

| scored part | held-out accuracy | held-out log loss | test accuracy |
|---|---|---|---|
{table}

For text longer than {length} tokens, score the first and the last {length} tokens and take the mean,
or truncate.

## Limits

The policy writes plausible phrases, not sense: plots, names and opinions are invented, contradict
each other, and repeat whatever bias and rudeness the reviews contain. The reward knows film
reviews in English and nothing else, and can be fooled easily. For demonstrations only.
"""


def main() -> None:
    """Run the stages asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    hub = "stanfordnlp/imdb"
    parser.add_argument("--unlabelled", default=hub, help="JSON lines with `text`, or a hub id")
    parser.add_argument("--train", default=hub, help="JSON lines with `text`, `label`, or a hub id")
    parser.add_argument("--prompts", default=hub, help="held-out reviews, or a hub id")
    parser.add_argument("--out", type=Path, default=Path("demo"), help="where the models go")
    parser.add_argument("--work", type=Path, default=Path("demo_work"), help="checkpoints")
    parser.add_argument("--stage", default="all", help="all, tokenizer, policy, reward or report")
    parser.add_argument("--minutes-policy", type=float, default=65.0)
    parser.add_argument("--minutes-reward", type=float, default=25.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoints")
    parser.add_argument("--compile", action="store_true", help="torch.compile (needs a compiler)")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if args.stage in ("all", "tokenizer"):
        reviews = read_reviews(args.unlabelled, "unsupervised", args.seed)
        train_tokenizer([text for text, _ in reviews]).save_pretrained(args.out / "policy")
    corpus = load_corpus(args, PreTrainedTokenizerFast.from_pretrained(args.out / "policy"))
    if args.stage in ("all", "policy"):
        train_policy(args, corpus)
    if args.stage in ("all", "reward"):
        train_reward(args, corpus)
    if args.stage in ("all", "report"):
        write_card(args, corpus)


if __name__ == "__main__":
    main()
