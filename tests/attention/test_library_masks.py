"""The rules that others ship, against the masks that transformers makes for PaliGemma and Gemma 3."""

import pytest
import torch
from transformers import PaliGemmaForConditionalGeneration
from transformers.models.gemma3 import modeling_gemma3
from unlock_families import gemma3, paligemma

from aki.attention import dense_mask, get_rule
from aki.compat import CACHE
from aki.layout import IMAGE, build_layout, number_runs

PAD, PICTURE, TOKENS = 0, 9, 3
# One turn each, padded on the right; pictures first, within, several, with a token between them (Gemma 3 takes pictures
# that touch for one), and none.
PROMPTS = [
    [[PICTURE] * TOKENS, [5, 6, 7]],
    [[5], [PICTURE] * TOKENS, [6], [PICTURE] * TOKENS, [7, 8]],
    [[5, 6], [PICTURE] * TOKENS],
    [[5, 6, 7]],
]
ANSWER = [3, 4]


@pytest.fixture(scope="module")
def batch() -> dict[str, torch.Tensor]:
    prompts = [[token for part in parts for token in part] for parts in PROMPTS]
    length = max(map(len, prompts)) + len(ANSWER)
    rows = [prompt + ANSWER + [PAD] * (length - len(prompt) - len(ANSWER)) for prompt in prompts]
    is_prompt = [[position < len(prompt) for position in range(length)] for prompt in prompts]
    ids, prompt = torch.tensor(rows), torch.tensor(is_prompt)
    return {"ids": ids, "prompt": prompt, "attention": (ids != PAD).long()}


def ours(rule: str, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    layout = build_layout(
        batch["ids"],
        {IMAGE: PICTURE},
        TOKENS,
        attention_mask=batch["attention"],
        prompt_block_ids=number_runs(batch["prompt"]),
    )
    return dense_mask(get_rule(rule), layout)


def agree(rule: str, batch: dict[str, torch.Tensor], theirs: torch.Tensor) -> None:
    """Apart from the rows of padding, which mean nothing."""
    real = batch["attention"].bool()[:, :, None]
    assert theirs.shape[1] == 1
    assert torch.equal(ours(rule, batch) & real, theirs[:, 0] & real)
    assert not torch.equal(ours(rule, batch) & real, ours("causal", batch) & real)


def test_image_bidirectional_is_gemma_3s_mask(batch):
    config = gemma3().model.config.get_text_config()
    assert config._attn_implementation == "sdpa"
    masks = modeling_gemma3.create_masks_for_vision_model(
        config=config,
        inputs_embeds=torch.zeros(*batch["ids"].shape, config.hidden_size),
        attention_mask=batch["attention"],
        **{CACHE: None},
        position_ids=None,
        block_sequence_ids=modeling_gemma3.get_block_sequence_ids_for_mask((batch["ids"] == PICTURE).long()),
    )
    agree("image_bidirectional", batch, masks["full_attention"])


def test_prefix_is_paligemmas_mask(batch):
    config = paligemma().model.config
    mask = PaliGemmaForConditionalGeneration.create_masks_for_generate(
        config,
        torch.zeros(*batch["ids"].shape, config.text_config.hidden_size),
        batch["attention"],
        None,
        None,
        # PaliGemma's processor marks the answer by 1.
        token_type_ids=(~batch["prompt"]).long(),
        is_first_iteration=True,
    )
    agree("prefix", batch, mask["full_attention"] if isinstance(mask, dict) else mask)
