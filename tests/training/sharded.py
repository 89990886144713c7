"""A step of the SFT recipe's tiny model, sharded as the recipe's `fsdp` says and not: the losses and gradients agree.

Run by torchrun with gloo. accelerate shards on accelerators alone, so torch's own call stands in for it here.
"""

import copy

import torch
import torch.distributed as dist
from PIL import Image
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from aki.data.collate import ChatCollator
from aki.data.schema import Sample, assistant, user
from aki.training.model import build_model, tiny
from aki.training.recipe import load_recipe

dist.init_process_group("gloo")
recipe = tiny(load_recipe("aki-4b/sft"))
torch.manual_seed(0)
whole, processor = build_model(recipe, ["what is there?"])
whole.train().model.vision_encoder.requires_grad_(False)
sharded, mesh = copy.deepcopy(whole), init_device_mesh("cpu", (dist.get_world_size(),))
names = recipe.fsdp["transformer_layer_cls_to_wrap"]
wrapped = [module for module in sharded.modules() if type(module).__name__ in names]
assert {type(module).__name__ for module in wrapped} == set(names)
for module in wrapped:
    fully_shard(module, mesh=mesh)
fully_shard(sharded, mesh=mesh)

picture = Image.new("RGB", (56, 56), (200 * dist.get_rank(), 30, 40))
batch = ChatCollator(processor, 4000)([Sample([user(picture, "what is there?"), assistant("a box")], "test", "1")])
losses = [model(**batch).loss for model in (sharded, whole)]
torch.testing.assert_close(*losses)
for loss in losses:
    loss.backward()
for (name, mine), theirs in zip(sharded.named_parameters(), whole.parameters(), strict=True):
    if theirs.grad is None:
        assert mine.grad is None, name
        continue
    dist.all_reduce(theirs.grad)
    torch.testing.assert_close(mine.grad.full_tensor(), theirs.grad / dist.get_world_size(), msg=name)
    assert mine.to_local().numel() < theirs.numel() or theirs.shape[0] == 1, name
dist.destroy_process_group()
