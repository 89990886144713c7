"""Videos and audio as they come to arrays as the processor takes them, or a sentence that says why not."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from aki.models.images import open_image


class ClipError(ValueError):
    """A video or an audio clip that cannot be read."""


def open_video(source: Any) -> NDArray[np.uint8]:
    """The frames of a video as one array.

    Args:
        source: frames in order, each anything that `aki.models.images.open_image` opens; or an array of them,
            (frames, height, width, 3 or 4) of uint8. A video file is decoded elsewhere (PyAV, torchcodec).

    Returns:
        (frames, height, width, 3) uint8.

    Raises:
        ClipError: no frames, frames of several sizes, or no frames at all but a file.
        ImageError: a frame that cannot be read.
    """
    source = source.numpy() if isinstance(source, Tensor) else source
    if isinstance(source, np.ndarray) and source.ndim != 4:
        raise ClipError(f"an array of shape {source.shape} is not a video: pass (frames, height, width, 3) of uint8.")
    if not isinstance(source, np.ndarray | list | tuple):
        raise ClipError(
            f"a {type(source).__name__} is not a video: pass its frames, a list of pictures or an array "
            "(frames, height, width, 3); a video file is decoded first, for instance by PyAV or torchcodec."
        )
    frames = [open_image(frame) for frame in source]
    if not frames:
        raise ClipError("the video has no frames.")
    sizes = {frame.size for frame in frames}
    if len(sizes) > 1:
        raise ClipError(f"the video has frames of several sizes (width, height), {sorted(sizes)}: scale them to one.")
    return np.stack([np.asarray(frame) for frame in frames])


def frames_as_given(chats: Iterable[Any]) -> dict[str, Any]:
    """Keywords of a processor for these chats: frames that come as such were chosen by whoever wrote them;
    of a file the processor chooses."""
    contents = (message["content"] for chat in chats for message in chat)
    parts = (part for content in contents if not isinstance(content, str) for part in content)
    given = any(not isinstance(part.get("video"), str | None) for part in parts)
    return {"videos_kwargs": {"do_sample_frames": False}} if given else {}


def pick_frames(video: NDArray[np.uint8], count: int) -> NDArray[np.uint8]:
    """So many frames, evenly spaced from the first to the last; those of a shorter video repeat."""
    return video[np.linspace(0, len(video) - 1, count).round().astype(int)]


def open_audio(source: Any, sampling_rate: int) -> NDArray[np.float32]:
    """A waveform.

    Args:
        source: samples at `sampling_rate`, one channel, -1 to 1; {"array": samples, "sampling_rate": in Hz}, as
            datasets has it; or a path, an http(s) URL or base64 of a file (wav, flac, mp3, ...), which takes soundfile.
        sampling_rate: of the result, in Hz.

    Returns:
        (samples,) float32.

    Raises:
        ClipError: not audio, empty, of several channels, integers or not finite; or there is nothing installed to
            read it.
    """
    if isinstance(source, dict):
        if source.get("array") is None or not source.get("sampling_rate"):
            raise ClipError(f"a dict of {sorted(source)} is not audio: it needs an array and its sampling_rate in Hz.")
        return _resample(open_audio(source["array"], sampling_rate), int(source["sampling_rate"]), sampling_rate)
    if isinstance(source, str | Path):
        source = _read(str(source), sampling_rate)
    if not isinstance(source, np.ndarray | Tensor | Sequence) or isinstance(source, bytes):
        raise ClipError(f"a {type(source).__name__} is not audio: pass a waveform, a path, a URL or base64.")
    try:
        samples = np.asarray(source.detach().cpu() if isinstance(source, Tensor) else source)
        wave = samples.astype(np.float32)
    except ValueError as error:
        raise ClipError(f"a {type(source).__name__} is not audio, its samples are no numbers: {error}") from error
    if not np.issubdtype(samples.dtype, np.floating):
        raise ClipError(f"audio of {samples.dtype} is not -1 to 1: divide it (that of a 16-bit file by 32768).")
    if wave.ndim != 1 or wave.size == 0:
        raise ClipError(f"an array of shape {wave.shape} is not audio: pass (samples,), one channel, at least one.")
    if not np.isfinite(wave).all():
        raise ClipError("the audio has samples that are not finite.")
    return wave


def _read(source: str, sampling_rate: int) -> NDArray[np.float32]:
    shown = source if len(source) < 200 else "the audio given"
    try:
        import soundfile
    except ImportError as error:
        raise ClipError(f"{shown} cannot be read without soundfile and soxr: pip install 'aki-mma[audio]'.") from error
    try:
        samples, given = soundfile.read(_file(source), dtype="float32", always_2d=True)
    except Exception as error:
        # Decoders and clients raise anything.
        raise ClipError(f"{shown} is missing, or no audio file that can be read: {error}") from error
    return _resample(samples.mean(1), given, sampling_rate)


def _file(source: str) -> str | io.BytesIO:
    if source.startswith(("http://", "https://")):
        response = httpx.get(source, timeout=30.0, follow_redirects=True)
        response.raise_for_status()
        return io.BytesIO(response.content)
    if source.startswith("data:"):
        return io.BytesIO(base64.b64decode(source.partition(",")[2], validate=True))
    if len(source) < 4096 and Path(source).exists():
        return source
    try:
        return io.BytesIO(base64.b64decode(source, validate=True))
    except ValueError:
        # soundfile then says that there is no such file.
        return source


def _resample(wave: NDArray[np.float32], given: int, wanted: int) -> NDArray[np.float32]:
    if given == wanted:
        return wave
    try:
        import soxr
    except ImportError as error:
        message = f"the audio is at {given} Hz, the encoder wants {wanted} Hz: pip install 'aki-mma[audio]'."
        raise ClipError(message) from error
    return soxr.resample(wave, given, wanted)
