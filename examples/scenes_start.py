"""The start of the evidence: a vision encoder that knows what stands where, and a pretrained language model whole.

    python examples/scenes_start.py THINGS --language-model model.gguf --output runs/scenes/start

1. The encoder learns with linear heads which name, word, size and kind of thing stands at each place of a scene; every
   other scene is filled up with plates, so that there is enough to read. This stands in for the pre-training of the
   paper's SigLIP: like that it knows all names and words, also those that captions and questions hold back.
2. The connector alone, an MLP on the means of a place's patches, learns to say so in the language model's embeddings: a
   place's token is classified by cosine against the (centred) embeddings of all names and words and of "nothing", and
   likewise of its row, its column and its thing's size.

What comes out is an AKI folder like any other, which the recipe `scenes-start` begins with. A run that was stopped goes
on from its last saved step.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, ResNetConfig
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from aki.data.scenes.questions import ORDINALS, ROWS
from aki.data.scenes.scene import PIXELS, PLACES, PLATE_LOOKS, Placed, Scene
from aki.data.sources.scenes import WORDS, Scenes
from aki.models import AkiForConditionalGeneration, AkiProcessor
from aki.models.templates import IMAGE_TOKEN

PATCH = 32
ENCODER = {"embedding_size": 48, "hidden_sizes": [48, 96, 192, 320], "depths": [2, 2, 2, 2], "layer_type": "basic"}
SIZES = ("small", "medium", "large")
TEMPERATURE = 0.07
SAVE_EVERY = 100
IGNORED = -100
CHATML = (
    "{%- set media = ('image',) -%}{%- set separator = '' -%}"
    "{%- macro content(message) -%}{%- if message.content is string -%}{{ message.content }}{%- else -%}"
    "{%- for part in message.content -%}{{ '<image>' if part.type in media else part.text }}{%- endfor -%}"
    "{%- endif -%}{%- endmacro -%}"
    "{%- for message in messages -%}{{ '<|im_start|>' + message.role + '\n' }}"
    "{%- if message.role == 'assistant' -%}{% generation %}{{ content(message) + '<|im_end|>' }}{% endgeneration %}"
    "{%- else -%}{{ content(message) + '<|im_end|>' }}{%- endif -%}{{ '\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)
"""SmolLM2's own marks, without its system message: a scene's question is short, and so is the prompt."""
CAPTION = (
    "{%- for message in messages -%}{%- for part in message.content -%}"
    "{%- if part.type == 'image' -%}{{ '<image>' }}"
    "{%- else -%}{% generation %}{{ part.text + eos_token }}{% endgeneration %}{%- endif -%}"
    "{%- endfor -%}{%- endfor -%}"
)


class Labelled(Dataset):
    """Scenes with what stands at each place: pixels (3, PIXELS, PIXELS) uint8, and (4, PLACES, PLACES) labels."""

    def __init__(self, scenes: Scenes, size: int):
        self.scenes, self.size = scenes, size
        self.names = {thing.name: number for number, thing in enumerate(scenes.things)}
        self.words = {word: number for number, word in enumerate(WORDS)}

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        scene = self.scenes.scene(index)
        if index % 2:
            scene = filled(np.random.default_rng([self.scenes.seed, index]), scene)
        labels = torch.full((4, PLACES, PLACES), IGNORED)
        labels[3] = 0
        for one in scene.placed:
            here = labels[:, one.row, one.column]
            here[3] = 1 if one.thing else 2
            if one.thing:
                here[0], here[2] = self.names[one.name], one.size
            else:
                here[1] = self.words[one.word]
        return torch.from_numpy(np.asarray(scene.draw()).transpose(2, 0, 1).copy()), labels


def filled(rng: np.random.Generator, scene: Scene) -> Scene:
    """The scene with a plate at each free place."""
    taken = {(one.row, one.column) for one in scene.placed}
    free = [place for place in np.ndindex(PLACES, PLACES) if place not in taken]
    words = rng.choice(sorted(set(WORDS).difference(one.word for one in scene.plates)), len(free), replace=False)
    plates = (
        Placed(
            *place,
            word=str(word),
            variant=int(rng.integers(PLATE_LOOKS)),
            shift=tuple(rng.random(2).tolist()),
        )
        for place, word in zip(free, words, strict=True)
    )
    return replace(scene, placed=(*scene.placed, *plates))


class Heads(nn.Module):
    """One linear head a kind of label, on the mean of a place's features."""

    def __init__(self, width: int, sizes: list[int]):
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(width, size) for size in sizes)

    def forward(self, places: Tensor) -> list[Tensor]:
        return [head(places) for head in self.heads]


def at_places(features: Tensor) -> Tensor:
    """(scenes, width, rows, columns) -> (scenes, PLACES**2, width): the mean of the patches that touch each place."""
    return nn.functional.adaptive_avg_pool2d(features, PLACES).flatten(2).transpose(1, 2)


def batches(data: Labelled, size: int, first: int) -> DataLoader:
    return DataLoader(torch.utils.data.Subset(data, range(first, len(data))), size, num_workers=1, drop_last=True)


def normalised(pixels: Tensor) -> Tensor:
    return pixels.float() / 127.5 - 1


def train_encoder(scenes: Scenes, steps: int, batch_size: int, folder: Path, bf16: bool) -> nn.Module:
    """Step 1; prints how often names and words are right on the scenes of each batch before it learns from them."""
    # Of a convolutional network AKI cannot tell width and patch; its configuration keeps what it is told.
    sizes = {"image_size": PIXELS, "patch_size": PATCH, "hidden_size": ENCODER["hidden_sizes"][-1]}
    encoder = AutoModel.from_config(ResNetConfig(**sizes, **ENCODER))
    data = Labelled(scenes, steps * batch_size)
    heads = Heads(ENCODER["hidden_sizes"][-1], [len(data.names), len(data.words), 3, 3])
    both = nn.ModuleList([encoder, heads])
    optimizer = torch.optim.AdamW(both.parameters(), 2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)

    def loss_of(pixels: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, float]]:
        places = at_places(encoder(normalised(pixels)).last_hidden_state)
        answers = heads(places)
        losses = [
            nn.functional.cross_entropy(answer.flatten(0, 1).float(), labels[:, kind].flatten(), ignore_index=IGNORED)
            for kind, answer in enumerate(answers)
        ]
        return sum(losses), {"names": _right(answers[0], labels[:, 0]), "words": _right(answers[1], labels[:, 1])}

    _train("encoder", both, optimizer, schedule, data, batch_size, steps, folder, loss_of, bf16)
    return encoder


def train_connector(
    model: AkiForConditionalGeneration, tokenizer, scenes: Scenes, steps: int, batch_size: int, folder: Path, bf16: bool
) -> None:
    """Step 2."""
    model.eval()  # the encoder's statistics are settled
    data = Labelled(scenes, steps * batch_size)
    groups = {"what": [*data.names, *data.words, "nothing"], "row": ROWS, "column": ORDINALS, "size": SIZES}
    embeddings = model.get_input_embeddings().weight.detach()
    said = {
        group: torch.stack(
            [embeddings[tokenizer(f" {text}", add_special_tokens=False)["input_ids"]].mean(0) for text in texts]
        )
        for group, texts in groups.items()
    }
    centre = said["what"].mean(0)
    targets = {group: nn.functional.normalize(texts - centre, dim=-1) for group, texts in said.items()}
    rows, columns = torch.meshgrid(torch.arange(PLACES), torch.arange(PLACES), indexing="ij")
    optimizer = torch.optim.AdamW(model.model.connector.parameters(), 1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps, pct_start=0.1)

    def loss_of(pixels: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, float]]:
        with torch.no_grad():
            features = model.patch_features(normalised(pixels))
        places = model.model.connector(features)
        directions = nn.functional.normalize((places - centre).float(), dim=-1)
        names, words, sizes, kinds = labels.unbind(1)
        what = torch.where(kinds == 1, names, torch.where(kinds == 2, words + len(data.names), len(said["what"]) - 1))
        wanted = {"what": what, "row": rows.expand_as(what), "column": columns.expand_as(what), "size": sizes}
        scores = {group: directions @ texts.T / TEMPERATURE for group, texts in targets.items()}
        losses = [
            nn.functional.cross_entropy(scores[group].flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
            for group, labels in wanted.items()
        ]
        # As long as the language model's own embeddings, whose length its layers are used to.
        length = places.norm(dim=-1).mean() / said["what"].norm(dim=-1).mean()
        right = {group: _right(scores[group], labels) for group, labels in wanted.items()}
        return sum(losses) + (length - 1) ** 2, right

    _train("connector", model.model.connector, optimizer, schedule, data, batch_size, steps, folder, loss_of, bf16)


def _right(scores: Tensor, labels: Tensor) -> float:
    asked = labels.flatten() != IGNORED
    return float((scores.flatten(0, 1).argmax(-1) == labels.flatten())[asked].float().mean())


def _train(name, module, optimizer, schedule, data, batch_size, steps, folder, loss_of, bf16) -> None:
    saved = folder / f"{name}.pt"
    done = 0
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        done = state["step"]
        for part, what in zip((module, optimizer, schedule), ("module", "optimizer", "schedule"), strict=True):
            part.load_state_dict(state[what])
    with tqdm(total=steps, initial=done, desc=name, unit="step") as bar:
        for pixels, labels in batches(data, batch_size, done * batch_size) if done < steps else ():
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss, right = loss_of(pixels, labels)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            done += 1
            bar.update()
            bar.set_postfix(loss=f"{loss.item():.2f}", **{what: f"{share:.2f}" for what, share in right.items()})
            if done % SAVE_EVERY == 0 or done == steps:
                state = {"module": module.state_dict(), "optimizer": optimizer.state_dict(), "step": done}
                torch.save(state | {"schedule": schedule.state_dict()}, saved.with_suffix(".partial"))
                saved.with_suffix(".partial").replace(saved)


def language_model(path: Path, folder: Path) -> Path:
    """A folder with the language model and its tokenizer; a GGUF file becomes one."""
    if path.is_dir():
        return path
    unpacked, partial = folder / "language_model", folder / "language_model.partial"
    if not unpacked.exists():
        where = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
        AutoTokenizer.from_pretrained(**where).save_pretrained(partial)
        read = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
        # What was quantized in the file is not any more, and an ordinary model is what training wants.
        del read.config.quantization_config
        plain = AutoModelForCausalLM.from_config(read.config)
        plain.load_state_dict(read.state_dict())
        plain.save_pretrained(partial)
        partial.replace(unpacked)
    return unpacked


def join(
    encoder: nn.Module, text: Path, folder: Path, connector: dict
) -> tuple[AkiForConditionalGeneration, AkiProcessor]:
    encoder.save_pretrained(folder / "encoder")
    tokenizer = AutoTokenizer.from_pretrained(text)
    if tokenizer.pad_token is None or tokenizer.pad_token == tokenizer.eos_token:
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
    tokenizer.padding_side = "left"
    model = AkiForConditionalGeneration.from_backbones(
        str(folder / "encoder"),
        str(text),
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        vocab_size=len(tokenizer),
        dtype=torch.float32,
        connector_config=connector,
    )
    model.config.text_config.pad_token_id = tokenizer.pad_token_id
    images = SiglipImageProcessorPil(
        size={"height": PIXELS, "width": PIXELS}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    templates = {"default": CHATML, "caption": CAPTION}
    return model, AkiProcessor(images, tokenizer, model.config.image_seq_length, chat_template=templates)


def begin(parser: argparse.ArgumentParser, options: argparse.Namespace, kept: Path) -> dict[str, Any]:
    """The settings, which a start that was cut off is gone on with alone."""
    for path in (*options.things, options.language_model):
        if not path.exists():
            parser.error(f"{path} is not there; `make scenes-start` fetches the stamps and the language model.")
    settings = json.loads(json.dumps(vars(options), default=str))
    if kept.exists() and json.loads(kept.read_text()) != settings:
        parser.error(
            f"{options.output} was begun with other settings ({kept}): repeat those, or name another --output."
        )
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(settings, indent=1) + "\n")
    return settings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("things", type=Path, nargs="+", help="stamp folders")
    parser.add_argument("--language-model", type=Path, required=True, help="a folder, or a GGUF file")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--latents", type=int, help="of a resampler, learned from captions; a token a place if absent")
    parser.add_argument("--steps", type=int, default=1200, help="of the encoder")
    parser.add_argument("--connector-steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bf16", action="store_true", help="faster on CPUs with AMX, slower on others")
    options = parser.parse_args()
    training = options.output / "training"
    settings = begin(parser, options, training / "settings.json")
    torch.manual_seed(options.seed)
    started = time.perf_counter()
    scenes = Scenes(options.things, task="caption", seed=options.seed)
    encoder = train_encoder(scenes, options.steps, options.batch_size, training, options.bf16)
    text = language_model(options.language_model, training)
    connector = {"connector": "pooled_mlp", "num_latents": PLACES**2}
    if options.latents:
        connector = {"connector": "perceiver_resampler", "num_latents": options.latents, "depth": 2}
    # What is drawn for the connector does not depend on whether the encoder was trained in this process.
    torch.manual_seed(options.seed)
    model, processor = join(encoder, text, training, connector)
    if not options.latents:
        train_connector(
            model, processor.tokenizer, scenes, options.connector_steps, options.batch_size, training, options.bf16
        )
    model.save_pretrained(options.output)
    processor.save_pretrained(options.output)
    about = {**settings, "seconds": time.perf_counter() - started}
    (options.output / "start.json").write_text(json.dumps(about, indent=1) + "\n")
    print(f"{options.output}: {sum(p.numel() for p in model.parameters()):,} parameters; ask it with `aki chat`.")


if __name__ == "__main__":
    main()
