"""One forward: what each sample of a batch gets, the rule, the loss, and inputs that do not fit."""

import pytest
import torch
from model_builders import (
    ATTENDING,
    EOS,
    IMAGE,
    PAD,
    PER_IMAGE,
    assert_same,
    pad,
    pictures,
    stock_logits,
    tiny_model,
    tokens,
)

from aki import AkiConfig
from aki.models.modeling import AkiOutput

SAMPLES = [
    # (tokens, images, tokens from which on all is answer)
    (tokens("image", 7, 8, 9, 3, 10, EOS), 1, 7),
    (tokens(5, "image", 7, "image", 8, 9, "image", 3, 11, 12, 13, EOS), 3, 14),
    (tokens(5, 6, 7, 8, 9, 3, 10, EOS), 0, 6),
    (tokens(5, 6, 7, 8, 9, 10, 11, 12, 3, "image", 14, EOS), 1, 12),
]
IMAGES = pictures(sum(count for _, count, _ in SAMPLES))


def batch_of(samples, side: str) -> dict[str, torch.Tensor]:
    rows = [row for row, _, _ in samples]
    blocks = [[0] * start + [-1] * (len(row) - start) for row, _, start in samples]
    inputs = {
        "input_ids": pad(rows, PAD, side),
        "attention_mask": pad([[1] * len(row) for row in rows], 0, side),
        "prompt_block_ids": pad(blocks, -1, side),
    }
    learned = (inputs["prompt_block_ids"] < 0) & (inputs["attention_mask"] == 1)
    return inputs | {"labels": inputs["input_ids"].where(learned, torch.tensor(-100))}


def images_of(sample: int) -> torch.Tensor | None:
    first = sum(count for _, count, _ in SAMPLES[:sample])
    return IMAGES[first : first + SAMPLES[sample][1]] if SAMPLES[sample][1] else None


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(("text", "implementation"), ATTENDING)
def test_each_sample_of_a_batch_gets_what_it_gets_alone(text, implementation, side):
    model = tiny_model(text=text)
    model.set_attn_implementation(implementation)
    batch = batch_of(SAMPLES, side)
    with torch.no_grad():
        together = model(**batch, pixel_values=IMAGES)
        for row, sample in enumerate(SAMPLES):
            real = batch["attention_mask"][row].bool()
            alone = model(
                input_ids=torch.tensor([sample[0]]),
                pixel_values=images_of(row),
                prompt_block_ids=batch["prompt_block_ids"][row, real][None],
            )
            assert_same(together.logits[row, real], alone.logits[0])
    assert together.image_hidden_states.shape == (len(IMAGES), PER_IMAGE, 32)
    assert together.loss.isfinite()


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_batch_equals_the_stock_language_model(side):
    model, batch = tiny_model(), batch_of(SAMPLES, side)
    with torch.no_grad():
        logits = model(**batch, pixel_values=IMAGES).logits
    wanted = stock_logits(model, batch["input_ids"], IMAGES, batch["prompt_block_ids"], batch["attention_mask"])
    real = batch["attention_mask"].bool()
    assert_same(logits[real], wanted[real])


@pytest.mark.parametrize("side", ["right", "left"])
def test_gradients_of_a_batch_are_those_of_its_samples(side):
    model, batch = tiny_model().train(), batch_of(SAMPLES, side)
    learned = int((batch["labels"][:, 1:] != -100).sum())
    model(**batch, pixel_values=IMAGES, num_items_in_batch=learned).loss.backward()
    together = {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    model.zero_grad()
    for row in range(len(SAMPLES)):
        real = batch["attention_mask"][row].bool()
        alone = {name: tensor[row, real][None] for name, tensor in batch.items() if name != "attention_mask"}
        model(**alone, pixel_values=images_of(row), num_items_in_batch=learned).loss.backward()
    for name, gradient in together.items():
        torch.testing.assert_close(gradient, model.get_parameter(name).grad, atol=1e-4, rtol=1e-3, msg=name)


def test_packed_samples_do_not_see_each_other():
    model = tiny_model()
    first, second = SAMPLES[0], SAMPLES[1]
    ids = torch.tensor([first[0] + second[0]])
    positions = torch.tensor([[*range(len(first[0])), *range(len(second[0]))]])
    blocks = torch.tensor([[0] * first[2] + [-1] * 2 + [1] * second[2] + [-1] * 4])
    assert blocks.shape == ids.shape
    with torch.no_grad():
        packed = model(input_ids=ids, position_ids=positions, prompt_block_ids=blocks, pixel_values=IMAGES[:4]).logits
        cut = len(first[0])
        for part, images in ((slice(0, cut), IMAGES[:1]), (slice(cut, None), IMAGES[1:4])):
            alone = model(input_ids=ids[:, part], prompt_block_ids=blocks[:, part], pixel_values=images).logits
            assert_same(packed[:, part], alone)


class TestRule:
    INPUTS = batch_of(SAMPLES[:1], "right")

    def logits(self, model, **inputs):
        with torch.no_grad():
            return model(input_ids=self.INPUTS["input_ids"], pixel_values=IMAGES[:1], **inputs).logits

    def test_it_is_read_at_each_call_and_may_be_set_for_one(self):
        model, blocks = tiny_model(), self.INPUTS["prompt_block_ids"]
        mma = self.logits(model, prompt_block_ids=blocks)
        causal = self.logits(model, prompt_block_ids=blocks, attention_rule="causal")
        assert (mma - causal).abs().max() > 1e-2
        ids = self.INPUTS["input_ids"]
        assert_same(mma, stock_logits(model, ids, IMAGES[:1], blocks))
        assert_same(causal, stock_logits(model, ids, IMAGES[:1], torch.full_like(ids, -1)))
        model.config.attention_rule = "causal"
        assert torch.equal(self.logits(model, prompt_block_ids=blocks), causal)
        assert torch.equal(self.logits(model, prompt_block_ids=blocks, attention_rule="mma"), mma)

    def test_labels_say_where_the_prompt_ends(self):
        model, batch = tiny_model(), self.INPUTS
        named = self.logits(model, prompt_block_ids=batch["prompt_block_ids"])
        assert torch.equal(self.logits(model, labels=batch["labels"]), named)
        # Whatever stands on the placeholders of the image, it is no label.
        on_images = batch["labels"].where(batch["input_ids"] != IMAGE, torch.tensor(17))
        assert torch.equal(self.logits(model, labels=on_images), named)

    def test_without_either_all_is_prompt_but_not_in_training(self):
        model = tiny_model()
        everything = self.logits(model, prompt_block_ids=torch.zeros_like(self.INPUTS["input_ids"]))
        assert torch.equal(self.logits(model), everything)
        with pytest.raises(ValueError, match="pass `prompt_block_ids`"):
            self.logits(model.train())

    def test_a_misspelt_one_is_refused(self):
        with pytest.raises(ValueError, match=r"no attention rule 'nma'.*Did you mean 'mma'"):
            AkiConfig(attention_rule="nma")
        with pytest.raises(ValueError, match=r"no attention rule 'casual'.*Did you mean 'causal'"):
            self.logits(tiny_model(), attention_rule="casual")

    def test_a_mask_that_is_already_made_is_used_as_it_is(self):
        model, ids = tiny_model(), self.INPUTS["input_ids"]
        mask = torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
        causal = self.logits(model, attention_rule="causal")
        assert_same(self.logits(model, attention_mask=mask), causal)

    def test_text_alone_is_causal_under_any_rule(self):
        model, ids = tiny_model(), torch.tensor([SAMPLES[2][0]])
        with torch.no_grad():
            assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids, attention_rule="causal").logits)
            embeds = model.get_input_embeddings()(ids)
            assert torch.equal(model(inputs_embeds=embeds).logits, model(input_ids=ids).logits)


class TestOutput:
    def test_loss_is_the_cross_entropy_of_the_next_token_over_labels(self):
        model, batch = tiny_model(), batch_of(SAMPLES, "right")
        noisy = batch["labels"].where(batch["input_ids"] != IMAGE, torch.tensor(17))
        with torch.no_grad():
            out = model(**batch | {"labels": noisy}, pixel_values=IMAGES)
        losses = [
            -torch.log_softmax(out.logits[row, position], 0)[label]
            for row in range(len(SAMPLES))
            for position, label in enumerate(batch["labels"][row, 1:].tolist())
            if label != -100
        ]
        assert len(losses) == 2 + 4 + 2 + 2
        assert out.loss.item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)

    def test_logits_to_keep(self):
        model, batch = tiny_model(), batch_of(SAMPLES, "left")
        del batch["labels"]
        with torch.no_grad():
            full = model(**batch, pixel_values=IMAGES).logits
            assert full.shape[1] == batch["input_ids"].shape[1]
            assert_same(model(**batch, pixel_values=IMAGES, logits_to_keep=2).logits, full[:, -2:])

    def test_tuples_and_hidden_states(self):
        model, batch = tiny_model(), batch_of(SAMPLES, "right")
        with torch.no_grad():
            out = model(**batch, pixel_values=IMAGES, output_hidden_states=True, use_cache=False)
            as_tuple = model(**batch, pixel_values=IMAGES, return_dict=False, use_cache=False)
        assert isinstance(out, AkiOutput)
        assert len(out.hidden_states) == 3
        assert torch.equal(as_tuple[0], out.loss)
        assert torch.equal(as_tuple[1], out.logits)

    def test_attentions_show_the_rule(self):
        model = tiny_model()
        model.set_attn_implementation("eager")
        ids = torch.tensor([tokens("image", 7, 8)])
        with torch.no_grad():
            attention = model(input_ids=ids, pixel_values=IMAGES[:1], output_attentions=True).attentions[0][0, 0]
        assert (attention[:PER_IMAGE, PER_IMAGE:] > 0).all(), "the image sees its question"
        assert attention[0, 1] == 0, "image tokens among themselves are causal"
        assert attention[PER_IMAGE, -1] == 0, "so is text"


class TestMismatch:
    @pytest.mark.parametrize(
        ("parts", "images", "found"),
        [
            (("image", 7), 2, PER_IMAGE),
            (("image", 7, "image"), 1, 2 * PER_IMAGE),
            ((5, 7, 8), 1, 0),
            ((IMAGE, 7, 8), 1, 1),
        ],
    )
    def test_images_and_placeholders(self, parts, images, found):
        message = rf"{images} image\(s\) need {images * PER_IMAGE} placeholders .* found {found}"
        with pytest.raises(ValueError, match=message):
            tiny_model()(input_ids=torch.tensor([tokens(*parts)]), pixel_values=pictures(images))

    def test_placeholders_without_images(self):
        with pytest.raises(ValueError, match=rf"0 image\(s\) need 0 placeholders .* found {PER_IMAGE}"):
            tiny_model()(input_ids=torch.tensor([tokens("image", 7)]))

    @pytest.mark.parametrize("both", [True, False])
    def test_input_ids_and_embeds(self, both):
        inputs = {"input_ids": torch.tensor([[5]]), "inputs_embeds": torch.zeros(1, 1, 32)} if both else {}
        with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
            tiny_model()(**inputs)
