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

_FULL_DISK_BYTES = 4096
"""A failed write is reported as a full disk when fewer bytes than this are free."""


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`; on success flush it and rename it to `path`, otherwise remove it.

    Readers see either the old file or the new one, never a partial file. Two writers never share a temporary name.

    Raises:
        UserError: the disk is full or `path` is not writable. The old file is unchanged.
    """
    path = Path(path)
    temporary = _temporary_name(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except Exception as error:
        raise _as_user_error(error, path) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


@contextlib.contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """Yield a temporary directory that replaces `path` on success, as `atomic_path` does for a file."""
    path = Path(path)
    temporary = _temporary_name(path)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if path.exists():
            shutil.rmtree(path)
        os.replace(temporary, path)
    except Exception as error:
        raise _as_user_error(error, path) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _temporary_name(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")


def _as_user_error(error: Exception, path: Path) -> Exception:
    """Return a UserError for a full disk or a path that cannot be written; return any other error unchanged.

    torch reports a full disk as "unexpected pos" and safetensors as an error type of its own, so the free space is
    checked as well.
    """
    disk_full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    disk_full = disk_full or "No space left" in str(error)
    if disk_full or (not isinstance(error, UserError) and _free_bytes(path) < _FULL_DISK_BYTES):
        return UserError(f"{path}: the disk is full; free some space and run again, finished work is kept")
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        return UserError(f"{path}: cannot write ({error.strerror}); check the permissions")
    if isinstance(error, OSError) and error.errno in (errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG):
        return UserError(f"{path}: cannot write ({error.strerror}); choose another path")
    return error


def _free_bytes(path: Path) -> int:
    try:
        return shutil.disk_usage(path.parent).free
    except OSError:
        return _FULL_DISK_BYTES


def write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write indented JSON with sorted keys, atomically.

    Raises:
        ValueError: a number is NaN or infinite; use None.
    """
    write_text(path, json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        UserError: the file is missing or is not valid JSON; the message gives the position of the syntax error.
    """
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:  # syntax, encoding, integers of thousands of digits, deep nesting
        raise UserError(f"{path}: not valid JSON ({error}); the file may be truncated, download or create it again") from None


def file_sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file in hexadecimal digits."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
