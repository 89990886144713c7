"""Unlocked models compute by segments and take packed rows: each family against its own padded rows, dense masks."""

from types import SimpleNamespace

import pytest
import torch
from test_unlock import built
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForImageTextToText
from unlock_chats import chat
from unlock_families import FAMILIES, IMAGE_ID, ROWS, TEXT, VISION

import aki
from aki.attention import CannotUnlock
from aki.layout import IGNORE_INDEX


@pytest.fixture(params=FAMILIES)
def family(request):
    family = built(request.param)
    yield family
    aki.lock(family.model)
    family.model.eval().zero_grad()
    family.model.set_attn_implementation("sdpa")


def learned(model, batch) -> torch.Tensor:
    """The loss of each label, row by row."""
    shifted = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE_INDEX)
    logits = model(**{name: value for name, value in batch.items() if name != "labels"}, labels=None).logits
    found = cross_entropy(logits.transpose(1, 2), shifted, reduction="none")
    return found[shifted != IGNORE_INDEX]


def gradients(model, loss) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def samples(family) -> list[dict[str, torch.Tensor]]:
    """Each row of a padded batch as a sample of its own, with labels on the answer and prompt blocks."""
    inputs = chat(family, answer=3, pad="right")
    ids, real = inputs["input_ids"], inputs["attention_mask"]
    found = []
    for row in range(ROWS):
        length = int(real[row].sum())
        one = {}
        for name, value in inputs.items():
            if value.shape[:2] == ids.shape:
                one[name] = value[row : row + 1, :length]
            elif len(value) % ROWS == 0:
                each = len(value) // ROWS
                one[name] = value[row * each : (row + 1) * each]
        one["labels"] = one["input_ids"].clone()
        one["labels"][:, : length - 3] = IGNORE_INDEX
        one["prompt_block_ids"] = torch.zeros_like(one["input_ids"])
        one["prompt_block_ids"][:, length - 3 :] = -1
        found.append(one)
    return found


def test_kernel_equals_dense(family):
    """Logits and gradients by segments against those under eager's masks."""
    inputs = samples(family)[0]
    model = family.model
    found = {}
    for implementation in ("eager", "segments"):
        model.set_attn_implementation("eager" if implementation == "eager" else "sdpa")
        aki.unlock(model)
        decoder = model.get_decoder()
        if implementation == "segments":
            if decoder.config._attn_implementation != "auto":
                pytest.skip("its decoder takes no attention of transformers' AttentionInterface")
            decoder.config._attn_implementation = "segments"
        model.eval()
        values = learned(model, inputs)
        found[implementation] = values.detach(), gradients(model, values.sum())
        aki.lock(model)
    torch.testing.assert_close(found["segments"][0], found["eager"][0], atol=1e-5, rtol=1e-5)
    assert found["segments"][1].keys() == found["eager"][1].keys()
    for name, gradient in found["segments"][1].items():
        torch.testing.assert_close(gradient, found["eager"][1][name], atol=1e-4, rtol=1e-4, msg=name)


@pytest.mark.parametrize("rule", ["mma", "causal"])
def test_packed_equals_unpacked(family, rule):
    """Losses and gradients of samples in one row are those that they have alone."""
    model = family.model
    aki.unlock(model, rule=rule)
    try:
        packed = aki.pack(lambda batch: batch[0], model, row_tokens=1000)(samples(family))
    except CannotUnlock as why:
        pytest.skip(str(why))
    assert packed["input_ids"].shape[0] == 1
    alone = torch.cat([learned(model, one) for one in samples(family)])
    apart = gradients(model, alone.sum())
    together = learned(model, packed)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    for name, gradient in gradients(model, together.sum()).items():
        torch.testing.assert_close(gradient, apart[name], atol=1e-4, rtol=1e-4, msg=name)


def test_lock_puts_back_the_implementation():
    model = built("LLaVA").model
    aki.unlock(model)
    assert model.get_decoder().config._attn_implementation == "auto"
    aki.unlock(model, rule="prefix")
    aki.lock(model)
    assert model.get_decoder().config._attn_implementation == "sdpa"


def test_lock_leaves_encoders_whose_attention_the_decoders_configuration_names():
    """Phi-4's decoder has the configuration of the whole model, and its encoders' in it."""
    model = FAMILIES["Phi-4-multimodal"]().model
    parts = model.get_decoder().config, model.config.vision_config, model.config.audio_config
    model.set_attn_implementation({"vision_config": "eager", "audio_config": "eager"})
    found = [[part._attn_implementation for part in parts]]
    for change in (aki.unlock, aki.lock):
        change(model)
        found.append([part._attn_implementation for part in parts])
    assert found == [[decoder, "eager", "eager"] for decoder in ("sdpa", "auto", "sdpa")]


def test_sinks_that_flash_attention_would_have_computed_take_the_models_own_eager_attention():
    text = {"model_type": "gpt_oss", **TEXT, "num_local_experts": 2, "num_experts_per_tok": 1}
    vision = {"model_type": "clip_vision_model", **VISION}
    config = AutoConfig.for_model("llava", text_config=text, vision_config=vision, image_token_index=IMAGE_ID)
    model = AutoModelForImageTextToText.from_config(config)
    decoder = model.get_decoder().config
    for before in ("eager", "flash_attention_2"):
        decoder._attn_implementation = before
        aki.unlock(model)
        assert decoder._attn_implementation == "eager"
        aki.lock(model)
        assert decoder._attn_implementation == before


@pytest.mark.parametrize("rule", ["causal", "mma", "prefix"])
@pytest.mark.parametrize("lengths", [[1, 4], [1, 1, 1], [3, 1, 2]])
def test_documents_of_one_token_are_apart_too(rule, lengths):
    """Of text alone, which transformers' own masks keep apart where no cache is made."""
    model = aki.unlock(FAMILIES["LLaVA"]().model.eval(), rule=rule)
    ids = torch.randint(4, 19, (1, sum(lengths)), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    with torch.no_grad():
        alone = torch.cat([model(one).logits for one in ids.split(lengths, 1)], 1)
        torch.testing.assert_close(model(ids, position_ids=positions).logits, alone)


def test_flash_attention_is_not_refused():
    model = built("LLaVA").model
    decoder = model.get_decoder()
    decoder.config._attn_implementation = "flash_attention_2"
    try:
        aki.unlock(model)
        aki.lock(model)
        assert decoder.config._attn_implementation == "flash_attention_2"
    finally:
        decoder.config._attn_implementation = "sdpa"


def test_rows_hold_whole_samples_and_their_rest_is_learned_by_nobody():
    lengths = [5, 7, 3, 9]
    made = [
        {
            "input_ids": torch.full((1, length), 3 + number),
            "attention_mask": torch.ones(1, length, dtype=torch.long),
            "labels": torch.full((1, length), 3 + number),
            "pixel_values": torch.full((1, 3, 2, 2 + number % 2), float(number)),
        }
        for number, length in enumerate(lengths)
    ]
    batch = aki.pack(lambda one: one[0], built("LLaVA").model, row_tokens=12)(made)
    assert "attention_mask" not in batch
    ids, positions, labels = batch["input_ids"], batch["position_ids"], batch["labels"]
    assert ids.shape == positions.shape == labels.shape
    documents = {}
    for row in range(len(ids)):
        starts = (positions[row] == 0).nonzero()[:, 0].tolist()
        for start, stop in zip(starts, [*starts[1:], ids.shape[1]], strict=True):
            documents[int(ids[row, start])] = (stop - start, labels[row, start:stop].tolist())
    for number, length in enumerate(lengths):
        assert documents[3 + number] == (length, [IGNORE_INDEX] + [3 + number] * (length - 1))
    assert all(label == IGNORE_INDEX for label in documents.get(0, (0, []))[1])
    order = [int(ids[row, start]) - 3 for row in range(len(ids)) for start in (positions[row] == 0).nonzero()[:, 0]]
    shown = [int(one.max()) for one in batch["pixel_values"]]
    assert shown == [number for number in order if number >= 0]


def test_a_sample_longer_than_a_row_is_a_sentence():
    collate = aki.pack(lambda one: one[0], built("LLaVA").model, row_tokens=4)
    with pytest.raises(ValueError, match="raise row_tokens"):
        collate([{"input_ids": torch.ones(1, 5, dtype=torch.long)}])


def test_a_family_that_cannot_be_packed_says_why():
    with pytest.raises(CannotUnlock, match="masks of its own"):
        aki.pack(SimpleNamespace(), built("Gemma 3").model, row_tokens=100)
