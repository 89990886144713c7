"""vLLM answers under the rule that a folder names. `plugin` is what vLLM loads; nothing else imports this room.

The way of a request: `prompts` reads from its ids which rows see more than causal ones; `settings` makes the engine's
configuration one under which that can be right, or refuses it; `hooks` asks in three places of vLLM: where a prompt is
cut into steps, where a block of the cache gets its name, and where a step is computed; `steps` says which rows of a
step are done again, `rows` does them, `cache` reads the keys of earlier steps. `model` and `processing` are AKI itself.
"""
