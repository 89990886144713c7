"""Issue 12, entry 7: all parts of a model take part on every process in every step, also where a batch lacks media."""

from __future__ import annotations

import copy

import global_batch
import pytest
import torch
import torch.distributed as dist
from test_global_batch import assert_same
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, SiglipVisionConfig, TrainingArguments, WhisperConfig
from two_processes import on_two

from aki import AkiConfig, AkiForConditionalGeneration
from aki.models import modeling

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
IMAGE, VIDEO, AUDIO, FRAMES, STEPS, MELS = 3, 4, 5, 2, 3, 4
TOKENS = {IMAGE: 4, VIDEO: FRAMES * 4, AUDIO: STEPS}


@pytest.fixture
def omni() -> AkiForConditionalGeneration:
    torch.manual_seed(0)
    whisper = {"d_model": 12, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16}
    whisper |= {"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 16, "vocab_size": 10}
    config = AkiConfig(
        vision_config=SiglipVisionConfig(image_size=8, patch_size=4, **SIZES),
        text_config=LlamaConfig(vocab_size=40, **SIZES),
        connector_config={"connector": "mlp"},
        image_token_id=IMAGE,
        video_config=SiglipVisionConfig(image_size=8, patch_size=4, **SIZES),
        video_connector_config={"connector": "mlp"},
        video_token_id=VIDEO,
        video_frames=FRAMES,
        audio_config=WhisperConfig(num_mel_bins=MELS, max_source_positions=STEPS, pad_token_id=0, **whisper),
        audio_connector_config={"connector": "mlp"},
        audio_token_id=AUDIO,
    )
    return AkiForConditionalGeneration(config).train()


def inputs(*kinds: int) -> dict[str, torch.Tensor]:
    """One sample with an item of each of these kinds."""
    torch.manual_seed(sum(kinds))
    prompt = [token for kind in kinds for token in [kind] * TOKENS[kind]] + [9, 10, 11]
    ids = torch.tensor([[*prompt, 12, 13]])
    blocks = torch.tensor([[0] * len(prompt) + [-1, -1]])
    media = {
        IMAGE: ("pixel_values", torch.randn(1, 3, 8, 8)),
        VIDEO: ("pixel_values_videos", torch.randn(1, FRAMES, 3, 8, 8)),
        AUDIO: ("input_features", torch.randn(1, MELS, 2 * STEPS)),
    }
    labels = ids.masked_fill(blocks == 0, -100)
    return {"input_ids": ids, "prompt_block_ids": blocks, "labels": labels} | dict(media[kind] for kind in kinds)


@pytest.mark.parametrize("kinds", [(), (IMAGE,), (VIDEO, AUDIO)])
def test_12_7_what_a_batch_lacks_takes_part_and_changes_no_loss(omni, kinds):
    given = inputs(*kinds)
    loss = omni(**given).loss
    loss.backward()
    # Bit for bit what inference computes, which runs no part that is not needed.
    assert torch.equal(omni.eval()(**given).loss, loss)
    for kind, part in ((IMAGE, "connector"), (VIDEO, "video_connector"), (AUDIO, "audio_connector")):
        for name, parameter in omni.model.get_submodule(part).named_parameters():
            assert parameter.grad is not None, name
            assert bool(parameter.grad.any()) == (kind in kinds), name


def test_12_7_inference_encodes_nothing_that_is_not_there(omni, monkeypatch):
    monkeypatch.setattr(modeling, "encode_media", lambda *_: pytest.fail("a blank was encoded"))
    omni.eval()
    with torch.no_grad():
        omni(**inputs())


def test_12_7_a_placeholder_without_its_picture_is_still_an_error(omni):
    with pytest.raises(ValueError, match=r"0 image\(s\) need 0 placeholders .* found 4"):
        omni(**{name: values for name, values in inputs(IMAGE).items() if name != "pixel_values"})


TEXT_ONLY = {"on one of two": {2, 3, 6, 7}, "on both": set(range(8)), "in one of two accumulated": {1, 2, 5, 6}}

# Its name before transformers 5.23, which those after it deprecate.
CHECKPOINTING = (
    "activation_checkpointing"
    if "activation_checkpointing" in TrainingArguments.__dataclass_fields__
    else "gradient_checkpointing"
)

WAYS = {
    "plain": {},
    "checkpointing": {CHECKPOINTING: True},
    # As transformers' own Trainer does it, where a parameter without a gradient ends the run.
    "no search": {CHECKPOINTING: True, "ddp_find_unused_parameters": False, "frozen": ["vision_encoder"]},
}


@pytest.mark.parametrize(
    ("text_only", "batch", "way"),
    [
        ("on one of two", 2, "plain"),
        ("on one of two", 2, "checkpointing"),
        ("on one of two", 2, "no search"),
        ("on both", 2, "no search"),
        ("in one of two accumulated", 1, "checkpointing"),
        ("in one of two accumulated", 1, "no search"),
    ],
)
def test_12_7_ddp(tmp_path, text_only, batch, way):
    """Weights after training are those of one process that has all samples."""
    options = WAYS[way] | {"text_only": TEXT_ONLY[text_only]}
    wanted = global_batch.train(**options)
    for found in on_two(lambda: global_batch.train(batch=batch, accumulation=2 // batch, **options), tmp_path):
        assert_same(found, wanted)


@pytest.mark.parametrize("kinds", [((IMAGE,), ()), ((IMAGE, AUDIO), (VIDEO,))], ids=["text", "other media"])
def test_12_7_fsdp2(omni, tmp_path, kinds):
    """Losses and gradients of accumulated batches are those of a model that is not sharded; evaluation ends too."""
    whole = copy.deepcopy(omni)
    losses = []
    for own in kinds * 2:
        losses.append(whole(**inputs(*own)).loss)
        (losses[-1] / 2).backward()

    def step():
        mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
        for module in omni.modules():
            if type(module).__name__ in ("SiglipEncoderLayer", "WhisperEncoderLayer", "LlamaDecoderLayer"):
                fully_shard(module, mesh=mesh)
        fully_shard(omni, mesh=mesh)
        own = kinds[dist.get_rank()]
        for micro in range(2):
            omni.set_requires_gradient_sync(micro == 1)
            loss = omni(**inputs(*own)).loss
            loss.backward()
        gradients = {name: p.grad.full_tensor() for name, p in omni.named_parameters() if p.grad is not None}
        omni.eval()
        with torch.no_grad():
            evaluated = omni(**inputs(*own)).loss
        return {"losses": torch.stack([loss.detach(), evaluated]), **gradients}

    for rank, found in enumerate(on_two(step, tmp_path)):
        torch.testing.assert_close(found.pop("losses"), losses[rank].detach().expand(2))
        wanted = {name: p.grad for name, p in whole.named_parameters() if name in found}
        assert_same(found, wanted)
