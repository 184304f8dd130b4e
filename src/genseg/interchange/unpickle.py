"""Arrays from untrusted NumPy files. No code in a file is executed.

`np.save` of a dict writes a pickle, and a pickle can call any function. The unpickler below can call only a few stand-ins for
functions of NumPy and torch, which collect the parts of arrays.
"""

import io
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from genseg.errors import UserError

Array = NDArray[Any]


def read_array(path: Path) -> Array:
    """Return the only array of a .npy or .npz file. Raises UserError if it has none, several, or an array of objects."""
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return loaded
        with loaded:
            if len(loaded.files) != 1:
                raise UserError(f"{path}: expected one array, got {', '.join(loaded.files) or 'none'}; save one per file")
            return np.asarray(loaded[loaded.files[0]])
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError, EOFError, MemoryError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: not a NumPy array ({_one_line(error)}); save it as numbers, without pickle") from None


def read_dict(path: Path) -> dict[str, Array]:
    """Return the dict of arrays that `np.save(path, {...})` wrote.

    Reads pickle protocols 0 to 5, written by Python 2 and 3 and NumPy 1 and 2. CPU tensors of torch, which occur in the dicts
    of IRN, are returned as arrays.

    Raises UserError if the file is missing, truncated or not such a dict, or the pickle contains anything but arrays.
    """
    try:
        with open(path, "rb") as handle:
            version = np.lib.format.read_magic(handle)
            header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
            shape, _, dtype = header[version](handle)
            if dtype != np.dtype(object) or shape != ():
                raise UserError(f"{path}: expected a dict saved by np.save(path, dict), got an array {list(shape)} of {dtype}")
            pickled = io.BytesIO(handle.read())
        content = _to_arrays(_Unpickler(pickled, encoding="latin1").load())  # Python 2 stored the bytes of an array as str
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except pickle.UnpicklingError as error:
        raise UserError(f"{path}: refused, {_one_line(error)}; save only arrays, with np.save or np.savez") from None
    except UserError:
        raise
    except Exception as error:  # a hostile or truncated pickle may raise anything
        raise UserError(f"{path}: not a readable NumPy file ({_one_line(error)}); make it again") from None
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UserError(f"{path}: expected a dict with string keys, saved by np.save(path, dict)")
    return content


class _Unpickler(pickle._Unpickler):
    """Based on the pure-Python unpickler; the C one allocates as much memory as a number in the file requests."""

    def find_class(self, module: str, name: str) -> "_StandIn":
        function = _KNOWN.get((module.replace("numpy._core", "numpy.core"), name))
        if function is None:
            raise pickle.UnpicklingError(f"the pickle requests {module}.{name}")
        return _StandIn(function)

    def persistent_load(self, pid: object) -> object:
        raise pickle.UnpicklingError("the pickle requests a persistent object")


@dataclass(frozen=True)
class _StandIn:
    """The stand-in for a function that a pickle names. A pickle can only call it."""

    function: Callable[..., Any]

    def __call__(self, *arguments: Any) -> Any:
        return self.function(*arguments)

    def __setstate__(self, state: object) -> None:  # the only way in which a pickle can set attributes
        raise pickle.UnpicklingError("the pickle modifies a function")


class _Dtype:
    """Stand-in for `numpy.dtype(code, False, True)`; `dtype` is None for Python objects."""

    def __init__(self, code: str, *_: object) -> None:
        if re.fullmatch(r"O[48]?|b1|[iu][1248]|f[248]", code) is None:
            raise pickle.UnpicklingError(f"the pickle has an array of type {code!r}")
        self.dtype = None if code.startswith("O") else np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        order, subarray, names, fields = state[1:5]
        if subarray or names or fields:
            raise pickle.UnpicklingError("the pickle has an array of records")
        if self.dtype is not None and order in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(order)


class _Array:
    """Stand-in for an array, created empty and then given its state; `value` is the array, or a list of objects."""

    def __init__(self, *_: object) -> None:
        self.value: Any = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, data = state
        self.value = data if dtype.dtype is None and shape == () else _numbers(data, dtype, shape, "F" if fortran else "C")


def _numbers(data: bytes | str, dtype: _Dtype, shape: tuple[int, ...] = (), order: Any = "C") -> Array:
    raw = data.encode("latin1") if isinstance(data, str) else bytes(data)
    if dtype.dtype is None:
        raise pickle.UnpicklingError("the pickle has an array of objects")
    return np.frombuffer(raw, dtype.dtype).reshape(shape, order=order)


def _latin1(text: str, encoding: str) -> bytes:
    """Stand-in for `_codecs.encode(text, "latin1")`, which is how pickle protocols before 3 write bytes."""
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"the pickle encodes text as {encoding!r}")
    return text.encode("latin1")


def _storage(raw: bytes) -> Array:
    """Return the numbers of a torch storage, which is pickled as the bytes of a torch file."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about classes in its own files
        storage = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
        return torch.empty(0, dtype=torch.uint8).set_(storage.untyped()).view(storage.dtype).numpy()


def _tensor(storage: Array, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: object) -> Array:
    """Stand-in for `torch._utils._rebuild_tensor_v2` that checks bounds."""
    last = offset + sum((side - 1) * stride for side, stride in zip(shape, strides, strict=True))
    if min((offset, *shape, *strides), default=0) < 0 or last >= len(storage):
        raise pickle.UnpicklingError("the pickle has a tensor larger than its storage")
    steps = [stride * storage.itemsize for stride in strides]
    return np.lib.stride_tricks.as_strided(storage[offset:], shape, steps).copy()


_KNOWN: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("numpy.core.multiarray", "scalar"): lambda dtype, data: _numbers(data, dtype),
    ("numpy.core.numeric", "_frombuffer"): lambda data, dtype, shape, order: _numbers(data, dtype, shape, order),
    ("_codecs", "encode"): _latin1,
    ("__builtin__", "bytes"): lambda: b"",  # empty bytes in protocols before 3
    ("collections", "OrderedDict"): lambda *_: {},
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch.storage", "_load_from_bytes"): _storage,
}


def _to_arrays(value: Any, top: bool = True) -> Any:
    """Convert an unpickled object to an array, or at the `top` a dict to a dict of arrays."""
    if isinstance(value, _Array):
        single = isinstance(value.value, list) and len(value.value) == 1
        return _to_arrays(value.value[0] if single else value.value, top)
    if isinstance(value, dict) and top:
        return {key: _to_arrays(item, top=False) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return value
    if isinstance(value, (list, tuple)):
        value = [item.value if isinstance(item, _Array) else item for item in value]
        if not all(isinstance(item, (int, float, np.ndarray)) for item in value):  # a few bytes can describe huge nested lists
            raise pickle.UnpicklingError("the pickle has lists of objects other than numbers and arrays")
    array = np.asarray(value)
    if array.dtype.kind not in "biuf":
        raise pickle.UnpicklingError(f"the pickle has a {type(value).__name__} instead of an array")
    return array


def _one_line(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:200]
