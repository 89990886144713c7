"""Video and audio beside images: each with an encoder and a connector, against stock parts and the oracle's masks."""

import copy

import oracle
import pytest
import torch
from model_builders import IMAGE, PAD, PER_IMAGE, VISION, assert_same, pad, pictures, stock_language_model, tiny_model
from transformers import AutoModel, VoxtralEncoderConfig, Wav2Vec2Config, WhisperConfig

from aki import AkiConfig, AkiForConditionalGeneration
from aki.compat import given_cache
from aki.models.other import parameters_of

VIDEO, AUDIO = 4, 6
FRAMES, LATENTS, MELS, STEPS = 2, 2, 4, 5
SIZES = {"num_latents": LATENTS, "depth": 1, "num_heads": 2, "head_dim": 4, "ff_mult": 2}
WHISPER = {
    "d_model": 12,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_layers": 1,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "num_mel_bins": MELS,
    "max_source_positions": STEPS,
    "vocab_size": 10,
    "pad_token_id": 0,
}
VOXTRAL = {
    "hidden_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "num_mel_bins": MELS,
    "max_source_positions": STEPS,
}
AUDIO_CONFIGS = {"whisper": lambda: WhisperConfig(**WHISPER), "voxtral": lambda: VoxtralEncoderConfig(**VOXTRAL)}
PARTS = ["vision_encoder", "connector", "video_encoder", "video_connector", "audio_encoder", "audio_connector"]
KINDS = {
    # name: (number, placeholder, with the resampler: tokens)
    "image": (1, IMAGE, PER_IMAGE),
    "video": (2, VIDEO, FRAMES * LATENTS),
    "audio": (3, AUDIO, LATENTS),
}
ROWS = [["audio", 9, "image", 7, 8, "video", "video", 10, 3], ["image", "audio", 7, 3], [5, 7, 3]]


def omni_model(audio: str = "whisper", connector: str = "perceiver_resampler") -> AkiForConditionalGeneration:
    return tiny_model(
        connector=connector,
        video_config=VISION["clip"](),
        video_connector_config=SIZES | {"connector": connector},
        video_token_id=VIDEO,
        video_frames=FRAMES,
        audio_config=AUDIO_CONFIGS[audio](),
        audio_connector_config=SIZES | {"connector": connector},
        audio_token_id=AUDIO,
    )


def media(images: int, videos: int, clips: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "pixel_values": pictures(images),
        "pixel_values_videos": pictures(videos * FRAMES, seed=2).unflatten(0, (videos, FRAMES)),
        "input_features": torch.randn(clips, MELS, 2 * STEPS, generator=generator),
    }


def written(rows, per_item: dict[str, int], answers: int = 0) -> tuple[torch.Tensor, list[oracle.Row]]:
    """input_ids padded on the left, and what the oracle knows of them; prompts but for the last `answers` tokens."""
    ids, known = [], []
    for row in rows:
        ids.append([])
        known.append([])
        for part in row:
            number, token, count = (*KINDS[part][:2], per_item[part]) if part in KINDS else (0, part, 1)
            ids[-1] += [token] * count
            known[-1] += [oracle.Token(0, modality=number, block=0)] * count
        for i in range(answers):
            known[-1][-1 - i] = oracle.Token(0, block=-1)
    length = max(map(len, ids))
    return pad(ids, PAD, "left"), [[oracle.PADDING] * (length - len(row)) + row for row in known]


PER_ITEM = {name: count for name, (_, _, count) in KINDS.items()}
INPUTS = media(2, 2, 2)


def batch(rows=ROWS, per_item=PER_ITEM, answers: int = 0):
    ids, known = written(rows, per_item, answers)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.tensor([[int(not t.is_padding) for t in row] for row in known]),
        "prompt_block_ids": torch.tensor([[t.block for t in row] for row in known]),
    }
    return inputs, known


def stock_logits(model, ids, known, inputs) -> torch.Tensor:
    """Embeddings put in place by hand, the oracle's masks, transformers' own encoders and language model."""
    features = {}
    with torch.no_grad():
        for name, values in inputs.items():
            kind = {"pixel_values": "vision", "pixel_values_videos": "video", "input_features": "audio"}[name]
            own = getattr(model.model, f"{kind}_encoder")
            encoder = AutoModel.from_config(copy.deepcopy(own.config)).eval()
            encoder = encoder.get_encoder() if own.config.model_type == "whisper" else encoder
            encoder.load_state_dict(own.state_dict())
            connector = model.model.connector if kind == "vision" else getattr(model.model, f"{kind}_connector")
            singles = values.flatten(0, 1) if kind == "video" else values
            found = []
            for single in singles:
                patches = encoder(single[None]).last_hidden_state
                # CLIP's class token.
                found += list(connector(patches[:, 1:] if kind == "video" else patches)[0])
            features[{"vision": IMAGE, "video": VIDEO, "audio": AUDIO}[kind]] = iter(found)
        language_model = stock_language_model(model)
        embeds = language_model.get_input_embeddings()(ids).clone()
        for b, row in enumerate(ids.tolist()):
            for position, token in enumerate(row):
                if token in features:
                    embeds[b, position] = next(features[token])
        assert all(next(rest, None) is None for rest in features.values())
        seen = oracle.masks("mma", known) | torch.eye(ids.shape[1], dtype=torch.bool)
        real = torch.tensor([[int(not t.is_padding) for t in row] for row in known])
        positions = (real.cumsum(1) - 1).clamp(min=0)
        return language_model(inputs_embeds=embeds, attention_mask=seen[:, None], position_ids=positions).logits


@pytest.mark.parametrize("audio", AUDIO_CONFIGS)
@pytest.mark.parametrize("connector", ["perceiver_resampler", "mlp"])
def test_all_at_once_equal_the_stock_language_model(audio, connector):
    model = omni_model(audio, connector)
    per_item = PER_ITEM if connector == "perceiver_resampler" else {"image": 4, "video": FRAMES * 4, "audio": STEPS}
    inputs, known = batch(per_item=per_item, answers=1)
    with torch.no_grad():
        logits = model(**inputs, **INPUTS).logits
    real = inputs["attention_mask"].bool()
    assert_same(logits[real], stock_logits(model, inputs["input_ids"], known, INPUTS)[real])


def test_audio_sees_image_and_text_and_image_sees_text():
    model = omni_model()
    model.set_attn_implementation("eager")
    ids, known = written([["audio", "image", 7, 8]], PER_ITEM)
    with torch.no_grad():
        out = model(input_ids=ids, output_attentions=True, **{k: v[:1] for k, v in INPUTS.items() if "video" not in k})
    seen = out.attentions[0][0, 0] > 0
    assert torch.equal(seen, oracle.masks("mma", known)[0])
    audio, image, text = slice(0, 2), slice(2, 5), slice(5, 7)
    for query, key in ((audio, image), (audio, text), (image, text)):
        assert seen[query, key].all()
    assert not seen[0, 1], "audio tokens among themselves are causal"
    assert not seen[2, 3], "so are those of an image"


def test_items_are_counted_over_all_kinds():
    ids, _ = written([["audio", "video", "video", 7, "image"]], PER_ITEM)
    layout = omni_model().layout(ids)
    items = [0] * LATENTS + [1] * FRAMES * LATENTS + [2] * FRAMES * LATENTS + [-1] + [3] * PER_IMAGE
    assert layout.media_item.tolist() == [items]


def test_the_order_of_frames_matters():
    model = omni_model()
    ids, _ = written([["video", 7, 8]], PER_ITEM)
    video = INPUTS["pixel_values_videos"][:1]
    with torch.no_grad():
        forth, back = (model(input_ids=ids, pixel_values_videos=v).logits for v in (video, video.flip(1)))
    assert (forth - back).abs().max() > 1e-2


@pytest.mark.parametrize("options", [{"use_cache": False}, {"cache_implementation": "static"}])
def test_caches_change_nothing(options):
    model = omni_model()
    inputs, known = batch()
    how = {"max_new_tokens": 4, "min_new_tokens": 4, "return_dict_in_generate": True, "output_logits": True}
    cached = model.generate(**inputs, **INPUTS, **how)
    other = model.generate(**inputs, **INPUTS, **how, **options)
    assert torch.equal(other.sequences, cached.sequences)
    assert_same(torch.stack(other.logits), torch.stack(cached.logits))
    grown = [row + [oracle.Token(0)] * 3 for row in known]
    wanted = stock_logits(model, cached.sequences[:, :-1], grown, INPUTS)[:, -4:]
    assert_same(torch.stack(cached.logits, 1), wanted)


def test_a_second_turn_on_the_cache_encodes_what_is_new_alone():
    model = omni_model()
    how = {"max_new_tokens": 3, "min_new_tokens": 3, "return_dict_in_generate": True, "output_logits": True}
    inputs = {"input_ids": written([["audio", "video", 7, 3]], PER_ITEM)[0]}
    first = {name: INPUTS[name][:1] for name in ("pixel_values_videos", "input_features")}
    answered = model.generate(**inputs, **first, **how)
    more, _ = written([["audio", "image", 8, 3]], PER_ITEM)
    ids = torch.cat([answered.sequences, more], 1)
    blocks = torch.full_like(ids, -1)
    blocks[:, : inputs["input_ids"].shape[1]] = 0
    blocks[:, answered.sequences.shape[1] :] = 1
    second = {"input_ids": ids, "prompt_block_ids": blocks, **INPUTS}
    second |= {"pixel_values": INPUTS["pixel_values"][:1], "pixel_values_videos": first["pixel_values_videos"]}
    uncached = model.generate(**second, **how, use_cache=False)
    encoded = []

    def hook(_, args):
        encoded.append(args[0].shape[0])

    with (
        model.model.audio_encoder.register_forward_pre_hook(hook),
        model.model.video_encoder.register_forward_pre_hook(hook),
    ):
        cached = model.generate(**second, **how, cache=given_cache(answered))
    assert encoded == [1]
    assert torch.equal(cached.sequences, uncached.sequences)
    assert_same(torch.stack(cached.logits), torch.stack(uncached.logits))


def test_beams_keep_each_row_with_its_media():
    model = omni_model()
    how = {"max_new_tokens": 3, "min_new_tokens": 3, "num_beams": 2}
    together = model.generate(**batch()[0], **INPUTS, **how)
    first = {"pixel_values": slice(0, 1), "pixel_values_videos": slice(0, 2), "input_features": slice(0, 1)}
    second = {"pixel_values": slice(1, 2), "input_features": slice(1, 2)}
    for row, own in enumerate((first, second)):
        alone = model.generate(**batch(ROWS[row : row + 1])[0], **{k: INPUTS[k][cut] for k, cut in own.items()}, **how)
        assert torch.equal(alone[0, -3:], together[row, -3:])


def test_a_folder_and_back(tmp_path):
    model = omni_model()
    model.save_pretrained(tmp_path)
    again = AkiForConditionalGeneration.from_pretrained(tmp_path)
    inputs, _ = batch()
    with torch.no_grad():
        assert torch.equal(again(**inputs, **INPUTS).logits, model(**inputs, **INPUTS).logits)
    assert again.config.media.keys() == model.config.media.keys()


def test_every_encoder_and_connector_learns():
    model = omni_model().train()
    inputs, _ = batch(answers=1)
    labels = inputs["input_ids"].where(inputs["prompt_block_ids"] < 0, torch.tensor(-100))
    labels = labels.masked_fill(inputs["attention_mask"] == 0, -100)
    model(**inputs, **INPUTS, labels=labels).loss.backward()
    for part in PARTS:
        gradients = [p.grad for p in model.parts[part].parameters() if p.grad is not None]
        assert all(g.isfinite().all() for g in gradients)
        assert any(g.abs().max() > 0 for g in gradients), part


def test_images_alone_are_configured_as_before():
    model = tiny_model()
    assert model.parts.keys() == {"vision_encoder", "connector", "language_model"}
    saved = model.config.to_diff_dict()
    again = AkiConfig.from_dict(saved)
    assert again.video_config is None
    assert again.audio_config is None
    assert list(again.media) == ["pixel_values"]


def test_joined_from_backbones(tmp_path):
    own = omni_model()
    parts = {
        "vision_encoder": own.model.vision_encoder,
        "video_encoder": own.model.video_encoder,
        # As on the hub: with its decoder.
        "audio_encoder": AutoModel.from_config(WhisperConfig(**WHISPER)),
        "language_model": stock_language_model(own),
    }
    for name, part in parts.items():
        part.save_pretrained(tmp_path / name)
    model = AkiForConditionalGeneration.from_backbones(
        **{name: tmp_path / name for name in parts},
        image_token_id=IMAGE,
        connector_config=own.config.connector_config,
        video_token_id=VIDEO,
        video_frames=FRAMES,
        video_connector_config=SIZES,
        audio_token_id=AUDIO,
        audio_connector_config=SIZES,
    )
    parts["audio_encoder"] = parts["audio_encoder"].get_encoder()
    for name, part in parts.items():
        whole = {"language_model": stock_language_model(model)}.get(name) or model.model.get_submodule(name)
        found = whole.state_dict()
        assert found.keys() == part.state_dict().keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in part.state_dict().items())
    with torch.no_grad():
        assert model(**batch()[0], **INPUTS).logits.isfinite().all()


class TestRefused:
    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("pixel_values_videos", r"1 video\(s\) need 4 placeholders .* found 8"),
            ("input_features", r"1 audio clip\(s\) need 2 placeholders .* found 4"),
        ],
    )
    def test_another_count(self, name, message):
        with pytest.raises(ValueError, match=message):
            omni_model()(**batch()[0], **INPUTS | {name: INPUTS[name][:1]})

    def test_placeholders_without_media(self):
        inputs = {name: values for name, values in INPUTS.items() if name != "input_features"}
        with pytest.raises(ValueError, match=r"0 audio clip\(s\) need 0 placeholders .* found 4"):
            omni_model()(**batch()[0], **inputs)

    def test_another_number_of_frames(self):
        with pytest.raises(ValueError, match=r"expected \(videos, 2, channels, height, width\)"):
            omni_model()(**batch()[0], **INPUTS | {"pixel_values_videos": torch.zeros(2, 3, 3, 16, 16)})

    def test_a_model_of_images(self):
        with pytest.raises(ValueError, match="no encoder for input_features"):
            tiny_model()(input_ids=torch.tensor([[5, 7]]), input_features=INPUTS["input_features"])

    @pytest.mark.parametrize("token", [None, IMAGE])
    def test_no_placeholder_of_its_own(self, token):
        with pytest.raises(ValueError, match="each needs a token of its own"):
            tiny_model(audio_config=AUDIO_CONFIGS["voxtral"](), audio_token_id=token)

    def test_an_audio_encoder_of_any_length(self):
        config = tiny_model().config
        config.audio_config, config.audio_connector_config = Wav2Vec2Config(), config.connector_config
        with pytest.raises(ValueError, match="'wav2vec2' has no fixed max_source_positions"):
            _ = config.media["input_features"].num_features


def test_all_encoders_and_connectors_are_named_by_their_part():
    """As `frozen` and the dry run name them."""
    model = omni_model()
    parts = {part: {id(parameter) for parameter in held} for part, held in parameters_of(model).items()}
    assert parts.keys() == {"vision_encoder", "connector", "language_model"}
    for module in ("vision", "video", "audio"):
        encoder, connector = f"{module}_encoder", "connector" if module == "vision" else f"{module}_connector"
        for part, name in (("vision_encoder", encoder), ("connector", connector)):
            assert {id(parameter) for parameter in model.model.get_submodule(name).parameters()} <= parts[part], name
    assert sum(map(len, parts.values())) == len(list(model.parameters()))
