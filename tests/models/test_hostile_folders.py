"""Issue 12, entry 14: broken weights are said at loading, and a folder that asks for too much is refused in seconds."""

import json
import time
from typing import Any

import pytest
import torch
from model_builders import TOKENIZE, user
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig

from aki import AkiForConditionalGeneration, AkiProcessor
from aki.apps.loading import load
from aki.evaluation.opening import load_model

SECONDS = 10
"""Of a busy machine; what is refused would take hours, or all of the memory."""


@pytest.fixture
def folder(make_model, processor, tmp_path):
    make_model().save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    return tmp_path


def rewrite(folder, **tensors):
    file = folder / "model.safetensors"
    save_file(load_file(file) | tensors, file, metadata={"format": "pt"})


SIZES: list[dict[str, Any]] = [
    {"size": {"height": 1_000_000, "width": 1_000_000}},
    {"size": {"shortest_edge": 1_000_000}},
    {"image_seq_length": 1_000_000},
]


def refused(folder, match):
    started = time.perf_counter()
    for open_it in (AkiForConditionalGeneration.from_pretrained, load):
        with pytest.raises(ValueError, match=match):
            open_it(folder)
    assert time.perf_counter() - started < 2 * SECONDS


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_12_14_one_number_that_is_none(folder, number):
    latents = load_file(folder / "model.safetensors")["model.connector.latents"]
    latents[1, 2] = number
    rewrite(folder, **{"model.connector.latents": latents})
    refused(folder, r"NaN or infinite numbers in 1 of its weights, .*: model\.connector\.latents\.")


def test_12_14_weights_that_no_part_takes(folder):
    rewrite(folder, **{"model.connector.layers.9.extra": torch.ones(2)})
    refused(folder, r"holds 1 weights that no part of the model takes, .*: model\.connector\.layers\.9\.extra\.")


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool])
def test_12_14_integers_where_floats_belong(folder, dtype):
    latents = load_file(folder / "model.safetensors")["model.connector.latents"]
    rewrite(folder, **{"model.connector.latents": latents.to(dtype)})
    refused(folder, r"in 1 tensors: model\.connector\.latents is (I8|I64|BOOL) instead of floating point")


@pytest.mark.parametrize(
    ("field", "match"),
    [
        ("text_config.num_hidden_layers", r"asks for 1,000,000 layers \(text_config\.num_hidden_layers\)"),
        ("vision_config.num_hidden_layers", r"asks for 1,000,000 layers \(vision_config\.num_hidden_layers\)"),
        ("connector_config.depth", r"asks for 1,000,000 layers \(connector_config\.depth\)"),
        # Shallow and wide: gigabytes that the weights do not have.
        ("text_config.num_key_value_heads", r"do not fit its config\.json in 4 tensors"),
        ("connector_config.ff_mult", r"do not fit its config\.json"),
        ("vision_config.num_channels", r"do not fit its config\.json in 1 tensors"),
    ],
)
def test_12_14_sizes_that_nobody_has(folder, field, match):
    config = json.loads((folder / "config.json").read_text())
    part, name = field.split(".")
    config[part][name] = 1_000_000
    (folder / "config.json").write_text(json.dumps(config))
    refused(folder, match)


ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
GIGABYTES = {
    "times": "{{ 'a' * 9999999999 }}",
    "padded": "{{ ('%' ~ '9999999999d') | format(1) }}",
    "doubled": "{% set n = namespace(x='aa') %}{% for i in range(40) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "long": "{% for i in range(9999) %}{{ messages[0].role * 999 }}{% endfor %}",
}


@pytest.mark.parametrize("template", [ENDLESS, *GIGABYTES.values()], ids=["endless", *GIGABYTES])
def test_12_14_templates_without_end(folder, template):
    (folder / "chat_template.jinja").write_text(template)
    started = time.perf_counter()
    for open_it in (AkiProcessor.from_pretrained, load):
        with pytest.raises(ValueError, match=r"takes more than (2 s|512 MB)|writes more than 1,000,000 characters"):
            open_it(folder)
    assert time.perf_counter() - started < 2 * SECONDS


@pytest.mark.parametrize("change", SIZES, ids=[" ".join(change) for change in SIZES])
def test_12_14_a_processor_that_makes_gigabytes_of_a_small_picture(folder, change):
    config = json.loads((folder / "processor_config.json").read_text())
    (field,) = change
    (config if field in config else config["image_processor"])[field] = change[field]
    (folder / "processor_config.json").write_text(json.dumps(config))
    for open_it in (AkiProcessor.from_pretrained, load):
        with pytest.raises(ValueError, match=rf"the processor of .* asks for 1,000,000 \(.*{field}.*\)"):
            open_it(folder)


def test_12_14_a_template_that_says_no_is_no_harm(folder):
    template = "{{ raise_exception('no') }}"
    (folder / "chat_template.jinja").write_text(template)
    processor = AkiProcessor.from_pretrained(folder)
    with pytest.raises(Exception, match="no"):
        processor.apply_chat_template([user("what is this ?")], **TOKENIZE)


@pytest.mark.parametrize(
    ("field", "match"),
    [
        ("num_hidden_layers", r"asks for 1,000,000 layers \(text_config\.num_hidden_layers\)"),
        ("intermediate_size", r"describes [\d,]+ parameters, and its weights are [\d,]+ numbers"),
    ],
)
def test_12_14_other_models_too(folder, field, match):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = SiglipVisionConfig(image_size=16, patch_size=8, **sizes)
    config = LlavaConfig(vision_config=vision, text_config=LlamaConfig(vocab_size=400, **sizes))
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    assert load(folder, unlock=True)
    saved = json.loads((folder / "config.json").read_text())
    saved["text_config"][field] = 1_000_000
    (folder / "config.json").write_text(json.dumps(saved))
    for open_it in (load, lambda folder, unlock: load_model(str(folder), "auto", None, unlock, None)):
        with pytest.raises(ValueError, match=match):
            open_it(folder, unlock=True)
