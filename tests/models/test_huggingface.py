"""What every Hugging Face user expects: Auto classes, folders, pipelines, the Trainer, checkpointing, adapters."""

import json
import shutil

import pytest
import torch
from model_builders import TEXT, TOKENIZE, assert_same, assistant, user
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    Trainer,
    TrainingArguments,
    pipeline,
)

from aki import AkiConfig, AkiForConditionalGeneration, AkiProcessor
from aki.data.collate import ChatCollator
from aki.data.schema import Sample


@pytest.fixture
def model(make_model) -> AkiForConditionalGeneration:
    return make_model()


@pytest.fixture
def folder(model, processor, tmp_path):
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def chats(picture) -> list[list[dict]]:
    return [
        [user(picture(10), "what is this ?")],
        [user(picture(20), "what is this ?"), assistant("a red one"), user("and", picture(30), "this ?")],
    ]


@pytest.fixture
def inputs(processor, chats):
    return processor.apply_chat_template(chats[1], add_generation_prompt=True, **TOKENIZE)


@pytest.fixture
def batch(processor, picture) -> dict[str, torch.Tensor]:
    samples = [
        Sample([user(picture(10), "what is this ?"), assistant("a red one")], "test", "0"),
        Sample([user("be brief and say what is this ?"), assistant("no")], "test", "1"),
        Sample([user(picture(20), "and", picture(30), "this ?"), assistant("yes it is")], "test", "2"),
    ]
    return ChatCollator(processor, max_length=64)(samples)


class TestFolders:
    def test_auto_classes(self, folder, model, inputs):
        assert type(AutoConfig.from_pretrained(folder)) is AkiConfig
        assert type(AutoProcessor.from_pretrained(folder)) is AkiProcessor
        loaded = AutoModelForImageTextToText.from_pretrained(folder)
        assert type(loaded) is AkiForConditionalGeneration
        with torch.no_grad():
            assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
        assert type(AutoModelForImageTextToText.from_config(model.config)) is AkiForConditionalGeneration

    def test_only_safetensors_are_written_and_read(self, folder, model):
        suffixes = {path.suffix for path in folder.iterdir() if path.is_file()}
        assert suffixes == {".json", ".safetensors", ".jinja", ".py"}
        (folder / "model.safetensors").unlink()
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
        with pytest.raises(OSError, match=r"no file named model\.safetensors"):
            AkiForConditionalGeneration.from_pretrained(folder)

    @pytest.mark.parametrize("device_map", [None, "cpu", "auto"])
    def test_dtype_and_device_map(self, folder, device_map, inputs):
        loaded = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16, device_map=device_map)
        assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
        assert loaded.device.type == "cpu"
        with torch.no_grad():
            assert loaded(**inputs).logits.isfinite().all()
        assert loaded.generate(**inputs, max_new_tokens=2).shape[1] > inputs["input_ids"].shape[1]

    def test_a_language_model_on_disk(self, folder, model, inputs, tmp_path):
        where = {
            "model.vision_encoder": "cpu",
            "model.connector": "cpu",
            "model.language_model": "disk",
            "lm_head": "disk",
        }
        loaded = AutoModelForImageTextToText.from_pretrained(folder, device_map=where, offload_folder=tmp_path / "off")
        with torch.no_grad():
            assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
        wanted = model.generate(**inputs, max_new_tokens=3)
        assert torch.equal(loaded.generate(**inputs, max_new_tokens=3), wanted)

    def test_shards(self, folder, model, tmp_path):
        model.save_pretrained(tmp_path / "shards", max_shard_size="50KB")
        assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
        loaded = AkiForConditionalGeneration.from_pretrained(tmp_path / "shards")
        assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in model.state_dict().items())

    def test_the_rule_is_saved_and_may_be_chosen_at_loading(self, folder):
        assert AkiForConditionalGeneration.from_pretrained(folder).config.attention_rule == "mma"
        loaded = AkiForConditionalGeneration.from_pretrained(folder, attention_rule="causal")
        assert loaded.config.attention_rule == "causal"

    def test_attention_implementations_are_set_without_complaint(self, folder, caplog):
        loaded = AkiForConditionalGeneration.from_pretrained(folder, attn_implementation="eager")
        assert loaded.model.language_model.config._attn_implementation == "eager"
        with caplog.at_level("WARNING", logger="transformers"):
            loaded.set_attn_implementation("sdpa")
            loaded.set_attn_implementation({"text_config": "eager"})
        assert not caplog.records
        assert loaded.model.language_model.config._attn_implementation == "eager"
        assert loaded.model.vision_encoder.config._attn_implementation == "sdpa"


class TestBrokenCheckpoints:
    """transformers only warns about missing weights, and leaves them random."""

    @pytest.mark.parametrize(
        "names", [["model.connector.latents"], ["model.vision_encoder.post_layernorm.bias", "lm_head.weight"]]
    )
    def test_missing_weights(self, folder, names):
        state = load_file(folder / "model.safetensors")
        for name in names:
            del state[name]
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        for load in (AkiForConditionalGeneration, AutoModelForImageTextToText):
            with pytest.raises(ValueError, match=rf"checkpoint {folder} lacks {len(names)} of the weights") as caught:
                load.from_pretrained(folder)
            assert all(name in str(caught.value) for name in names)

    def test_many_missing_weights_are_counted(self, folder):
        state = {
            n: t for n, t in load_file(folder / "model.safetensors").items() if n.startswith("model.language_model")
        }
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=r"lacks \d+ of the weights .* and \d+ more\.$"):
            AkiForConditionalGeneration.from_pretrained(folder)

    def test_tied_weights_are_not_missing(self, make_model, tmp_path):
        model = make_model("gemma2")
        model.save_pretrained(tmp_path)
        assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
        _, info = AkiForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info.values())

    def test_another_architecture(self, tmp_path):
        AutoModelForCausalLM.from_config(TEXT["llama"]()).save_pretrained(tmp_path)
        for load in (AkiForConditionalGeneration, AkiConfig):
            with pytest.raises(ValueError, match=rf"{tmp_path} holds a model of type 'llama', not an AKI model"):
                load.from_pretrained(tmp_path)

    def test_the_published_layout(self, tmp_path):
        (tmp_path / "config.json").write_text(json.dumps({"vision_encoder_path": "a", "initial_tokenizer_len": 3}))
        with pytest.raises(ValueError, match=r"no named type, not an AKI model.*aki convert"):
            AkiForConditionalGeneration.from_pretrained(tmp_path)

    def test_weights_of_another_size(self, folder):
        config = json.loads((folder / "config.json").read_text())
        config["connector_config"]["num_latents"] += 1
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=r"model\.connector\.latents is \[3, 16\] instead of \[4, 16\]"):
            AkiForConditionalGeneration.from_pretrained(folder)

    def test_no_weights_or_no_config(self, folder):
        (folder / "model.safetensors").unlink()
        with pytest.raises(OSError, match=r"no file named model\.safetensors"):
            AkiForConditionalGeneration.from_pretrained(folder)
        shutil.rmtree(folder)
        with pytest.raises((OSError, ValueError)):
            AkiForConditionalGeneration.from_pretrained(folder)


class TestPipeline:
    @pytest.fixture
    def pipe(self, folder):
        return pipeline("image-text-to-text", model=str(folder))

    def answer(self, model, processor, inputs) -> str:
        out = model.generate(**inputs, max_new_tokens=6)
        return processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    def test_chats(self, pipe, model, processor, chats):
        wanted = [
            self.answer(model, processor, processor.apply_chat_template(chat, add_generation_prompt=True, **TOKENIZE))
            for chat in chats
        ]
        alone = [pipe(text=chat, max_new_tokens=6, return_full_text=False)[0]["generated_text"] for chat in chats]
        assert alone == wanted
        together = pipe(text=chats, max_new_tokens=6, return_full_text=False, batch_size=2)
        assert [row[0]["generated_text"] for row in together] == wanted

    def test_an_answer_that_is_begun(self, pipe, model, processor, chats):
        chat = [*chats[0], assistant("a red")]
        inputs = processor.apply_chat_template(chat, continue_final_message=True, **TOKENIZE)
        (out,) = pipe(text=chat, max_new_tokens=6, return_full_text=False)
        assert out["generated_text"] == self.answer(model, processor, inputs)

    def test_text_and_images(self, pipe, model, processor, picture):
        texts, images = ["<image>what is this ?", "and<image>this ?"], [[picture(10)], [picture(20)]]
        wanted = [
            self.answer(model, processor, processor(images=image, text=text, return_tensors="pt"))
            for image, text in zip(images, texts, strict=True)
        ]
        together = pipe(images=images, text=texts, max_new_tokens=6, return_full_text=False)
        assert [row["generated_text"] for row in together] == wanted


class TestTraining:
    def arguments(self, folder, **options) -> TrainingArguments:
        plain = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "remove_unused_columns": False}
        return TrainingArguments(str(folder), **plain | {"save_strategy": "no", "logging_steps": 1} | options)

    def train(self, model, processor, folder, picture, **options) -> Trainer:
        answers = ["no", "a red one", "yes it is", "be brief and say no"]
        samples = [
            Sample([user(picture(20 * n), "what is this ?"), assistant(text)], "test", str(n))
            for n, text in enumerate(answers)
        ]
        collator = ChatCollator(processor, max_length=64)
        trainer = Trainer(model, self.arguments(folder, **options), data_collator=collator, train_dataset=samples)
        trainer.train()
        return trainer

    def test_the_trainer_trains_and_saves(self, model, processor, picture, tmp_path, inputs):
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        trainer = self.train(model, processor, tmp_path, picture, max_steps=2, per_device_train_batch_size=2)
        assert all(torch.tensor(entry["loss"]).isfinite() for entry in trainer.state.log_history if "loss" in entry)
        for part in (
            "model.vision_encoder.embeddings.patch_embedding.weight",
            "model.connector.latents",
            "lm_head.weight",
        ):
            assert not torch.equal(before[part], model.state_dict()[part])
        trainer.save_model(str(tmp_path / "saved"))
        again = AkiForConditionalGeneration.from_pretrained(tmp_path / "saved")
        model.eval()
        with torch.no_grad():
            assert torch.equal(again(**inputs).logits, model(**inputs).logits)

    def test_accumulated_steps_are_those_of_the_whole_batch(self, make_model, processor, picture, tmp_path):
        """The mean is over the labels of all four samples, whose answers differ in length."""
        options = {
            "max_steps": 1,
            "optim": "sgd",
            "learning_rate": 0.1,
            "lr_scheduler_type": "constant",
            "max_grad_norm": 0,
        }
        trained = []
        for size, steps in ((4, 1), (1, 4)):
            model = make_model()
            options |= {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
            self.train(model, processor, tmp_path, picture, **options)
            trained.append(model.state_dict())
        whole, parts = trained
        assert not torch.equal(whole["model.connector.latents"], make_model().state_dict()["model.connector.latents"])
        for name, tensor in whole.items():
            torch.testing.assert_close(parts[name], tensor, atol=1e-4, rtol=1e-3, msg=name)

    @pytest.mark.parametrize("text", ["llama", "phi3", "gemma3"])
    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_gradient_checkpointing_changes_no_gradient(self, make_model, text, use_reentrant, batch):
        model = make_model(text).train()
        model(**batch).loss.backward()
        wanted = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
        model.zero_grad()
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        assert model.is_gradient_checkpointing
        model(**batch, use_cache=False).loss.backward()
        for name, gradient in wanted.items():
            torch.testing.assert_close(model.get_parameter(name).grad, gradient, msg=name)

    def test_frozen_parts_get_no_gradient(self, model, batch):
        model.train().model.vision_encoder.requires_grad_(False)
        model(**batch).loss.backward()
        trained = {n.removeprefix("model.").split(".")[0] for n, p in model.named_parameters() if p.grad is not None}
        assert trained == {"connector", "language_model", "lm_head"}


class TestAdapters:
    LORA = LoraConfig(r=2, target_modules=r".*language_model\..*\.(q_proj|v_proj)", task_type="CAUSAL_LM")

    def test_lora(self, folder, batch, inputs, tmp_path):
        base = AkiForConditionalGeneration.from_pretrained(folder)
        adapted = get_peft_model(base, self.LORA)
        trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
        assert trained
        assert all("lora_" in name for name in trained)
        optimizer = torch.optim.SGD((p for p in adapted.parameters() if p.requires_grad), lr=1.0)
        with torch.no_grad():
            before = adapted(**inputs).logits
        adapted.train()
        for _ in range(2):
            adapted(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        adapted.eval().save_pretrained(tmp_path / "adapter")
        again = PeftModel.from_pretrained(AkiForConditionalGeneration.from_pretrained(folder), tmp_path / "adapter")
        with torch.no_grad():
            logits = adapted(**inputs).logits
            assert (logits - before).abs().max() > 1e-2
            assert torch.equal(again(**inputs).logits, logits)
        generated = again.generate(**inputs, max_new_tokens=4)
        merged = again.merge_and_unload()
        merged.save_pretrained(tmp_path / "merged")
        alone = AkiForConditionalGeneration.from_pretrained(tmp_path / "merged")
        with torch.no_grad():
            assert_same(alone(**inputs).logits, logits)
        assert torch.equal(alone.generate(**inputs, max_new_tokens=4), generated)

    def test_a_folder_with_an_adapter(self, folder, inputs, tmp_path):
        base = AkiForConditionalGeneration.from_pretrained(folder)
        adapted = get_peft_model(base, self.LORA)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
        adapted.save_pretrained(tmp_path / "adapter")
        loaded = AkiForConditionalGeneration.from_pretrained(tmp_path / "adapter")
        with torch.no_grad():
            assert torch.equal(loaded(**inputs).logits, adapted(**inputs).logits)


def test_a_compiled_forward_equals_the_eager_one(model, inputs):
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        assert_same(compiled(**inputs).logits, model(**inputs).logits)
