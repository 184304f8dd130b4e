"""Atomic writes, hashes and JSON."""

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


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`; on success flush it and rename it to `path`, otherwise remove it.

    Readers see either the old file or the new one, never a partial file. Concurrent writers use different temporary names.
    Raises UserError if the disk is full or `path` is not writable; the old file is then unchanged.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if temporary.is_dir():
            if path.exists():
                shutil.rmtree(path)
        else:
            with open(temporary, "rb") as handle:
                os.fsync(handle.fileno())
        os.replace(temporary, path)
    except Exception as error:
        raise _as_user_error(error, path) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        with contextlib.suppress(OSError):
            temporary.unlink()


@contextlib.contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """Yield a temporary directory that replaces `path` on success. An old directory is removed just before that."""
    with atomic_path(path) as temporary:
        temporary.mkdir()
        yield temporary


def _as_user_error(error: Exception, path: Path) -> Exception:
    """Return a UserError for a full disk or a path that cannot be written; return any other error unchanged.

    torch and safetensors raise other errors if the disk is full, so the free space is checked as well.
    """
    number = error.errno if isinstance(error, OSError) else None
    disk_full = number in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
    if disk_full or (not isinstance(error, UserError) and _is_full(path.parent)):
        return UserError(f"{path}: the disk is full; free some space and run again (finished work is kept)")
    if number in (errno.EACCES, errno.EROFS, errno.EPERM):
        return UserError(f"{path}: cannot write ({os.strerror(number)}); check the permissions")
    if number in (errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG):
        return UserError(f"{path}: cannot write ({os.strerror(number)}); choose another path")
    return error


def _is_full(folder: Path) -> bool:
    """Return whether the disk of a folder has less than 4 KiB of free space."""
    try:
        return shutil.disk_usage(folder).free < 4096
    except OSError:
        return False


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write indented JSON with sorted keys, atomically. Raises ValueError if a number is NaN or infinite; use None."""
    write_text(path, json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Read a JSON file. Raises UserError if it is missing or not valid JSON, with the position of the syntax error."""
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
