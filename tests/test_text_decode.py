"""Text read piece by piece, or behind other text, is the text that decoding everything gives."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from stars_fast import demo
from stars_fast.inputs.hooks import stop_test
from stars_fast.rewards import Completion, Response, RewardPrompt
from stars_fast.text.decode import CONTEXT_TOKENS, TextStream, continuation

WORDS = ["a", "b", "END", "is", "n't", "'", "s", ".", ",", "!", "é", "world"]


def of(tokenizer, **options):
    tokenizer.add_special_tokens([AddedToken("</s>", special=True, normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token=None, **options)


def byte_level():
    """A token for every byte."""
    tokenizer = Tokenizer(
        models.BPE({letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, [])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return of(tokenizer)


def metaspace(decoder, bytes_too):
    """As SentencePiece has it: words with their space in front, single letters, and bytes for what is left."""
    pieces = [*(f"<0x{byte:02X}>" for byte in range(256 if bytes_too else 0)), "▁", "▁▁", *WORDS]
    pieces += [f"▁{word}" for word in WORDS] + list("ENDworlist")
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(
        models.Unigram([(piece, -float(len(vocabulary) - i)) for i, piece in enumerate(vocabulary)], 0, bytes_too)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoder
    return of(tokenizer)


def word_piece(clean_up, decoder_cleans=False):
    vocabulary = {piece: i for i, piece in enumerate(["[UNK]", *WORDS, *(f"##{word}" for word in WORDS)])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(cleanup=decoder_cleans)
    return of(tokenizer, clean_up_tokenization_spaces=clean_up)


LLAMA = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
)
TOKENIZERS = {
    "demo": demo.load()[2],
    "bytes": byte_level(),
    "metaspace": metaspace(decoders.Metaspace(prepend_scheme="first"), False),
    "llama": metaspace(LLAMA, True),
    "word pieces": word_piece(False),
    "cleaned word pieces": word_piece(True),
    "word pieces that their decoder cleans": word_piece(False, True),
}
tokenizers = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS.keys())


def ids_of(tokenizer):
    """Ids of a text, cut anywhere; and, where bytes do not make others unreadable, any ids, also many times."""
    pieces = st.lists(st.sampled_from([*WORDS, " ", "  ", "\n", "ü🐈", "日本" * 6]), max_size=50)
    ids = pieces.map(lambda text: tokenizer("".join(text), add_special_tokens=False)["input_ids"])
    written = st.tuples(ids, st.integers(0, 3)).map(lambda drawn: drawn[0][: len(drawn[0]) - drawn[1]])
    if tokenizer is TOKENIZERS["llama"]:
        return written
    runs = st.lists(st.tuples(st.integers(0, len(tokenizer) - 1), st.sampled_from([1, 1, 1, 20])), max_size=50)
    return written | runs.map(lambda drawn: [token for token, times in drawn for _ in range(times)])


@tokenizers
@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_pieces_add_up_to_the_whole_text(tokenizer, data):
    ids = data.draw(ids_of(tokenizer))
    stream, pieces, end = TextStream(), [], 0
    while end < len(ids):
        end += data.draw(st.integers(1, 5))
        pieces.append(stream.piece(tokenizer, ids[:end], last=end >= len(ids))[0])
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)


@tokenizers
def test_a_stream_decodes_the_end_of_a_text_alone(tokenizer, monkeypatch):
    ids = tokenizer(" a world is" * 100, add_special_tokens=False)["input_ids"]
    lengths, decode, stream = [], tokenizer.decode, TextStream()
    monkeypatch.setattr(tokenizer, "decode", lambda ids, **options: lengths.append(len(ids)) or decode(ids, **options))
    for end in range(5, len(ids), 5):
        stream.piece(tokenizer, ids[:end], last=False)
    assert max(lengths) <= 2 * CONTEXT_TOKENS + 5


@pytest.mark.parametrize("name", ["demo", "metaspace", "llama"])
def test_a_text_keeps_its_space_behind_another(name):
    tokenizer = TOKENIZERS[name]
    context, ids = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("a", "a world"))
    assert continuation(tokenizer, context, ids[len(context) :], True) == " world"


@tokenizers
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_stop_strings_and_rewards_see_the_text_behind_the_prompt(tokenizer, data):
    """That is what decoding prompt and answer together adds, unless the cut between them goes through a character."""
    ids = [token for token in data.draw(ids_of(tokenizer)) if token not in tokenizer.all_special_ids]
    cut = data.draw(st.integers(0, len(ids)))
    context, answer = ids[:cut], ids[cut:]
    text = continuation(tokenizer, context, answer, True)
    before, whole = (tokenizer.decode(tokens, skip_special_tokens=True) for tokens in (context, ids))
    if text is None:
        return
    completion = Completion(Response(RewardPrompt(0, context, context)), answer, True, tokenizer=tokenizer)
    assert completion.continuation == text
    assert text in tokenizer.decode([*context[-60:], *answer], skip_special_tokens=True)
    if whole.startswith(before) and not before.endswith("\ufffd"):
        assert whole[len(before) :] == text
    if text.strip():
        stop = data.draw(st.integers(0, len(text) - 1))
        string = text[stop : stop + data.draw(st.integers(1, 6))]
        ends = stop_test([string], tokenizer, context)
        seen = [n for n in range(1, len(answer) + 1) if ends(answer[:n])]
        assert seen, (string, text)
