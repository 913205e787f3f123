"""Chat formats by name: how a conversation is written for models that bring no template of their
own.

A format is a Jinja template like a model's own (`qlora_jax.data.chat_template`) and the strings
that end a reply. These belong together: a base model that was trained in Guanaco's format goes on
with `### Human:` when its answer is over, and only the format knows that this is the end.

In all of them an answer is closed with the end token, also in the middle of a conversation, so that
it is clear to the model where an answer ends. (The literal dialogues of the paper's OASST1 set have
it after the last answer alone; there the marker that follows is learned instead, see
`line_formats.parse_dialogue`.)
"""

import dataclasses
from collections.abc import Sequence

from qlora_jax.errors import ConfigError, nearest

# Jinja drops a line end right after a tag, so those that count stand inside {{ }}.
_SYSTEM = "{% if m.role == 'system' %}{{ m.content }}"


@dataclasses.dataclass(frozen=True)
class ChatFormat:
    """A way to write conversations.

    Attributes:
        template: Jinja source. BOS is put before it for the models that want one.
        stop_strings: each ends a reply and is no part of it.
        writes_bos: whether the template writes BOS itself.
    """

    template: str
    stop_strings: tuple[str, ...] = ()
    writes_bos: bool = False


def _marked(user: str, assistant: str, system_end: str = "\n") -> str:
    """A template of turns that begin with a marker."""
    return (
        "{% for m in messages %}"
        + f"{_SYSTEM}{system_end}"
        + "{% elif m.role == 'user' %}"
        + f"{{{{ '{user}' + m.content }}}}"
        + "{% else %}"
        + f"{{{{ '{assistant}' + m.content }}}}{{{{ eos_token }}}}"
        + "{% endif %}{% endfor %}"
        + "{% if add_generation_prompt %}"
        + f"{{{{ '{assistant.rstrip()}' }}}}"
        + "{% endif %}"
    )


_ALPACA = (
    "{% if messages[0].role != 'system' %}Below is an instruction that describes a task. Write a "
    "response that appropriately completes the request.\n\n{% endif %}"
    "{% for m in messages %}"
    + _SYSTEM
    + "\n\n{% elif m.role == 'user' %}### Instruction:\n{{ m.content }}\n\n### Response: "
    "{% else %}{{ m.content }}{{ eos_token }}{% if not loop.last %}{{ '\n\n' }}{% endif %}"
    "{% endif %}{% endfor %}"
)
_CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_VICUNA = (
    "{% if messages[0].role != 'system' %}A chat between a curious user and an artificial "
    "intelligence assistant. The assistant gives helpful, detailed, and polite answers to the "
    "user's questions.{% endif %}{% for m in messages %}"
    + _SYSTEM
    + "{% elif m.role == 'user' %} USER: {{ m.content }}"
    "{% else %} ASSISTANT: {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)
_LLAMA2 = (
    "{% set ns = namespace(system='') %}{% for m in messages %}{% if m.role == 'system' %}"
    "{% set ns.system = '<<SYS>>\n' + m.content + '\n<</SYS>>\n\n' %}"
    "{% elif m.role == 'user' %}{{ bos_token }}[INST] {{ ns.system + m.content }} [/INST]"
    "{% set ns.system = '' %}{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
)
_LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
_PLAIN = (
    "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}"
    "{% elif m.role == 'system' %}{{ '\n\n' }}{% endif %}{% endfor %}"
)

CHAT_FORMATS = {
    "guanaco": ChatFormat(_marked("### Human: ", "### Assistant: "), ("### Human:",)),
    "alpaca": ChatFormat(_ALPACA, ("### Instruction:",)),
    "chatml": ChatFormat(_CHATML, ("<|im_end|>", "<|im_start|>")),
    "vicuna": ChatFormat(_VICUNA, (" USER:",)),
    "llama2": ChatFormat(_LLAMA2, ("[INST]",), writes_bos=True),
    "llama3": ChatFormat(_LLAMA3, ("<|eot_id|>",), writes_bos=True),
    "hh": ChatFormat(_marked("\n\nHuman: ", "\n\nAssistant: ", ""), ("\n\nHuman:",)),
    "plain": ChatFormat(_PLAIN),
}


def find_chat_format(name: str) -> ChatFormat:
    """Looks a format up.

    Raises:
        ConfigError: there is none of this name.

    >>> find_chat_format("guanaco").stop_strings
    ('### Human:',)
    """
    if name not in CHAT_FORMATS:
        guess = nearest(name, CHAT_FORMATS)
        hint = f"; did you mean {guess}?" if guess else ""
        raise ConfigError(f"chat format {name!r} is not one of {', '.join(CHAT_FORMATS)}{hint}")
    return CHAT_FORMATS[name]


def cut_at_stop(text: str, stop_strings: Sequence[str]) -> str:
    """The text before the first of the strings that end a reply.

    >>> cut_at_stop(" Oh.### Human: And?", ("### Human:",))
    ' Oh.'
    """
    ends = [position for stop in stop_strings if (position := text.find(stop)) >= 0]
    return text[: min(ends)] if ends else text
