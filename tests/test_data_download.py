"""Downloads from a local server that supports range requests, and whose responses have faults."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_folders import REPOSITORY, png_params, small_png, study_params
from genseg.data import download
from genseg.data.download import Remote, fetch, fetch_png, install, read_sources
from genseg.errors import UserError
from rehearsal.servers import Fault, Server, serving

CONTENT = np.random.default_rng(0).bytes(300_000)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(download.time, "sleep", lambda seconds: None)
    with serving(Server()) as server:
        yield server


def remote(server: Server, target: Path, content: bytes = CONTENT, published: bool = True, name: str = "file.bin") -> Remote:
    server.files.setdefault(name, content)
    checksum = hashlib.sha256(content).hexdigest() if published else None
    return Remote(name, server.url(name), len(content) if published else None, checksum, [target], [None])


def test_interrupted_connection_is_resumed(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server.faults = [Fault(cut=100_000), Fault(cut=50_000), Fault(cut=1)]
    fetch(remote(server, tmp_path / "x"), tmp_path / "file.bin")
    assert (tmp_path / "file.bin").read_bytes() == CONTENT
    assert [requested for _, requested in server.requests] == [None, "bytes=100000-", "bytes=150000-", "bytes=150001-"]
    assert "resuming" in capsys.readouterr().err
    assert not (tmp_path / "file.bin.part").exists()


def test_partial_file_of_an_earlier_run_is_resumed(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.bin.part").write_bytes(CONTENT[:1234])
    fetch(remote(server, tmp_path / "x"), tmp_path / "file.bin")
    assert (tmp_path / "file.bin").read_bytes() == CONTENT
    assert server.requests == [("/file.bin", "bytes=1234-")]


@pytest.mark.parametrize("published", [True, False])
def test_partial_file_that_has_all_bytes_is_accepted(server: Server, tmp_path: Path, published: bool) -> None:
    (tmp_path / "file.bin.part").write_bytes(CONTENT)
    fetch(remote(server, tmp_path / "x", published=published), tmp_path / "file.bin")
    assert (tmp_path / "file.bin").read_bytes() == CONTENT


def test_partial_file_longer_than_the_file_is_downloaded_again(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.bin.part").write_bytes(CONTENT + b"more")
    fetch(remote(server, tmp_path / "x"), tmp_path / "file.bin")
    assert (tmp_path / "file.bin").read_bytes() == CONTENT


def test_download_restarts_if_the_host_does_not_support_range_requests(server: Server, tmp_path: Path) -> None:
    server.ranges = False
    server.faults = [Fault(cut=100_000)]
    fetch(remote(server, tmp_path / "x"), tmp_path / "file.bin")
    assert (tmp_path / "file.bin").read_bytes() == CONTENT


def test_failed_download_keeps_partial_file(server: Server, tmp_path: Path) -> None:
    server.faults = [Fault(cut=70_000)] + [Fault(cut=0)] * download.MAX_FAILURES
    with pytest.raises(UserError, match=r"70,000 bytes are kept in .*file\.bin\.part; run again to resume") as caught:
        fetch(remote(server, tmp_path / "target"), tmp_path / "file.bin")
    assert str(tmp_path / "target") in str(caught.value)
    fetch(remote(server, tmp_path / "target"), tmp_path / "file.bin")
    assert (tmp_path / "file.bin").read_bytes() == CONTENT


@pytest.mark.parametrize(
    "faults",
    [
        [Fault(announced=1000, cut=1000)],  # a truncated copy in a proxy
        [Fault(announced=10**6)],
        [Fault(status=503), Fault(status=429), Fault(cut=0)],
        [Fault(cut=100), Fault(shift=1000)],
    ],
    ids=["announces fewer bytes", "announces more bytes", "is busy", "sends another range"],
)
def test_faults_of_the_host_are_overcome_in_one_run(server: Server, tmp_path: Path, faults: list[Fault]) -> None:
    server.faults = faults
    fetch(remote(server, tmp_path / "x"), tmp_path / "file.bin")
    assert (tmp_path / "file.bin").read_bytes() == CONTENT
    assert server.faults == []


def test_file_longer_than_published_is_rejected(server: Server, tmp_path: Path) -> None:
    source = remote(server, tmp_path / "x")
    server.files["file.bin"] = CONTENT + b"more"
    with pytest.raises(UserError, match=r"file\.bin\.bad: .* expected 300,000 bytes, got 300,004; run again to download it"):
        fetch(source, tmp_path / "file.bin")


SMALL = st.integers(0, 3000)
FAULTS = st.one_of(
    st.builds(Fault, cut=SMALL),
    st.builds(Fault, cut=SMALL, announced=st.integers(0, 10_000)),
    st.builds(Fault, status=st.sampled_from([404, 429, 500, 503])),
    st.builds(Fault, flip=st.integers(0, 1)),
    st.builds(Fault, shift=SMALL),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(faults=st.lists(FAULTS, max_size=12), published=st.booleans())
def test_after_any_faults_running_again_gives_the_published_file(
    server: Server, tmp_path: Path, faults: list[Fault], published: bool
) -> None:
    """A JSON file without a checksum too, unless a byte has changed: nothing but the checksum could show that."""
    content = json.dumps(list(range(500))).encode()
    if not published:
        faults = [fault for fault in faults if fault.flip is None]
    source = remote(server, tmp_path / "x", content, published, "file.json")
    server.faults = list(faults)
    file = tmp_path / "file.json"
    file.unlink(missing_ok=True)
    while not file.exists():
        faults_left = len(server.faults)
        try:
            fetch(source, file)
        except UserError:
            assert len(server.faults) < faults_left, "failed without a fault"
    assert file.read_bytes() == content


def test_missing_file_or_host_is_reported(server: Server, tmp_path: Path) -> None:
    source = remote(server, tmp_path / "target")
    server.files.clear()
    with pytest.raises(UserError, match="404") as caught:
        fetch(source, tmp_path / "file.bin")
    assert server.url("file.bin") in str(caught.value)
    unreachable = Remote("file.bin", "http://127.0.0.1:9/file.bin", None, None, [tmp_path / "target"], [None])
    with pytest.raises(UserError, match="refused"):
        fetch(unreachable, tmp_path / "file.bin")


def test_file_with_wrong_checksum_is_rejected(server: Server, tmp_path: Path) -> None:
    source = remote(server, tmp_path / "x")
    server.files["file.bin"] = CONTENT[:-1] + bytes([CONTENT[-1] ^ 1])
    with pytest.raises(UserError, match="sha256") as caught:
        fetch(source, tmp_path / "file.bin")
    assert "file.bin.bad" in str(caught.value)
    assert not (tmp_path / "file.bin").exists()
    assert (tmp_path / "file.bin.bad").exists()


def test_unpublished_checksum_is_printed_and_written(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = remote(server, tmp_path / "target/file.bin", published=False)
    fetch(source, tmp_path / "file.bin")
    checksum = hashlib.sha256(CONTENT).hexdigest()
    messages = capsys.readouterr().err
    assert checksum in messages
    assert "NOT VERIFIED" in messages
    install(source, tmp_path / "file.bin")
    assert (tmp_path / "target/file.bin").read_bytes() == CONTENT
    assert (tmp_path / "target/file.bin.sha256").read_text() == f"{checksum}  file.bin\n"


def test_full_disk_is_reported_and_download_resumed(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def receive(source: Remote, part: Path) -> bool:
        part.write_bytes(CONTENT[:10])
        raise OSError(errno.ENOSPC, "No space left on device", str(part))

    source = remote(server, tmp_path / "x")
    line = f"file.bin,{source.url},{source.bytes},{source.sha256},{{images}},"
    (tmp_path / "sources.csv").write_text(f"name,url,bytes,sha256,unpacks_to,entries\n{line}\n")
    png = study_params(**png_params(tmp_path / "coco")).data.png
    assert png is not None
    with monkeypatch.context() as patch:
        patch.setattr(download, "_receive", receive)
        with pytest.raises(UserError, match=r"file\.bin\.part: the disk is full"):
            fetch_png(png, tmp_path / "sources.csv", tmp_path / "downloads")
    fetch_png(png, tmp_path / "sources.csv", tmp_path / "downloads")
    assert (tmp_path / "coco").read_bytes() == CONTENT
    assert server.requests == [("/file.bin", "bytes=10-")]


def zip_bytes(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def test_archive_with_16_bit_entry_count_is_unpacked_completely(tmp_path: Path) -> None:
    """As in COCO's panoptic archive, the number of entries at the end of the file is too small."""
    content = bytearray(zip_bytes({f"photos/{number}.png": b"x" for number in range(300)}))
    end = content.rindex(b"PK\x05\x06")
    content[end + 8 : end + 12] = (44).to_bytes(2, "little") * 2
    (tmp_path / "photos.zip").write_bytes(content)
    install(Remote("photos.zip", "", None, None, [tmp_path / "to/photos"], [300]), tmp_path / "photos.zip")
    assert len(list((tmp_path / "to/photos").iterdir())) == 300


def test_invalid_archive_is_rejected(tmp_path: Path) -> None:
    content = zip_bytes({"photos/1.png": b"x" * 100})
    for bad, name, entries, message in (
        (content, "photos", 2, "expected 2 files in photos, got 1"),
        (content, "masks", 1, "masks is missing"),
        (content[:-30], "photos", 1, "not a complete zip"),
        (content.replace(b"x" * 100, b"y" * 100), "photos", 1, "corrupt"),
    ):
        (tmp_path / "a.zip").write_bytes(bad)
        with pytest.raises(UserError, match=message):
            install(Remote("a.zip", "", None, None, [tmp_path / "to" / name], [entries]), tmp_path / "a.zip")
        assert not (tmp_path / "to" / name).exists()


def test_only_missing_files_are_downloaded(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small archives with the structure of the published ones. The unpacked folder equals the local one."""
    monkeypatch.chdir(tmp_path)
    small_png(tmp_path / "local")

    def folder_files(folder: str, prefix: str) -> dict[str, bytes]:
        return {f"{prefix}{item.name}": item.read_bytes() for item in sorted((tmp_path / "local" / folder).iterdir())}

    for split in ("train2017", "val2017"):
        server.files[f"{split}.zip"] = zip_bytes(folder_files(split, f"{split}/"))
        server.files[f"png_coco_{split}.json"] = (tmp_path / f"local/annotations/png_coco_{split}.json").read_bytes()
    server.files["panoptic.zip"] = zip_bytes(
        {
            f"annotations/panoptic_{split}.{kind}": (
                zip_bytes(
                    folder_files(f"annotations/panoptic_{split}", f"panoptic_{split}/")
                    | {f"__MACOSX/panoptic_{split}/._1.png": b""}
                )
                if kind == "zip"
                else (tmp_path / f"local/annotations/panoptic_{split}.json").read_bytes()
            )
            for split in ("train2017", "val2017")
            for kind in ("zip", "json")
        }
    )
    panoptic_targets = "{annotations}/panoptic_train2017.json;{annotations}/panoptic_val2017.json;"
    panoptic_targets += "{annotations}/panoptic_train2017;{annotations}/panoptic_val2017"
    targets = {
        "train2017.zip": ("{images}/train2017", "4"),
        "val2017.zip": ("{images}/val2017", "2"),
        "panoptic.zip": (panoptic_targets, "1;1;4;2"),
        "png_coco_train2017.json": ("{narratives}/png_coco_train2017.json", "1"),
        "png_coco_val2017.json": ("{narratives}/png_coco_val2017.json", ""),
    }
    lines = ["name,url,bytes,sha256,unpacks_to,entries"]
    for name, (target, entries) in targets.items():
        content = server.files[name]
        lines.append(f"{name},{server.url(name)},{len(content)},{hashlib.sha256(content).hexdigest()},{target},{entries}")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/sources.csv").write_text("\n".join(lines) + "\n")
    png = study_params(**png_params(tmp_path / "coco")).data.png
    assert png is not None
    server.faults = [Fault(cut=500), Fault(cut=700)]
    fetch_png(png)
    local = {path.relative_to(tmp_path / "local") for path in (tmp_path / "local").rglob("*")}
    assert {path.relative_to(tmp_path / "coco") for path in (tmp_path / "coco").rglob("*")} == local
    for path in local:
        if (tmp_path / "local" / path).is_file():
            assert (tmp_path / "coco" / path).read_bytes() == (tmp_path / "local" / path).read_bytes()
    server.requests.clear()
    fetch_png(png)
    assert server.requests == []
    # If one file is missing, only its source is downloaded again; the other files are kept.
    (tmp_path / "coco/annotations/png_coco_val2017.json").unlink()
    fetch_png(png)
    assert {name for name, _ in server.requests} == {"/png_coco_val2017.json"}


def test_shipped_list_of_sources_is_valid() -> None:
    folders = {key: key for key in ("images", "annotations", "narratives")}
    remotes = read_sources(REPOSITORY / "data/sources.csv", folders)
    targets = {str(target) for source in remotes for target in source.targets}
    for split in ("train", "val"):
        assert {
            f"images/{split}2017",
            f"annotations/panoptic_{split}2017",
            f"annotations/panoptic_{split}2017.json",
            f"narratives/png_coco_{split}2017.json",
        } <= targets
    for source in remotes:
        assert source.url.endswith(source.name)
        assert source.sha256 is None or len(source.sha256) == 64


def test_invalid_list_of_sources_is_reported_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "sources.csv").write_text("name,url,bytes,sha256,unpacks_to,entries\na,b,many,,{images}/x,1\n")
    with pytest.raises(UserError, match="line 2"):
        read_sources(tmp_path / "sources.csv", {"images": "i"})
    with pytest.raises(UserError, match="cannot read"):
        read_sources(tmp_path / "nowhere.csv", {})
