"""What clients do wrong, by accident or on purpose: each gets its sentence, and the next one its answer."""

from __future__ import annotations

import io
import json
import socket
import struct
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from serving import WEB, client, data_url, message, picture_bytes, running

from aki.apps.serve.limits import Limits
from aki.apps.serve.schema import ChatRequest

LIMITS = Limits(max_body_mb=1, max_images=2, max_megapixels=1, max_tokens=50, max_waiting=4, max_batch=2, patience=1.0)
CHAT = [message("how many digits are red?", data_url(picture_bytes(40)))]
PATH = "/v1/chat/completions"


@pytest.fixture(scope="module")
def strict(engine):
    with running(engine, LIMITS) as port:
        yield port


@pytest.fixture(scope="module")
def another(strict):
    """Another client, and what it is told before anything here happens."""
    own = client(strict)

    def ask():
        return own.chat.completions.create(model="tiny", messages=CHAT, max_tokens=8).choices[0].message.content

    return ask, ask()


@pytest.fixture(autouse=True)
def _others_are_answered_as_before(another):
    """Whatever a test here does to the server, another client's answer stays the same."""
    yield
    ask, before = another
    assert ask() == before


def post(port, body, **options):
    content = body if isinstance(body, bytes | str) else json.dumps(body)
    headers = {"Content-Type": "application/json"} | options.pop("headers", {})
    return WEB.post(f"http://127.0.0.1:{port}{PATH}", content=content, headers=headers, timeout=20, **options)


def asked(messages=CHAT, **options):
    return {"model": "tiny", "messages": messages, **options}


def refused(answer, status, *words):
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert len(error["message"]) < 500
    for word in words:
        assert word in error["message"] + str(error["code"]), error
    return error


def png_of(width, height):
    """A small file that says it has so many pixels, and has them: rows of zeros."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compressobj(9)
    data = b"".join(rows.compress(bytes(1 + width // 8)) for _ in range(height)) + rows.flush()
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


class TestSizes:
    def test_body(self, strict):
        big = asked([message("x" * 1_100_000)])
        refused(post(strict, big), 413, "1 MB", "body_too_large")

    def test_body_without_a_length(self, strict):
        def chunks():
            for _ in range(12):
                yield b" " * 100_000

        answer = WEB.post(f"http://127.0.0.1:{strict}{PATH}", content=chunks(), timeout=20)
        refused(answer, 413, "1 MB", "body_too_large")

    def test_images(self, strict):
        url = data_url(picture_bytes())
        refused(post(strict, asked([message("?", url, url, url)])), 400, "3 images", "up to 2")

    def test_pixels(self, strict):
        refused(post(strict, asked([message("?", data_url(png_of(1001, 1000)))])), 400, "1001 x 1000", "1 megapixels")
        assert post(strict, asked([message("?", data_url(png_of(1000, 1000)))], max_tokens=1)).status_code == 200

    @pytest.mark.parametrize("size", [(12_000, 12_000), (40_000, 40_000)])
    def test_a_decompression_bomb_is_not_unpacked(self, strict, size, monkeypatch):
        def unpacked(_):
            raise AssertionError("somebody unpacked it")

        monkeypatch.setattr("PIL.ImageFile.ImageFile.load", unpacked)
        bomb = data_url(png_of(*size))
        assert len(bomb) < 400_000
        refused(post(strict, asked([message("?", bomb)])), 400, "pixels")

    def test_new_tokens(self, strict):
        for name in ("max_tokens", "max_completion_tokens"):
            refused(post(strict, asked(**{name: 51})), 400, "51 new tokens", "up to 50")
            assert post(strict, asked(**{name: 50})).status_code == 200

    def test_context(self, strict):
        refused(post(strict, asked([message("what? " * 300)])), 400, "room for 256", "context_length_exceeded")

    def test_a_text_that_is_far_too_long_never_gets_to_the_tokenizer(self, strict, monkeypatch):
        monkeypatch.setattr("aki.models.AkiProcessor.apply_chat_template", None)
        refused(post(strict, asked([message("x" * 900_000)])), 400, "900000 characters", "context_length_exceeded")

    def test_messages_and_parts_without_end(self, strict):
        many = [{"role": "assistant", "content": ""}] * 10_000 + CHAT
        refused(post(strict, asked(many)), 400, "messages", "at most 1000")
        parts = {"role": "user", "content": [{"type": "text", "text": ""}] * 10_000}
        refused(post(strict, asked([parts])), 400, "content", "at most 1000")

    def test_a_body_of_nothing_but_small_values_is_not_parsed(self, strict):
        for small in (b"[]", b"{}", b'"n":0', b"0"):
            body = b'{"model": "tiny", "messages": [' + (small + b",") * 100_001 + b"0]}"
            refused(post(strict, body), 400, "commas", "too_many_parts")

    def test_an_answer_without_a_number_of_tokens_ends_at_the_limit_or_the_context(self, strict):
        assert post(strict, asked()).json()["usage"]["completion_tokens"] == 50
        near = post(strict, asked([message("how " * 210)])).json()
        assert near["usage"]["total_tokens"] == 256
        assert near["choices"][0]["finish_reason"] == "length"

    def test_many_large_bodies_do_not_fill_the_memory(self, engine, monkeypatch):
        monkeypatch.setattr("aki.apps.serve.gate.BODIES", 1)
        with running(engine, LIMITS) as port, socket.create_connection(("127.0.0.1", port)) as first:
            first.sendall(head(length=900_000) + b" " * 800_000)
            time.sleep(0.2)
            answer = post(port, b" " * 300_000)
            refused(answer, 429, "queue_full")
            assert answer.headers["retry-after"] == "1"


def head(length, extra=b""):
    return (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n%s\r\n" % (length, extra)
    )


def cut_off(data: bytes) -> str:
    return data_url(data[: len(data) // 2])


class TestImages:
    @pytest.mark.parametrize(
        "url",
        [
            "/etc/passwd",
            "digits",
            "file:///etc/passwd",
            "FILE:///etc/hostname",
            "C:\\picture.png",
            "ftp://example.com/a.png",
            "http://127.0.0.1/a.png",
            "https://example.com/a.png",
            "",
        ],
    )
    def test_what_is_no_data_url_is_refused_before_it_is_opened(self, strict, url, monkeypatch):
        def opened(*_, **__):
            raise AssertionError("somebody opened it")

        monkeypatch.setattr("PIL.Image.open", opened)
        refused(post(strict, asked([message("?", url)])), 400, "must be a data URL", "invalid_image_url")

    def test_a_local_picture_that_is_there(self, strict, tmp_path):
        path = tmp_path / "there.png"
        path.write_bytes(picture_bytes())
        for url in (str(path), path.as_uri()):
            refused(post(strict, asked([message("?", url)])), 400, "must be a data URL")

    @pytest.mark.parametrize(
        ("url", "code"),
        [
            (data_url(b""), "invalid_image"),
            (data_url(b"not a picture at all"), "invalid_image"),
            (data_url(b"%PDF-1.4"), "invalid_image"),
            (data_url(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), "invalid_image"),
            (cut_off(picture_bytes(9, (90, 90))), "invalid_image"),
            (cut_off(picture_bytes(9, (90, 90), "JPEG")), "invalid_image"),
            (cut_off(picture_bytes(9, (90, 90), "WEBP")), "invalid_image"),
            (data_url(picture_bytes())[:-3], "invalid_image"),
            ("data:image/png;base64,***", "invalid_image"),
            ("data:image/svg+xml,<svg/>", "invalid_image_url"),
            ("data:;base64", "invalid_image_url"),
            ("data", "invalid_image_url"),
        ],
    )
    def test_broken_ones(self, strict, url, code):
        assert refused(post(strict, asked([message("?", url)])), 400, "image")["code"] == code

    @pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
    def test_formats_that_are_taken(self, strict, form):
        url = data_url(picture_bytes(9, (30, 30), form))
        assert post(strict, asked([message("?", url)], max_tokens=1)).status_code == 200

    def test_a_format_that_pillow_knows_and_we_do_not_take(self, strict):
        out = io.BytesIO()
        Image.new("RGB", (9, 9)).save(out, "TIFF")
        refused(post(strict, asked([message("?", data_url(out.getvalue()))])), 400, "another format than PNG")


class TestBodies:
    @pytest.mark.parametrize(
        "body",
        [
            b"",
            b"{",
            b"null",
            b"[]",
            b'"text"',
            b"\xff\xfe{}",
            b"[" * 100_000,
            b'{"a":' * 100_000,
            b'{"model": "tiny", "messages": ' + b"[" * 50_000 + b"]" * 50_000 + b"}",
            b'{"model": "tiny", "max_tokens": ' + b"9" * 100_000 + b"}",
        ],
    )
    def test_what_is_no_request(self, strict, body):
        refused(post(strict, body), 400)

    @pytest.mark.parametrize("body", [b"{", b"\0", b'{"model": tiny}', b"model=tiny"])
    def test_what_is_not_json(self, strict, body):
        assert refused(post(strict, body), 400, "the body: this is not JSON.")["param"] is None

    @pytest.mark.parametrize(
        ("change", "word"),
        [
            ({"messages": []}, "messages"),
            ({"messages": "hello"}, "messages"),
            ({"messages": [{}]}, "messages.0"),
            ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0"),
            ({"messages": [{"role": "user"}]}, "content"),
            ({"messages": [{"role": "user", "content": 3}]}, "content"),
            ({"messages": [{"role": "user", "content": [{"type": "video", "video": "x"}]}]}, "content"),
            ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": 3}]}]}, "image_url"),
            ({"messages": [{"role": "assistant", "content": "x"}]}, "the last message must be the user's"),
            ({"messages": [{"role": "user", "content": ""}]}, "the question is empty"),
            ({"model": 3}, "model"),
            ({"max_tokens": 0}, "max_tokens"),
            ({"max_tokens": -5}, "max_tokens"),
            ({"max_tokens": 1.5}, "max_tokens"),
            ({"max_tokens": "many"}, "max_tokens"),
            ({"temperature": -1}, "temperature"),
            ({"temperature": float("nan")}, "temperature"),
            ({"temperature": float("inf")}, "temperature"),
            ({"top_p": 0}, "top_p"),
            ({"seed": 2**70}, "seed"),
            ({"stop": ""}, "stop"),
            ({"stop": ["x"] * 5}, "stop"),
            ({"stop": {"a": 1}}, "stop"),
            ({"stream": "maybe"}, "stream"),
            ({"frobnicate": 1}, "frobnicate"),
        ],
    )
    def test_wrong_fields_are_named(self, strict, change, word):
        error = refused(post(strict, asked() | change), 400, word)
        assert error["type"] == "invalid_request_error"

    def test_text_that_is_no_unicode(self, strict):
        refused(post(strict, json.dumps(asked([message("\ud800")]))), 400)

    def test_another_model(self, strict):
        refused(post(strict, asked() | {"model": "gpt"}), 404, "'tiny', not 'gpt'", "model_not_found")

    def test_another_content_type(self, strict):
        refused(post(strict, asked(), headers={"Content-Type": "text/plain"}), 400, "Content-Type: application/json")

    def test_other_places_and_methods(self, strict):
        refused(WEB.get(f"http://127.0.0.1:{strict}/v1/files"), 404)
        refused(WEB.get(f"http://127.0.0.1:{strict}{PATH}"), 405)
        refused(WEB.get(f"http://127.0.0.1:{strict}/docs"), 404)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["user", "text"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "type", "text"]), inner),
    max_leaves=6,
)
PARTS = st.fixed_dictionaries({"type": st.sampled_from(["text", "image_url"]) | VALUES}, optional={"text": VALUES})
MESSAGES = st.fixed_dictionaries({"role": st.sampled_from(["user", "system"]) | VALUES, "content": st.lists(PARTS)})


@given(st.dictionaries(st.sampled_from(sorted(ChatRequest.model_fields)), VALUES), st.lists(MESSAGES) | VALUES)
@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_json_is_too_absurd_for_a_sentence(strict, fields, messages):
    answer = post(strict, asked(max_tokens=1) | fields | {"messages": messages})
    assert answer.status_code in (200, 400, 404), answer.text
    if answer.status_code != 200:
        refused(answer, answer.status_code)


def everything(connection) -> bytes:
    connection.settimeout(10)
    data = b""
    with suppress(ConnectionResetError):  # what the server did not read any more
        while piece := connection.recv(65536):
            data += piece
    return data


class TestSlowClients:
    """The server's patience is one second here."""

    @pytest.mark.parametrize("begin", [b"", b"POST /v1/chat", b"POST / HTTP/1.1\r\nHost: a\r\nX-A: "])
    def test_a_head_that_never_ends(self, strict, begin):
        with socket.create_connection(("127.0.0.1", strict)) as connection:
            connection.sendall(begin)
            started = time.monotonic()
            assert everything(connection) == b""
            assert time.monotonic() - started < 5

    def test_a_second_head_that_never_ends(self, strict):
        with socket.create_connection(("127.0.0.1", strict)) as connection:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            said = b""
            while not said.endswith(b'{"status":"ok"}'):
                said += connection.recv(65536)
            connection.sendall(b"G")
            started = time.monotonic()
            assert everything(connection) == b""
            assert time.monotonic() - started < 5

    def test_a_byte_now_and_then(self, strict):
        with socket.create_connection(("127.0.0.1", strict)) as connection:
            connection.sendall(head(1000))
            started = time.monotonic()
            for _ in range(4):
                connection.sendall(b" ")
                time.sleep(0.3)
            said = everything(connection)
            assert b" 408 " in said
            assert b"not there after 1 seconds" in said
            assert time.monotonic() - started < 5

    @pytest.mark.parametrize("length", [1000, 10**9])
    def test_a_body_that_goes_on_after_its_answer(self, engine, length):
        """Refused for its missing key, without a look at its body."""
        with (
            running(engine, LIMITS, api_key="sesame") as port,
            socket.create_connection(("127.0.0.1", port)) as connection,
        ):
            connection.sendall(head(length))
            assert b" 401 " in connection.recv(65536)
            started = time.monotonic()
            with suppress(ConnectionResetError, BrokenPipeError):
                while time.monotonic() - started < 5:
                    connection.sendall(b" ")
                    time.sleep(0.1)
            assert time.monotonic() - started < 4

    def test_many_of_them_are_in_nobodys_way(self, engine):
        with running(engine) as port:
            slow = [socket.create_connection(("127.0.0.1", port)) for _ in range(40)]
            for connection in slow:
                connection.sendall(head(1000) + b"{")
            started = time.monotonic()
            assert post(port, asked(max_tokens=1)).status_code == 200
            assert time.monotonic() - started < Limits().patience / 2
            for connection in slow:
                connection.close()

    def test_half_a_body_and_gone(self, strict):
        with socket.create_connection(("127.0.0.1", strict)) as connection:
            connection.sendall(head(1000) + b'{"model"')

    def test_what_is_not_http(self, strict):
        with socket.create_connection(("127.0.0.1", strict)) as connection:
            connection.sendall(bytes(range(256)) * 10 + b"\r\n\r\n")
            assert b" 200 " not in everything(connection)

    def test_endless_headers(self, strict):
        with socket.create_connection(("127.0.0.1", strict)) as connection:
            with suppress(ConnectionResetError, BrokenPipeError):
                connection.sendall(b"GET / HTTP/1.1\r\n" + b"X: " + b"y" * 2_000_000)
            assert b" 200 " not in everything(connection)


def test_a_full_queue_says_when_to_come_back(strict, engine):
    free = threading.Event()
    with engine.model.register_forward_pre_hook(lambda *_: free.wait(20) and None), ThreadPoolExecutor(12) as pool:
        waiting = [pool.submit(post, strict, asked([message("how many?")], max_tokens=2)) for _ in range(12)]
        assert next(as_completed(waiting)).result().status_code == 429
        free.set()
        answers = [one.result() for one in waiting]
    statuses = [answer.status_code for answer in answers]
    assert set(statuses) == {200, 429}
    # Four wait, and what is taken from them makes room for more.
    assert statuses.count(200) >= 4
    full = answers[statuses.index(429)]
    refused(full, 429, "4 requests are waiting", "queue_full")
    assert full.headers["retry-after"] == "1"
    said = {answer.json()["choices"][0]["message"]["content"] for answer in answers if answer.status_code == 200}
    assert len(said) == 1


class TestKey:
    @pytest.fixture(scope="class")
    def locked(self, engine):
        with running(engine, LIMITS, api_key="sësame") as port:
            yield port

    @pytest.mark.parametrize("given", [None, "", "Bearer", "Bearer sesame", "Bearer sësam", "sësame", "Basic sësame"])
    def test_without_the_key(self, locked, given):
        headers = {} if given is None else {"Authorization": given.encode()}
        for path in (PATH, "/v1/models", "/metrics", "/nowhere"):
            answer = WEB.get(f"http://127.0.0.1:{locked}{path}", headers=headers)
            refused(answer, 401, "API key", "invalid_api_key")
        refused(post(locked, asked(), headers=headers), 401)

    def test_with_it(self, locked):
        answer = post(locked, asked(max_tokens=1), headers={"Authorization": "Bearer sësame".encode()})
        assert answer.status_code == 200

    def test_health_is_open(self, locked):
        assert WEB.get(f"http://127.0.0.1:{locked}/health").status_code == 200

    def test_the_comparison_takes_constant_time(self, locked, monkeypatch):
        seen = []

        def compare(given, wanted):
            seen.append((given, wanted))
            return False

        monkeypatch.setattr("hmac.compare_digest", compare)
        refused(post(locked, asked(), headers={"Authorization": "Bearer x"}), 401)
        assert seen == [(b"Bearer x", "Bearer sësame".encode())]


def test_limits_are_more_than_nothing():
    with pytest.raises(ValueError, match="max_images is 0"):
        Limits(max_images=0)
