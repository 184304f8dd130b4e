"""Arrays from NumPy files of strangers. Nothing that a file says is executed.

`np.save` of a dict writes a pickle, and a pickle is a program. Here it runs in a machine that knows no function but the few
stand-ins below, none of which is NumPy's own: they only collect what an array is made of.
"""

from __future__ import annotations

import io
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from genseg.errors import UserError

Array = NDArray[Any]


def read_array(path: Path) -> Array:
    """The one array of a .npy or .npz file.

    Raises:
        UserError: missing, no NumPy file, an array of objects, or several arrays in a .npz.
    """
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return loaded
        with loaded:
            if len(loaded.files) != 1:
                raise UserError(f"{path}: holds {len(loaded.files)} arrays ({', '.join(loaded.files)}); save one a file")
            return np.asarray(loaded[loaded.files[0]])
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError, EOFError, MemoryError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: not a NumPy array ({_line(error)}); save it as numbers, without pickle") from None


def read_dict(path: Path) -> dict[str, Array]:
    """The dict of arrays that `np.save(path, {...})` wrote; pickle protocols 0 to 5, of Python 2 and 3, NumPy 1 and 2.

    CPU tensors of torch, which IRN leaves in its dicts, are read as arrays.

    Raises:
        UserError: missing or truncated, no such dict, or the pickle asks for anything but arrays.
    """
    try:
        with open(path, "rb") as handle:
            version = np.lib.format.read_magic(handle)
            header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
            shape, _, dtype = header[version](handle)
            if dtype != np.dtype(object) or shape != ():
                raise UserError(f"{path}: an array {list(shape)} of {dtype}, expected a dict saved by np.save(path, dict)")
            found = _plain(_Unpickler(handle.read()).load())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except pickle.UnpicklingError as error:
        raise UserError(f"{path}: refused, {_line(error)}; only arrays are read, save them with np.save or np.savez") from None
    except UserError:
        raise
    except Exception as error:  # a hostile or truncated pickle may raise anything
        raise UserError(f"{path}: not a readable NumPy file ({_line(error)}); make it again") from None
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise UserError(f"{path}: holds no dict with names, expected one saved by np.save(path, dict)")
    return found


class _Unpickler(pickle._Unpickler):
    """The one in Python: the one in C allocates whatever memory a number in the file asks for."""

    def __init__(self, content: bytes) -> None:
        super().__init__(io.BytesIO(content), encoding="latin1")  # Python 2 kept the bytes of an array as str

    def find_class(self, module: str, name: str) -> _StandIn:
        maker = _KNOWN.get((module.replace("numpy._core", "numpy.core"), name))
        if maker is None:
            raise pickle.UnpicklingError(f"its pickle asks for {module}.{name}")
        return _StandIn(maker)

    def persistent_load(self, pid: object) -> object:
        raise pickle.UnpicklingError("its pickle asks for a persistent object")


class _StandIn:
    """What a pickle gets when it names a function. Immutable: a pickle can call it and nothing else."""

    __slots__ = ("_maker",)

    def __init__(self, maker: Callable[..., Any]) -> None:
        object.__setattr__(self, "_maker", maker)

    def __call__(self, *arguments: Any) -> Any:
        return self._maker(*arguments)  # type: ignore[attr-defined]

    def __setattr__(self, name: str, value: object) -> None:
        raise pickle.UnpicklingError("its pickle changes a function")

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError("its pickle changes a function")


class _Dtype:
    """`numpy.dtype(code, False, True)` and its state; `dtype` is None for Python objects."""

    __slots__ = ("dtype",)

    def __init__(self, code: str, *_: object) -> None:
        if re.fullmatch(r"O[48]?|b1|[iu][1248]|f[248]", code) is None:
            raise pickle.UnpicklingError(f"its pickle has an array of type {code!r}")
        self.dtype = None if code.startswith("O") else np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        order, subarray, names, fields = state[1:5]
        if subarray or names or fields:
            raise pickle.UnpicklingError("its pickle has an array of records")
        if self.dtype is not None and order in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(order)


class _Array:
    """An array that is being unpickled: made empty, then given its state; `value` is the array, or a list of objects."""

    __slots__ = ("value",)

    def __init__(self, *_: object) -> None:
        self.value: Any = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, data = state
        self.value = data if dtype.dtype is None and shape == () else _numbers(data, dtype, shape, "F" if fortran else "C")


def _numbers(data: bytes | str, dtype: _Dtype, shape: tuple[int, ...] = (), order: Any = "C") -> Array:
    raw = data.encode("latin1") if isinstance(data, str) else bytes(data)
    if dtype.dtype is None:
        raise pickle.UnpicklingError("its pickle has an array of objects")
    return np.frombuffer(raw, dtype.dtype).reshape(shape, order=order)


def _latin1(text: str, encoding: str) -> bytes:
    """How pickle protocols before 3 write bytes: `_codecs.encode(text, "latin1")`."""
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"its pickle encodes text as {encoding!r}")
    return text.encode("latin1")


def _storage(raw: bytes) -> Array:
    """A torch storage, which pickles as the bytes of a torch file."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates what its own files hold
        storage = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
        return torch.empty(0, dtype=torch.uint8).set_(storage.untyped()).view(storage.dtype).numpy()


def _tensor(storage: Array, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: object) -> Array:
    """`torch._utils._rebuild_tensor_v2`, with its bounds checked."""
    last = offset + sum((side - 1) * stride for side, stride in zip(shape, strides, strict=True))
    if min((offset, *shape, *strides), default=0) < 0 or last >= len(storage):
        raise pickle.UnpicklingError("its pickle has a tensor larger than its storage")
    steps = [stride * storage.itemsize for stride in strides]
    return np.lib.stride_tricks.as_strided(storage[offset:], shape, steps).copy()


_KNOWN: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("numpy.core.multiarray", "scalar"): lambda dtype, data: _numbers(data, dtype),
    ("numpy.core.numeric", "_frombuffer"): lambda data, dtype, shape, order: _numbers(data, dtype, shape, order),
    ("_codecs", "encode"): _latin1,
    ("__builtin__", "bytes"): lambda: b"",  # how the same protocols write no bytes at all
    ("collections", "OrderedDict"): lambda *_: {},
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch.storage", "_load_from_bytes"): _storage,
}


def _plain(value: Any, top: bool = True) -> Any:
    """Arrays for whatever holds numbers, and at the `top` a dict of them."""
    if isinstance(value, _Array):
        single = isinstance(value.value, list) and len(value.value) == 1
        return _plain(value.value[0] if single else value.value, top)
    if isinstance(value, dict) and top:
        return {key: _plain(item, top=False) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return value
    if isinstance(value, (list, tuple)):
        value = [item.value if isinstance(item, _Array) else item for item in value]
        if not all(isinstance(item, (int, float, np.ndarray)) for item in value):  # lists of lists: a few bytes are many
            raise pickle.UnpicklingError("its pickle holds lists of other things than numbers and arrays")
    array = np.asarray(value)
    if array.dtype.kind not in "biuf":
        raise pickle.UnpicklingError(f"its pickle holds a {type(value).__name__} where an array belongs")
    return array


def _line(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:200]
