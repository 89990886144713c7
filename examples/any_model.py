"""A model and data of its own, made in seconds and offline, for the recipe `any_model.yaml` beside it:

    python examples/any_model.py runs/any-model
    aki compare examples/any_model.yaml --output runs/any-model/compared
    aki chat runs/any-model/compared/mma --image runs/any-model/pictures/test-0-0.png "how many digits are red?"

The model is Idefics3, which SmolVLM is built on, with random weights, in a folder as it would be published. The data
are chats in JSON lines about pictures of four coloured handwritten digits; what is held out is in other handwriting.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, Idefics3ImageProcessorPil, Idefics3Processor

from aki.data.digits import DigitScenes, corpus
from aki.data.tokenizer import train_tokenizer
from aki.models.templates import SHORT

PIXELS, GRID = 16, 2
MARKS = ("<fake_token_around_image>", "<global-img>", "<end_of_utterance>")


def write_model(folder: Path) -> None:
    """Four tokens a picture: patches of 4 x 4 pixels, of which the connector joins 2 x 2."""
    tokenizer = train_tokenizer(corpus(GRID, size=300), more=MARKS)
    images = Idefics3ImageProcessorPil(
        do_image_splitting=False, size={"longest_edge": PIXELS}, max_image_size={"longest_edge": PIXELS}
    )
    processor = Idefics3Processor(images, tokenizer, image_seq_len=GRID**2, chat_template=SHORT)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"initializer_range": 0.1}  # about 1 / sqrt(width): from 0.02 so small a model learns late
    ids = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": None, "eos_token_id": None}
    config = AutoConfig.for_model(
        "idefics3",
        text_config={"model_type": "llama", "vocab_size": len(tokenizer), "num_key_value_heads": 2, **sizes, **ids},
        vision_config={"image_size": PIXELS, "patch_size": 4, **sizes},
        image_token_id=processor.image_token_id,
        scale_factor=2,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def write_chats(file: Path, split: str, size: int, seed: int, *skills: str) -> None:
    """A line a chat; pictures go into `pictures/` beside the file."""
    pictures = file.parent / "pictures"
    pictures.mkdir(exist_ok=True)
    with file.open("w") as lines:
        for sample in DigitScenes(split, "question", size, PIXELS, GRID, seed, skills):
            shown = sample.messages[0]["content"][0]
            shown["image"].save(pictures / f"{sample.id}.png")
            shown["image"] = f"{sample.id}.png"
            lines.write(json.dumps({"messages": sample.messages}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", type=int, default=8000, help="chats to learn from")
    parser.add_argument("--held-out", type=int, default=500, help="chats of each kind of question that are held out")
    options = parser.parse_args()
    write_model(options.folder / "model")
    write_chats(options.folder / "train.jsonl", "train", options.size, 0, "colour", "count_colour")
    write_chats(options.folder / "colour.jsonl", "test", options.held_out, 0, "colour")
    write_chats(options.folder / "counting.jsonl", "test", options.held_out, 1, "count_colour")
    print(f"{options.folder} holds a model, {options.size} chats to learn from and 2 x {options.held_out} held out.")


if __name__ == "__main__":
    main()
