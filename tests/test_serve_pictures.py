"""Pictures of a request: which are read, which are refused, and that no answer tells of the server's files."""

import base64
import io
import os

import pytest
from PIL import Image
from serving import CONFIG, tiny_engine
from starlette.testclient import TestClient
from tiny_pictures import llava, llava_processor

from stars_fast import AsyncStarsEngine, StarsEngine
from stars_fast.serve import pictures, schema
from stars_fast.serve.app import create_app
from stars_fast.serve.service import CHATS, Service

SAID = {"type": "text", "text": "what is this?"}


def encoded(size=(4, 3), kind="PNG", mode="RGB", **options) -> bytes:
    file = io.BytesIO()
    Image.new(mode, size, "red").save(file, kind, **options)
    return file.getvalue()


def data_url(contents: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(contents).decode()}"


@pytest.fixture(scope="module")
def service():
    session = AsyncStarsEngine(tiny_engine())
    yield Service(session, "tiny", CONFIG)
    session.close()


@pytest.fixture
def seen(service, monkeypatch):
    """What the engine is asked for, which is as far as a request goes here."""
    asked = []

    def prepare(arguments):
        asked.append(arguments.prompts[0])
        raise ValueError("prompts[0] has been seen")

    monkeypatch.setattr(service.engine.engine, "processor", object())
    monkeypatch.setattr(service.engine.engine, "prepare", prepare)
    return asked


def post(service, *urls: str, **options):
    parts = [{"type": "image_url", "image_url": {"url": url, **options}} for url in urls]
    body = {"messages": [{"role": "user", "content": [*parts, SAID]}], "max_tokens": 3}
    return TestClient(create_app(service)).post("/v1/chat/completions", json=body)


def message(answer, status: int = 400) -> str:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["param"] is None or error["message"].startswith(error["param"])
    return error["message"]


@pytest.mark.parametrize("kind, mode", [("PNG", "RGBA"), ("JPEG", "L"), ("WEBP", "RGB"), ("GIF", "P")])
def test_a_picture_reaches_the_engine_opened_upright_and_in_rgb(service, seen, kind, mode):
    exif = Image.Exif()
    exif[274] = 6  # lies on its side
    turned = {"exif": exif} if kind == "JPEG" else {}
    assert "has been seen" in message(post(service, data_url(encoded((4, 3), kind, mode, **turned)), detail="low"))
    ((turn,),) = seen
    picture, said = turn["content"]
    assert picture["type"] == "image" and picture["image"].mode == "RGB"
    assert picture["image"].size == ((3, 4) if turned else (4, 3)) and said == SAID


def test_nothing_is_fetched_and_no_file_is_read_unless_a_folder_is_named(service, seen):
    for url, words in (
        ("https://example.org/a.png", "pictures are not fetched"),
        ("http://127.0.0.1:1/a.png", "pictures are not fetched"),
        ("ftp://example.org/a.png", "pictures are not fetched"),
        ("file:///etc/hostname", "no files are read here"),
        ("/etc/hostname", "no files are read here"),
        ("a.png", "no files are read here"),
        ("data:image/png,AAAA", "no data URL in base64"),
        ("data:image/png;base64,A*A", "no data URL in base64"),
        (data_url(b""), "no picture that can be read"),
        (data_url(encoded((99, 99))[:-40]), "no picture that can be read"),
        (data_url(encoded(kind="TIFF")), "give PNG, JPEG, WEBP, GIF"),
    ):
        told = message(post(service, url))
        assert words in told and "hostname" not in told and "example" not in told
    assert not seen


@pytest.fixture
def folder(service, tmp_path, monkeypatch):
    inside = tmp_path / "pictures"
    (inside / "deeper").mkdir(parents=True)
    for place in (inside / "a b.png", inside / "deeper" / "c.png", tmp_path / "secret.png"):
        place.write_bytes(encoded())
    (inside / "out.png").symlink_to(tmp_path / "secret.png")
    (inside / "in.png").symlink_to("deeper/c.png")
    (inside / "circle.png").symlink_to("circle.png")
    (inside / "notes.txt").write_text("PRIVATE")
    os.mkfifo(inside / "pipe.png")
    monkeypatch.setattr(service, "image_folder", inside)
    return inside


def test_files_of_the_folder_are_read(service, seen, folder):
    names = ["a b.png", "deeper/c.png", "./deeper/../a b.png", "in.png", f"{folder}/a b.png"]
    names += [f"file://{folder}/a%20b.png", f"file://localhost{folder}/deeper/c.png"]
    for name in names:
        assert "has been seen" in message(post(service, name)), name
    assert len(seen) == len(names)


def test_what_lies_outside_the_folder_is_told_like_what_is_not_there(service, seen, folder):
    outside = ["../secret.png", "out.png", f"{folder.parent}/secret.png", f"file://{folder.parent}/secret.png"]
    outside += [f"file://{folder}/%2e%2e/secret.png", "deeper/../../secret.png", f"file://else{folder}/a%20b.png"]
    missing = ["nothing.png", "", ".", "deeper", "circle.png", "a\0.png", "x" * 5000, "pipe.png"]
    told = {message(post(service, name)) for name in [*outside, *missing[:1], *missing[2:]]}
    assert told == {"messages[0].content[0].image_url.url: there is no such picture in the server's folder"}
    assert message(post(service, "notes.txt")).endswith("is no picture that can be read: give PNG, JPEG, WEBP, GIF")
    assert not seen


def test_sizes_are_bounded_before_a_picture_is_opened(service, seen, folder, monkeypatch):
    monkeypatch.setattr(pictures, "MOST_PIXELS", 20)
    assert "has been seen" in message(post(service, data_url(encoded((4, 5)))))
    for urls in ([data_url(encoded((4, 6)))], [data_url(encoded((4, 3)))] * 2):
        assert "at most 20 pixels" in message(post(service, *urls))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5)  # Pillow's own: an error above twice as many
    assert "at most 20 pixels" in message(post(service, data_url(encoded((4, 5)))))
    monkeypatch.undo()
    monkeypatch.setattr(service, "image_folder", folder)
    monkeypatch.setattr(service.engine.engine, "processor", object())
    monkeypatch.setattr(pictures, "MOST_BYTES", 10)
    assert "more than 10 bytes" in message(post(service, "a b.png"))
    many = [data_url(encoded((1, 1)))] * (pictures.MOST_PICTURES + 1)
    assert f"at most {pictures.MOST_PICTURES} pictures" in message(post(service, *many))
    monkeypatch.setattr(schema, "MOST_PARTS", 4)
    assert "has 5 messages and parts, more than 4" in message(post(service, *many[:3]))


def test_requests_wait_while_the_pictures_of_others_take_up_too_much(service, seen, monkeypatch):
    held, prepare = [], service.engine.engine.prepare
    monkeypatch.setattr(service.engine.engine, "prepare", lambda asked: held.append(service.pixels) or prepare(asked))
    for urls in ([data_url(encoded((4, 5)))] * 2, ["data:"], [data_url(encoded((4, 6)))]):
        post(service, *urls)
        assert service.pixels == 0  # once a request has ended
    assert held == [40, 24]
    monkeypatch.setattr(service, "pixels", pictures.MOST_HELD)
    answer = post(service, data_url(encoded()))
    assert "pictures of open requests" in message(answer, 503) and answer.headers["retry-after"] == "1"
    assert service.pixels == pictures.MOST_HELD and len(seen) == 2


def test_bodies_have_room_for_pictures_where_pictures_are_read(service, monkeypatch):
    most = service.max_body(CHATS)
    monkeypatch.setattr(service.engine.engine, "processor", object())
    assert service.max_body(CHATS) == most + pictures.MOST_BYTES and service.max_body("/v1/completions") == most
    assert "the body has more than" in message(post(service, "data:" + "A" * service.max_body(CHATS)), 413)


@pytest.mark.parametrize(
    "part, place, words",
    [
        ({"type": "image_url", "image_url": "data:"}, "image_url", " is text: give text, or a list of parts"),
        ({"type": "image_url"}, "image_url", " is missing"),
        ({"type": "image_url", "image_url": {"url": ""}}, "image_url.url", " is empty: give text, or"),
        ({"type": "video_url", "video_url": {"url": "x"}}, "type", "='video_url': give text, or a list of parts"),
        ({"text": "x"}, "type", " is missing"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_part_of_another_form_is_named(service, part, place, words):
    body = {"messages": [{"role": "user", "content": [SAID, part]}]}
    answer = TestClient(create_app(service)).post("/v1/chat/completions", json=body)
    assert message(answer).startswith(f"messages[0].content[1].{place}{words}")


def test_a_processor_reads_a_chat_once_also_where_its_room_is_asked_for(monkeypatch):
    processor, read = llava_processor(), []
    engine = StarsEngine(llava(), lambda completion_ids: [0.0] * len(completion_ids), processor=processor)
    make = type(processor).__call__
    monkeypatch.setattr(type(processor), "__call__", lambda *a, **k: read.append(k) or make(*a, **k))
    session = AsyncStarsEngine(engine, max_model_len=64)
    try:
        part = {"type": "image_url", "image_url": {"url": data_url(encoded((40, 30)))}}
        body = {"messages": [{"role": "user", "content": [part, SAID]}], "stars": {"method": "vanilla"}}
        answer = TestClient(create_app(Service(session, "tiny", CONFIG))).post(CHATS, json=body).json()
        assert len(read) == 1 and answer["usage"]["total_tokens"] <= 64
        assert answer["choices"][0]["finish_reason"] in ("stop", "length"), answer
    finally:
        session.close()


def test_a_policy_of_text_has_no_pictures(service):
    told = message(post(service, data_url(encoded())))
    assert told == "messages[0].content[0].type='image_url': the policy of this server reads no pictures"
