"""The flags that all scripts share, and how a script ends.

A script declares its flags, and hands its `main` to `run`:

    from absl import flags
    from qlora_jax import command_line

    _CONFIG = command_line.define_config()
    _WORKDIR = flags.DEFINE_string("workdir", None, "where the run is written")

    def main():
        training.train(_CONFIG.value, _WORKDIR.value)

    if __name__ == "__main__":
        command_line.run(main)

`--config=file.py`, `--config=file.py:argument` and `--config=run/config.json` all work, and so does
`--config.lora.rank=32` after them. This is absl with `ml_collections.config_flags`; what is added
is that JSON is read too, and that a mistake is answered with the nearest name and exit code 2.
"""

import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from absl import app, flags
from ml_collections import config_flags

from qlora_jax import config as config_lib
from qlora_jax import config_rules, errors

# --help lists a flag under the module that defines it: let that be the script that calls.
flags.disclaim_key_flags()

_CONFIG_FLAG = "config"
_EXAMPLE = "configs/smollm2_135m.py"
_HELP = (
    "a recipe (.py, with an argument for get_config() after a colon) or the config.json of a run; "
    "any field of qlora_jax/config.py can be set after it, as in --config.lora.rank=32"
)


class _ConfigParser(flags.ArgumentParser):
    """Reads recipes and JSON alike, where config_flags' own parser reads only Python."""

    def parse(self, argument: str):
        return config_lib.load_config(argument)

    def flag_type(self) -> str:
        return "config file"


def define_config(
    *, required: bool = True, flag_values: flags.FlagValues = flags.FLAGS
) -> flags.FlagHolder:
    """Defines the flag `--config` and, with it, one flag for each field of the configuration.

    Args:
        required: whether a script cannot do without it; if not, the value is None when not given.
        flag_values: where to define it.

    Returns:
        A holder whose `.value` is the `ConfigDict` once the flags are parsed, validated by `parse`.

    Example:
        >>> values = flags.FlagValues()
        >>> define_config(required=False, flag_values=values).name
        'config'
    """
    holder = config_flags.DEFINE_config_file(_CONFIG_FLAG, None, _HELP, flag_values=flag_values)
    flag_values[_CONFIG_FLAG].parser = _ConfigParser()
    if required:
        flags.mark_flag_as_required(_CONFIG_FLAG, flag_values)
    return holder


def parse(argv: Sequence[str], flag_values: flags.FlagValues = flags.FLAGS) -> None:
    """Parses a command line into `flag_values`, and validates the configuration if there is one.

    Args:
        argv: the program's name and its arguments.
        flag_values: the flags that are defined.

    Raises:
        ConfigError: a flag or field is unknown, has a value it cannot have, or is missing.

    Example:
        >>> values = flags.FlagValues()
        >>> _ = flags.DEFINE_string("workdir", None, "", flag_values=values)
        >>> parse(["train.py", "--wrkdir=x"], values)
        Traceback (most recent call last):
        qlora_jax.errors.ConfigError: there is no flag --wrkdir; did you mean --workdir?
    """
    _refuse_unknown_fields(argv, flag_values)
    try:
        rest = flag_values(list(argv))
    except flags.UnrecognizedFlagError as error:
        raise errors.ConfigError(_unknown_flag(error.flagname, flag_values)) from None
    except flags.Error as error:
        raise errors.ConfigError(_rejected_value(str(error))) from None
    if len(rest) > 1:
        raise errors.ConfigError(
            f"cannot use {rest[1]!r}: everything is given as --name=value, "
            f"for example --{_CONFIG_FLAG}={_EXAMPLE}"
        )
    if _CONFIG_FLAG in flag_values and flag_values[_CONFIG_FLAG].value is not None:
        config_lib.validate(flag_values[_CONFIG_FLAG].value)


def run(main: Callable[[], Any]) -> NoReturn:
    """Parses the command line, runs `main`, and ends the process with its exit code.

    Args:
        main: a function without arguments that reads its flags.

    Raises:
        SystemExit: always; code 2 after a user's mistake.
    """
    app.define_help_flags()

    def parse_and_run() -> Any:
        parse(sys.argv)
        return main()

    errors.run_main(parse_and_run)


def _refuse_unknown_fields(argv: Sequence[str], flag_values: flags.FlagValues) -> None:
    """Looks at the names before config_flags does, which would raise a bare KeyError."""
    if _CONFIG_FLAG not in flag_values:
        return
    known = config_lib.field_names()
    given = [re.match(rf"--?(?:no)?{_CONFIG_FLAG}\.([^=]*)", argument) for argument in argv[1:]]
    unknown = [match[1] for match in given if match and match[1] not in known]
    config_rules.raise_if_any(
        "the command line", [config_rules.unknown_field(name, known) for name in unknown]
    )
    given_config = any(re.match(rf"--?{_CONFIG_FLAG}(=|$)", argument) for argument in argv[1:])
    if any(given) and not given_config:
        raise errors.ConfigError(
            "--config.… changes a field of a configuration, but --config=file.py is not given"
        )


def _unknown_flag(name: str, flag_values: flags.FlagValues) -> str:
    known = list(flag_values)
    if _CONFIG_FLAG in flag_values:
        known += [f"{_CONFIG_FLAG}.{field}" for field in config_lib.field_names()]
    match = errors.nearest(name, known)
    hint = f"did you mean --{match}?" if match else "--help lists them"
    return f"there is no flag --{name}; {hint}"


def _rejected_value(message: str) -> str:
    """Says what a field needs, instead of how Python failed to convert a text to it."""
    field = re.match(rf"flag --{_CONFIG_FLAG}\.([\w.]+)=(.*?): ", message, flags=re.DOTALL)
    if required := re.search(r"Flag (--\S+) must have a value other than None", message):
        example = f"--{_CONFIG_FLAG}={_EXAMPLE}"
        hint = f"for example {example}" if required[1] in example else "--help says what it is"
        return f"{required[1]} is needed; {hint}"
    if not field:
        return message
    base = config_rules.flatten(config_lib.get_config())
    needs = config_rules.TYPE_NAMES[type(base[field[1]])]
    return f"--{_CONFIG_FLAG}.{field[1]}: got {field[2]!r}, needs to be {needs}"
