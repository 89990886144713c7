"""Videos as a list of frames: a frame that cannot be read is a bad sample, and no frame is left out."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, tokenizer_with
from PIL import Image
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from aki.data.collate import ChatCollator
from aki.data.report import BadSample
from aki.data.schema import Sample, assistant
from aki.data.tokenizer import train_tokenizer
from aki.models import AkiProcessor
from aki.models.explain import chat_inputs
from aki.models.templates import AKI
from aki.prompts import write_prompt_blocks


@pytest.fixture
def film(tmp_path):
    """Names of frames -> a sample; "broken" is no picture, and "wide" of another size."""
    for name, size in (("red", (16, 16)), ("blue", (16, 16)), ("green", (16, 16)), ("wide", (32, 16))):
        Image.new("RGB", size, "red" if name == "wide" else name).save(tmp_path / f"{name}.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")

    def of(*names):
        video = {"type": "video", "video": [str(tmp_path / f"{name}.png") for name in names]}
        asked = {"role": "user", "content": [video, {"type": "text", "text": "what colour is it?"}]}
        return Sample([asked, assistant("it is red")], "films", "1")

    return of


@pytest.fixture
def aki_collator():
    tokenizer = train_tokenizer(["what colour is it", "it is red"], bos_token="<s>", more=("<|end|>", "<video>"))
    squares = SiglipImageProcessorPil(size={"height": 16, "width": 16})
    processor = AkiProcessor(squares, tokenizer, 4, chat_template=AKI, video_seq_length=3, video_frames=2)
    return ChatCollator(processor, 256)


@pytest.mark.parametrize(("names", "said"), [(("red", "broken"), "broken"), (("red", "wide"), "of several sizes")])
def test_frames_that_make_no_video_are_a_bad_sample(aki_collator, film, names, said):
    with pytest.raises(BadSample, match=said):
        aki_collator.encode(film(*names))


def test_frames_that_were_given_are_not_chosen_again(aki_collator, film, monkeypatch):
    """In training and in what is asked afterwards; of a file the processor chooses."""
    passed = []
    monkeypatch.setattr(AkiProcessor, "apply_chat_template", lambda self, chat, **kwargs: passed.append(kwargs) or {})
    frames, file = aki_collator.opened(film("red", "blue")).messages[:1], film("red").messages[:1]
    file[0]["content"][0]["video"] = "film.mp4"
    for chat in (frames, [frames], file, [file], [{"role": "user", "content": "no film"}]):
        chat_inputs(aki_collator.processor, chat)
    for chat in (frames, file):
        aki_collator._inputs([Sample(chat, "films", "1")])
    chosen = [kwargs["processor_kwargs"].get("videos_kwargs", {}).get("do_sample_frames") for kwargs in passed]
    assert chosen == [False, False, None, None, None, False, None]


def test_each_frame_is_read(film):
    """Qwen3-VL's processor would choose some by time, and refuses to where they come as a list."""
    pytest.importorskip("torchvision", reason="transformers prepares videos with torchvision alone")
    from transformers import Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

    marks = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
    tokenizer = tokenizer_with("<|vision_start|>", "<|vision_end|>", **marks)
    sizes = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
    template = FAMILIES["llava"]()[1].chat_template.replace("'image'", "'video'")
    processor = Qwen3VLProcessor(
        Qwen2VLImageProcessor(size={"shortest_edge": 64, "longest_edge": 1024}, **sizes),
        tokenizer,
        Qwen3VLVideoProcessor(size={"shortest_edge": 64, "longest_edge": 4096}, **sizes),
        chat_template=template.replace("<image>", "<|vision_start|><|video_pad|><|vision_end|>"),
    )
    assert processor.video_processor.do_sample_frames
    batch, _ = ChatCollator(write_prompt_blocks(processor), 512).encode(film(*["red", "blue", "green"] * 4))
    assert torch.equal(batch["video_grid_thw"], torch.tensor([[6, 4, 4]]))  # 12 frames, two a step of time
