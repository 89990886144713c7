# PyPI's torchvision beside torch for CPU: its operators cannot be loaded, but what registers fakes for them wants to
# know their names. `make test-vllm` writes these lines behind torchvision/extension.py in its own environment.
import torch.library

_names = torch.library.Library("torchvision", "FRAGMENT")
for _name in ("nms", "qnms"):
    _names.define(_name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
