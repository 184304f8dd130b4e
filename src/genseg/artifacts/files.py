"""Atomic writes, hashes and canonical JSON."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from genseg.errors import UserError

_FULL = 4096
"""Free bytes under which a write that failed is taken to have failed for want of space."""


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Give a temporary name beside `path`; on success flush it to disk and rename it to `path`, else remove it.

    A reader sees the old file or the new one, never a part; two writers never share a temporary name.

    Raises:
        UserError: the disk is full or not writable. The old file is untouched.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except Exception as error:
        raise _plain(error, path) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


@contextlib.contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """Like `atomic_path` for a whole directory: written beside `path`, swapped in when complete."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if path.exists():
            shutil.rmtree(path)
        os.replace(temporary, path)
    except Exception as error:
        raise _plain(error, path) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _plain(error: Exception, path: Path) -> Exception:
    """A full disk or missing permission as a UserError, whatever a library made of it; any other error as it is.

    torch says "unexpected pos" and safetensors its own kind, so the disk itself is asked, too.
    """
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    full = full or "No space left" in str(error) or (not isinstance(error, UserError) and _free_bytes(path) < _FULL)
    if full:
        return UserError(f"{path}: the disk is full; free some space and run again, finished work is kept")
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        return UserError(f"{path}: cannot write ({error.strerror}); check the permissions")
    if isinstance(error, OSError) and error.errno in (errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG):
        return UserError(f"{path}: cannot write ({error.strerror}); give another path")
    return error


def _free_bytes(path: Path) -> int:
    try:
        return shutil.disk_usage(path.parent).free
    except OSError:
        return _FULL


def write_text(path: str | Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write sorted, indented JSON (NaN is refused: use null)."""
    write_text(path, json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Read JSON; raises UserError naming the file and, for bad syntax, the place."""
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:  # bad syntax or encoding, numbers of thousands of digits, endless brackets
        raise UserError(f"{path}: not valid JSON ({error}); the file may be truncated, fetch or make it again") from None


def file_sha256(path: str | Path) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
