"""A small critic of texts, finished or not: a causal classifier that a bag-of-n-grams model teaches to read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from training import DEVICE, EOS, LENGTH, PAD, VOCAB, Batch, autocast, config, tensor
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

PREFIXES = (16, 32, 64, 128)
BUCKETS = 2**20  # for hashed n-grams
Teacher = Callable[[np.ndarray], np.ndarray]


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
