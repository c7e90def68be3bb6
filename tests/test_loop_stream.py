"""Streamed text: its pieces make up the whole, and no character is told of before it is complete."""

import math

from test_text_decode import tokenizers
from tiny_tokenizers import byte_bpe

from stars_fast import StarsConfig
from stars_fast.loop.request import PromptNode, Request, Terms
from stars_fast.loop.stream import Progress, new_events, progress_bar
from stars_fast.methods import RSD, BestOfN, MetropolisHastings, OptimalStopping, Segments, Stars, Vanilla
from stars_fast.outputs import SegmentEvent, SegmentTrace, Stats
from stars_fast.policy.leaf import Sampling
from stars_fast.rewards import RewardPrompt


def streamed(tokenizer, ids, length):
    """The text of each event, where segments have ``length`` tokens."""
    prompt = RewardPrompt(0, [1], [1])
    sampled = Terms(StarsConfig(), Stars(), Segments(), Sampling(), Stats())
    request = Request(sampled, PromptNode([1], prompt), key=0, target=0.0, base=0.0, beta=1.0)
    pieces = []
    for start in range(0, len(ids), length):
        segment = ids[start : start + length]
        request.tokens.extend(segment)
        request.segments.append(SegmentTrace(segment, 0.0, 0.0, 1, True, 0.0))
        request.finish_reason = "length" if len(request.tokens) == len(ids) else None
        pieces += [event.text for event in new_events(request, tokenizer)]
    return pieces


def test_a_character_split_between_segments_waits_for_the_rest():
    tokenizer = byte_bpe(300)
    text = "a 🐈 b"
    pieces = streamed(tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"], 1)
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces) and "🐈" in pieces and "" in pieces


@tokenizers
def test_the_text_of_all_events_is_that_of_the_answer(tokenizer):
    ids = tokenizer(" a world is ' s , END ü🐈 b." * 4, add_special_tokens=False)["input_ids"]
    for end in range(len(ids) - 4, len(ids) + 1):
        for length in (1, 3, 16):
            pieces = streamed(tokenizer, ids[:end], length)
            assert "".join(pieces) == tokenizer.decode(ids[:end], skip_special_tokens=True)
            assert len(pieces) == -(-end // length)


def shown(method, segments):
    """What the bar says of candidates, for segments of (threshold, attempts, accepted)."""
    bar = Progress(method)
    for threshold, attempts, accepted in segments:
        bar.advance(SegmentEvent(0, 0, 0, SegmentTrace([1], 0.0, threshold, attempts, accepted, 0.0), None, None))
    return bar.choice


def test_the_bar_tells_of_candidates_in_the_terms_of_the_method():
    assert shown(Stars(), [(0.5, 3, True), (0.5, 5, False)]) == "acceptance 12%"
    assert shown(Stars(), [(-math.inf, 1, True)]) == "", "nothing was tested"
    assert shown(OptimalStopping(), [(0.5, 3, True), (0.5, 4, False)]) == "3.5 candidates a segment"
    assert shown(BestOfN(), [(math.inf, 4, False)]) == "4.0 candidates a segment"
    assert shown(RSD(draft="x"), [(0.5, 1, True), (math.nan, 2, False)]) == "50% of drafts kept"
    assert shown(MetropolisHastings(), [(math.nan, 7, True)]) == "" == shown(Vanilla(), [(-math.inf, 1, True)])


def test_the_bar_shows_targets_that_are_found(capsys):
    with progress_bar(True, 1, Stars(), "answers") as bar:
        bar.expect(2)
        bar.calibrated(40)
        bar.calibrated(24)
        bar.advance(SegmentEvent(0, 0, 0, None, None, "error"))
    shown = capsys.readouterr().err
    assert "calibrating" in shown and "2/2" in shown and "64 tokens drawn" in shown
    assert "answers" in shown and "1/1" in shown
    with progress_bar(True, 1, Stars()):
        pass
    assert "calibrating" not in capsys.readouterr().err
