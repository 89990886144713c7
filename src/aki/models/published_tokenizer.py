"""The published checkpoint's tokenizer: the folder's or its language model's, with the added tokens in their places."""

from __future__ import annotations

from tokenizers import AddedToken
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from aki.models.checkpoint_files import CheckpointError
from aki.models.published import PublishedCheckpoint
from aki.models.templates import ANSWER_TOKEN, END_OF_CHUNK_TOKEN, END_TOKEN, IMAGE_TOKEN, SYSTEM_TOKEN, USER_TOKEN

PAD_TOKEN = "<pad>"
_MEDIA = (IMAGE_TOKEN, END_OF_CHUNK_TOKEN)


def published_tokenizer(published: PublishedCheckpoint) -> PreTrainedTokenizerBase:
    """The tokenizer, padding on the left; what it lacks is added in the published order: padding, image, end of chunk.

    Raises:
        CheckpointError: there is none, it lacks role tokens, or its ids are not the checkpoint's.
    """
    tokenizer = _load(published)
    tokenizer.chat_template = None
    vocabulary = tokenizer.get_vocab()
    unknown = [token for token in (SYSTEM_TOKEN, USER_TOKEN, END_TOKEN, ANSWER_TOKEN) if token not in vocabulary]
    if unknown:
        raise CheckpointError(
            f"the tokenizer of {published.folder} does not know {', '.join(unknown)}, which the prompt is made of: "
            "add the checkpoint's own tokenizer files."
        )
    unnamed = [name for name in ("bos_token", "eos_token") if getattr(tokenizer, name) is None]
    if unnamed:
        raise CheckpointError(
            f"the tokenizer of {published.folder} has no {' and no '.join(unnamed)}: add the checkpoint's own "
            "tokenizer_config.json."
        )
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    lacking = [token for token in _MEDIA if token not in vocabulary]
    expected = published.original_tokens + len(_MEDIA) - len(lacking)
    if lacking and len(tokenizer) != expected:
        raise CheckpointError(
            f"the tokenizer of {published.folder} has {len(tokenizer)} tokens before {' and '.join(lacking)}, by "
            f"initial_tokenizer_len in its config.json it should have {expected}: add the checkpoint's own tokenizer "
            "files."
        )
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in lacking], special_tokens=True)
    _check_ids(tokenizer, published)
    return tokenizer


def _load(published: PublishedCheckpoint) -> PreTrainedTokenizerBase:
    """tokenizer.json decides where there is one: some classes of transformers cut text in another way than their
    files say."""
    reasons = []
    for place in filter(None, [str(published.folder), published.meta.get("lang_model_path")]):
        for kind in (PreTrainedTokenizerFast, AutoTokenizer):
            try:
                return kind.from_pretrained(place, padding_side="left", trust_remote_code=False)
            except Exception as error:  # tokenizers raises nothing narrower on a broken file
                reasons.append(str(error).partition("\n")[0])
    raise CheckpointError(
        f"neither {published.folder} nor the language model that its config.json names has a tokenizer that loads: "
        f"add the checkpoint's tokenizer files. ({reasons[0]})"
    )


def _check_ids(tokenizer: PreTrainedTokenizerBase, published: PublishedCheckpoint) -> None:
    first, end = published.original_tokens, published.original_tokens + published.added_tokens
    for token in _MEDIA:
        token_id = tokenizer.convert_tokens_to_ids(token)
        if not first <= token_id < end:
            raise CheckpointError(
                f"{token} has the id {token_id} in the tokenizer of {published.folder}, but the weights have the added "
                f"tokens at {first} to {end - 1}: add the checkpoint's own tokenizer files."
            )
    if len(tokenizer) > end:
        raise CheckpointError(
            f"the tokenizer of {published.folder} has {len(tokenizer)} tokens, the weights have {end} "
            "(initial_tokenizer_len and the added ones): add the checkpoint's own tokenizer files."
        )
    ids = {"image_token_id": tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)}
    ids |= {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    for name, token_id in ids.items():
        if published.meta.get(name, token_id) != token_id:
            raise CheckpointError(
                f"{published.folder}/config.json has {name} {published.meta[name]}, its tokenizer {token_id}: "
                "add the checkpoint's own tokenizer files."
            )
