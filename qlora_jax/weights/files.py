"""Reading bytes from model files, and saying why a file cannot be read.

Tensors are read with `seek` and `readinto` into an array of their own, not through `mmap`: pages of
a mapped file count as resident memory of the process until the kernel takes them back, so loading
a model through a map looks (and under a container's limit behaves) as if the whole file were held.
"""

import os
import pathlib
from typing import BinaryIO

import numpy as np

from qlora_jax.errors import WeightsError

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_ZIP_MAGIC = b"PK\x03\x04"
_GIT_LFS_MAGIC = b"version https://git-lfs"

_INSTEAD = (
    "Pickle files can run any code when they are opened, so they are refused. Use the model's "
    "safetensors or GGUF files; or, where you trust the file, convert it in an environment with "
    "torch: `safetensors.torch.save_file(torch.load(FILE, weights_only=True), "
    "'model.safetensors')`."
)


def refuse_pickle(path: pathlib.Path) -> None:
    """Refuses a pickle by its name, or by its first bytes whatever its name.

    Args:
      path: a file that exists.

    Raises:
      WeightsError: the file is a pickle, or a zip archive as `torch.save` writes it.

    Example:
      >>> refuse_pickle(pathlib.Path("model.safetensors.index.json"))  # judged by its name
      >>> refuse_pickle(pathlib.Path("pytorch_model.bin"))
      Traceback (most recent call last):
      ...
      qlora_jax.errors.WeightsError: pytorch_model.bin is a pickle file (by its suffix .bin)...
    """
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise WeightsError(f"{path} is a pickle file (by its suffix {path.suffix}). {_INSTEAD}")
    if not path.is_file():
        return
    with open(path, "rb") as file:
        head = file.read(16)
    if head.startswith(_ZIP_MAGIC):
        raise WeightsError(f"{path} is a zip archive, as torch.save writes it. {_INSTEAD}")
    # A safetensors header length may begin with the same two bytes; its JSON then follows at 8.
    if len(head) > 2 and head[0] == 0x80 and 2 <= head[1] <= 5 and head[8:9] != b"{":
        raise WeightsError(f"{path} is a pickle file (by its first bytes). {_INSTEAD}")


def explain_bytes(path: pathlib.Path, expected: str) -> str:
    """Says what a file that is not `expected` looks like instead.

    Args:
      path: a file that exists.
      expected: the kind of file that was wanted, such as "a safetensors file".

    Returns:
      One sentence or two for an error message.

    Example:
      >>> import tempfile
      >>> with tempfile.NamedTemporaryFile() as file:
      ...     explain_bytes(pathlib.Path(file.name), "a GGUF file").replace(file.name, "x.gguf")
      'x.gguf is empty, not a GGUF file. Download it again.'
    """
    with open(path, "rb") as file:
        head = file.read(32)
    if not head:
        return f"{path} is empty, not {expected}. Download it again."
    if head.startswith(_GIT_LFS_MAGIC):
        return f"{path} is a Git LFS pointer, not {expected}. Run `git lfs pull` in its folder."
    return (
        f"{path} is not {expected}, or it is damaged (first bytes {head[:8]!r}). Download it again."
    )


def read_array(file: BinaryIO, offset: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Reads one little-endian array into memory of its own.

    Args:
      file: opened for reading in binary mode, unbuffered for large arrays.
      offset: bytes from the start of the file.
      shape: of the array.
      dtype: of the array, also one of `ml_dtypes`.

    Returns:
      A new array; its data is aligned to 64 bytes, so that JAX can take it without a copy.

    Raises:
      WeightsError: the file ends before the array does.

    Example:
      >>> import io
      >>> read_array(io.BytesIO(bytes(range(8))), 2, (2, 3), np.dtype(np.uint8))
      array([[2, 3, 4],
             [5, 6, 7]], dtype=uint8)
    """
    array = empty_aligned(shape, dtype)
    view = memoryview(array.reshape(-1).view(np.uint8))
    file.seek(offset)
    done = 0
    while done < len(view):
        # One read(2) returns at most 2 GiB.
        count = file.readinto(view[done : done + (1 << 30)])
        if not count:
            name = getattr(file, "name", "the file")
            raise WeightsError(
                f"{name} ends at byte {offset + done}, in the middle of a tensor that reaches to "
                f"byte {offset + len(view)}. Download it again."
            )
        done += count
    return array


def empty_aligned(shape: tuple[int, ...], dtype: np.dtype, alignment: int = 64) -> np.ndarray:
    """Makes an uninitialised array whose data starts at a multiple of `alignment` bytes.

    Args:
      shape: of the array.
      dtype: of the array.
      alignment: in bytes, a power of two.

    Returns:
      An array in row-major order.

    Example:
      >>> empty_aligned((3, 5), np.dtype(np.float32)).ctypes.data % 64
      0
    """
    nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    buffer = np.empty(nbytes + alignment, np.uint8)
    start = -buffer.ctypes.data % alignment
    return buffer[start : start + nbytes].view(dtype).reshape(shape)


def file_size(path: pathlib.Path) -> int:
    """Returns the size of a file in bytes.

    Example:
      >>> file_size(pathlib.Path("/dev/null"))
      0
    """
    return os.stat(path).st_size
