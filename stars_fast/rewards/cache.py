"""What a scorer has encoded of prompts, responses and candidates: one model's tree, as a cache of id lists."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from stars_fast.rewards.base import Completion, Response, RewardPrompt
from stars_fast.text.chat import common_prefix
from stars_fast.text.media import Media, text_inputs
from stars_fast.tree.attention import plugged
from stars_fast.tree.memory import default_tokens
from stars_fast.tree.model import TreeModel
from stars_fast.tree.prefixes import first_of_each

# Tokens of one packed scoring pass; more are scored in several.
_MAX_PACKED = 16384


@dataclass(eq=False)
class Encoded:
    """Ids whose keys and values lie in the tree, and the node that holds them. A cache: it may be short, or gone."""

    node: int = -1
    ids: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)  # one per id, of scorers that keep them


class Text(NamedTuple):
    """A completion in the model's ids."""

    completion: Completion
    ids: list[int]  # up to and including the answer
    tail: list[int]  # encoded behind it and rolled back
    wanted: Sequence[int] = ()  # positions whose features are read; none: the last, tail included


class Row(NamedTuple):
    """A completion in a packed pass."""

    place: int  # among the texts asked for
    known: int  # how many of its ids the tree held: the others are new
    positions: list[int]  # those wanted that were not known, in the order of their features
    encoded: Encoded  # of its ids; ``values`` are those of the known ones, for the scorer to extend


class TreeCache:
    """Encodes completions over one model's tree: prompt and accepted text once, a candidate's own tokens, its tail.

    What prompts begin with stays in the tree for others that begin alike, until room is needed
    (:class:`stars_fast.tree.prefixes.Prefixes`). A prompt with media is read whole, with those of its batch, and its
    ids alone are never taken for it: texts of the prompt begin with its run.

    Parameters
    ----------
    model : TreeModel
        Its body may be a base model, whose features are hidden states, or one with a language-model head: logits.
    lag : int
        How many last ids of a text are left to the pass that encodes the next: 1 for scorers that ask for the
        prediction of each id, which is made at the one before. Goes without tails.
    max_packed : int, optional
        Most tokens of one pass.
    """

    def __init__(self, model: TreeModel, lag: int = 0, max_packed: int | None = None) -> None:
        self.model = model
        self.lag = lag
        self.max_packed = max_packed
        self.tokens = 0  # encoded since begin
        self._has_logits = model.body is model.model
        self._runs: dict[RewardPrompt, list[int]] = {}
        self._answered: dict[RewardPrompt, None] = {}  # with an answer that is over: the last, perhaps
        self._media: dict[RewardPrompt, Media] = {}  # of those runs whose ids do not say all
        self._prefixes: dict[RewardPrompt, Encoded] = {}
        self._responses: dict[Response, Encoded] = {}
        self._completions: dict[Completion, Encoded] = {}
        self._plugged = ExitStack()

    def begin(self, rows: int, longest: int, kv_cache_tokens: int | None) -> None:
        """Make room for ``rows`` texts of up to ``longest`` tokens."""
        self.tokens = 0
        self.model.allocate(kv_cache_tokens or default_tokens(self.model, rows, longest), longest)
        self._plugged.enter_context(plugged(self.model.model))

    def fits(self, rows: int, longest: int) -> bool:
        """Whether there is the room that :meth:`begin` would make."""
        return default_tokens(self.model, rows, longest) < self.model.tree.capacity

    def open(self, runs: Mapping[RewardPrompt, list[int]], media: Mapping[RewardPrompt, Media] | None = None) -> None:
        """Texts may begin with these runs of ids from now on, which are rows of ``media`` where there are any."""
        for prompt, run in runs.items():
            if prompt not in self._runs:
                self._runs[prompt], self._prefixes[prompt] = run, Encoded()
                if media and prompt in media:
                    self._media[prompt] = media[prompt]
                elif run and self.model.reads_whole:
                    self._media[prompt] = Media(text_inputs(run))

    def forget(self, prompt: RewardPrompt) -> None:
        """No text begins with the prompt's run any more. What is encoded of it is kept until room is needed."""
        self._runs.pop(prompt, None)
        self._media.pop(prompt, None)
        self._answered.pop(prompt, None)
        self._drop(self._prefixes.pop(prompt, None))

    def end(self) -> None:
        """Release everything."""
        for held_by in (self._runs, self._answered, self._media, self._prefixes, self._responses, self._completions):
            held_by.clear()
        self.model.clear()
        self._plugged.close()

    def commit(self, completion: Completion) -> None:
        """The completion's text becomes its response's, unless it was dropped: then the next pass encodes it again."""
        encoded = self._completions.pop(completion, None)
        if encoded is not None:
            self._let_go(completion.response)
            self._responses[completion.response] = encoded

    def discard(self, completion: Completion) -> None:
        """Forget the completion."""
        self._drop(self._completions.pop(completion, None))

    def close(self, response: Response) -> None:
        """Forget the response."""
        self._let_go(response)
        if response.prompt in self._prefixes:
            self._answered[response.prompt] = None

    def _let_go(self, response: Response) -> None:
        self._drop(self._responses.pop(response, None))

    def fork(self, response: Response, twin: Response) -> None:
        """``twin`` goes on from what is encoded of ``response``."""
        if response in self._responses:
            self._share(self._responses[response], twin)

    def encode(self, texts: Sequence[Text]) -> Iterator[tuple[list[Row], torch.Tensor]]:
        """Encode what is new of each text, in as many packed passes as tokens and slots ask for.

        Yields
        ------
        (rows, features)
            Rows of the pass and, row by row and position by position, hidden states or logits ``[F, X]``.
        """
        self._join_prompts([text.completion.response for text in texts])
        for places, known in self._batches(texts):
            yield self._pass(texts, places, known)

    def read_ahead(self, prompts: Sequence[RewardPrompt], most: int) -> list[RewardPrompt]:
        """Encode at most ``most`` tokens of these prompts, the first ones' first. Returns those that are not done.

        What finds no free slots is left to the pass that needs it. Media are read first, and of their batches at least
        one, however large: they come whole.
        """
        unread = self._unread(dict.fromkeys(prompts))
        left, most, full = self._read_batches_ahead(unread, most)
        unread = [prompt for prompt in unread if prompt not in self._media]
        now = set(self._first_of_each(unread))
        wanted = min(most, sum(len(self._missing(prompt)) for prompt in now))
        full = not self._has_room(wanted) or full
        room = min(wanted, self.model.tree.free_slots)
        pieces: dict[RewardPrompt, list[int]] = {}
        for prompt in unread:
            run = self._missing(prompt)
            if piece := run[:room] if prompt in now else []:
                pieces[prompt] = piece
            room -= len(piece)
            if len(piece) < len(run):
                left.append(prompt)
        if pieces:
            self._encode_prompts(pieces)
        return [] if full else left

    def _read_batches_ahead(self, prompts: Sequence[RewardPrompt], most: int) -> tuple[list[RewardPrompt], int, bool]:
        """Those of the prompts with media that wait, how many tokens are left, and whether some found no free slots."""
        left, allowed, full = list[RewardPrompt](), most, False
        for batch in self._batches_of(prompts):
            tokens = sum(len(self._missing(prompt)) for prompt in batch)
            if tokens > allowed and allowed < most:
                left += batch
            elif self._has_room(tokens):
                self._read_media(batch)
                allowed -= tokens
            else:
                full = True
        return left, max(allowed, 0), full

    def _batches_of(self, prompts: Iterable[RewardPrompt]) -> list[list[RewardPrompt]]:
        """Those of the prompts with media, by what a processor made of them together."""
        batches: dict[int, list[RewardPrompt]] = {}
        for prompt in prompts:
            if prompt in self._media:
                batches.setdefault(id(self._media[prompt].inputs), []).append(prompt)
        return list(batches.values())

    def _unread(self, prompts: Iterable[RewardPrompt]) -> list[RewardPrompt]:
        """Those of the prompts that are not in the tree as a whole; they go on from the longest run that is kept."""
        unread = [prompt for prompt in prompts if self._missing(prompt)]
        for prompt in unread:
            if prompt in self._media:  # the same ids may stand for other pictures
                continue
            run = self._runs[prompt]
            node, length = self.model.prefixes.longest(run, len(run) - self.lag)
            if length > len(self._prefixes[prompt].ids):
                self._hold(prompt, node, length)
            else:
                self.model.release(node)
        return [prompt for prompt in unread if self._missing(prompt)]

    def _first_of_each(self, prompts: Sequence[RewardPrompt]) -> list[RewardPrompt]:
        """Those to encode now: the others begin alike, and go on from there."""
        texts = [prompt for prompt in prompts if prompt not in self._media]
        known = [len(self._prefixes[prompt].ids) for prompt in texts]
        now = {texts[place] for place in first_of_each([self._runs[prompt] for prompt in texts], known)}
        return [prompt for prompt in prompts if prompt in now or prompt in self._media]

    def _missing(self, prompt: RewardPrompt) -> list[int]:
        """The prompt's ids, but for the last ``lag``, that are not in the tree."""
        run, known = self._runs[prompt], len(self._prefixes[prompt].ids)
        return run[known : len(run) - self.lag] if known < len(run) else []

    def _encode_prompts(self, pieces: Mapping[RewardPrompt, list[int]]) -> None:
        """Append to what is in the tree of each prompt; of those with media, to nothing."""
        for batch in self._batches_of(pieces):
            self._read_media(batch)
        pieces = {prompt: piece for prompt, piece in pieces.items() if prompt not in self._media}
        if not pieces:
            return
        logits = {"logits_to_keep": 0} if self._has_logits else {}
        before = [self._prefixes[prompt] for prompt in pieces]
        nodes, _ = self.model.extend([encoded.node for encoded in before], list(pieces.values()), **logits)
        for (prompt, piece), old, node in zip(pieces.items(), before, nodes, strict=True):
            self.tokens += len(piece)
            self._hold(prompt, node, len(old.ids) + len(piece))
            if not self._missing(prompt):
                run = self._runs[prompt]
                self.model.prefixes.keep(run[: len(run) - self.lag], node)

    def _read_media(self, batch: Sequence[RewardPrompt]) -> None:
        """Read these prompts, which are rows of one batch, in one pass."""
        media = [self._media[prompt] for prompt in batch]
        logits = {"logits_to_keep": 1} if self._has_logits else {}
        rows = [one.row for one in media]
        nodes, _ = self.model.read_media(media[0].inputs, rows, self.lag, **logits)
        for prompt, node in zip(batch, nodes, strict=True):
            length = len(self._runs[prompt]) - self.lag
            self.tokens += length
            self._hold(prompt, node, length)

    def _hold(self, prompt: RewardPrompt, node: int, length: int) -> None:
        """The node, which holds so many ids of the prompt's run, is what is in the tree of it."""
        run = self._runs[prompt]
        ids = run if length == len(run) - self.lag else run[:length]
        self._drop(self._prefixes[prompt])
        self._prefixes[prompt] = Encoded(node, ids, [0.0] * len(ids))

    def _join_prompts(self, responses: Sequence[Response]) -> None:
        """Give each new response the node of its prompt, encoding what of prompts is not in the tree."""
        fresh = [one for one in dict.fromkeys(responses) if one not in self._responses or self._is_cut_short(one)]
        waiting = list(dict.fromkeys(response.prompt for response in fresh))
        while waiting := self._unread(waiting):
            now = {prompt: len(self._missing(prompt)) for prompt in self._first_of_each(waiting)}
            longest, *others = sorted(now, key=now.__getitem__, reverse=True)
            batch, tokens = [longest], now[longest]
            for prompt in others:
                if self._has_room(tokens + now[prompt]):
                    batch.append(prompt)
                    tokens += now[prompt]
            self._make_room(tokens, keep=set(), reading=longest)
            self._encode_prompts({prompt: self._missing(prompt) for prompt in batch})
            waiting = [prompt for prompt in waiting if prompt not in batch]
        for response in fresh:
            self._let_go(response)
            self._share(self._prefixes[response.prompt], response)

    def _is_cut_short(self, response: Response) -> bool:
        """Whether less than its prompt with media is in the tree of it: what lacks cannot be encoded from ids."""
        prompt, held = response.prompt, self._responses[response]
        return prompt in self._media and len(held.ids) < len(self._runs[prompt])

    def _share(self, encoded: Encoded, response: Response) -> None:
        self._responses[response] = Encoded(self.model.retain(encoded.node), encoded.ids, encoded.values)

    def _batches(self, texts: Sequence[Text]) -> Iterator[tuple[range, dict[Response, int]]]:
        """Places of texts that one packed pass and the free slots can hold, at least one each; and how many ids all of
        a response's texts among them have in the tree and need not encode.
        """
        limit, start = self.max_packed or _MAX_PACKED, 0
        while start < len(texts):
            stop, new = start, 0
            known: dict[Response, int] = {}
            rows: Counter[Response] = Counter()
            while stop < len(texts):
                response, text = texts[stop].completion.response, texts[stop]
                if self._is_cut_short(response):  # its media made way for others', and they make way for it
                    if stop > start:
                        break
                    self._join_prompts([response])
                shared = self._shared_by(response, text)
                before = known.get(response, shared)
                after = min(before, shared)
                grown = new + len(text.ids) + len(text.tail) - after + (before - after) * rows[response]
                if stop > start and (grown > limit or not self._has_room(grown)):
                    break
                stop, new, known[response] = stop + 1, grown, after
                rows[response] += 1
            self._make_room(new, keep=set(known))
            yield range(start, stop), known
            start = stop

    def _pass(
        self, texts: Sequence[Text], places: Sequence[int], known: Mapping[Response, int]
    ) -> tuple[list[Row], torch.Tensor]:
        groups: dict[Response, list[int]] = {}
        for place in places:
            groups.setdefault(texts[place].completion.response, []).append(place)
        order = [(place, response) for response, group in groups.items() for place in group]
        for response, length in known.items():
            self._rewind(response, length)
        branches, asked, index, packed = [], [], [], 0
        for place, response in order:
            _, ids, tail, wanted = texts[place]
            first = max(known[response] - self.lag, 0)
            branches.append(ids[first : len(ids) - self.lag] + tail)
            asked.append([at for at in wanted or (len(ids) + len(tail) - 1,) if at >= first])
            index += [packed + at - first for at in asked[-1]]
            packed += len(branches[-1])
        features, nodes = self._forward(groups, branches, index)
        rows = []
        for (place, response), node, read in zip(order, nodes, asked, strict=True):
            values = self._responses[response].values[: known[response]]
            rows.append(Row(place, known[response], read, self._remember(texts[place], node, values)))
        return rows, features

    def _forward(
        self, groups: Mapping[Response, list[int]], branches: list[list[int]], places: list[int]
    ) -> tuple[torch.Tensor, list[int]]:
        """Features at these places of the packed row, and the branches' nodes."""
        rows = [len(group) for group in groups.values()]
        leaves = [self._responses[response].node for response in groups]
        index = torch.tensor(places, dtype=torch.int64, device=self.model.device)
        logits = {"logits_to_keep": index} if self._has_logits else {}
        nodes, output, _ = self.model.encode(leaves, rows, branches, **logits)
        self.tokens += sum(len(branch) for branch in branches)
        return output.logits[0] if self._has_logits else output.last_hidden_state[0, index], nodes

    def _rewind(self, response: Response, known: int) -> None:
        """Shorten what is in the tree to so many ids."""
        encoded = self._responses[response]
        if known < len(encoded.ids):
            kept = max(known - self.lag, 0)
            node = self.model.tree.cut(encoded.node, kept) if kept else -1
            self.model.release(encoded.node)
            self._responses[response] = Encoded(node, encoded.ids[:known], encoded.values[:known])

    def _shared_by(self, response: Response, text: Text) -> int:
        """How many of its ids the text has in the tree and need not encode: without a tail, the last is encoded."""
        return min(common_prefix(self._responses[response].ids, text.ids), len(text.ids) - (not text.tail))

    def _remember(self, text: Text, branch: int, values: list[float]) -> Encoded:
        """Keep the branch without its tail, until the completion is committed or discarded."""
        tree, length = self.model.tree, len(text.ids) - self.lag
        self.discard(text.completion)
        node = branch
        if tree.length(branch) > length:
            node = tree.cut(branch, length)
            tree.release(branch)
        encoded = self._completions[text.completion] = Encoded(node, text.ids, values)
        return encoded

    def _has_room(self, slots: int) -> bool:
        """Whether so many slots are free, once kept prefixes have made way."""
        tree = self.model.tree
        if tree.free_slots < slots:
            self.model.prefixes.make_room(slots)
        return tree.free_slots >= slots

    def _make_room(self, slots: int, keep: set[Response], reading: RewardPrompt | None = None) -> None:
        """Drop cached runs until ``slots`` are free: kept prefixes, prompts that were answered, rejected and waiting
        candidates, idle prompts, other responses.
        """
        while self._answered and not self._has_room(slots):
            prompt = next(iter(self._answered))
            del self._answered[prompt]
            if prompt is not reading:
                self._drop(self._prefixes[prompt])
        if self._has_room(slots):
            return
        for completion in list(self._completions):
            self.discard(completion)
        idle = [encoded for prompt, encoded in self._prefixes.items() if encoded.node >= 0 and prompt is not reading]
        others = [encoded for response, encoded in self._responses.items() if response not in keep]
        for encoded in idle + others:
            if self.model.tree.free_slots >= slots:
                return
            self._drop(encoded)

    def _drop(self, encoded: Encoded | None) -> None:
        if encoded is not None:
            self.model.release(encoded.node)
            encoded.node, encoded.ids, encoded.values = -1, [], []
