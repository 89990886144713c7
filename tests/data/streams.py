"""Small samples, a collator and shards for the tests of mixtures, shards and feeds."""

import io
import json
import tarfile
from functools import cache

import torch
from PIL import Image

from aki.data.collate import ChatCollator
from aki.data.report import BadSample
from aki.data.schema import Sample, assistant, user
from aki.training.model import build_model
from aki.training.recipe import load_recipe


class Numbers:
    """A source whose sample i says `NAME i`; those in `bad` cannot be used."""

    def __init__(self, name, size, bad=()):
        self.name, self.size, self.bad = name, size, set(bad)

    def __len__(self):
        return self.size

    def sample(self, index, epoch):
        if index in self.bad:
            raise BadSample("broken image", f"{index} is bad", self.name, str(index))
        picture = Image.new("RGB", (24, 24), (index % 256, index // 256, len(self.name)))
        return Sample([user(picture, f"{self.name} {'x' * (index % 7)}"), assistant(str(index))], self.name, str(index))


def name_of(sample):
    return f"{sample.source}/{sample.id}"


@cache
def collator(max_length=60):
    torch.manual_seed(0)
    recipe = load_recipe("digits")
    recipe.model.vision |= {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    recipe.model.text |= {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    return ChatCollator(build_model(recipe)[1], max_length)


def picture(colour=(10, 20, 30), size=(30, 20)):
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "JPEG")
    return file.getvalue()


def write_shard(path, members):
    """A tar of (key, {extension: bytes})."""
    with tarfile.open(path, "w") as tar:
        for key, files in members:
            for extension, content in files.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return str(path)


def captions(folder, shards=4, size=10):
    """Shards of `size` captioned pictures each; the caption names the shard and the number."""
    return [
        write_shard(
            folder / f"{shard:03}.tar",
            [(f"{shard:03}{i:05}", {"jpg": picture(), "txt": f"{shard}-{i}".encode()}) for i in range(size)],
        )
        for shard in range(shards)
    ]


def ocr(text):
    return json.dumps([{"text": "without its words"}, {"text": text}]).encode()
