"""XLA's compiler for a GPU that is not there: in this process, or in one for each architecture.

Mosaic GPU keeps, for as long as a process lives, the architecture that it assembled for first: a
kernel for another one would be refused, or assembled for the wrong GPU without a word. Programs
with such kernels are therefore compiled in another process, one for each compute capability. A
defect in a compiler that ends its process ends only that one.

This file is also that process's program. It then runs without the rest of the package, whose
imports it does not need: requests and answers are pickled through the standard streams.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax._src import compiler
from jax._src.interpreters import mlir
from jax._src.lib import _jax
from jax.experimental import topologies
from jaxlib.mlir import ir

_PLUGINS = ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")
# Nothing can be timed, so nothing is chosen by timing.
_OPTIONS = {"xla_gpu_autotune_level": "0"}


def has_plugin() -> bool:
    """Whether JAX's CUDA plugin is installed."""
    for name in _PLUGINS:
        try:
            if importlib.util.find_spec(name):
                return True
        except ModuleNotFoundError:  # not even the package around it
            continue
    return False


class NoPluginError(Exception):
    """JAX's CUDA plugin is not installed."""


class CompilerError(Exception):
    """A compiler refused a program or ended; the message is what it said."""


class Answer(NamedTuple):
    """What is known of a compiled program.

    Attributes:
        memory: the sizes of `jax.stages.Compiled.memory_analysis`, by name.
        text: the optimized program.
    """

    memory: dict[str, int]
    text: str


def compile_here(module: bytes, description: str, options: Mapping[str, str]) -> Answer:
    """Compiles for the GPU that a text describes.

    JAX has no public function for this: its own way from a lowered to a compiled program takes
    the devices from the arguments, which here are on the CPU.

    Args:
        module: StableHLO for one device, as MLIR bytecode.
        description: a text-format `GpuTargetConfigProto`.
        options: XLA options.

    Raises:
        NoPluginError: see there.
        CompilerError: what XLA said.
    """
    device = _device(description)
    compile_options = compiler.get_compile_options(
        num_replicas=1,
        num_partitions=1,
        device_assignment=np.zeros((1, 1), np.int32),
        env_options_overrides={**_OPTIONS, **options},
    )
    with mlir.make_ir_context():
        parsed = ir.Module.parse(module)
    try:
        executable = device.client.compile(parsed, _jax.DeviceList((device,)), compile_options)
    except jax.errors.JaxRuntimeError as error:
        raise CompilerError(str(error)) from None
    stats = executable.get_compiled_memory_stats()
    names = [name for name in dir(stats) if name.endswith("_in_bytes")]
    text = "\n\n".join(one.to_string() for one in executable.hlo_modules())
    return Answer({name: getattr(stats, name) for name in names}, text)


@functools.cache
def _device(description: str) -> jax.Device:
    """A device with a client that compiles for it and can do nothing else."""
    describe = functools.partial(
        topologies.get_topology_desc,
        platform="cuda",
        target_config=description,
        topology="1x1x1",
    )
    try:
        return describe().devices[0]
    except NotImplementedError:  # no plugin has registered itself
        _register_plugin()
    return describe().devices[0]


def _register_plugin() -> None:
    """Starts JAX's CUDA plugin, which stays away where it finds no GPU to run on."""
    for name in _PLUGINS:
        try:
            plugin = importlib.import_module(name)
        except ImportError:
            continue
        with set_environment(JAX_SKIP_CUDA_CONSTRAINTS_CHECK="1"):
            plugin.initialize()
        return
    raise NoPluginError


@contextlib.contextmanager
def set_environment(**variables: str) -> Iterator[None]:
    """Sets environment variables, also for native code, for as long as the block runs.

    >>> with set_environment(NO_SUCH_VARIABLE="1"):
    ...     os.environ["NO_SUCH_VARIABLE"]
    '1'
    >>> "NO_SUCH_VARIABLE" in os.environ
    False
    """
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def compile_apart(
    module: bytes,
    description: str,
    options: Mapping[str, str],
    *,
    architecture: str,
    environment: Mapping[str, str] | None = None,
) -> Answer:
    """`compile_here` in the process for that architecture, which is started when first needed.

    Args:
        module: as there.
        description: as there.
        options: as there.
        architecture: compute capability of the described GPU.
        environment: variables for this program's compiler.

    Raises:
        NoPluginError: see there.
        CompilerError: what XLA said, or the process's last words.
    """
    # Where Mosaic GPU finds its tools is in variables that are set when JAX imports it.
    tools = {k: v for k, v in os.environ.items() if k.startswith("MOSAIC_GPU_")}
    request = (module, description, dict(options), {**tools, **(environment or {})})
    return _process(architecture).ask(request)


class _Process:
    """A process that runs this file and answers one request after the other."""

    def __init__(self) -> None:
        self.log = tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            # -P: the names of this package's modules are not to be imported as top-level ones.
            [sys.executable, "-P", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
        )

    def ask(self, request: Any) -> Answer:
        try:
            pickle.dump(request, self.process.stdin)
            self.process.stdin.flush()
            outcome, *content = pickle.load(self.process.stdout)
        except (EOFError, BrokenPipeError):
            _process.cache_clear()
            code = self.process.wait()
            self.log.seek(0)
            words = self.log.read().decode(errors="replace")[-2000:]
            raise CompilerError(f"the compiler ended with code {code}: {words}") from None
        match outcome:
            case "compiled":
                return Answer(*content)
            case "no plugin":
                raise NoPluginError
        raise CompilerError(*content)


@functools.cache
def _process(architecture: str) -> _Process:
    return _Process()


def main() -> None:
    """Answers requests until there are no more."""
    # Native code writes to the standard output too.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    while True:
        try:
            module, description, options, environment = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            with set_environment(**environment):
                answer = "compiled", *compile_here(module, description, options)
        except NoPluginError:
            answer = ("no plugin",)
        except Exception as error:
            answer = "error", str(error)
        pickle.dump(answer, answers)
        answers.flush()


if __name__ == "__main__":
    main()
