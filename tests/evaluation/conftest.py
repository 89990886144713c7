import gc
import json
import math
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest
from draw_benchmarks import write_benchmarks

# Before lmms-eval, as `aki eval` has it: lmms-eval asks for our entry point while it is being imported itself.
import aki.evaluation.lmms  # noqa: F401


@pytest.fixture(scope="session", autouse=True)
def _quick_collections():
    """lmms-eval collects garbage in every run, and what is imported by now is most of what it would look through."""
    gc.freeze()


@pytest.fixture(scope="session")
def benchmarks(tmp_path_factory):
    """The twelve benchmarks' data, drawn."""
    folder = tmp_path_factory.mktemp("benchmarks")
    write_benchmarks(folder)
    return folder


class Judge(BaseHTTPRequestHandler):
    """An OpenAI-compatible judge that likes an answer exactly if it is the reference.

    After `patience` questions it says `then`, or, where that is None, fails.
    """

    patience: ClassVar[float] = math.inf
    then: ClassVar[str | None] = None
    asked: ClassVar[list[str]] = []

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = request["messages"][0]["content"]
        Judge.asked.append(prompt)
        said = verdict(prompt) if len(Judge.asked) <= Judge.patience else Judge.then
        if said is None:
            self.send_error(400)
            return
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": said}}
        reply = {"id": "1", "object": "chat.completion", "created": 0, "model": request["model"], "choices": [choice]}
        body = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def verdict(prompt: str) -> str:
    if prompt.endswith("Extracted answer: "):
        return prompt.removesuffix("\n\nExtracted answer: ").split("\n\n")[-1]
    pair = re.search(r"\[(\w+) 1\]\n(.*)\n\n\[End of \1 1\]\n\n\[\1 2\]\n(.*)\n\n\[End of \1 2\]", prompt, re.DOTALL)
    if pair:
        return "10 10\nThe same." if pair[2] == pair[3] else "10 0\nOther."
    if prompt == "Say the number 1.":
        return "1"
    *_, reference, answer, _ = prompt.splitlines()[-1].split("|")
    return "1.0" if reference.strip() == answer.strip() else "0.0"


@pytest.fixture(scope="session")
def judge_server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


@pytest.fixture
def judge(judge_server, monkeypatch):
    """lmms-eval's judge settings, for a judge on localhost."""
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    monkeypatch.setenv("OPENAI_API_URL", judge_server)
    monkeypatch.setenv("MODEL_VERSION", "stand-in")
    monkeypatch.setattr(Judge, "patience", math.inf)
    monkeypatch.setattr(Judge, "then", None)
    monkeypatch.setattr(Judge, "asked", [])
    return Judge
