"""The kinds of media that a model takes: what encodes each, and how many placeholders one item of it has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from aki.layout import AUDIO, IMAGE
from aki.models.connectors import Connector, connector_named


@dataclass(frozen=True)
class Media:
    """One kind of media of an `AkiConfig`.

    Attributes:
        modality: its number in `SequenceLayout.modality`.
        name: what one item is called in messages.
        encoder, connector: names of the model's parts.
        token_id: its placeholder in input_ids, one for every embedding.
        frames: pictures an item, each encoded alone; 1 for anything but a video.
    """

    modality: int
    name: str
    encoder: str
    connector: str
    encoder_config: Any
    connector_config: Any
    token_id: int
    frames: int = 1

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the pictures that the encoder takes.

        Raises:
            ValueError: the encoder has no fixed size.
        """
        size = getattr(self.encoder_config, "image_size", None)
        if size is None:
            raise ValueError(
                f"the vision encoder {self.encoder_config.model_type!r} has no fixed image_size (NaFlex encoders take "
                "pictures of any size, which AKI does not): use a fixed-resolution checkpoint, for instance "
                "google/siglip2-so400m-patch14-384."
            )
        return _pair(size)

    @property
    def patch_grid(self) -> tuple[int, int]:
        """Rows and columns of patches of one picture.

        Raises:
            ValueError: the encoder has no fixed size.
        """
        (height, width), (patch_height, patch_width) = self.image_size, _pair(self.encoder_config.patch_size)
        return height // patch_height, width // patch_width

    @property
    def num_features(self) -> int:
        """Patches of one picture, or steps in time of one audio clip.

        Raises:
            ValueError: the encoder takes inputs of any size.
        """
        if self.modality == AUDIO:
            steps = getattr(self.encoder_config, "max_source_positions", None)
            if steps is None:
                raise ValueError(
                    f"the audio encoder {self.encoder_config.model_type!r} has no fixed max_source_positions: use one "
                    "of a fixed length, as Whisper's or Voxtral's."
                )
            return steps
        rows, columns = self.patch_grid
        return rows * columns

    @property
    def tokens_per_item(self) -> int:
        """Embeddings, and so placeholders, of one item."""
        return self.frames * self._connector.count(self.connector_config, self.num_features)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns on which the embeddings of one item stand, as its connector says.

        Raises:
            ValueError: they stand on no grid.
        """
        if self.modality != IMAGE:
            raise ValueError(f"a rule with rings needs media on a grid, which the tokens of one {self.name} are not.")
        return self._connector.grid(self.connector_config, self.patch_grid)

    @property
    def _connector(self) -> type[Connector]:
        return connector_named(self.connector_config.connector)


def _pair(size: int | list[int] | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
