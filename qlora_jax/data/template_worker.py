"""The process in which chat templates are rendered; `chat_template.py` starts it and talks to it.

It is run as a file, imports nothing but Jinja, gets no environment variable of the program that it
works for, and gives up what a template could do harm with before it reads one: more memory than
`MEMORY_BYTES`, writing files, and computing time beyond what each request allows.

Requests and answers are JSON after four bytes with its length. The environment offers exactly what
transformers' `apply_chat_template` offers (the same whitespace rules, `tojson` without HTML
escapes, `raise_exception`, `strftime_now`, loop controls, the `generation` block).
"""

import datetime
import json
import os
import resource
import struct
import sys
from typing import Any, BinaryIO

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY_BYTES = 512 << 20
_TEMPLATE_DATE = datetime.datetime(2024, 7, 26)
_MOST_WORDS = 500  # characters of what a template has to say


class _GenerationTag(jinja2.ext.Extension):
    """Accepts `{% generation %}…{% endgeneration %}`, which marks the assistant's text."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    """Formats a fixed date instead of that of today; see `chat_template.py`."""
    return _TEMPLATE_DATE.strftime(format)


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


def compile_template(template: str) -> jinja2.Template:
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


def answer(request: dict[str, Any], compiled: dict[int, jinja2.Template]) -> dict[str, Any]:
    """Renders beginnings of one conversation.

    Args:
      request: "number" of the template and, the first time, "template" itself; "variables" with
        "messages"; "wanted", for each text the number of messages and whether the assistant is
        asked for more; "most_characters" of a text.
      compiled: templates by their number; changed in place.

    Returns:
      "texts"; or "failure" with "reason", one of "syntax", "refused", "memory" and "length".

    Example:
      >>> request = {"number": 0, "template": "{{ x * 2 }}", "most_characters": 10}
      >>> request |= {"variables": {"x": "ab", "messages": []}, "wanted": [(0, False)]}
      >>> answer(request, {})
      {'texts': ['abab']}
    """
    try:
        if "template" in request:
            compiled[request["number"]] = compile_template(request["template"])
        template, variables = compiled[request["number"]], request["variables"]
        texts: list[str] = []
        for count, prompt in request["wanted"]:
            messages = variables["messages"][:count]
            options = {**variables, "messages": messages, "add_generation_prompt": prompt}
            texts.append(template.render(**options))
            if len(texts[-1]) > request["most_characters"]:
                return {"failure": "length", "reason": f"{len(texts[-1])} characters"}
    except jinja2.TemplateSyntaxError as error:
        reason = f"line {error.lineno}: {error.message}"
        return {"failure": "syntax", "reason": reason[:_MOST_WORDS]}
    except MemoryError:
        return {"failure": "memory", "reason": f"{MEMORY_BYTES >> 20} MB"}
    except Exception as error:  # the sandbox passes on whatever the template's expressions raise
        return {"failure": "refused", "reason": (str(error) or type(error).__name__)[:_MOST_WORDS]}
    return {"texts": texts}


def give_up_rights() -> None:
    """Limits what this process can do from now on."""
    for name, limit in (("AS", MEMORY_BYTES), ("FSIZE", 0), ("CORE", 0)):
        try:
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (limit, limit))
        except (OSError, ValueError):  # an operating system that does not limit this
            pass


def limit_time(seconds: float) -> None:
    """Lets the kernel end this process after some more seconds of computing."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    soft = int(used.ru_utime + used.ru_stime + seconds) + 2
    resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))


def read_message(file: BinaryIO) -> dict[str, Any] | None:
    """The next message, or None at the end."""
    length = file.read(4)
    return json.loads(file.read(struct.unpack("<I", length)[0])) if len(length) == 4 else None


def main() -> None:
    """Answers requests until there are no more."""
    give_up_rights()
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    compiled: dict[int, jinja2.Template] = {}
    message: dict[str, Any] = {"ready": True}
    while True:
        raw = json.dumps(message).encode()
        answers.write(struct.pack("<I", len(raw)) + raw)
        answers.flush()
        request = read_message(requests)
        if request is None:
            return
        limit_time(request["seconds"])
        message = answer(request, compiled)
        message["compiled"] = request["number"] in compiled


if __name__ == "__main__":
    main()
