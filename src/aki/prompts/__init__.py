"""What is prompt and what is answer in a tokenised chat (`blocks`), and the scopes that a chat names (`scopes`)."""

from aki.prompts.blocks import write_prompt_blocks

__all__ = ["write_prompt_blocks"]
