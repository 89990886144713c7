"""What the tests of vLLM share: one engine after another in this process, few starts, each for many tests."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).parent
_vllm = find_spec("vllm")
# This folder's own name is found too, and has no file.
if _vllm is None or _vllm.origin is None:
    # `make test-vllm` makes an environment that has it; test_vllm_prompts.py runs in any.
    collect_ignore = [file.name for file in HERE.glob("test_*.py") if file.name != "test_vllm_prompts.py"]

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_CI_ENV": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}
