"""Fetches the published files that are missing: resumed, checksummed, unpacked with a count check.

`data/sources.csv` has one row a file: `name`; `url`; `bytes` and `sha256`, empty where nobody published them; `unpacks_to`,
the paths (`;` between them) that the file provides, with the params' folders in braces; `entries`, how many files each of
these paths holds. A path that exists is never fetched: so every source can be a local copy.
"""

from __future__ import annotations

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

from genseg.artifacts.files import atomic_directory, file_sha256, write_text
from genseg.errors import UserError
from genseg.params import Png

SOURCES = Path("data/sources.csv")
DOWNLOADS = Path("work/downloads")
ATTEMPTS = 5
"""Connections in a row that bring no byte before the download gives up."""
_CHUNK = 1 << 20
_TIMEOUT = 60.0
_REPORT_SECONDS = 10.0


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
    """Fetch and unpack what `sources` names and is not yet at its place.

    Raises:
        UserError: a host does not answer, a file has another size or checksum than published, the disk is full.
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
            place(remote, file)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise UserError(
                    f"{error.filename or file}: the disk is full; free some space and run again, it resumes"
                ) from None
            raise UserError(f"{error.filename or file}: {error.strerror}; check the permissions and run again") from None


def read_sources(path: Path, folders: dict[str, str]) -> list[Remote]:
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
    """Download to `file`; an interrupted download continues from `<file>.part`.

    The checksum is compared with the published one. Where none is known the computed one is printed and kept in
    `<file>.sha256`, and the file is called unverified.

    Raises:
        UserError: as `fetch_png`. What was fetched stays in `<file>.part` (or `<file>.bad`, if it cannot be the file).
    """
    part = file.with_name(file.name + ".part")
    file.parent.mkdir(parents=True, exist_ok=True)
    failures = 0
    while True:
        before = _size(part)
        try:
            if _receive(remote, part):
                break
            trouble = "the connection was cut"
        except urllib.error.HTTPError as error:
            raise _gave_up(remote, part, f"the host answers {error.code} {error.reason}") from None
        except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
            trouble = str(getattr(error, "reason", error)) or type(error).__name__
        failures = 0 if _size(part) > before else failures + 1
        if failures >= ATTEMPTS:
            raise _gave_up(remote, part, trouble)
        print(f"data: {remote.name}: {trouble} at {_size(part):,} bytes, resuming", file=sys.stderr, flush=True)
        time.sleep(0.2 * 2**failures)
    _verify(remote, part)
    part.rename(file)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _gave_up(remote: Remote, part: Path, trouble: str) -> UserError:
    targets = ", ".join(map(str, remote.targets))
    kept = f"{_size(part):,} bytes are kept in {part}; run again to resume, or" if part.exists() else "run again later, or"
    return UserError(f"{remote.url}: {trouble}; {kept} put your own copy at {targets} (the paths are params below data.png)")


def _receive(remote: Remote, part: Path) -> bool:
    """Append what the host sends from the end of `part` on; whether the file is now complete."""
    have = _size(part)
    if remote.bytes is not None and have == remote.bytes:
        return True
    request = urllib.request.Request(remote.url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        whole = error.headers.get("Content-Range", "").rpartition("/")[2]
        if error.code == 416 and whole == str(have):
            return True
        if error.code == 416:  # the part is longer than the file: it belongs to another version
            part.unlink()
            return False
        raise
    with response:
        resumed = response.status == 206
        start = have if resumed else 0
        length = response.headers.get("Content-Length")
        total = start + int(length) if length else None
        done, last = start, time.monotonic()
        with open(part, "ab" if resumed else "wb") as handle:
            while block := response.read(_CHUNK):
                handle.write(block)
                done += len(block)
                if time.monotonic() - last >= _REPORT_SECONDS:
                    of = f" of {total / 1e6:,.0f}" if total else ""
                    print(f"data: {remote.name}: {done / 1e6:,.0f}{of} MB", file=sys.stderr, flush=True)
                    last = time.monotonic()
    return total is None or done == total


def _verify(remote: Remote, path: Path) -> None:
    """Compare a fetched file with what is published of it; a file that differs is set aside as `<name>.bad`."""
    found = file_sha256(path)
    trouble = None
    if remote.bytes is not None and _size(path) != remote.bytes:
        trouble = f"{_size(path):,} bytes, published are {remote.bytes:,}"
    elif remote.sha256 is not None and found != remote.sha256:
        trouble = f"sha256 {found}, published is {remote.sha256}"
    if trouble is not None:
        bad = path.with_name(remote.name + ".bad")
        path.replace(bad)
        raise UserError(f"{bad}: fetched from {remote.url} but it has {trouble}; look at it, remove it and run again")
    if remote.sha256 is None:
        write_text(_record(path.with_name(remote.name)), f"{found}  {remote.name}\n")
        message = f"data: {remote.name}: sha256 {found}, NOT VERIFIED, no checksum is known; kept in {remote.name}.sha256"
        print(message, file=sys.stderr, flush=True)


def _record(file: Path) -> Path:
    return file.with_name(file.name + ".sha256")


def place(remote: Remote, file: Path) -> None:
    """Put the file, or what it unpacks to, at its targets; each target appears complete or not at all."""
    if not zipfile.is_zipfile(file):
        if file.suffix == ".zip":
            raise UserError(f"{file}: not a whole zip archive; remove it and run again")
        remote.targets[0].parent.mkdir(parents=True, exist_ok=True)
        shutil.move(file, remote.targets[0])
        if _record(file).exists():
            shutil.move(_record(file), _record(remote.targets[0]))
        return
    print(f"data: unpacking {file}", file=sys.stderr, flush=True)
    holder = remote.targets[0].parent / f".{remote.name}.unpacked"
    shutil.rmtree(holder, ignore_errors=True)  # of an earlier run that was killed
    try:
        with atomic_directory(holder) as temporary:
            _unpack(file, temporary)
        for target, entries in zip(remote.targets, remote.entries, strict=True):
            found = sorted(holder.rglob(target.name), key=lambda item: len(item.parts))
            if not found:
                raise UserError(f"{file}: holds no {target.name}, so it is not the published archive; remove it and run again")
            count = sum(1 for item in found[0].rglob("[!.]*") if item.is_file()) if found[0].is_dir() else 1
            if entries is not None and count != entries:
                raise UserError(
                    f"{file}: {target.name} unpacks to {count:,} files, published are {entries:,}; fetch the archive again"
                )
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.move(found[0], target)
    finally:
        shutil.rmtree(holder, ignore_errors=True)
    print(f"data: {file} is unpacked and may be removed", file=sys.stderr, flush=True)


def _unpack(file: Path, folder: Path) -> None:
    """Unpack an archive and the archives in it, without macOS's doubles.

    zipfile walks the whole central directory. Tools that trust the 16-bit count at its end lose multiples of 65,536 files of
    COCO's panoptic archive.
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
