"""Coverage-guided fuzzing of what reads model files.

    pip install atheris
    ulimit -v $((8 << 20))                                  # 8 GiB, of which JAX maps most
    python tests/fuzz/fuzz_files.py safetensors DIR tests/corpus/safetensors -max_total_time=300

The first word is the kind: safetensors, gguf or json. All that follows is for libFuzzer: DIR, where
it puts inputs that reach new code, further folders with inputs to begin with, and its options. It
ends with the input that led to anything but tensors or a `WeightsError`: another exception, more
than 5 seconds, or an allocation of more than 64 MiB. Minimise what it found, and keep what matters:

    python tests/fuzz/fuzz_files.py gguf tests/corpus/gguf DIR -merge=1 -max_len=2048
"""

import os
import pathlib
import sys
import tempfile

import atheris

sys.path[:0] = [str(pathlib.Path(__file__).parents[i]) for i in (1, 2)]
os.environ.setdefault("JAX_PLATFORMS", "cpu")

_INSTRUMENTED = [
    "qlora_jax.data.gguf_tokenizer",
    "qlora_jax.guarded_files",
    "qlora_jax.models.config",
    "qlora_jax.models.families",
    "qlora_jax.weights.files",
    "qlora_jax.weights.gguf",
    "qlora_jax.weights.gguf_header",
    "qlora_jax.weights.safetensors_header",
]
with atheris.instrument_imports(include=_INSTRUMENTED):
    from hostile_files import SUFFIXES, open_file


def main() -> None:
    """Fuzzes until libFuzzer's own options say that it is enough."""
    kind = sys.argv.pop(1)
    # In memory where there is such a disk: every input is written to a file.
    shared = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(dir=shared) as folder:
        path = pathlib.Path(folder) / f"model{SUFFIXES[kind]}"

        def test_one_input(data: bytes) -> None:
            path.write_bytes(data)
            open_file(path)

        limits = ["-timeout=5", "-malloc_limit_mb=64", "-rss_limit_mb=2048", "-max_len=4096"]
        atheris.Setup([sys.argv[0], *limits, *sys.argv[1:]], test_one_input)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
