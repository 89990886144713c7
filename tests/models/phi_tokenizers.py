"""Tokenizers in the manner of Phi-3's, with a vocabulary of a few words, made without a file."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

ROLES = ("<|assistant|>", "<|system|>", "<|end|>", "<|user|>")
NEWLINE = "<0x0A>"
SYSTEM_TOKENS = (
    "<|system|> ▁A ▁chat ▁between ▁a ▁curious ▁user ▁and ▁an ▁artificial ▁intelligence ▁assistant . ▁The ▁assistant "
    "▁gives ▁helpful , ▁detailed , ▁and ▁polite ▁answers ▁to ▁the ▁user's ▁questions . <|end|>"
)
"""The system message of the paper's prompt as Phi-3 cuts it: role tokens take the newline, a blank begins a text."""


def phi_tokenizer(pieces: Iterable[str], *, swallows: bool = True) -> PreTrainedTokenizerFast:
    """As Phi-3.5's: BOS is `<s>`, EOS and padding `<|endoftext|>`; a text begins with a blank; newlines are a byte.

    Args:
        pieces: the vocabulary in the order of its ids, special tokens included; blanks are written as ▁.
        swallows: whether role tokens take the white space after them, as Phi-3's do.
    """
    vocabulary = list(pieces)
    tokenizer = Tokenizer(models.Unigram([(piece, -1.0) for piece in vocabulary], 0, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(
        [
            AddedToken(piece, rstrip=swallows and piece in ROLES, normalized=False)
            for piece in vocabulary
            if piece in ("<unk>", "<s>", "</s>", "<|endoftext|>", *ROLES)
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
    )


def words(text: str) -> list[str]:
    """The pieces of a text in the order in which they first come: each word with its blank, and without."""
    found = dict.fromkeys(text.replace(".", " .").replace(",", " ,").split())
    return [piece for word in found for piece in (f"▁{word}", word)]
