"""Chat templates (Jinja, as transformers renders them). What stands between the generation tags is the answer."""

IMAGE_TOKEN, VIDEO_TOKEN, AUDIO_TOKEN = "<image>", "<video>", "<audio>"
SYSTEM_TOKEN, USER_TOKEN, ANSWER_TOKEN, END_TOKEN = "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"
END_OF_CHUNK_TOKEN = "<|endofchunk|>"
SYSTEM_MESSAGE = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)

_PARTS, _MESSAGES = "for part in message.content", "for message in messages"
_TEXT_FIRST_PARTS = (
    "for part in (message.content | rejectattr('type', 'in', media) | list)"
    " + (message.content | selectattr('type', 'in', media) | list)"
)
_ECHOED_PARTS = (
    "for part in ((message.content | rejectattr('type', 'in', media) | list)"
    " if message.content | selectattr('type', 'in', media) | list else []) + message.content"
)
_ANSWERS_FIRST = (
    "for message in (messages | selectattr('role', 'equalto', 'assistant') | list)"
    " + (messages | rejectattr('role', 'equalto', 'assistant') | list)"
)

CONTENT = (
    "{%- set media = ('image', 'video', 'audio') -%}"
    "{%- macro content(message) -%}"
    "{%- if message.content is string -%}{{ message.content }}"
    "{%- else -%}{%- " + _PARTS + " -%}"
    "{%- if not loop.first and (part.type in media or loop.previtem.type in media) -%}{{ separator }}{%- endif -%}"
    "{%- if part.type in media -%}<{{ part.type }}>{%- else -%}{{ part.text }}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{%- endmacro -%}"
)

SHORT = (
    "{%- set separator = '' -%}" + CONTENT + "{%- for message in messages -%}"
    "{%- if message.role == 'assistant' -%}"
    + ANSWER_TOKEN
    + "{% generation %}{{ content(message) }}{{ eos_token }}{% endgeneration %}"
    "{%- elif message.role == 'system' -%}" + SYSTEM_TOKEN + "{{ content(message) }}"
    "{%- else -%}" + USER_TOKEN + "{{ content(message) }}"
    "{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}" + ANSWER_TOKEN + "{%- endif -%}"
)
"""Role tokens and text, nothing else: for small models trained from scratch."""

AKI = (
    "{%- set separator = '\n' -%}"
    + CONTENT
    + "{%- macro turn(role, text) -%}{{ role + '\n' + text + '"
    + END_TOKEN
    + "\n' }}{%- endmacro -%}"
    "{%- if bos_token -%}{{ bos_token }}"
    "{%- if add_generation_prompt or messages[-1].begun -%}{{ ' ' }}{%- endif -%}{%- endif -%}"
    "{%- if messages[0].role != 'system' -%}{{ turn('" + SYSTEM_TOKEN + "', \"" + SYSTEM_MESSAGE + '") }}{%- endif -%}'
    "{%- for message in messages -%}"
    "{%- if message.role == 'assistant' -%}"
    + ANSWER_TOKEN
    + "{% generation %}{{ '\n' }}{{ content(message) }}{{ eos_token }}{% endgeneration %}"
    "{%- elif message.role == 'system' -%}{{ turn('" + SYSTEM_TOKEN + "', content(message)) }}"
    "{%- else -%}{{ turn('" + USER_TOKEN + "', content(message)) }}"
    "{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}" + ANSWER_TOKEN + "{{ '\n' }}{%- endif -%}"
)
"""The paper's prompt (section 3), which the published checkpoint knows. Tokenise it without adding special tokens.

Before an answer that is to come it begins with BOS and a blank, in training with BOS alone. Answers end with EOS, later
turns follow it, and images stand on lines of their own. `messages[-1].begun` marks an answer that is to be continued.
"""

CAPTION = (
    "{%- set separator = '' -%}" + CONTENT + "{{- bos_token if bos_token else '' -}}"
    "{%- for message in messages -%}"
    "{%- if message.role == 'assistant' -%}{% generation %}{{ content(message) | trim }}"
    + END_OF_CHUNK_TOKEN
    + "{{ eos_token }}{% endgeneration %}"
    "{%- else -%}{{ content(message) }}"
    "{%- endif -%}{%- endfor -%}"
)
"""Pre-training (paper, section 3): BOS `<image>{caption, stripped}<|endofchunk|>` EOS, all of the text is a label."""


def echo(template: str) -> str:
    """The template with the text of each message that has media twice, before them and where it stands.

    Raises:
        ValueError: the template is none of these.
    """
    return _own(template).replace(_PARTS, _ECHOED_PARTS)


def text_first(template: str) -> str:
    """The template with the text of each message before its media; a caption comes before its picture.

    Raises:
        ValueError: the template is none of these, so that nobody can say where its media are.
    """
    template = _own(template).replace(_PARTS, _TEXT_FIRST_PARTS)
    # A caption is the whole of what is said, and has no question that must come before it.
    return template if END_OF_CHUNK_TOKEN not in template else template.replace(_MESSAGES, _ANSWERS_FIRST)


def _own(template: str) -> str:
    if _PARTS not in template:
        raise ValueError("only AKI's own chat templates can put text elsewhere: write a template that does.")
    return template
