"""Videos and audio in chats: opened, prepared by the encoders' own processors, and all the way through the model."""

import copy
import itertools

import numpy as np
import pytest
import soundfile
import torch
from model_builders import PER_IMAGE, PIXELS, TOKENIZE, VISION, assistant, enlarge
from PIL import Image
from transformers import AutoProcessor, TrainingArguments, VoxtralEncoderConfig, WhisperConfig, WhisperFeatureExtractor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from aki import AkiForConditionalGeneration, AkiProcessor
from aki.data.collate import ChatCollator
from aki.data.packing import PackedCollator, join
from aki.data.schema import Sample
from aki.models.clips import ClipError, open_audio, open_video, pick_frames
from aki.training.trainer import AkiTrainer, guard_batch

FRAMES, LATENTS, MELS, RATE = 3, 2, 8, 8000
SIZES = {"num_latents": LATENTS, "depth": 1, "num_heads": 2, "head_dim": 4, "ff_mult": 2}
# A second in steps of 10 ms, which Whisper's encoder halves.
EXTRACTOR = {"feature_size": MELS, "sampling_rate": RATE, "hop_length": 80, "chunk_length": 1, "n_fft": 100}
STEPS = 50
AUDIO = {
    "whisper": lambda: WhisperConfig(
        d_model=12,
        encoder_layers=1,
        encoder_attention_heads=2,
        decoder_layers=1,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        num_mel_bins=MELS,
        max_source_positions=STEPS,
        vocab_size=10,
        pad_token_id=0,
    ),
    "voxtral": lambda: VoxtralEncoderConfig(
        hidden_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        num_mel_bins=MELS,
        max_source_positions=STEPS,
    ),
}
PLACEHOLDERS = {"image": PER_IMAGE, "video": FRAMES * LATENTS, "audio": LATENTS}


@pytest.fixture
def parts(make_processor, make_model, tokenizer):
    """A processor and a model for all three, whose frames have another size than images."""

    def make(audio: str = "whisper") -> tuple[AkiProcessor, AkiForConditionalGeneration]:
        own = copy.deepcopy(tokenizer)
        own.add_tokens(["<video>", "<audio>"], special_tokens=True)
        frames = CLIPImageProcessorPil(
            size={"height": PIXELS, "width": PIXELS}, do_center_crop=False, image_mean=[0, 0, 0], image_std=[1, 1, 1]
        )
        processor = AkiProcessor(
            make_processor().image_processor,
            own,
            image_seq_length=PER_IMAGE,
            chat_template=make_processor().chat_template,
            video_seq_length=PLACEHOLDERS["video"],
            video_frames=FRAMES,
            frame_processor=frames,
            audio_seq_length=PLACEHOLDERS["audio"],
            audio_extractor=WhisperFeatureExtractor(**EXTRACTOR),
        )
        model = make_model(
            video_config=VISION["clip"](),
            video_connector_config=SIZES,
            video_frames=FRAMES,
            video_token_id=processor.video_token_id,
            audio_config=AUDIO[audio](),
            audio_connector_config=SIZES,
            audio_token_id=processor.audio_token_id,
        )
        model.resize_token_embeddings(len(own))
        enlarge(model.model.language_model.get_input_embeddings())
        return processor, model

    return make


def picture(level: int = 100) -> Image.Image:
    return Image.new("RGB", (20, 30), (level, level, level))


def tone(seconds: float = 0.1, hertz: float = 440) -> np.ndarray:
    return np.sin(2 * np.pi * hertz * np.arange(int(seconds * RATE)) / RATE).astype(np.float32)


def say(*content) -> dict:
    parts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]
    return {"role": "user", "content": parts}


def image(level: int = 100) -> dict:
    return {"type": "image", "image": picture(level)}


def video(*levels: int) -> dict:
    return {"type": "video", "video": [picture(level) for level in levels]}


def audio(wave=None) -> dict:
    return {"type": "audio", "audio": tone() if wave is None else wave}


ALL = [say(audio(), image(), video(10, 20, 30), "what is this ?")]


class TestProcessor:
    def test_placeholders_blocks_and_values(self, parts):
        processor, model = parts()
        out = processor.apply_chat_template([*ALL, assistant("a red one")], **TOKENIZE)
        ids = out["input_ids"][0]
        tokens = processor.tokenizer.convert_ids_to_tokens(ids)
        runs = [(token, len(list(run))) for token, run in itertools.groupby(tokens)]
        assert runs[:4] == [
            ("<|user|>", 1),
            ("<audio>", LATENTS),
            ("<image>", PER_IMAGE),
            ("<video>", FRAMES * LATENTS),
        ]
        answer = tokens.index("<|assistant|>") + 1
        assert out["prompt_block_ids"][0].tolist() == [0] * answer + [-1] * (len(tokens) - answer)
        assert out["pixel_values"].shape == (1, 3, PIXELS, PIXELS)
        assert out["input_features"].shape == (1, MELS, 2 * STEPS)
        # The frames' own processor: no mean, no deviation.
        shades = out["pixel_values_videos"].mean((2, 3, 4))[0].tolist()
        assert shades == pytest.approx([10 / 255, 20 / 255, 30 / 255], abs=1e-4)
        assert set(processor.model_input_names) >= {"pixel_values_videos", "input_features", "prompt_block_ids"}
        sizes = [media.tokens_per_item for media in model.config.media.values()]
        assert sizes == list(PLACEHOLDERS.values())

    def test_audio_is_what_the_extractor_makes_of_it(self, parts):
        processor, _ = parts()
        out = processor.apply_chat_template(
            [say(audio(), "and this ?")], **TOKENIZE, processor_kwargs={"padding": True}
        )
        wanted = WhisperFeatureExtractor(**EXTRACTOR)(tone(), sampling_rate=RATE, return_tensors="pt")
        assert torch.equal(out["input_features"], wanted["input_features"])

    def test_a_batch_keeps_each_row_with_its_own(self, parts):
        processor, _ = parts()
        chats = [
            [say(video(1, 2, 3), audio(), "no")],
            [say("what is this ?")],
            [say(audio(tone(hertz=200)), "and this ?", video(7))],
        ]
        out = processor.apply_chat_template(chats, **TOKENIZE, processor_kwargs={"padding": True})
        for token, per_row in (("<video>", (1, 0, 1)), ("<audio>", (1, 0, 1))):
            found = (out["input_ids"] == processor.tokenizer.convert_tokens_to_ids(token)).sum(1)
            assert found.tolist() == [n * PLACEHOLDERS[token[1:-1]] for n in per_row]
        first = out["pixel_values_videos"][:, 0].mean((1, 2, 3)) * 255
        assert first.tolist() == pytest.approx([1, 7], abs=1e-3)
        assert out["input_features"].shape[0] == 2
        assert not torch.equal(*out["input_features"])

    def test_text_with_tokens_and_lists_beside_it(self, parts):
        processor, _ = parts()
        out = processor(text="<video><audio>no", videos=[[picture(), picture()]], audio=[tone()], return_tensors="pt")
        assert out["pixel_values_videos"].shape == (1, FRAMES, 3, PIXELS, PIXELS)
        assert out["input_ids"].shape[1] > FRAMES * LATENTS + LATENTS

    def test_saved_and_loaded(self, parts, tmp_path):
        processor, model = parts()
        processor.save_pretrained(tmp_path)
        model.save_pretrained(tmp_path)
        for again in (AkiProcessor.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)):
            given, wanted = (p.apply_chat_template(ALL, **TOKENIZE) for p in (again, processor))
            assert given.keys() == wanted.keys()
            assert all(torch.equal(given[name], wanted[name]) for name in wanted)

    def test_a_wav_file(self, parts, tmp_path):
        processor, _ = parts()
        path = tmp_path / "a.wav"
        soundfile.write(path, tone(), RATE, subtype="FLOAT")
        for part in ({"type": "audio", "path": str(path)}, {"type": "audio", "audio": path}):
            given = processor.apply_chat_template([say(part, "no")], **TOKENIZE)
            wanted = processor.apply_chat_template([say(audio(), "no")], **TOKENIZE)
            assert torch.equal(given["input_features"], wanted["input_features"])


class TestModel:
    @pytest.mark.parametrize("kind", AUDIO)
    def test_generation_cached_and_not(self, parts, kind):
        processor, model = parts(kind)
        chats = [ALL, [say("no", video(9, 9), "and this ?")]]
        inputs = processor.apply_chat_template(
            chats, **TOKENIZE, add_generation_prompt=True, processor_kwargs={"padding": True}
        )
        how = {"max_new_tokens": 4, "min_new_tokens": 4}
        cached = model.generate(**inputs, **how)
        assert torch.equal(cached, model.generate(**inputs, **how, use_cache=False))
        placeholders = torch.tensor(processor.media_token_ids)
        assert not torch.isin(cached[:, inputs["input_ids"].shape[1] :], placeholders).any()

    def test_the_audio_sees_the_question(self, parts):
        """Its embeddings' hidden states move with the question that follows, and do not where the rule is causal."""
        processor, model = parts()
        hidden = {}
        for rule, question in itertools.product(("mma", "causal"), ("what is this ?", "what is that ?")):
            inputs = processor.apply_chat_template([say(audio(), question)], **TOKENIZE)
            with torch.no_grad():
                out = model(**inputs, attention_rule=rule, output_hidden_states=True)
            where = inputs["input_ids"][0] == processor.audio_token_id
            hidden[rule, question] = out.hidden_states[-1][0, where]
        what, that = "what is this ?", "what is that ?"
        assert torch.equal(hidden["causal", what], hidden["causal", that])
        assert not torch.allclose(hidden["mma", what], hidden["mma", that], atol=1e-3)

    def test_a_train_step_through_collator_guard_and_trainer(self, parts, tmp_path):
        processor, model = parts()
        samples = [Sample([*ALL, assistant("a red one")], "own", "0"), Sample([say("no"), assistant("no")], "own", "1")]
        collate = ChatCollator(processor, 64)
        batch = collate(samples)
        media = torch.isin(batch["input_ids"], torch.tensor(processor.media_token_ids))
        assert (batch["labels"][media] == -100).all()
        assert (batch["labels"] != -100).any(1).all()
        guard_batch(model, batch)
        trainer = AkiTrainer(model.train(), TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[]))
        trainer.compute_loss(model, trainer._prepare_inputs(batch)).backward()
        learned = ["video_encoder", "video_connector", "audio_encoder", "audio_connector", "connector"]
        for name in learned:
            gradients = [p.grad for p in model.model.get_submodule(name).parameters() if p.grad is not None]
            assert gradients, name
            assert all(gradient.isfinite().all() for gradient in gradients), name
            assert any(gradient.abs().max() > 0 for gradient in gradients), name

    def test_packed_with_all_media(self, parts):
        processor, model = parts()
        chats = [
            [*ALL, assistant("no")],
            [say(video(5, 6), "and this ?"), assistant("yes it is")],
            [say("no"), assistant("no")],
        ]
        samples = [Sample(chat, "own", str(i)) for i, chat in enumerate(chats)]
        collate = ChatCollator(processor, 64)
        row = join([collate([sample]) for sample in samples])
        packed = PackedCollator(processor.tokenizer.pad_token_id)([row])
        with torch.no_grad():
            losses = [float(model(**inputs).loss) for inputs in (packed, collate(samples))]
        assert losses[0] == pytest.approx(losses[1], abs=1e-5)


class TestClips:
    def test_frames_are_picked_evenly(self):
        frames = np.arange(10)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8)
        assert pick_frames(frames, 4)[:, 0, 0, 0].tolist() == [0, 3, 6, 9]
        assert pick_frames(frames[:2], 4)[:, 0, 0, 0].tolist() == [0, 0, 1, 1]
        assert pick_frames(frames, 1)[:, 0, 0, 0].tolist() == [0]

    def test_an_array_and_a_tensor_are_videos(self):
        frames = np.full((2, 4, 5, 3), 7, np.uint8)
        assert open_video(frames).shape == (2, 4, 5, 3)
        assert np.array_equal(open_video(torch.from_numpy(frames)), frames)

    def test_other_rates_are_resampled(self):
        """440 Hz stay 440 Hz."""
        fast = np.sin(2 * np.pi * 440 * np.arange(RATE) / (2 * RATE)).astype(np.float32)
        wave = open_audio({"array": fast, "sampling_rate": 2 * RATE}, RATE)
        assert len(wave) == RATE // 2
        assert np.abs(np.fft.rfft(wave)).argmax() * RATE / len(wave) == pytest.approx(440, abs=2)

    @pytest.mark.parametrize(
        ("source", "message"),
        [
            ([], "no frames"),
            ("film.mp4", r"a str is not a video.*decoded first"),
            (np.zeros((4, 4, 3), np.uint8), r"\(4, 4, 3\) is not a video"),
            ([picture(), Image.new("RGB", (3, 3))], "frames of several sizes"),
            (np.zeros((2, 4, 4, 3)), "dtype float64 is not a picture"),
        ],
    )
    def test_no_video(self, source, message):
        with pytest.raises(ValueError, match=message):
            open_video(source)

    @pytest.mark.parametrize(
        ("source", "message"),
        [
            (np.zeros(0), "is not audio"),
            (np.zeros((2, 100)), r"\(2, 100\) is not audio.*one channel"),
            (np.array([np.nan]), "not finite"),
            ("missing.wav", "missing.wav is missing, or no audio file"),
            (b"RIFF", "a bytes is not audio"),
            (None, "a NoneType is not audio"),
            ((tone() * 32767).astype(np.int16), "audio of int16 is not -1 to 1"),
            ((tone(), RATE), "a tuple is not audio"),
            (["a"], "samples are no numbers"),
            ({"array": tone()}, "needs an array and its sampling_rate"),
        ],
    )
    def test_no_audio(self, source, message):
        with pytest.raises(ClipError, match=message):
            open_audio(source, RATE)

    def test_a_clip_that_the_encoder_would_not_hear_to_its_end(self, parts):
        with pytest.raises(ClipError, match=r"has 1\.5 s, the encoder hears 1\.0 s"):
            parts()[0].apply_chat_template([say(audio(tone(1.5)), "no")], **TOKENIZE)

    def test_a_processor_of_images_says_what_it_takes(self, processor):
        with pytest.raises(ValueError, match=r"has video, which this processor was not made for \(it takes image\)"):
            processor.apply_chat_template([say(video(1), "no")], **TOKENIZE)
        with pytest.raises(ValueError, match="takes image alone, not audio"):
            processor(text="no", audio=[tone()])

    def test_a_part_without_its_clip(self, parts):
        with pytest.raises(ValueError, match="the audio part of a message has no audio"):
            parts()[0].apply_chat_template([say({"type": "audio"}, "no")])

    def test_more_tokens_than_clips(self, parts):
        with pytest.raises(ValueError, match="2 <audio> tokens in the text and 1 audio"):
            parts()[0](text="<audio><audio>", audio=[tone()])

    def test_audio_needs_an_extractor_and_a_token(self, processor):
        with pytest.raises(ValueError, match="does not know the audio token"):
            AkiProcessor(processor.image_processor, processor.tokenizer, audio_seq_length=2)
        with pytest.raises(ValueError, match="pass audio_extractor"):
            AkiProcessor(processor.image_processor, processor.tokenizer, audio_seq_length=2, audio_token="<|user|>")
