import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest
from draw_benchmarks import write_benchmarks


@pytest.fixture(scope="session")
def benchmarks(tmp_path_factory):
    """The twelve benchmarks' data, drawn."""
    folder = tmp_path_factory.mktemp("benchmarks")
    write_benchmarks(folder)
    return folder


class Judge(BaseHTTPRequestHandler):
    """An OpenAI-compatible judge that likes an answer exactly if it is the reference."""

    silent = False
    asked: ClassVar[list[str]] = []

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = request["messages"][0]["content"]
        Judge.asked.append(prompt)
        said = "I would rather not say." if Judge.silent else verdict(prompt)
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
    monkeypatch.setattr(Judge, "silent", False)
    monkeypatch.setattr(Judge, "asked", [])
    return Judge
