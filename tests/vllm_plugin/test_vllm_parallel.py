"""One model over two processes: a test of its own, because this process can be but one of vLLM's."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from asking import QUESTIONS, Reference, answers, engine, same
from folders import TEXT, aki_folder


def run(folder: Path) -> None:
    TEXT["num_key_value_heads"] = 2
    reference = Reference(aki_folder(folder))
    expected = [reference.answer(question, "mma") for question in QUESTIONS]
    with engine(folder, tensor_parallel_size=2) as llm:
        for _ in range(2):  # the second time from the cache of prefixes
            assert all(same(a, b) for a, b in zip(answers(llm, reference, QUESTIONS), expected, strict=True))


@pytest.mark.slow
def test_two_processes_answer_as_one(tmp_path):
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    command = [sys.executable, __file__, str(tmp_path / "model")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]


if __name__ == "__main__":
    run(Path(sys.argv[1]))
