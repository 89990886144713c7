"""Answers a second through the lmms-eval adapter, one prompt at a time and sixteen, with a 100 M-parameter AKI.

Prompts have different lengths and a picture each; every answer is 16 new tokens, greedy. `identical` says whether each
prompt got the same answer both ways. Both take turns, so that a noisy machine disturbs both alike.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lmms_eval.api.instance import Instance
from PIL import Image
from transformers import CLIPVisionConfig, LlamaConfig
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from aki import AkiConfig, AkiForConditionalGeneration, AkiProcessor
from aki.data.tokenizer import train_tokenizer
from aki.evaluation.lmms import Aki
from aki.models.templates import SHORT

BATCHES, NEW_TOKENS, PIXELS, IMAGE_TOKENS = (1, 16), 16, 96, 16
QUESTION = "which of the digits at the top of the picture is red and where does it stand"


def save_model(folder: Path) -> int:
    """A model of about 100 M parameters with random weights; returns how many."""
    tokenizer = train_tokenizer([QUESTION] * 8, vocab_size=400)
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=14,
        num_attention_heads=12,
        max_position_embeddings=1024,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        initializer_range=0.06,  # large enough for answers that differ from prompt to prompt
    )
    vision = CLIPVisionConfig(
        image_size=PIXELS,
        patch_size=12,
        hidden_size=192,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
    )
    connector = {"connector": "perceiver_resampler", "num_latents": IMAGE_TOKENS, "depth": 2, "num_heads": 4}
    torch.manual_seed(0)
    config = AkiConfig(
        vision_config=vision,
        text_config=text,
        connector_config=connector,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        attention_rule="mma",
    )
    model = AkiForConditionalGeneration(config)
    model.save_pretrained(folder)
    image_processor = SiglipImageProcessorPil(size={"height": PIXELS, "width": PIXELS})
    AkiProcessor(image_processor, tokenizer, IMAGE_TOKENS, chat_template=SHORT).save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def prompts(count: int) -> list[dict[str, Any]]:
    """Questions of 4 to 24 words, a picture each, in an order that is not theirs by length."""
    rng = np.random.default_rng(0)
    documents = []
    for _ in range(count):
        words = rng.choice(QUESTION.split(), int(rng.integers(4, 25)))
        pixels = rng.integers(0, 256, (PIXELS, PIXELS, 3), dtype=np.uint8)
        documents.append({"question": " ".join(words), "image": Image.fromarray(pixels)})
    return documents


def ask(document: dict[str, Any]) -> list[dict[str, Any]]:
    content = [{"type": "image", "url": document["image"]}, {"type": "text", "text": document["question"]}]
    return [{"role": "user", "content": content}]


def requests(documents: list[dict[str, Any]]) -> list[Instance]:
    asked = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
    return [
        Instance(
            "generate_until",
            (document["question"], ask, asked, number, "prompts", "test"),
            0,
            {"task": "prompts", "doc_id": number, "repeats": 1},
        )
        for number, document in enumerate(documents)
    ]


def measure(folder: Path, count: int, rounds: int) -> dict[str, Any]:
    documents = prompts(count)
    models = {batch: Aki(str(folder), batch_size=batch) for batch in BATCHES}
    seconds: dict[int, list[float]] = {batch: [] for batch in BATCHES}
    answers: dict[int, list[str]] = {}
    for model in models.values():
        model.task_dict["prompts"] = {"test": documents}
        model.generate_until(requests(documents[:1]))
    for _ in range(rounds):
        for batch, model in models.items():
            started = time.perf_counter()
            answers[batch] = model.generate_until(requests(documents))
            seconds[batch].append(time.perf_counter() - started)
    return {
        "rows": [
            {"batch": batch, "answers_per_s": count / statistics.median(taken)} for batch, taken in seconds.items()
        ],
        "identical": answers[BATCHES[0]] == answers[BATCHES[1]],
        "different_answers": len(set(answers[BATCHES[0]])),
        "prompts": count,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="16 prompts, once")
    parser.add_argument("--json", type=Path, help="also write the numbers there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        parameters = save_model(Path(folder))
        results = measure(Path(folder), 16 if options.quick else 48, 1 if options.quick else 3)
    results["parameters"] = parameters
    first = results["rows"][0]["answers_per_s"]
    print(f"{parameters / 1e6:.0f} M parameters, {results['prompts']} prompts, {NEW_TOKENS} new tokens each")
    print(f"{'batch':>5} {'answers/s':>10} {'ratio':>6}")
    for row in results["rows"]:
        print(f"{row['batch']:>5} {row['answers_per_s']:>10.2f} {row['answers_per_s'] / first:>6.2f}")
    print(f"answers identical: {results['identical']} ({results['different_answers']} different ones)")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
