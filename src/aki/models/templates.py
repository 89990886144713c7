"""Chat templates (Jinja, as transformers renders them). What stands between the generation tags is the answer."""

IMAGE_TOKEN, VIDEO_TOKEN, AUDIO_TOKEN = "<image>", "<video>", "<audio>"
SYSTEM_TOKEN, USER_TOKEN, ANSWER_TOKEN, END_TOKEN = "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"
END_OF_CHUNK_TOKEN = "<|endofchunk|>"

_CONTENT = (
    "{%- macro content(message) -%}"
    "{%- if message.content is string -%}{{ message.content }}"
    "{%- else -%}{%- for part in message.content -%}"
    "{%- if part.type in ('image', 'video', 'audio') -%}<{{ part.type }}>{{ image_separator }}"
    "{%- else -%}{{ part.text }}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{%- endmacro -%}"
)

SHORT = (
    "{%- set image_separator = '' -%}" + _CONTENT + "{%- for message in messages -%}"
    "{%- if message.role == 'assistant' -%}"
    + ANSWER_TOKEN
    + "{% generation %}{{ content(message) }}{{ eos_token }}{% endgeneration %}"
    "{%- elif message.role == 'system' -%}" + SYSTEM_TOKEN + "{{ content(message) }}"
    "{%- else -%}" + USER_TOKEN + "{{ content(message) }}"
    "{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}" + ANSWER_TOKEN + "{%- endif -%}"
)
"""Role tokens and text, nothing else: for small models trained from scratch."""

CAPTION = (
    "{%- set image_separator = '' -%}" + _CONTENT + "{{- bos_token if bos_token else '' -}}"
    "{%- for message in messages -%}"
    "{%- if message.role == 'assistant' -%}{% generation %}{{ content(message) | trim }}"
    + END_OF_CHUNK_TOKEN
    + "{{ eos_token }}{% endgeneration %}"
    "{%- else -%}{{ content(message) }}"
    "{%- endif -%}{%- endfor -%}"
)
"""Pre-training (paper, section 3): BOS `<image>{caption, stripped}<|endofchunk|>` EOS, all of the text is a label."""
