"""A small byte-pair tokenizer trained from the data's own text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from aki.models.templates import ANSWER_TOKEN, END_OF_CHUNK_TOKEN, IMAGE_TOKEN, SYSTEM_TOKEN, USER_TOKEN

PAD_TOKEN, EOS_TOKEN = "<pad>", "<|endoftext|>"
VOCAB_SIZE = 600


def train_tokenizer(
    texts: Iterable[str], vocab_size: int = VOCAB_SIZE, bos_token: str | None = None, more: Sequence[str] = ()
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with AKI's special tokens; pads on the left, as generation wants it.

    Args:
        vocab_size: with the 256 bytes and the special tokens.
        bos_token, more: further special tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    special = [PAD_TOKEN, EOS_TOKEN, IMAGE_TOKEN, END_OF_CHUNK_TOKEN, SYSTEM_TOKEN, USER_TOKEN, ANSWER_TOKEN, *more]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[*special, bos_token] if bos_token else special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD_TOKEN,
        eos_token=EOS_TOKEN,
        bos_token=bos_token,
        additional_special_tokens=special[2:],
        padding_side="left",
    )
