"""What the backbone and the model on it give back."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast


@dataclass
class AkiModelOutput(BaseModelOutputWithPast):
    """Output of the decoder, and what it was shown of the images.

    Attributes:
        image_hidden_states: (images, embeddings an image, text width).
    """

    image_hidden_states: Tensor | None = None


@dataclass
class AkiOutput(CausalLMOutputWithPast):
    """Output of the language model, and what it was shown of the images.

    Attributes:
        image_hidden_states: (images, embeddings an image, text width).
    """

    image_hidden_states: Tensor | None = None
