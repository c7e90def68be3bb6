"""Streamed text: its pieces make up the whole, and no character is told of before it is complete."""

from test_text_decode import tokenizers
from tiny_tokenizers import byte_bpe

from stars_fast import StarsConfig
from stars_fast.loop.request import PromptNode, Request, Terms
from stars_fast.loop.stream import new_events
from stars_fast.methods import Segments, Stars
from stars_fast.outputs import SegmentTrace, Stats
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
