"""Melodies that fit their lyrics: SongMASS's alignment (arXiv 2012.05168) as a reward, on a policy trained here.

A lyric is a line of syllables, capitals where they are stressed; a melody is notes and rests. Both are divided into
sentences by ``[sep]``, and sentence i of the melody belongs to sentence i of the lyric::

    la NA di [sep] O la [sep] =>    C1 E2 D1 R [sep] G2 E1 [sep]

SongMASS aligns the notes and syllables of a sentence by dynamic programming over its cross-attention, one syllable with
one or several notes. A decoder-only policy has no such attention: here the tokens alone say what an alignment costs. A
note that a syllable is drawn out over is cheap, one that no syllable has, or a syllable without a note, is not::

    python examples/songmass.py
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from training import make_optimizers, schedule
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from stars_fast import StarsConfig, StarsEngine
from stars_fast.methods import BestOfN, Segments, Stars, Vanilla

SEP, SUNG, REST = "[sep]", "=>", "R"
EOS = 1  # its id
LIGHT = ("la", "na", "di", "o")
NOTES = [pitch + length for pitch in "CDEGA" for length in "12"]  # of one beat or two
SENTENCES, SHORTEST, LONGEST = 3, 3, 9  # of a lyric; syllables of a sentence
MISSING, DRAWN_OUT, MISFIT, BREAK = 1.0, 0.5, 0.25, 0.25  # what the parts of an alignment cost


# The reward


def cost(syllables: Sequence[str], melody: Sequence[str], ended: bool) -> float:
    """The cheapest alignment of a sentence, in time len(syllables) * len(melody).

    Syllables and notes keep their order. A syllable takes a note, which misfits where it is stressed and the note
    short, or the other way round, and may be drawn out over further ones. A rest breaks the sentence unless it stands
    at its end. What is not ended is aligned with as many syllables as is cheapest.
    """
    while ended and melody and melody[-1] == REST:
        melody = melody[:-1]
    table = [MISSING * place for place in range(len(syllables) + 1)]  # by syllables that have been sung
    for note in melody:
        if note == REST:
            table = [before + BREAK for before in table]
            continue
        longer = [table[0] + MISSING]  # a note before the first syllable
        for place, syllable in enumerate(syllables, 1):
            fits = MISFIT * (syllable.isupper() != (note[-1] == "2"))
            longer.append(min(table[place - 1] + fits, table[place] + DRAWN_OUT, longer[-1] + MISSING))
        table = longer
    return table[-1] if ended else min(table)


def sentences(text: str) -> tuple[list[list[str]], list[str]]:
    """Those that have ended, and what follows them."""
    *ended, rest = (part.split() for part in text.split(SEP))
    return ended, rest


def singable(
    prompts: Sequence[str], completions: Sequence[str], completion_ids: Sequence[Sequence[int]]
) -> list[float]:
    """The reward: what aligning melodies with their lyrics costs, negated. Melodies may break off anywhere."""
    rewards = []
    for prompt, completion, ids in zip(prompts, completions, completion_ids, strict=True):
        lyric, (sung, rest) = sentences(prompt)[0], sentences(completion)
        over = list(ids[-1:]) == [EOS]
        melodies = [*sung, rest, *[[]] * (len(lyric) - len(sung) - 1)] if over else [*sung, rest]
        lines = [*lyric, *[[]] * len(melodies)]  # sentences beyond the lyric's have nothing to be sung to
        ended = (over or place < len(sung) for place in range(len(melodies)))
        rewards.append(-sum(map(cost, lines, melodies, ended)))
    return rewards


def matching(prompt: str, completion: str) -> float:
    """Share of the lyric's sentences with as many notes as syllables."""
    lyric, ended = sentences(prompt)[0], sentences(completion)[0]
    counts = [sum(note != REST for note in melody) for melody in ended]
    return sum(len(line) == count for line, count in zip(lyric, counts, strict=False)) / len(lyric)


# The policy


def song(chance: random.Random) -> tuple[str, str]:
    """A lyric, as the policy is asked for its melody, and one that is mostly right."""
    lyric, melody = [], []
    for _ in range(SENTENCES):
        for _ in range(chance.randint(SHORTEST, LONGEST)):
            stressed = chance.random() < 0.4
            lyric.append(chance.choice(LIGHT).upper() if stressed else chance.choice(LIGHT))
            for _ in range(1 + (chance.random() < 0.05)):
                melody.append(chance.choice("CDEGA") + ("2" if stressed != (chance.random() < 0.1) else "1"))
        lyric.append(SEP)
        melody += [REST] * (chance.random() < 0.3) + [SEP]
    return " ".join([*lyric, SUNG]), " ".join(melody)


def new_tokenizer() -> PreTrainedTokenizerFast:
    words = ["<s>", "</s>", "<pad>", SEP, SUNG, REST, *NOTES, *LIGHT, *map(str.upper, LIGHT)]
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def train(tokenizer: PreTrainedTokenizerFast, steps: int, seed: int) -> LlamaForCausalLM:
    """A policy that knows how melodies go, and miscounts."""
    torch.manual_seed(seed)
    chance = random.Random(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=48,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=128,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    optimizers = make_optimizers(model, 5e-3)
    for step in range(steps):
        songs = [f"{lyric} {melody} </s>" for lyric, melody in (song(chance) for _ in range(32))]
        ids = tokenizer(songs, padding=True, padding_side="right", return_tensors="pt").input_ids
        logits = model(ids[:, :-1], use_cache=False).logits
        F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), ignore_index=tokenizer.pad_token_id).backward()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * schedule(step / steps)
            optimizer.step()
            optimizer.zero_grad()
    return model.eval()


# What guidance does


@dataclass(frozen=True)
class Sung(Stars):
    """STARS with a sentence as a segment."""

    name: ClassVar[str] = "sung"

    def segments(self) -> Segments:
        return Segments(delimiter=SEP)


def compare(engine: StarsEngine, lyrics: Sequence[str], seed: int) -> dict[str, float]:
    """Print and return the share of sentences that match: plain, by STARS, and by best-of-n at STARS' tokens."""
    config = StarsConfig(max_new_tokens=SENTENCES * (LONGEST + 6), segment_length=LONGEST + 6)
    rule = {"target_reward": 0.0, "base_reward": 0.0, "beta": 0.25, "max_attempts": 16}
    shares = dict[str, float]()
    plain = engine.generate(lyrics, config, method=Vanilla(), seed=seed)
    guided = engine.generate(lyrics, config, method=Sung(), seed=seed, **rule)
    n = max(2, round(guided.stats["policy_tokens"] / plain.stats["policy_tokens"]))
    best = engine.generate(lyrics, config, method=BestOfN(n=n), seed=seed)
    for name, out in (("vanilla", plain), (f"best of {n}", best), ("stars, by the sentence", guided)):
        assert out.texts is not None
        shares[name] = sum(map(matching, lyrics, out.texts)) / len(lyrics)
        tokens, reward = out.stats["policy_tokens"] / len(lyrics), sum(out.rewards) / len(lyrics)
        print(f"{name:24} {shares[name]:.3f} of sentences match, reward {reward:6.2f}, {tokens:6.1f} tokens a melody")
    print(f"\n{lyrics[0]}\n{guided.texts[0] if guided.texts else ''}")
    return shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400, help="of training the policy: about a minute")
    parser.add_argument("--count", type=int, default=100, help="lyrics")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    tokenizer, held = new_tokenizer(), random.Random(args.seed + 1)
    policy = train(tokenizer, args.steps, args.seed)
    compare(StarsEngine(policy, singable, tokenizer=tokenizer), [song(held)[0] for _ in range(args.count)], args.seed)


if __name__ == "__main__":
    main()
