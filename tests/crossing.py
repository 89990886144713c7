"""`python crossing.py write|read FOLDER`: models with their logits, for another release of transformers to load."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

TESTS = Path(__file__).parent
sys.path[:0] = [str(TESTS / "models"), str(TESTS / "attention")]

from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402
from published_folders import published_folder, tiny_tokenizer  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor  # noqa: E402
from unlock_families import TEXT, VISION, build  # noqa: E402

import aki  # noqa: E402
from aki.models.convert import convert  # noqa: E402
from aki.models.published import load_published  # noqa: E402
from aki.training.model import build_model, tiny  # noqa: E402
from aki.training.recipe import load_recipe  # noqa: E402

LORA = LoraConfig(target_modules=["q_proj", "qkv_proj", "o_proj"], r=4, init_lora_weights=False)
IMAGE = 20
"""The placeholder of the unlocked model, four a picture."""


def aki_inputs(folder: Path) -> dict[str, Tensor]:
    """What the folder's processor makes of a chat of two turns, an answer in it and a question."""
    picture = Image.effect_mandelbrot((32, 32), (-2, -1.5, 1, 1.5), 40).convert("RGB")
    question = [{"type": "image", "image": picture}, {"type": "text", "text": "is there a red 3?"}]
    chat = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": [{"type": "text", "text": "yes"}]},
        {"role": "user", "content": [{"type": "text", "text": "how many digits are red?"}]},
    ]
    return AutoProcessor.from_pretrained(folder).apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )


def own_inputs() -> dict[str, Tensor]:
    ids = torch.tensor([[1, 5, *[IMAGE] * 4, 7, 8, 9]])
    return {"input_ids": ids, "pixel_values": torch.linspace(-1, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)}


@torch.no_grad()
def said(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inputs, the logits, and the tokens that are generated from them."""
    model.eval()
    generated = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    return {**inputs, "logits": model(**inputs).logits, "generated": generated}


def write(folder: Path) -> None:
    recipe = load_recipe("digits")
    torch.manual_seed(0)
    model, processor = build_model(replace(recipe, model=tiny(recipe).model))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.2)
    for part in (model, processor):
        part.save_pretrained(folder / "saved")
    inputs = aki_inputs(folder / "saved")
    save(folder / "saved", said(model, inputs))
    adapted = get_peft_model(model, LORA)
    adapted.save_pretrained(folder / "adapter")
    save(folder / "adapter", said(adapted, inputs))

    published_folder(folder / "published", tiny_tokenizer())
    convert(folder / "published", folder / "converted")
    inputs = aki_inputs(folder / "converted")
    save(folder / "published", said(load_published(folder / "published"), inputs))
    save(folder / "converted", said(AutoModelForImageTextToText.from_pretrained(folder / "converted"), inputs))

    config = AutoConfig.for_model(
        "llava",
        text_config={"model_type": "llama", **TEXT},
        vision_config={"model_type": "clip_vision_model", **VISION},
        image_token_index=IMAGE,
    )
    unlocked = aki.unlock(build(config))
    unlocked.save_pretrained(folder / "unlocked")
    save(folder / "unlocked", said(unlocked, own_inputs()))


def read(folder: Path) -> None:
    auto = AutoModelForImageTextToText
    saved = auto.from_pretrained(folder / "saved")
    check(folder / "saved", saved, aki_inputs(folder / "saved"))
    check(folder / "adapter", PeftModel.from_pretrained(saved, folder / "adapter"), aki_inputs(folder / "saved"))
    check(folder / "published", load_published(folder / "published"), aki_inputs(folder / "converted"))
    check(folder / "converted", auto.from_pretrained(folder / "converted"), aki_inputs(folder / "converted"))
    unlocked = auto.from_pretrained(folder / "unlocked")
    assert unlocked.config.attention_rule == "mma"
    check(folder / "unlocked", aki.unlock(unlocked), own_inputs())


def save(folder: Path, tensors: dict[str, Tensor]) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "said.safetensors")


def check(folder: Path, model: nn.Module, inputs: dict[str, Tensor]) -> None:
    wanted = load_file(folder / "said.safetensors")
    for name, found in said(model, inputs).items():
        # The kernels are torch's and the same; what is left is the order of sums.
        tolerance = 1e-5 if found.is_floating_point() else 0
        torch.testing.assert_close(found, wanted[name], atol=tolerance, rtol=0, msg=lambda m: f"{folder}: {name}: {m}")  # noqa: B023
    print(f"{folder.name}: equal")


if __name__ == "__main__":
    {"write": write, "read": read}[sys.argv[1]](Path(sys.argv[2]))
