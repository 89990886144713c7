"""A frozen vision encoder's features: in the lowest precision that keeps them, and from disk when pictures repeat."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from aki.files import replacing

TOLERANCE = 0.02
"""How far an image's features may move in a lower precision: the norm of the difference over the norm."""


def computes_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 in hardware; elsewhere it is emulated and slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def lowest_precision(
    encode: Callable[[Tensor], Tensor], pixel_values: Tensor, tolerance: float = TOLERANCE
) -> torch.dtype:
    """bfloat16 where the device has it and it keeps these images' features within the tolerance; else the encoder's.

    Args:
        encode: (images, channels, height, width) -> (images, patches, width).
        pixel_values: some images, on the encoder's device.
    """
    device = pixel_values.device
    with torch.no_grad():
        with torch.autocast(device.type, enabled=False):
            features = encode(pixel_values)
        if not computes_bfloat16(device):
            return features.dtype
        with torch.autocast(device.type, torch.bfloat16):
            lower = encode(pixel_values).float().flatten(1)
    exact = features.float().flatten(1)
    moved = (lower - exact).norm(dim=1) / exact.norm(dim=1)
    return torch.bfloat16 if float(moved.max()) <= tolerance else features.dtype


class FeatureCache:
    """Features on disk, a file an image, named by the image as the encoder gets it and by the encoder's weights.

    The pixels that go into the name are pre-processed, so another pre-processing is another name, and so is another
    precision. Files are written whole or not at all, and one that is not what was written is written again; processes
    may share a folder, on several machines too.
    """

    def __init__(self, folder: str | Path, encoder: nn.Module, precision: torch.dtype | None = None):
        self.folder = Path(folder)
        self.encoder = _fingerprint(encoder, precision)

    def __call__(self, pixel_values: Tensor, encode: Callable[[Tensor], Tensor]) -> Tensor:
        """
        Args:
            pixel_values: (images, channels, height, width).
            encode: computes what is not there yet.

        Returns:
            (images, patches, width), as `encode` gave them.
        """
        paths = [self._path(image) for image in pixel_values]
        found = {i: features for i, path in enumerate(paths) if (features := self._read(path)) is not None}
        missing = [i for i in range(len(paths)) if i not in found]
        if missing:
            for i, features in zip(missing, encode(pixel_values[missing]), strict=True):
                found[i] = features.detach().cpu().contiguous()
                self._write(paths[i], found[i])
        return torch.stack([found[i] for i in range(len(paths))]).to(pixel_values.device)

    def _path(self, image: Tensor) -> Path:
        digest = hashlib.sha256(self.encoder + _bytes(image)).hexdigest()
        return self.folder / digest[:2] / f"{digest[2:]}.safetensors"

    @staticmethod
    def _read(path: Path) -> Tensor | None:
        try:
            with safe_open(path, "pt") as file:
                features = file.get_tensor("features")
                return features if (file.metadata() or {}).get("xxh3") == _checksum(features) else None
        except (FileNotFoundError, SafetensorError):
            return None

    @staticmethod
    def _write(path: Path, features: Tensor) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Not synced, which would take longer than the encoder: what a power cut leaves of it fails its checksum.
        with replacing(path) as partial:
            save_file({"features": features}, partial, {"xxh3": _checksum(features)})


def _checksum(features: Tensor) -> str:
    return xxhash.xxh3_128_hexdigest(_bytes(features))


def _fingerprint(encoder: nn.Module, precision: torch.dtype | None) -> bytes:
    digest = hashlib.sha256(str(precision).encode())
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(name.encode())
        digest.update(_bytes(tensor))
    return digest.digest()


def _bytes(tensor: Tensor) -> bytes:
    tensor = tensor.detach().cpu().contiguous()
    return f"{tensor.dtype}{tuple(tensor.shape)}".encode() + tensor.view(torch.uint8).numpy().tobytes()
