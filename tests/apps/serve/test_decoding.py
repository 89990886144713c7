"""What pictures may cost (issue 12, entry 3)."""

from __future__ import annotations

import io
import subprocess
import sys
import threading
import time
import tracemalloc
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from serving import client, data_url, message, picture_bytes, running
from test_limits import png_of, refused
from test_limits import post as sent

from aki.apps.serve.images import decoded_images
from aki.apps.serve.limits import Limits, Refused


def many_scans(side: int, scans: int) -> bytes:
    """A progressive JPEG, its last scan again and again: a few bytes, and each goes over all of the picture."""
    out = io.BytesIO()
    Image.new("L", (side, side), 90).save(out, "JPEG", progressive=True)
    data = out.getvalue()
    return data[:-2] + data[data.rfind(b"\xff\xda") : -2] * scans + data[-2:]


def test_decoding_has_an_end(monkeypatch):
    """Entry 3: 3,000 scans over 9 megapixels are 15 s and more."""
    monkeypatch.setattr("aki.apps.serve.images.DECODING", 0.3)
    began = time.process_time()
    with pytest.raises(Refused, match=r"0\.3 seconds to decode"):
        decoded_images([many_scans(3000, 3000)], Limits())
    assert time.process_time() - began < 3


def test_decoding_ends_when_nobody_is_there():
    """Entry 3: the one who asked has hung up."""
    began = time.process_time()
    with pytest.raises(Refused, match="nobody is there"):
        decoded_images([many_scans(3000, 3000)], Limits(), lambda: time.process_time() - began > 0.2)
    assert time.process_time() - began < 2


def test_an_ordinary_progressive_picture_is_read_as_pillow_reads_it():
    shades = np.random.default_rng(0).integers(0, 255, (200, 300, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(shades).save(out, "JPEG", progressive=True, quality=95)
    assert len(out.getvalue()) > 50_000
    (read,) = decoded_images([out.getvalue()], Limits())
    assert np.array_equal(read, Image.open(io.BytesIO(out.getvalue())))


def test_pixels_are_counted_over_all_pictures_of_a_request(engine):
    """Entry 3: each of them alone is small enough, and is read; together they are refused, before any is decoded."""
    with running(engine, Limits(max_megapixels=1)) as port:
        url = data_url(png_of(800, 800))
        assert sent(port, {"model": "tiny", "messages": [message("?", url)], "max_tokens": 1}).status_code == 200
        body = {"model": "tiny", "messages": [message("?", url, url)], "max_tokens": 1}
        refused(sent(port, body), 400, "800 x 800, 800 x 800", "1 megapixels", "too_many_pixels")


def test_text_does_not_wait_for_pictures(engine, monkeypatch):
    """Entry 3: all readers are busy with pictures, and a question without one is answered."""
    free = threading.Event()
    read = decoded_images

    def slow(files, *more):
        if files:
            free.wait(20)
        return read(files, *more)

    monkeypatch.setattr("aki.apps.serve.app.decoded_images", slow)
    with running(engine) as port, ThreadPoolExecutor(4) as pool:
        ask = client(port).chat.completions.create
        chat = [message("what?", data_url(picture_bytes(3)))]
        pictures = [pool.submit(ask, model="tiny", messages=chat, max_tokens=1) for _ in range(4)]
        time.sleep(0.2)
        try:
            assert ask(model="tiny", messages=[message("what?")], max_tokens=1, timeout=10).choices
            assert not any(one.done() for one in pictures)
        finally:
            free.set()
        assert all(one.result().choices for one in pictures)


def test_pictures_leave_places_of_the_queue_to_text(engine, monkeypatch):
    """Entry 3: requests with pictures, as many as there are places; a question without one finds its own."""
    free = threading.Event()
    read = decoded_images

    def slow(files, *more):
        if files:
            free.wait(20)
        return read(files, *more)

    monkeypatch.setattr("aki.apps.serve.app.decoded_images", slow)
    ask = {"model": "tiny", "max_tokens": 1}
    with running(engine, Limits(max_waiting=4)) as port, ThreadPoolExecutor(4) as pool:
        pictures = ask | {"messages": [message("what?", data_url(picture_bytes(3)))]}
        asked = [pool.submit(sent, port, pictures) for _ in range(4)]
        try:
            (refused_one,) = wait(asked, timeout=10, return_when=FIRST_COMPLETED).done
            refused(refused_one.result(), 429, "3 requests with images", "queue_full")
            assert sent(port, ask | {"messages": [message("what?")]}).status_code == 200
        finally:
            free.set()
        assert sorted(one.result().status_code for one in asked) == [200, 200, 200, 429]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells what memory a process has")
def test_memory_returns(model_folder):
    """Entry 3: of 16-bit pictures of 24 megapixels, read two at a time, next to nothing is kept."""
    out = io.BytesIO()
    Image.fromarray(np.zeros((4900, 4900), np.uint16)).save(out, "PNG")
    body = {"model": "tiny", "messages": [message("?", data_url(out.getvalue()))], "max_tokens": 1}
    small = body | {"messages": [message("?", data_url(picture_bytes()))]}
    command = [sys.executable, "-m", "aki", "serve", str(model_folder), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process, ThreadPoolExecutor(4) as pool:
        try:
            port = int(process.stdout.readline().rpartition(":")[2].removesuffix("/v1\n"))
            assert sent(port, small).status_code == 200
            before = megabytes(process.pid, "VmRSS")
            answers = [pool.submit(sent, port, body) for _ in range(4)]
            assert {answer.result().status_code for answer in answers} == {200}
            assert sent(port, small).status_code == 200
            assert megabytes(process.pid, "VmHWM") - before > 200
            assert megabytes(process.pid, "VmRSS") - before < 100
        finally:
            process.kill()


def megabytes(process: int, what: str) -> float:
    """Of a process's status: VmRSS, what it has now, or VmHWM, the most that it had."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1000 for line in lines if line.startswith(what))


def test_text_does_not_wait_for_the_processor_of_pictures(engine, monkeypatch):
    """Entry 3: nor while pictures are made into what the model takes."""
    free, busy = threading.Event(), threading.Event()
    images = engine.processor.image_processor
    process = type(images).__call__

    def slow(self, *arguments, **options):
        busy.set()
        free.wait(20)
        return process(self, *arguments, **options)

    monkeypatch.setattr(type(images), "__call__", slow)
    with running(engine) as port, ThreadPoolExecutor(1) as pool:
        ask = client(port).chat.completions.create
        chat = [message("what?", data_url(picture_bytes(3)))]
        picture = pool.submit(ask, model="tiny", messages=chat, max_tokens=1)
        try:
            assert busy.wait(10)
            assert ask(model="tiny", messages=[message("what?")], max_tokens=1, timeout=10).choices
        finally:
            free.set()
        assert picture.result().choices


def test_sixteen_bits_cost_little():
    """Entry 3: a megapixel was 24 bytes a pixel and more; the values are those of dividing by 257."""
    values = np.arange(2**20, dtype=np.uint32).astype(np.uint16).reshape(1024, 1024)
    out = io.BytesIO()
    Image.fromarray(values).save(out, "PNG")
    tracemalloc.start()
    try:
        (read,) = decoded_images([out.getvalue()], Limits())
        assert tracemalloc.get_traced_memory()[1] < 8 * values.size
    finally:
        tracemalloc.stop()
    assert np.array_equal(np.asarray(read)[..., 0], np.round(values / 257))
