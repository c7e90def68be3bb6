"""Streamed text: its pieces make up the whole, and no character is told of before it is complete."""

from tiny_tokenizers import byte_bpe

from stars_fast.loop.request import PromptNode, Request
from stars_fast.loop.stream import new_events
from stars_fast.outputs import SegmentTrace
from stars_fast.rewards import Response, RewardPrompt


def test_a_character_split_between_segments_waits_for_the_rest():
    tokenizer = byte_bpe(300)
    text = "a 🐈 b"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    prompt = RewardPrompt(0, [1], [1])
    request = Request(0, 0, 0, PromptNode([1], prompt), 0, 0.0, 0.0, 1.0, Response(prompt))
    pieces = []
    for token in ids:
        request.tokens.append(token)
        request.segments.append(SegmentTrace([token], 0.0, 0.0, 1, True, 0.0))
        request.finish_reason = "length" if len(request.tokens) == len(ids) else None
        pieces += [event.text for event in new_events(request, tokenizer)]
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces) and "🐈" in pieces and "" in pieces
