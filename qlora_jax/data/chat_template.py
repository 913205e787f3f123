"""Chat templates: the Jinja text that a model brings along to write a conversation its way.

A template comes with a model from anywhere, so it is untrusted code. It runs in Jinja's immutable
sandbox and sees plain strings, lists and dictionaries only. The environment offers exactly what
transformers' `apply_chat_template` offers (the same whitespace rules, `tojson` without HTML
escapes, `raise_exception`, `strftime_now`, loop controls, the `generation` block), so that a
template renders to the same text.

One thing differs. Templates such as those of Llama 3.1 and 3.2 write the date of today into the
system turn. Here it is always 26 Jul 2024, the date to which Llama's own template falls back where
there is no clock: training data that changed overnight could not be continued to the bit, and what
is asked of the model afterwards should look like what it was trained on.
"""

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from qlora_jax.errors import DataError

TEMPLATE_DATE = datetime.datetime(2024, 7, 26)


def render_chat_template(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = False,
    special_tokens: Mapping[str, str] | None = None,
) -> str:
    """Writes a conversation as one text.

    Args:
      template: Jinja source.
      messages: dictionaries with "role", "content" and whatever else the template reads.
      add_generation_prompt: end with the header of the assistant's turn.
      special_tokens: further variables, such as "bos_token".

    Returns:
      The text, special tokens included as they are written.

    Raises:
      DataError: the template is not valid, calls `raise_exception`, or fails on these messages.

    Example:
      >>> template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
      >>> render_chat_template(template, [{"role": "user", "content": "hi"}])
      '<user>hi'
      >>> render_chat_template("{{ raise_exception('roles must alternate') }}", [])
      Traceback (most recent call last):
      ...
      qlora_jax.errors.DataError: the chat template refused the conversation (roles: none): roles...
    """
    messages = [dict(message) for message in messages]
    try:
        return _compile(template).render(
            messages=messages,
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **(special_tokens or {}),
        )
    except jinja2.TemplateSyntaxError as error:
        raise DataError(
            f"the model's chat template is not valid Jinja: line {error.lineno}: {error.message}. "
            "Correct chat_template.jinja or tokenizer_config.json in the model's folder."
        ) from None
    # The sandbox passes on whatever Python error the template's own expressions raise.
    except (
        jinja2.TemplateError,
        ArithmeticError,
        AttributeError,
        LookupError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:
        roles = ", ".join(str(message.get("role")) for message in messages[:8]) or "none"
        reason = str(error).rstrip(".") or type(error).__name__
        raise DataError(
            f"the chat template refused the conversation (roles: {roles}): {reason}. "
            "Each message needs the role and content that the model's template expects."
        ) from None


class _GenerationTag(jinja2.ext.Extension):
    """Accepts `{% generation %}…{% endgeneration %}`, which marks the assistant's text."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    """Formats `TEMPLATE_DATE` instead of the date of today."""
    return TEMPLATE_DATE.strftime(format)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


@functools.lru_cache(maxsize=16)
def _compile(template: str) -> jinja2.Template:
    """Compiles a template in a fresh sandbox."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationTag, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment.from_string(template)
