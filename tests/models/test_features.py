from __future__ import annotations

import pytest
import torch

from aki.models.features import FeatureCache, computes_bfloat16, lowest_precision
from aki.training.stages import build_model


@pytest.fixture
def model(tiny_recipe):
    torch.manual_seed(0)
    return build_model(tiny_recipe)[0]


@pytest.fixture
def pixels(model):
    return torch.rand(3, 3, *model.config.image_size)


def test_a_frozen_encoder_keeps_nothing_for_a_backward(model, pixels):
    learning = saved_for_backward(model, pixels)
    model.model.vision_encoder.requires_grad_(False)
    assert saved_for_backward(model, pixels) < learning / 2
    assert model.model.connector.layers[0].weight.grad is not None


def saved_for_backward(model, pixels) -> int:
    kept: list[int] = []

    def keep(tensor):
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.get_image_features(pixels).pooler_output.sum().backward()
    return sum(kept)


def test_features_from_disk_are_the_features_and_are_computed_once(model, pixels, tmp_path):
    model.model.vision_encoder.requires_grad_(False)
    wanted = model.get_image_features(pixels).pooler_output
    calls = []
    model.model.vision_encoder.register_forward_hook(lambda *args: calls.append(1))
    model.model.feature_cache = FeatureCache(tmp_path, model.model.vision_encoder)
    assert torch.allclose(model.get_image_features(pixels).pooler_output, wanted, atol=1e-6)
    assert torch.allclose(model.get_image_features(pixels.flip(0)).pooler_output, wanted.flip(0), atol=1e-6)
    assert len(calls) == 1
    model.get_image_features(torch.cat([pixels, pixels[:1] + 0.01]))
    assert len(calls) == 2
    assert len(list(tmp_path.rglob("*.safetensors"))) == 4


def test_other_weights_and_another_precision_are_other_features(model, pixels, tmp_path):
    first = FeatureCache(tmp_path, model.model.vision_encoder)
    lower = FeatureCache(tmp_path, model.model.vision_encoder, torch.bfloat16)
    with torch.no_grad():
        next(model.model.vision_encoder.parameters()).add_(1e-3)
    moved = FeatureCache(tmp_path, model.model.vision_encoder)
    assert len({cache._path(pixels[0]) for cache in (first, lower, moved)}) == 3


@pytest.mark.skipif(not computes_bfloat16(torch.device("cpu")), reason="this CPU has no bfloat16")
def test_the_lower_precision_is_taken_only_within_the_tolerance(model, pixels):
    encode = model.patch_features
    assert lowest_precision(encode, pixels, tolerance=0.05) == torch.bfloat16
    assert lowest_precision(encode, pixels, tolerance=1e-6) == torch.float32


def test_an_autocast_around_the_model_leaves_the_encoder_in_the_precision_that_was_settled(model, pixels):
    model.model.vision_encoder.requires_grad_(False)
    exact = model.patch_features(pixels)
    with torch.autocast("cpu", torch.bfloat16):
        assert not torch.equal(model.patch_features(pixels), exact)
        model.model.encoder_dtype = lowest_precision(model.patch_features, pixels, tolerance=0)
        assert torch.equal(model.patch_features(pixels), exact)


def test_a_file_of_features_that_cannot_be_read_is_written_again(model, pixels, tmp_path):
    cache = FeatureCache(tmp_path, model.model.vision_encoder)
    wanted = cache(pixels, model.patch_features)
    damaged = sorted(tmp_path.rglob("*.safetensors"))[0]
    damaged.write_bytes(damaged.read_bytes()[:5])
    assert torch.allclose(cache(pixels, model.patch_features), wanted, atol=1e-6)
    assert torch.allclose(cache(pixels, lambda missing: pytest.fail("all are there")), wanted, atol=1e-6)


def test_features_in_a_lower_precision_reach_the_connector_in_its_own(model, pixels):
    model.model.vision_encoder.requires_grad_(False)
    wanted = model.get_image_features(pixels).pooler_output
    model.model.encoder_dtype = torch.bfloat16
    lower = model.get_image_features(pixels).pooler_output
    assert lower.dtype == wanted.dtype
    assert 0 < (lower - wanted).norm() < 0.05 * wanted.norm()


def test_15_features_whose_bytes_changed_are_computed_again(model, pixels, tmp_path):
    """Issue 12, entry 15: a power cut leaves a file of the right length with zeros in it."""
    cache = FeatureCache(tmp_path, model.model.vision_encoder)
    wanted = cache(pixels, model.patch_features)
    damaged = sorted(tmp_path.rglob("*.safetensors"))[0]
    damaged.write_bytes(damaged.read_bytes()[:-40] + bytes(40))
    assert torch.allclose(cache(pixels, model.patch_features), wanted, atol=1e-6)


def test_15_two_machines_may_write_the_same_features(model, pixels, tmp_path, monkeypatch):
    """Issue 12, entry 15: both have a process of this number, and the second comes before the first has renamed."""
    from aki.models import features

    cache, save, inner = FeatureCache(tmp_path, model.model.vision_encoder), features.save_file, []

    def both_at_once(tensors, path, *args):
        save(tensors, path, *args)
        if not inner:
            inner.append(path)
            cache(pixels, model.patch_features)  # the other machine's, from start to end

    monkeypatch.setattr(features, "save_file", both_at_once)
    wanted = cache(pixels, model.patch_features)
    assert torch.equal(cache(pixels, lambda missing: pytest.fail("all are there")), wanted)
    assert not list(tmp_path.rglob("*.partial"))
