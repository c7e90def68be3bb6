"""One answer grows: its candidates are cut where its steps end, and scored as they would be returned."""

import pytest
from conftest import tiny_policy, tiny_tokenizer
from test_methods import CONFIG, PROMPTS, VOCAB, Sums, generate, make_engine

from stars_fast import StarsEngine
from stars_fast.inputs.arguments import Arguments
from stars_fast.methods import ParticleFilter


def test_steps_end_with_the_delimiter():
    engine = StarsEngine(tiny_policy(VOCAB, hidden=32), Sums(), tokenizer=tiny_tokenizer(VOCAB))
    out = generate(engine, ParticleFilter(particles=2, delimiter="w1"), segment_length=11)
    ends = {1, *range(10, 20), VOCAB - 1}  # w1 is in w10 to w19 too
    lengths = {len(segment.tokens) for segments in out.segments for segment in segments}
    assert len(lengths) > 3
    for segments in out.segments:
        assert all(segment.tokens[-1] in ends for segment in segments[:-1])
        assert not any(ends & set(segment.tokens[:-1]) for segment in segments)
    with pytest.raises(ValueError, match="delimiter='w1' needs a tokenizer"):
        generate(make_engine(), ParticleFilter(delimiter="w1"))


def test_a_candidate_that_a_criterion_ends_is_scored_as_far_as_that():
    scored, engine = [], make_engine()

    def score(completions):
        scored.extend((one.tokens, one.finished, one.eos) for one in completions)
        return [1.0] * len(completions)

    engine.reward.score = score
    settings = dict(candidates=3, alpha=1.0, num_return_sequences=4)
    out = engine.run(Arguments(PROMPTS, CONFIG, settings, seed=1, stop=lambda row: lambda ids: 7 in ids))
    stopped = [one for one in scored if 7 in one[0]]
    assert stopped and all(ids.index(7) == len(ids) - 1 and finished and not eos for ids, finished, eos in stopped)
    for ids, reason in zip(out.completions, out.finish_reasons, strict=True):
        assert (ids[-1] in (7, VOCAB - 1)) == (reason == "stop")
    assert any(ids[-1] == 7 for ids in out.completions)
