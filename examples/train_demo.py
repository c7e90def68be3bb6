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
import contextlib
import json
import lzma
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

BOS, EOS, PAD = 0, 1, 2  # the ids that the special tokens get, being first in the vocabulary
VOCAB, LENGTH, PREFIXES = 4096, 384, (16, 32, 64, 128)
BUCKETS = 2**20  # for hashed n-grams
HELD_UNLABELLED, HELD_TRAIN = 500, 2000  # reviews set aside to measure with
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Review = tuple[str, int]
Batch = tuple[torch.Tensor, ...]
Teacher = Callable[[np.ndarray], np.ndarray]


# ------------------------------------------------------------------------------------------ data
def read_reviews(source: str, split: str, seed: int) -> list[Review]:
    """Read reviews from JSON lines (``.xz`` or plain) or from the hub, in a random order."""
    if Path(source).exists():
        opener: Any = lzma.open if source.endswith(".xz") else open
        with opener(source, "rt", encoding="utf-8") as lines:
            rows: Any = [json.loads(line) for line in lines]
    else:
        from datasets import load_dataset  # only needed without local files

        rows = load_dataset(source, split=split)
    # Line breaks carry little in these texts, and one-line samples are easier to show.
    reviews = [(re.sub(r"(<br\s*/?>|\s)+", " ", row["text"]).strip(), int(row.get("label", -1))) for row in rows]
    return [reviews[i] for i in np.random.default_rng(seed).permutation(len(reviews))]


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
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[np.ndarray]:
    """Tokenise texts as ``<s> ... </s>``, two bytes per token."""
    encodings = tokenizer.backend_tokenizer.encode_batch(texts)
    return [np.array([*e.ids, EOS], dtype=np.uint16) for e in encodings]


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


# -------------------------------------------------------------------------------------- training
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


def fit(
    model: torch.nn.Module,
    batches: Callable[[], Batch],
    loss_of: Callable[[Batch], torch.Tensor],
    evaluate: Callable[[], str],
    minutes: float,
    lr: float,
    checkpoint: Path,
    resume: bool,
) -> None:
    """Train for the given minutes, with a checkpoint and an evaluation every four."""
    optimizers = make_optimizers(model, lr)
    state: dict[str, float] = {"seconds": 0.0, "steps": 0, "tokens": 0, "loss": float("nan")}
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
    while state["seconds"] < 60 * minutes:
        progress = state["seconds"] / (60 * minutes)
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
        if state["seconds"] >= next_save or state["seconds"] >= 60 * minutes:
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


# ---------------------------------------------------------------------------------------- policy
def new_policy() -> LlamaForCausalLM:
    """Give 4.2 million parameters."""
    model: Any = LlamaForCausalLM(config(256, 5, 576, 4, head_dim=64))
    return model.to(DEVICE)


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
        args.minutes_policy,
        5e-3,
        checkpoint,
        args.resume,
    )


# ---------------------------------------------------------------------------------------- reward
def ngrams(doc: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Hash a text's distinct runs of one, two and three tokens; also tell where each first ends."""
    a = doc.astype(np.int64)
    pairs = (a[:-1] * 4099 + a[1:] + 7_000_003) * 2_654_435_761
    triples = ((a[:-2] * 65_537 + a[1:-1] * 257 + a[2:]) * 31 + 77_003_201) * 2_654_435_789
    runs = np.concatenate([a, pairs, triples]) % BUCKETS
    ends = np.concatenate([np.arange(i, len(a)) for i in range(3)])
    runs, first = np.unique(runs, return_index=True)
    return runs, ends[first]


def expit(x: Any) -> Any:
    """Turn log-odds into a probability."""
    return 1 / (1 + np.exp(-x))


def fit_teacher(docs: list[np.ndarray], labels: np.ndarray) -> Teacher:
    """Fit a bag-of-n-grams logistic model on naive Bayes log-ratios.

    Returns a function that gives the log-odds after each token of a text.  The model is as
    accurate as a small network and takes seconds, so its opinions on unlabelled reviews and on
    unfinished ones teach the network far more quickly than the labels alone.
    """
    bags = [ngrams(doc)[0] for doc in docs]
    counts = np.ones((2, BUCKETS))
    for bag, label in zip(bags, labels, strict=True):
        counts[int(label), bag] += 1
    ratio = tensor(np.log(counts[1] / counts[1].sum() * counts[0].sum() / counts[0]), np.float32)
    weight = torch.full((BUCKETS, 1), 0.02, device=DEVICE, requires_grad=True)
    optimizer = torch.optim.Adam([weight], lr=1e-3)
    rng = np.random.default_rng(0)
    for _ in range(3):
        for part in np.array_split(rng.permutation(len(bags)), max(1, len(bags) // 256)):
            flat = tensor(np.concatenate([bags[i] for i in part]))
            starts = tensor(np.cumsum([0, *(len(bags[i]) for i in part[:-1])]))
            scores = F.embedding_bag(flat, weight, starts, mode="sum", per_sample_weights=ratio[flat])
            loss = F.binary_cross_entropy_with_logits(scores[:, 0], tensor(labels[part], np.float32))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    final = (weight.detach()[:, 0] * ratio).cpu().numpy()

    def running(doc: np.ndarray) -> np.ndarray:
        runs, ends = ngrams(doc)
        return np.cumsum(np.bincount(ends, weights=final[runs], minlength=len(doc)))

    return running


def new_reward() -> LlamaForSequenceClassification:
    """Give 1.2 million parameters and one output."""
    model: Any = LlamaForSequenceClassification(config(128, 4, 320, 2, head_dim=64, num_labels=1))
    return model.to(DEVICE)


@torch.no_grad()
def give_vocabulary(model: LlamaForSequenceClassification, policy: LlamaForCausalLM, teacher: Teacher) -> None:
    """Start the reward's embeddings from what the policy and the teacher know about each token.

    One coordinate is the teacher's opinion of the token, the others are the principal components
    of the policy's embeddings: far cheaper than teaching the reward to read.
    """
    known = policy.model.embed_tokens.weight.float()
    table = model.model.embed_tokens.weight
    _, _, axes = torch.linalg.svd(known - known.mean(0), full_matrices=False)
    components = (known - known.mean(0)) @ axes[: table.shape[1] - 1].T
    opinions = tensor([teacher(np.array([i]))[0] for i in range(VOCAB)], np.float32)[:, None]
    # Tenfold because one coordinate must be heard among all the others.
    table.copy_(0.02 * torch.cat([10 * opinions / opinions.std(), components / components.std()], 1))


def reward_loss(model: LlamaForSequenceClassification, batch: Batch) -> torch.Tensor:
    """Log loss of the verdict after each token.

    A causal model gives one score per position, so each review teaches all its prefixes at once;
    the last position counts as much as all the others together.
    """
    ids, targets, lengths = batch
    with autocast():
        inputs = F.dropout(model.model.embed_tokens(ids), 0.1, training=model.training)
        hidden = model.model(inputs_embeds=inputs, use_cache=False).last_hidden_state
        scores = model.score(hidden)[..., 0].float()
    places = torch.arange(ids.shape[1], device=DEVICE)
    each = F.binary_cross_entropy_with_logits(scores, targets, reduction="none")
    mean = (each * (places < lengths[:, None])).sum(1) / lengths
    return (mean + each.gather(1, lengths[:, None] - 1)[:, 0]).mean() / 2


def window(doc: np.ndarray, tail: bool) -> np.ndarray:
    """Return a review's first tokens, or ``<s>`` and its last ones."""
    return doc[:LENGTH] if not tail else np.concatenate([doc[:1], doc[1:][1 - LENGTH :]])


def padded(rows: list[np.ndarray], value: float = PAD) -> np.ndarray:
    """Pad on the right, to a multiple of 32."""
    width = -(-max(map(len, rows)) // 32) * 32
    return np.stack([np.pad(row, (0, width - len(row)), constant_values=value) for row in rows])


def labelled_batches(docs: list[np.ndarray], labels: np.ndarray, teacher: Teacher, seed: int) -> Iterator[Batch]:
    """Yield, for ever, batches of reviews of similar lengths with a target for each position.

    A target is half what the whole review says (its label or, without one, the teacher's opinion
    of it) and half the teacher's opinion of the text so far.
    """
    rng = np.random.default_rng(seed)
    known = labels >= 0
    # Held-out reviews show the teacher too modest by this factor.
    opinions = [np.nan if k else expit(1.6 * teacher(doc)[-1]) for k, doc in zip(known, docs, strict=True)]
    whole = np.where(known, 0.03 + 0.94 * labels, opinions)
    while True:
        for chunk in np.array_split(rng.permutation(len(docs)), max(1, len(docs) // 1600)):
            # Half of the windows lose `</s>`: text that is scored may or may not have it.
            texts = [window(docs[i], rng.random() < 0.4) for i in chunk]
            texts = [t[:-1] if t[-1] == EOS and rng.random() < 0.5 else t for t in texts]
            by_length = np.argsort([len(t) for t in texts])
            for g in rng.permutation(-(-len(texts) // 16)):
                group = by_length[16 * g : 16 * g + 16]
                part = [texts[i] for i in group]
                goals = [0.5 * whole[chunk[i]] + 0.5 * expit(1.6 * teacher(texts[i])) for i in group]
                yield tensor(padded(part)), tensor(padded(goals, 0), np.float32), tensor([len(t) for t in part])


@torch.no_grad()
def judge(model: LlamaForSequenceClassification, docs: list[np.ndarray]) -> np.ndarray:
    """Score texts the way users do: padded, with an attention mask, pooled by the model."""
    scores = []
    for i in range(0, len(docs), 32):
        ids = tensor(padded(docs[i : i + 32]))
        scores.append(model(ids, attention_mask=(ids != PAD).long()).logits.squeeze(1).float().cpu())
    return torch.cat(scores).numpy()


def judge_all(
    model: LlamaForSequenceClassification, docs: list[np.ndarray], labels: np.ndarray
) -> dict[str, tuple[float, float]]:
    """Accuracy and log loss on prefixes, on the first window and on first and last together."""
    first, last = (judge(model, [window(d, tail) for d in docs]) for tail in (False, True))
    views = {f"first {n} tokens": judge(model, [d[: n + 1] for d in docs]) for n in PREFIXES}
    views[f"first {LENGTH} tokens"] = first
    views[f"first {LENGTH}, without `</s>`"] = judge(model, [d[:-1][:LENGTH] for d in docs])
    views[f"whole (mean of first and last {LENGTH})"] = (first + last) / 2
    sign = 2 * labels - 1
    return {name: (float((s * sign > 0).mean()), float(np.logaddexp(0, -s * sign).mean())) for name, s in views.items()}


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
        args.minutes_reward,
        3e-3,
        checkpoint,
        args.resume,
    )


# ---------------------------------------------------------------------------------------- report
def save_half(model: Any, checkpoint: Path, target: Path) -> dict[str, float]:
    """Write a checkpoint's model as float16 safetensors; return how far its training went."""
    saved = torch.load(checkpoint, map_location=DEVICE)
    model.load_state_dict(saved["model"])
    model = model.half()
    model.config.use_cache = True
    if isinstance(model, LlamaForCausalLM):
        model.generation_config = GenerationConfig(bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD)
    model.save_pretrained(target)
    return dict(saved["state"])


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
    p_state = save_half(new_policy(), args.work / "policy.pt", policy_dir)
    r_state = save_half(new_reward(), args.work / "reward.pt", reward_dir)
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
