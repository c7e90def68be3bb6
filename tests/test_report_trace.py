"""A trace can be read back, and looked at: in a terminal and in a browser, whatever stands in its texts."""

import json
import math
import re
import shutil
import subprocess
from base64 import b64encode
from hashlib import sha256

import pytest
from conftest import sum_reward, tiny_policy, tiny_reward
from test_methods import EVERY
from tiny_tokenizers import byte_bpe, models_for
from typer.testing import CliRunner

from stars_fast import StarsConfig, StarsEngine
from stars_fast.cli import app
from stars_fast.report import trace_lines
from stars_fast.report.page import page
from stars_fast.report.trace import load_trace, number

pytestmark = pytest.mark.filterwarnings("ignore:method=.* itself", "ignore:.* of .* requests failed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NASTY = "</script><script>document.title='caught'</script><!-- <b>w3</b> {{js}} 日本語 🙂 \u2028"
CONFIG = StarsConfig(segment_length=4, max_attempts=5, target_reward=1.0, base_reward=0.0, max_new_tokens=14)


@pytest.fixture(scope="module")
def spoken():
    """A trace whose texts cut through characters, beside prompts of every kind."""
    tokenizer = byte_bpe(300)
    policy, reward = models_for(tokenizer)
    engine = StarsEngine(policy, reward, tokenizer=tokenizer, reward_tokenizer="policy")
    return engine.generate([NASTY, "plain", "日本語"], CONFIG, seed=3, num_return_sequences=2, trace=True)


@pytest.fixture(scope="module")
def saved(spoken, tmp_path_factory):
    path = tmp_path_factory.mktemp("traces") / "run.jsonl"
    spoken.save_trace(path)
    return path


def some(engine, method, **settings):
    return engine.generate([[5, 6], [7]], CONFIG, seed=0, method=method, trace=True, **settings)


@pytest.fixture(scope="module")
def every(tmp_path_factory, tokenizer32):
    """An answer of each method in one file, and one that broke off."""
    folder, lines = tmp_path_factory.mktemp("methods"), []
    engine = StarsEngine(tiny_policy(32, hidden=32), tiny_reward(32, hidden=32), tokenizer=tokenizer32)
    for name, method in EVERY.items():
        some(engine, method).save_trace(folder / name)
        lines += (folder / name).read_text().splitlines(True)

    def fails(completions):
        return [ValueError("</script> no") if len(one.split()) > 6 else 0.5 for one in completions]

    broken = StarsEngine(tiny_policy(32, hidden=32), fails, tokenizer=tokenizer32)
    for method in ("stars", EVERY["particle_filter"], EVERY["best_of_n"], EVERY["metropolis_hastings"]):
        some(broken, method).save_trace(folder / "broken")
        lines += (folder / "broken").read_text().splitlines(True)
    path = folder / "every.jsonl"
    path.write_text("".join(lines))
    return path


def test_a_record_holds_the_answer_and_its_segments(spoken, saved):
    records = load_trace(saved)
    assert [(one["row"], one["prompt_index"], one["sample_index"]) for one in records] == [
        (row, row // 2, row % 2) for row in range(6)
    ]
    for row, record in enumerate(records):
        segments = spoken.segments[row]
        assert "".join(segment["text"] for segment in record["segments"]) == record["text"] == spoken.texts[row]
        assert [segment["tokens"] for segment in record["segments"]] == [segment.tokens for segment in segments]
        assert record["tokens"] == spoken.completions[row]
        assert [number(one["reward"]) for one in record["segments"]] == pytest.approx([s.reward for s in segments])
        assert (number(record["target"]), number(record["base"]), record["seed"]) == (1.0, 0.5, 3)
        assert record["settings"]["segment_length"] == 4 and record["method"] == "stars"
        for told, segment in zip(record["segments"], segments, strict=True):
            assert [one["tokens"] for one in told["candidates"]] == [one.tokens for one in segment.candidates]
            assert [one["verdict"] for one in told["candidates"]] == [one.verdict for one in segment.candidates]
    assert records[0]["prompt"] == records[0]["prompt_text"] == NASTY


def test_numbers_that_are_not_finite_come_back(every):
    rewards = [number(one["reward"]) for record in load_trace(every) for one in record["segments"]]
    limits = [number(one["threshold"]) for record in load_trace(every) for one in record["segments"]]
    assert any(map(math.isnan, rewards)) and any(map(math.isfinite, rewards))
    assert {math.inf, -math.inf} <= set(limits)


def test_a_candidate_reads_behind_what_it_continues(every):
    """Words alone, so that a text is that of its tokens, whatever is before it."""
    for record in load_trace(every):
        for one in [*record["unfinished"], *(one for segment in record["segments"] for one in segment["candidates"])]:
            assert one["text"].split() == [f"w{token}" for token in one["tokens"] if token < 31]


def test_an_answer_that_broke_off_keeps_what_it_had_drawn(every):
    broken = [record for record in load_trace(every) if record["error"]]
    assert len(broken) == 8 and all("</script> no" in record["error"] for record in broken)
    assert all(any(one["verdict"] == "error" for one in record["unfinished"]) for record in broken)
    assert all(record["reward"] is None for record in broken)


def test_the_file_is_whole_or_what_it_was(spoken, tmp_path, monkeypatch):
    path = tmp_path / "run.jsonl"
    path.write_text("before")
    monkeypatch.setattr(trace_lines, "to_line", lambda record: 1 / (3 - record["row"]) and "{}\n")
    with pytest.raises(ZeroDivisionError):
        spoken.save_trace(path)
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


def test_an_output_without_a_trace_and_a_file_that_is_none_are_refused(saved, tmp_path):
    engine = StarsEngine(tiny_policy(32, hidden=32), tiny_reward(32, hidden=32))
    with pytest.raises(ValueError, match="trace=True"):
        engine.generate([[5]], CONFIG, seed=0).save_trace(tmp_path / "none")
    path = tmp_path / "bad.jsonl"
    for text, said in (
        ("", "empty"),
        (saved.read_text().split("\n")[0] + "\n{", "line 2, is not JSON"),
        ('{"id": 1}\n', "line 1.*schema is None, not 'stars_fast.trace/1'"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=said):
            load_trace(path)


def invoke(*arguments):
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, ["trace", *map(str, arguments)])


def test_the_terminal_shows_segments_and_on_request_what_was_not_kept(every):
    plain, whole = invoke(every, "--row", 0), invoke(every, "--candidates")
    assert plain.exit_code == whole.exit_code == 0, plain.output + whole.output
    assert "rejected" not in plain.output and "</script> no" in plain.output
    assert all(name in plain.output for name in EVERY)
    assert all(f" {verdict} " in whole.output for verdict in ("accepted", "rejected", "fallback", "unseen", "error"))
    for arguments in (
        (every, every),
        (every, every, every, "--html", "x"),
        (every, "--html", every),
        (every, "--row", 9),
        ("nowhere",),
    ):
        assert invoke(*arguments).exit_code == 2


def test_a_line_that_lacks_what_is_shown_is_refused_in_a_line(saved, tmp_path):
    path, whole = tmp_path / "bad.jsonl", saved.read_text().split("\n")[0]
    for change, said in (
        (lambda one: [one.pop(name) for name in list(one) if name != "schema"], "the answer lacks 'settings'"),
        (lambda one: one["segments"][1].pop("attempts"), "segment 2 lacks 'attempts'"),
        (lambda one: one["segments"][0]["candidates"].append(3), "a candidate is a int"),
        (
            lambda one: one["segments"][0]["candidates"][0].update(attempt="first"),
            "a candidate has a str for 'attempt'",
        ),
        (lambda one: one.update(target="high"), "the answer has a str for 'target'"),
        (lambda one: one.update(target=math.nan), "JSON has no NaN"),
        (lambda one: one.update(prompt=[math.inf]), "JSON has no Infinity"),
    ):
        record = json.loads(whole)
        change(record)
        path.write_text(json.dumps(record))
        with pytest.raises(ValueError, match=f"line 1, is n.*{said}"):
            load_trace(path)
    path.write_text(whole.replace('"target": 1.0', '"target": 1e999'))
    for options in ((), ("--html", tmp_path / "page.html")):
        refused = invoke(path, *options)
        assert refused.exit_code == 2 and "1e999 is beyond all bounds" in refused.stderr
        assert len(refused.stderr.splitlines()) == 1 and "Traceback" not in refused.stderr


def test_a_terminal_gets_no_controls_and_no_markup_from_a_trace(saved, tmp_path):
    controls, record = "\x1b]52;c;aGk=\x07\x9b31m", json.loads(saved.read_text().split("\n")[0])
    for one in (record, record["segments"][0], record["segments"][0]["candidates"][0]):
        for name in ("prompt_text", "text", "method", "finish_reason", "error", "verdict"):
            if name in one:
                one[name] = f"[/red]{name}{controls}"
    path = tmp_path / "controls.jsonl"
    path.write_text(json.dumps(record) + "\n" + saved.read_text())
    shown = invoke(path, "--candidates")
    assert shown.exit_code == 0, shown.output
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", shown.stdout)
    assert all(
        f"[/red]{name}\ufffd]52;c;" in shown.stdout for name in ("prompt_text", "text", "method", "finish_reason")
    )


def test_half_a_surrogate_pair_that_an_error_quotes_is_saved_read_again_and_shown(policy32, tmp_path):
    out = StarsEngine(policy32, sum_reward).generate([[1, 2]], CONFIG, seed=0, trace=True)
    out.errors[0] = "half a pair \ud800"
    out.save_trace(tmp_path / "half.jsonl")
    assert load_trace(tmp_path / "half.jsonl")[0]["error"] == out.errors[0]
    assert "half a pair \ufffd" in invoke(tmp_path / "half.jsonl").stdout
    html = tmp_path / "half.html"
    assert invoke(tmp_path / "half.jsonl", "--html", html).exit_code == 0
    assert "half a pair \\ud800" in html.read_text("utf-8")


def test_nothing_in_a_text_ends_the_pages_data(saved):
    text = page([("</title>", load_trace(saved))])
    assert text.count("</script>") == 2 and "</title>" not in text.split("</head>")[1]
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])
    assert data["runs"][0]["answers"][0]["prompt_text"] == NASTY
    assert not re.search(r"""(?:src|href)\s*=|https?://(?!www\.w3\.org/2000/svg)|@import|url\(""", text)


# Go everywhere, as somebody who clicks does, and tell what there was.
TOUR = r"""<script>
const told = { answers: [], problem: null };
const all = (selector) => [...document.querySelectorAll(`main ${selector}`)];
const press = (key) => document.body.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
const escaped = (c) => "\\u" + c.charCodeAt(0).toString(16).padStart(4, "0");
try {
  for (let i = 0; i < items.length; i += 1) {
    go(i);
    told.answers.push({
      spans: all(".seg").length, rows: all(".cand").length, drawings: all("figure").length,
      prompt: all(".prompt")[0].textContent, error: all(".error").map((one) => one.textContent)[0] ?? null,
    });
    const clicked = [".band", ".lost", ".leaf", "button.cand"].flatMap((one) => all(one).slice(0, 2));
    for (const node of clicked) node.dispatchEvent(new Event("click"));
  }
  go(0);
  for (let i = 0; i < 20; i += 1) press("ArrowLeft");
  press("ArrowRight");
  told.pressed = Number(all('.seg[aria-pressed="true"]')[0].dataset.segment);
  press("j");
  const many = Array.from({ length: 300000 }, (_, i) => i);
  told.span = span([0], many)[1] > 1e5 && h("p", {}, many).childNodes.length === many.length;
  told.current = Number(document.querySelector('[aria-current="true"]').dataset.item);
} catch (error) { told.problem = String(error.stack || error); }
told.title = document.title;
document.body.replaceChildren(JSON.stringify(told).replace(/[^ -~]|[&<>]/g, escaped));
</script>"""


def toured(text, tmp_path):
    """What a browser makes of the page, at every answer."""
    if CHROMIUM is None:
        pytest.skip("no chromium")
    path = tmp_path / "page.html"
    # The tour's digest beside that of the page's own script; no other may run.
    script = TOUR.removeprefix("<script>").removesuffix("</script>")
    allowed = b64encode(sha256(script.encode()).digest()).decode()
    text = text.replace("script-src ", f"script-src 'sha256-{allowed}' ", 1)
    foreign = "<script>document.title = 'foreign'</script>"
    path.write_text(text.replace("</body>", foreign + TOUR + "</body>"), "utf-8")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run([*command, "--dump-dom", path.as_uri()], capture_output=True, timeout=60, check=True)
    told = json.loads(re.search(r"<body>(.*?)</body>", done.stdout.decode(), re.S)[1])
    assert told["problem"] is None and told["span"]
    return told


def test_a_browser_shows_the_answers_of_all_methods(every, saved, tmp_path):
    records = [*load_trace(saved), *load_trace(every)]
    told = toured(page([("all", records)]), tmp_path)
    assert told["title"] == "all" and told["pressed"] == 1 and told["current"] == 1
    assert [one["prompt"] for one in told["answers"]] == [record["prompt_text"] for record in records]
    assert [one["error"] for one in told["answers"]] == [record["error"] for record in records]
    for one, record in zip(told["answers"], records, strict=True):
        assert one["spans"] == len(record["segments"]) + bool(record["unfinished"])
        assert one["rows"] > 0
        if record["loop"] == "population" and not record["error"]:
            assert one["drawings"] == 1 + (len(record["segments"]) > 1)  # the tree, and the curve


def test_a_browser_compares_two_runs(saved, tmp_path):
    records = load_trace(saved)
    told = toured(page([("one", records), ("other", records[::-1][:4])]), tmp_path)
    assert told["title"] == "one and other" and len(told["answers"]) == 6
    both = [2 * len(record["segments"]) for record in records]
    assert [one["spans"] for one in told["answers"]][2:] == both[2:]
    assert [one["spans"] for one in told["answers"]][:2] == [both[0] // 2, both[1] // 2]
