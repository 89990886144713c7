"""`aki convert`: from the published layout to a folder for from_pretrained, against the authors' own outputs."""

import json
import os
import shutil
import stat
import sys
from pathlib import Path

import pytest
import torch
from others import holding
from phi_tokenizers import SYSTEM_TOKENS
from PIL import Image
from published_folders import (
    META,
    expanded,
    published_folder,
    reference_cases,
    tiny_tokenizer,
)
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    SiglipConfig,
)

import aki
from aki.apps.chat import answer, load
from aki.cli import main
from aki.files import InUseError
from aki.models import convert as converting
from aki.models.checkpoint_files import CheckpointError
from aki.models.convert import convert
from aki.models.published import load_published
from aki.models.templates import AKI, CAPTION

CASES = reference_cases()
PROMPT = f"<s> ▁▁ {SYSTEM_TOKENS} <|user|> IMAGES ▁ <0x0A> what ▁is ▁this ▁? <|end|> <|assistant|>".replace(
    "IMAGES", " ".join(["<image>"] * META["num_vision_tokens"])
)


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("published")
    convert(published_folder(folder / "source", tiny_tokenizer()), folder / "out")
    return folder / "out"


@pytest.fixture
def source(tmp_path) -> Path:
    return published_folder(tmp_path / "source", tiny_tokenizer())


@pytest.fixture
def picture(tmp_path) -> Path:
    Image.new("RGB", (60, 40), "red").save(tmp_path / "scene.png")
    return tmp_path / "scene.png"


class TestExactness:
    """What the authors' modules computed, from the saved folder."""

    @pytest.fixture(scope="class")
    def model(self, converted):
        model = AutoModelForImageTextToText.from_pretrained(converted)
        assert type(model) is aki.AkiForConditionalGeneration
        return model.eval()

    @pytest.mark.parametrize("name", ["sft_single", "sft_batch", "pretrain", "text_only"])
    def test_logits(self, model, name):
        inputs = expanded(CASES[name])
        with torch.no_grad():
            outputs = model(**inputs)
        real = inputs["attention_mask"].bool()
        torch.testing.assert_close(outputs.logits[real], CASES[name]["logits"][real], atol=1e-5, rtol=0)
        assert outputs.loss.item() == pytest.approx(CASES[name]["loss"].item(), abs=1e-5)

    @pytest.mark.parametrize("name", ["generate_0", "generate_1"])
    def test_tokens(self, model, name, monkeypatch):
        # The reference generated 12 tokens, whatever they were.
        monkeypatch.setattr(model.generation_config, "eos_token_id", None)
        inputs = expanded(CASES[name])
        length = inputs["input_ids"].shape[1]
        out = model.generate(
            **inputs, attention_mask=torch.ones_like(inputs["input_ids"]), max_new_tokens=12, do_sample=False
        )
        assert torch.equal(out[:, length:], CASES[name]["new_tokens"])

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_a_16_bit_checkpoint_stays_as_it_is(self, source, dtype, tmp_path):
        tensors = {name: tensor.to(dtype) for name, tensor in load_file(source / "model.safetensors").items()}
        save_file(tensors, source / "model.safetensors")
        done = convert(source, tmp_path / "out")
        assert done.dtype == dtype
        said = json.loads((tmp_path / "out" / "config.json").read_text())["dtype"]
        assert said == str(dtype).removeprefix("torch.")
        assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()} == {dtype}
        model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
        assert model.dtype == dtype
        wanted = load_published(source).to(dtype).state_dict()
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in model.state_dict().items())

    def test_halves_of_different_precision_lose_none(self, source, tmp_path):
        name = "lang_model.model.embed_tokens"
        tensors = load_file(source / "model.safetensors")
        tensors[f"{name}.weight"] = tensors[f"{name}.weight"].to(torch.bfloat16)
        save_file(tensors, source / "model.safetensors")
        convert(source, tmp_path / "out")
        found = load_file(tmp_path / "out" / "model.safetensors")["model.language_model.embed_tokens.weight"]
        added = tensors[f"{name}.additional_embedding.weight"]
        assert torch.equal(found[-len(added) :], added)
        assert torch.equal(found[: -len(added)], tensors[f"{name}.weight"].float()[: META["initial_tokenizer_len"]])

    def test_shards(self, tmp_path, converted):
        done = convert(published_folder(tmp_path / "source", tiny_tokenizer(), files=3), tmp_path / "out")
        assert done.files > 2
        assert len(list((tmp_path / "out").glob("*.safetensors"))) == done.files
        wanted = load_file(converted / "model.safetensors")
        again = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").state_dict()
        assert again.keys() == wanted.keys()
        assert all(torch.equal(again[name], wanted[name]) for name in wanted)


class TestProcessor:
    def test_the_prompt_token_by_token(self, converted, picture):
        processor = AutoProcessor.from_pretrained(converted)
        assert processor.chat_template == {"default": AKI, "caption": CAPTION}
        content = [{"type": "image", "path": str(picture)}, {"type": "text", "text": "what is this ?"}]
        out = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        assert processor.tokenizer.convert_ids_to_tokens(out["input_ids"][0]) == PROMPT.split()
        assert (out["prompt_block_ids"] == 0).all()
        assert set(out) == {"input_ids", "attention_mask", "pixel_values", "prompt_block_ids"}

    def test_pictures(self, converted):
        """RGB, bicubic to the encoder's size without a crop, mean and standard deviation 0.5."""
        processor = AutoProcessor.from_pretrained(converted)
        noise = Image.effect_noise((60, 37), 80).convert("RGB")
        pixels = processor(images=noise, text="<image>", return_tensors="pt")["pixel_values"]
        size = META["vision"]["image_size"]
        small = noise.resize((size, size), Image.Resampling.BICUBIC)
        wanted = torch.tensor(list(small.tobytes())).view(size, size, 3).permute(2, 0, 1)[None] / 127.5 - 1
        torch.testing.assert_close(pixels, wanted, atol=1e-6, rtol=0)

    def test_other_means(self, tmp_path):
        source = published_folder(tmp_path / "source", tiny_tokenizer(), norm_mean=[0.1, 0.2, 0.3], norm_std=0.25)
        convert(source, tmp_path / "out")
        images = AutoProcessor.from_pretrained(tmp_path / "out").image_processor
        assert (list(images.image_mean), list(images.image_std)) == ([0.1, 0.2, 0.3], [0.25] * 3)

    def test_what_the_tokenizer_lacked_is_at_its_place(self, converted):
        tokenizer = AutoTokenizer.from_pretrained(converted)
        assert tokenizer.convert_tokens_to_ids(["<pad>", "<image>", "<|endofchunk|>"]) == [89, 90, 91]
        assert (tokenizer.pad_token, tokenizer.padding_side) == ("<pad>", "left")

    def test_generation_stops_at_the_end_of_text_and_says_no_placeholder(self, converted):
        model = AutoModelForImageTextToText.from_pretrained(converted)
        generation = model.generation_config
        assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (1, 2, 89)
        assert generation.suppress_tokens == [90]

    def test_text_is_cut_as_the_tokenizers_file_says(self, tmp_path):
        """transformers' LlamaTokenizer, which Phi-3.5's folder names, would put no blank after a special token."""
        bpe = models.BPE({piece: i for i, piece in enumerate(_llama_pieces())}, [], unk_token="<unk>")
        backend = Tokenizer(bpe)
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.decoder = decoders.Replace("▁", " ")
        backend.add_special_tokens([piece for piece in _llama_pieces() if piece.startswith("<")])
        names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
        source = published_folder(tmp_path / "source")
        PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(source)
        (source / "tokenizer_config.json").write_text(json.dumps(names | {"tokenizer_class": "LlamaTokenizer"}))
        convert(source, tmp_path / "out")
        text = "<s> <|user|>abc cab<|end|>bc"
        tokenizer = AutoProcessor.from_pretrained(tmp_path / "out").tokenizer
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == backend.encode(text).ids
        assert tokenizer.tokenize("<|end|>bc") == ["<|end|>", "▁", "b", "c"]


def _llama_pieces() -> list[str]:
    special = ["<unk>", "<s>", "</s>", "<|system|>", "<|user|>", "<|end|>", "<|assistant|>"]
    return [*special, "▁", "a", "b", "c", *(f"w{i}" for i in range(META["initial_tokenizer_len"] - 12))]


class TestChat:
    def test_from_the_published_folder_to_an_answer(self, source, picture, tmp_path, capsys, monkeypatch):
        asked = []
        generate = aki.AkiForConditionalGeneration.generate
        monkeypatch.setattr(
            aki.AkiForConditionalGeneration,
            "generate",
            lambda self, **inputs: asked.append(inputs) or generate(self, **inputs),
        )
        main(["convert", str(source), str(tmp_path / "out")])
        said = capsys.readouterr().out
        held = sum(tensor.numel() for tensor in load_published(source).state_dict().values())
        assert f"{tmp_path}/out holds {held:,} parameters in float32" in said
        assert f"aki chat {tmp_path}/out --image" in said
        main(["chat", str(tmp_path / "out"), "--image", str(picture), "what is this ?", "--max-new-tokens", "5"])
        said = capsys.readouterr().out.strip()
        (inputs,) = asked
        _, processor = load(tmp_path / "out")
        tokens = processor.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])
        assert tokens == PROMPT.split()
        # The same from the layout itself, by other code.
        own = load_published(published_folder(tmp_path / "again"))
        out = own.generate(**{k: inputs[k] for k in ("input_ids", "pixel_values", "attention_mask")}, max_new_tokens=5)
        wanted = processor.tokenizer.decode(out[0, len(tokens) :], skip_special_tokens=True).strip()
        assert said == wanted != ""

    def test_without_a_picture(self, converted):
        model, processor = load(converted)
        assert answer(model, processor, "what is this ?", max_new_tokens=3)

    @pytest.mark.parametrize("assistant_token_id", [5, 88])
    def test_the_answer_may_start_with_any_token(self, tmp_path, picture, assistant_token_id):
        tokenizer = tiny_tokenizer(assistant_token_id)
        convert(published_folder(tmp_path / "source", tokenizer), tmp_path / "out")
        model, processor = load(tmp_path / "out")
        assert processor.answer_token_id == assistant_token_id
        assert isinstance(answer(model, processor, "what is this ?", picture, max_new_tokens=3), str)

    def test_nothing_knows_the_number_of_phi_3(self):
        for path in Path(aki.__file__).parent.rglob("*.py"):
            assert "32001" not in path.read_text().replace("_", ""), path


def test_backbones_by_name(tmp_path, picture):
    """As released: config.json names two backbones; Phi-3.5's has longrope and a sliding window longer than itself."""
    vision = {name: value for name, value in META["vision"].items() if name != "model_type"}
    SiglipConfig(vision_config=vision).save_pretrained(tmp_path / "siglip")
    rope = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [4.0, 4.1, 4.2, 4.3]}
    phi3 = META["text"] | {
        "rope_scaling": {"type": "longrope", **rope},
        "original_max_position_embeddings": 256,
        "sliding_window": 2048,
        "bos_token_id": 1,
        "eos_token_id": 3,
        "pad_token_id": 3,
    }
    (tmp_path / "phi3").mkdir()
    (tmp_path / "phi3" / "config.json").write_text(json.dumps(phi3))
    tiny_tokenizer().save_pretrained(tmp_path / "phi3")
    paths = {"vision_encoder_path": str(tmp_path / "siglip"), "lang_model_path": str(tmp_path / "phi3")}
    names = ("image", "end_of_chunk", "assistant", "bos", "eos", "pad")
    token_ids = dict.fromkeys(f"{name}_token_id" for name in names)
    source = published_folder(tmp_path / "source", text=None, vision=None, **paths, **token_ids)
    convert(source, tmp_path / "out")
    model, processor = load(tmp_path / "out")
    text = model.config.text_config
    assert {key: text.rope_parameters[key] for key in rope} == rope
    assert text.rope_parameters["rope_type"] == "longrope"
    assert (text.original_max_position_embeddings, text.sliding_window, text.vocab_size) == (256, 2048, 92)
    for holder in (text, model.generation_config):
        assert (holder.bos_token_id, holder.eos_token_id, holder.pad_token_id) == (1, 2, 89)
    assert processor.image_token_id == 90
    assert isinstance(answer(model, processor, "what is this ?", picture, max_new_tokens=3), str)


class TestWholeOrNothing:
    def test_interrupted(self, tmp_path, monkeypatch):
        source, written = published_folder(tmp_path / "source", tiny_tokenizer(), files=3), []

        def interrupted(tensors, path, **options):
            assert not (path.parent / "config.json").exists(), "without it a folder does not load"
            written.append(path)
            if len(written) == 2:
                raise KeyboardInterrupt
            save_file(tensors, path, **options)

        with monkeypatch.context() as patch:
            patch.setattr(converting, "save_file", interrupted)
            with pytest.raises(KeyboardInterrupt):
                convert(source, tmp_path / "out")
        assert sorted(os.listdir(tmp_path)) == ["source"]
        convert(source, tmp_path / "out")
        assert load(tmp_path / "out")

    def test_what_a_killed_one_left_is_replaced(self, source, tmp_path, monkeypatch):
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "rmtree", lambda *_, **__: None)
            patch.setattr(converting, "save_file", lambda *_, **__: sys.exit(9))
            with pytest.raises(SystemExit):
                convert(source, tmp_path / "out")
        (left,) = set(os.listdir(tmp_path)) - {"source"}
        (tmp_path / left / "model-00001-of-00002.safetensors").write_bytes(b"half")
        assert not (tmp_path / "out").exists()
        convert(source, tmp_path / "out")
        assert sorted(os.listdir(tmp_path)) == ["out", "source"]
        assert not list((tmp_path / "out").glob("*-of-*"))

    def test_12_10_two_of_one_name(self, source, tmp_path):
        """Issue 12, entry 10: the second deleted what the first had written so far."""
        partial = tmp_path / ".out.converting"
        with holding(partial / ".lock") as other:
            (partial / "model.safetensors").write_bytes(b"half")
            with pytest.raises(InUseError, match=rf"output folder .*/out is in use by process {other} on"):
                convert(source, tmp_path / "out")
            assert (partial / "model.safetensors").read_bytes() == b"half"
        convert(source, tmp_path / "out")
        assert sorted(os.listdir(tmp_path)) == ["out", "source"]
        assert not list((tmp_path / "out").glob(".*"))

    def test_a_folder_that_holds_something_is_left_alone(self, source, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.tex").write_text("dear")
        with pytest.raises(CheckpointError, match="is not empty"):
            convert(source, tmp_path / "out")
        assert os.listdir(tmp_path / "out") == ["thesis.tex"]
        with pytest.raises(CheckpointError, match="is not empty"):
            convert(source, source)

    def test_an_empty_folder_is_filled(self, source, tmp_path):
        (tmp_path / "out").mkdir()
        convert(source, tmp_path / "out")
        assert load(tmp_path / "out")

    def test_the_source_is_not_changed(self, source, tmp_path):
        before = {path.name: path.read_bytes() for path in source.iterdir()}
        for path in source.iterdir():
            path.chmod(stat.S_IREAD)
        convert(source, tmp_path / "out")
        assert {path.name: path.read_bytes() for path in source.iterdir()} == before


class TestRefusals:
    def refused(self, source: Path, match: str) -> None:
        with pytest.raises(CheckpointError, match=match):
            convert(source, source.parent / "out")
        assert os.listdir(source.parent) == [source.name]

    def test_bad_tensors_are_one_error(self, source):
        tensors = load_file(source / "model.safetensors")
        del tensors["vision_tokenizer.latents"]
        tensors["lang_model.model.extra"] = torch.zeros(2)
        tensors["lang_model.lm_head.bias"] = torch.zeros(80)
        save_file(tensors, source / "model.safetensors")
        self.refused(
            source,
            r"3 tensors: extra lang_model\.model\.extra; lang_model\.lm_head\.bias is \(80,\), expected \(90,\); "
            r"missing vision_tokenizer\.latents \(8, 24\)\.",
        )

    def test_quantised_weights(self, source):
        tensors = load_file(source / "model.safetensors")
        tensors["lang_model.model.norm.weight"] = torch.zeros(32, dtype=torch.int8)
        save_file(tensors, source / "model.safetensors")
        self.refused(source, r"lang_model\.model\.norm\.weight in .* has the dtype I8")

    def test_a_shard_that_is_missing(self, tmp_path):
        source = published_folder(tmp_path / "source", tiny_tokenizer(), files=3)
        (source / "model-00002-of-00003.safetensors").unlink()
        self.refused(source, r"lacks weights that its .*index\.json names: model-00002-of-00003\.safetensors")

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "{",
            "[]",
            "{}",
            '{"weight_map": {}}',
            '{"weight_map": ["a"]}',
            '{"weight_map": {"a": 1}}',
            '{"weight_map": null}',
        ],
    )
    def test_a_broken_index(self, source, text):
        (source / "model.safetensors.index.json").write_text(text)
        self.refused(source, "is broken|lacks weights")

    def test_an_index_cannot_reach_outside(self, tmp_path):
        published_folder(tmp_path / "source/other", tiny_tokenizer())
        source = published_folder(tmp_path / "source", tiny_tokenizer(), files=2)
        index = {"weight_map": {"a": "other/model.safetensors"}}
        (source / "model.safetensors.index.json").write_text(json.dumps(index))
        self.refused(source, "gives no file of the folder")

    @pytest.mark.parametrize(
        ("name", "said"),
        [
            ("embed_tokens.weight", r"embed_tokens\.weight is \(\), expected \(90, 32\)"),
            ("embed_tokens.additional_embedding.weight", r"is \(\), expected \(added tokens, width\)"),
        ],
    )
    def test_a_number_for_a_vocabulary(self, source, name, said):
        tensors = load_file(source / "model.safetensors") | {f"lang_model.model.{name}": torch.tensor(1.0)}
        save_file(tensors, source / "model.safetensors")
        self.refused(source, said)

    @pytest.mark.parametrize("value", [[0.5, 0.5], "half", [None, 0.5, 0.5]])
    def test_means_that_are_none(self, tmp_path, value):
        source = published_folder(tmp_path / "source", tiny_tokenizer(), norm_mean=value)
        self.refused(source, "norm_mean in .* is .*: write one number, or three")

    def test_a_deviation_of_zero(self, tmp_path):
        self.refused(published_folder(tmp_path / "source", tiny_tokenizer(), norm_std=[0.5, 0, 0.5]), "has a zero")

    def test_a_shard_cut_off(self, tmp_path):
        source = published_folder(tmp_path / "source", tiny_tokenizer(), files=3)
        path = source / "model-00003-of-00003.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
        self.refused(source, r"model-00003-of-00003\.safetensors is broken")

    def test_no_tokenizer(self, tmp_path):
        self.refused(
            published_folder(tmp_path / "source"), "tokenizer that loads: add the checkpoint's tokenizer files"
        )

    def test_a_tokenizer_without_role_tokens(self, source):
        text = (source / "tokenizer.json").read_text().replace("<|system|>", "<|sys|>").replace("<|end|>", "<|ende|>")
        (source / "tokenizer.json").write_text(text)
        self.refused(source, r"does not know <\|system\|>, <\|end\|>, which the prompt is made of")

    def test_a_broken_tokenizer(self, source):
        (source / "tokenizer.json").write_text("{")
        self.refused(source, "tokenizer that loads: add the checkpoint's tokenizer files")

    def test_a_tokenizer_that_does_not_name_its_tokens(self, source):
        (source / "tokenizer_config.json").unlink()
        self.refused(source, r"has no bos_token and no eos_token: .* own tokenizer_config\.json")

    @pytest.mark.parametrize("value", ["90", -90, 0, 8.0, True, None])
    def test_counts_that_are_none(self, tmp_path, value):
        source = published_folder(tmp_path / "source", tiny_tokenizer(), initial_tokenizer_len=value)
        self.refused(source, "initial_tokenizer_len in .* is .*, which is no count|has no initial_tokenizer_len")

    @pytest.mark.parametrize("sizes", [{}, {"model_type": "nope"}, {"model_type": "phi3", "hidden_size": "much"}])
    def test_sizes_that_are_none(self, tmp_path, sizes):
        self.refused(published_folder(tmp_path / "source", tiny_tokenizer(), text=sizes), "as text could not be read")

    def test_a_tokenizer_of_another_length(self, source):
        tokenizer = tiny_tokenizer()
        tokenizer.add_tokens("more")
        tokenizer.save_pretrained(source)
        self.refused(source, r"has 91 tokens before <image> and <\|endofchunk\|>, .* should have 90")

    def test_a_tokenizer_with_tokens_at_other_places(self, source):
        tokenizer = tiny_tokenizer()
        tokenizer.add_tokens(["<image>", "<|endofchunk|>"], special_tokens=True)
        tokenizer.save_pretrained(source)
        self.refused(source, r"<image> has the id 89 in the tokenizer .* have the added tokens at 90 to 91")

    def test_a_tokenizer_with_more_tokens_than_rows(self, source):
        tokenizer = tiny_tokenizer()
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
        tokenizer.add_tokens(["<image>", "<|endofchunk|>", "more"])
        tokenizer.save_pretrained(source)
        self.refused(source, r"has 93 tokens, the weights have 92")

    @pytest.mark.parametrize("name", ["pad_token_id", "eos_token_id", "bos_token_id", "image_token_id"])
    def test_ids_that_differ(self, tmp_path, name):
        source = published_folder(tmp_path / "source", tiny_tokenizer(), **{name: 77})
        self.refused(source, rf"has {name} 77, its tokenizer \d+")

    def test_another_size_of_pictures(self, tmp_path):
        self.refused(published_folder(tmp_path / "source", tiny_tokenizer(), n_px=384), "n_px in .* is 384, .* 42 x 42")

    def test_backbones_that_are_not_there(self, tmp_path):
        source = published_folder(
            tmp_path / "source", tiny_tokenizer(), vision=None, vision_encoder_path=str(tmp_path / "source" / "siglip")
        )
        self.refused(source, "names as vision_encoder_path could not be read: write the folder or hub id")

    def test_a_checkpoint_that_is_not_there(self, tmp_path, capsys, monkeypatch):
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        with pytest.raises(SystemExit):
            main(["convert", str(tmp_path / "none"), str(tmp_path / "out")])
        said = capsys.readouterr().err
        assert f"aki: there is no folder {tmp_path}/none, and no such checkpoint could be fetched" in said
        assert "Traceback" not in said


def test_a_tokenizer_that_has_it_all_is_left_as_it_is(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.add_tokens(["<image>", "<|endofchunk|>"], special_tokens=True)
    convert(published_folder(tmp_path / "source", tokenizer), tmp_path / "out")
    before, after = (Tokenizer.from_file(str(tmp_path / name / "tokenizer.json")) for name in ("source", "out"))
    assert before.to_str() == after.to_str()
