"""Download of missing published files: resuming, checksums, unpacking and file counts.

`data/sources.csv` has one row per file, with the columns `name`; `url`; `bytes` and `sha256`, empty if they are not published;
`unpacks_to`, the paths that the file provides (separated by `;`, with names of params in braces); and `entries`, the number
of files below each of these paths. Existing paths are never downloaded, so every source can be a local copy.
"""

import csv
import errno
import http.client
import shutil
import sys
import time
import urllib.error
import urllib.request
import zipfile
from dataclasses import dataclass
from pathlib import Path

from genseg.artifacts.files import atomic_directory, atomic_path, file_sha256, read_json, write_text
from genseg.data import PROGRESS_SECONDS
from genseg.errors import UserError
from genseg.params.data import Png

SOURCES = Path("data/sources.csv")
DOWNLOADS = Path("work/downloads")
MAX_FAILURES = 5
"""A download fails after this many consecutive connections without any data."""


@dataclass(frozen=True)
class Remote:
    """One row of `sources.csv`."""

    name: str
    url: str
    bytes: int | None
    sha256: str | None
    targets: list[Path]
    entries: list[int | None]


def fetch_png(png: Png, sources: Path = SOURCES, downloads: Path = DOWNLOADS) -> None:
    """Download and unpack the files of `sources` whose targets are missing.

    Raises UserError if a host does not respond, a file differs from the published size or checksum, or the disk is full.
    """
    folders = {"images": png.images, "annotations": png.annotations, "narratives": png.narratives}
    for remote in read_sources(sources, folders):
        if all(target.exists() for target in remote.targets):
            continue
        file = downloads / remote.name
        try:
            if file.exists():
                _verify(remote, file)
            else:
                fetch(remote, file)
            install(remote, file)
        except OSError as error:
            problem = f"{error.strerror}; check the permissions and run again"
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                problem = "the disk is full; free some space and run again to resume"
            raise UserError(f"{error.filename or file}: {problem}") from None


def read_sources(path: Path, folders: dict[str, str]) -> list[Remote]:
    """Read a list of downloads (`sources.csv`). Raises UserError if it is missing or a line is malformed.

    `folders` are the paths that replace `{images}`, `{annotations}` and `{narratives}`.
    """
    try:
        with path.open(newline="", encoding="utf-8") as handle:
            rows = list(csv.DictReader(handle))
    except OSError as error:
        raise UserError(f"{path}: cannot read the list of downloads ({error.strerror})") from None
    remotes = []
    for number, row in enumerate(rows, 2):
        try:
            targets = [Path(item.format(**folders)) for item in row["unpacks_to"].split(";")]
            entries = [int(item) if item else None for item in row["entries"].split(";")]
            size = int(row["bytes"]) if row["bytes"] else None
            if len(targets) != len(entries):
                raise ValueError("unpacks_to and entries differ in length")
            remotes.append(Remote(row["name"], row["url"], size, row["sha256"].lower() or None, targets, entries))
        except (KeyError, ValueError, AttributeError) as error:
            raise UserError(f"{path}: line {number}: {error!r}; expected name,url,bytes,sha256,unpacks_to,entries") from None
    return remotes


def fetch(remote: Remote, file: Path) -> None:
    """Download to `file`. An interrupted download is resumed from `<file>.part`.

    The checksum is compared with the published one. Without a published checksum, the computed one is printed, written to
    `<file>.sha256`, and reported as not verified. Raises UserError as `fetch_png` does; the data stay in `<file>.part`, or in
    `<file>.bad` if the size or the checksum is wrong, or a JSON file without checksum is not valid.
    """
    part = file.with_name(file.name + ".part")
    file.parent.mkdir(parents=True, exist_ok=True)
    failures = 0
    while True:
        size_before = _size(part)
        try:
            if _receive(remote, part):
                break
            problem = "the connection was interrupted"
        except urllib.error.HTTPError as error:
            problem = f"the host responded {error.code} {error.reason}"
            if error.code < 500 and error.code != 429:  # these are not temporary
                raise _download_error(remote, part, problem) from None
        except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
            problem = str(getattr(error, "reason", error)) or type(error).__name__
        failures = 0 if _size(part) > size_before else failures + 1
        if failures >= MAX_FAILURES:
            raise _download_error(remote, part, problem)
        print(f"data: {remote.name}: {problem} at {_size(part):,} bytes, resuming", file=sys.stderr, flush=True)
        time.sleep(0.2 * 2**failures)
    _verify(remote, part)
    part.rename(file)


def _size(path: Path) -> int:
    """Return the size of a file in bytes, 0 if it does not exist."""
    return path.stat().st_size if path.exists() else 0


def _download_error(remote: Remote, part: Path, problem: str) -> UserError:
    targets = ", ".join(map(str, remote.targets))
    remedy = f"{_size(part):,} bytes are kept in {part}; run again to resume" if part.exists() else "run again later"
    return UserError(f"{remote.url}: {problem}; {remedy}, or copy the data to {targets} (paths set below data.png)")


def _receive(remote: Remote, part: Path) -> bool:
    """Download the bytes that `part` lacks, append them, and return whether the file is complete."""
    # 1. Request the remaining bytes.
    offset = _size(part)
    if remote.bytes is not None and offset == remote.bytes:
        return True
    request = urllib.request.Request(remote.url, headers={"Range": f"bytes={offset}-"} if offset else {})
    try:
        response = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        total_bytes = error.headers.get("Content-Range", "").rpartition("/")[2]
        if error.code == 416 and total_bytes == str(offset):
            return True
        if error.code == 416:  # the part is longer than the file, so it is from another version
            part.unlink()
            return False
        raise

    # 2. Write them. A host that does not support range requests sends the whole file. The published size is trusted more than
    # the host's, which ends too early if a proxy has stored a part of the file.
    with response:
        done = offset if response.status == 206 else 0
        if done and not response.headers.get("Content-Range", "").startswith(f"bytes {done}-"):
            raise http.client.HTTPException("the host sent another range of bytes than requested")
        length = response.headers.get("Content-Length")
        total = remote.bytes or (done + int(length) if length else None)
        last_time = time.monotonic()
        with open(part, "ab" if done else "wb") as handle:
            while chunk := response.read(1 << 20):
                handle.write(chunk)
                done += len(chunk)
                if time.monotonic() - last_time >= PROGRESS_SECONDS:
                    progress = f"{done / 1e6:,.0f}" + (f" of {total / 1e6:,.0f}" if total else "")
                    print(f"data: {remote.name}: {progress} MB", file=sys.stderr, flush=True)
                    last_time = time.monotonic()
    return total is None or done >= total  # a file that is too long is not resumed but rejected


def _verify(remote: Remote, path: Path) -> None:
    """Compare a downloaded file with the published size and checksum; rename it to `<name>.bad` if they differ.

    Without a published checksum, a JSON file must at least be complete: a truncated one would not be downloaded again.
    """
    sha256, problem = file_sha256(path), None
    if remote.bytes is not None and _size(path) != remote.bytes:
        problem = f"expected {remote.bytes:,} bytes, got {_size(path):,}"
    elif remote.sha256 is not None and sha256 != remote.sha256:
        problem = f"expected sha256 {remote.sha256}, got {sha256}"
    elif remote.sha256 is None and remote.name.endswith(".json"):
        try:
            read_json(path)
        except UserError:
            problem = "not valid JSON"
    if problem is not None:
        bad_path = path.with_name(remote.name + ".bad")
        path.replace(bad_path)
        raise UserError(f"{bad_path}: downloaded from {remote.url}: {problem}; run again to download it again")
    if remote.sha256 is None:
        write_text(_checksum_path(path.with_name(remote.name)), f"{sha256}  {remote.name}\n")
        message = f"sha256 {sha256}, NOT VERIFIED (no published checksum); written to {remote.name}.sha256"
        print(f"data: {remote.name}: {message}", file=sys.stderr, flush=True)


def _checksum_path(file: Path) -> Path:
    return file.with_name(file.name + ".sha256")


def install(remote: Remote, file: Path) -> None:
    """Move the file, or the contents of the archive, to its targets; each target appears complete or not at all.

    Raises UserError if the archive is corrupt or lacks a target, or a target differs from the published number of files.
    """
    # 1. Move a file that is not an archive.
    if not zipfile.is_zipfile(file):
        if file.suffix == ".zip":
            raise UserError(f"{file}: not a complete zip archive; remove it and run again")
        with atomic_path(remote.targets[0]) as temporary:  # on another disk, moving is copying
            shutil.move(file, temporary)
        if _checksum_path(file).exists():
            shutil.move(_checksum_path(file), _checksum_path(remote.targets[0]))
        return

    # 2. Unpack an archive, check its contents and move them.
    print(f"data: unpacking {file}", file=sys.stderr, flush=True)
    unpacked = remote.targets[0].parent / f".{remote.name}.unpacked"
    shutil.rmtree(unpacked, ignore_errors=True)  # left by an interrupted run
    try:
        with atomic_directory(unpacked) as temporary:
            _unpack(file, temporary)
        for target, entries in zip(remote.targets, remote.entries, strict=True):
            candidates = sorted(unpacked.rglob(target.name), key=lambda item: len(item.parts))
            if not candidates:
                raise UserError(f"{file}: not the published archive, {target.name} is missing; remove it and run again")
            content = candidates[0]
            count = sum(1 for item in content.rglob("[!.]*") if item.is_file()) if content.is_dir() else 1
            if entries is not None and count != entries:
                raise UserError(f"{file}: expected {entries:,} files in {target.name}, got {count:,}; fetch the archive again")
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.move(content, target)
    finally:
        shutil.rmtree(unpacked, ignore_errors=True)
    print(f"data: {file} is unpacked and can be removed", file=sys.stderr, flush=True)


def _unpack(file: Path, folder: Path) -> None:
    """Unpack an archive and the archives inside it, except for the metadata files of macOS.

    zipfile reads the whole central directory. Tools that rely on the 16-bit file count lose files of COCO's archive.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            names = [item for item in archive.namelist() if not item.startswith("__MACOSX/") and not item.endswith("/")]
            for name in names:
                inner = Path(archive.extract(name, folder))
                if inner.suffix == ".zip":
                    _unpack(inner, inner.parent)
                    inner.unlink()
    except (zipfile.BadZipFile, EOFError, NotImplementedError) as error:
        raise UserError(f"{file}: corrupt archive ({error}); remove it and run again") from None
