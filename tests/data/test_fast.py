"""Training's own way gives what the processor gives."""

import numpy as np
import pytest
import torch
from fixtures.make import write_sources
from PIL import Image
from streams import collator
from transformers import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from aki.data.collate import ChatCollator
from aki.data.fast import FastPixels, NoFastWay
from aki.data.schema import Sample, assistant, user
from aki.data.sources import open_source
from aki.data.tokenizer import train_tokenizer
from aki.models import AkiProcessor
from aki.models.templates import AKI, CAPTION, END_TOKEN, SHORT


@pytest.mark.parametrize("size", [(640, 480), (31, 57), (48, 48), (1, 1)])
@pytest.mark.parametrize(("mean", "std"), [([0.5] * 3, [0.5] * 3), ([0.48, 0.45, 0.4], [0.27, 0.26, 0.3])])
def test_pixels_are_the_image_processors(size, mean, std):
    processor = SiglipImageProcessorPil(size={"height": 48, "width": 40}, image_mean=mean, image_std=std, resample=3)
    noise = np.random.default_rng(size[0]).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    pictures = [Image.fromarray(noise), Image.fromarray(255 - noise)]
    fast = FastPixels(processor)
    raw = fast(pictures)
    assert (raw.dtype, raw.shape) == (torch.uint8, (2, 3, 48, 40))
    wanted = torch.as_tensor(np.stack(processor(pictures)["pixel_values"]))
    torch.testing.assert_close(fast.normalise(raw), wanted, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "processor",
    [
        CLIPImageProcessorPil(),
        SiglipImageProcessorPil(do_normalize=False),
        SiglipImageProcessorPil(size={"shortest_edge": 20}),
    ],
)
def test_image_processors_that_do_more_or_less_keep_their_own_way(processor):
    with pytest.raises(NoFastWay):
        FastPixels(processor)


def processor_of(template):
    words = ["Answer the question using a single word or phrase. What colour is the square?"]
    tokenizer = train_tokenizer(words, bos_token="<s>", more=(END_TOKEN,))
    images = SiglipImageProcessorPil(size={"height": 48, "width": 48}, image_mean=[0.5] * 3, image_std=[0.4] * 3)
    return AkiProcessor(images, tokenizer, 9, chat_template={"default": template, "caption": CAPTION})


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """Of each of the eleven sources, and what they do not have: several turns and pictures, a system, a caption."""
    folder = tmp_path_factory.mktemp("released")
    sources = [open_source(**entry, cache=folder / "cache") for entry in write_sources(folder)]
    pictures = [Image.new("RGB", (60, 20), colour) for colour in ("red", "green")]
    talk = [
        user(pictures[0], "left?"),
        assistant("red"),
        user(pictures[1], "right?"),
        assistant("gr\u00fcn"),
    ]
    several = [
        Sample(talk, "talk", "1"),
        Sample([{"role": "system", "content": [{"type": "text", "text": "Be brief."}]}, *talk], "talk", "2"),
        Sample([user(pictures[0]), assistant(" a red box. ")], "caption", "1"),
    ]
    return [source.sample(i, 0) for source in sources for i in range(2)] + several


@pytest.mark.parametrize("template", [AKI, SHORT, None], ids=["paper", "short", "caption"])
@pytest.mark.parametrize("max_length", [400, 150])
def test_inputs_are_the_processors(samples, template, max_length):
    fast = ChatCollator(processor_of(template or AKI), max_length, None if template else "caption")
    slow = ChatCollator(fast.processor, max_length, fast.template)
    assert fast.fast is not None
    slow.fast = None
    compared = 0
    for sample in samples:
        found = [encoded(collate, sample) for collate in (fast, slow)]
        assert isinstance(found[0], str) == isinstance(found[1], str), sample
        if isinstance(found[0], str):
            assert found[0] == found[1]
            continue
        (one, cut), (two, cut_too) = found
        assert (one.keys(), cut) == (two.keys(), cut_too)
        compared += 1
        for name in one:
            torch.testing.assert_close(one[name], two[name], atol=1e-6, rtol=0)
    assert compared >= 2


def encoded(collate, sample):
    try:
        return collate.encode(sample)
    except ValueError as error:
        return str(error)


def test_the_trainer_normalises_what_workers_leave_as_bytes():
    raw = ChatCollator(collator().processor, 60, raw_pixels=True)
    sample = Sample([user(Image.new("RGB", (50, 30), (10, 200, 90)), "what?"), assistant("x")], "s", "1")
    bytes_, floats = raw.encode(sample)[0]["pixel_values"], collator().encode(sample)[0]["pixel_values"]
    assert bytes_.dtype == torch.uint8
    torch.testing.assert_close(raw.fast.pixels.normalise(bytes_), floats)
