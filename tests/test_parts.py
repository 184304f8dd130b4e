"""Parts: equal bytes wherever they are cut, bounded memory, and killed jobs that go on after their last part."""

import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from genseg.artifacts import parquet, predictions
from genseg.artifacts.masks import encode
from genseg.artifacts.parquet import KEY
from genseg.artifacts.parts import Parts, Piece, make_parts
from genseg.artifacts.predictions import (
    as_levels,
    iterate_maps,
    maps_path,
    read_predictions,
    write_predictions,
    write_with_maps,
)
from genseg.cli import main
from genseg.errors import UserError
from genseg.metrics.soft_maps import calibration_counts
from genseg.refine import coarse
from test_training import variant

SIDE = 64


def unit_rows(unit: int, rows: int, maps: bool = True) -> Piece:
    """Return predictions of a unit that depend on its number only."""
    rng = np.random.default_rng(unit)
    levels = rng.integers(0, 256, (rows, SIDE, SIDE), dtype=np.uint8)
    frame = pd.DataFrame({"image_id": unit, "narrative_id": "n", "phrase_id": range(rows)})
    frame["mask"] = [encode(level > 127) for level in levels]
    return frame.assign(score=rng.random(rows).astype(np.float32)), levels if maps else None


# ------------------------------------------------------------------------------------------------------------- bytes
@settings(max_examples=12, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=12), st.booleans(), st.randoms())
def test_gathered_bytes_do_not_depend_on_parts(tmp_path_factory, sizes, maps, random):
    folder = tmp_path_factory.mktemp("parts")
    pieces = {unit: unit_rows(unit, rows, maps) for unit, rows in enumerate(sizes)}
    parts, units = Parts(folder / "work", "k"), list(pieces)
    if random.random() < 0.5:
        random.shuffle(units)
    while units:
        count = random.randint(1, len(units))
        parts.write({unit: pieces[unit] for unit in sorted(units[:count])}, 1.0)
        units = units[count:]
    assert Parts(folder / "work", "k").gather(folder / "gathered.parquet", threshold="0.5") == sum(sizes)
    frame = pd.concat([frame for frame, _ in pieces.values()], ignore_index=True)
    soft = np.concatenate([levels for _, levels in pieces.values()]) / np.float32(255) if maps else None
    write_with_maps(frame, soft, folder / "whole.parquet", key="k", threshold="0.5")
    assert (folder / "gathered.parquet").read_bytes() == (folder / "whole.parquet").read_bytes()
    assert maps_path(folder / "gathered.parquet").exists() == maps
    if maps:
        assert maps_path(folder / "gathered.parquet").read_bytes() == save({"maps": as_levels(soft)})


def test_pieces_of_a_table_give_its_bytes_over_several_row_groups(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "ROW_GROUP", 40)
    frame = pd.concat([unit_rows(unit, 7)[0] for unit in range(20)], ignore_index=True)
    write_predictions(frame, tmp_path / "whole.parquet", key="k")
    pieces = [(frame[start : start + 11], None) for start in range(0, len(frame), 11)]
    predictions.write_in_pieces(pieces, None, tmp_path / "pieces.parquet", key="k")
    assert (tmp_path / "whole.parquet").read_bytes() == (tmp_path / "pieces.parquet").read_bytes()
    pd.testing.assert_frame_equal(read_predictions(tmp_path / "pieces.parquet"), frame)


def test_finished_units_are_not_made_again_and_parts_with_another_key_are_ignored(tmp_path):
    made: list[int] = []

    def make(unit: int) -> dict[str, Piece]:
        made.append(unit)
        if len(made) == 4:
            raise KeyboardInterrupt
        return {"a": unit_rows(unit, 600), "b": unit_rows(unit, 1)}

    for _ in range(2):
        outputs = {name: Parts(tmp_path / name, "k") for name in "ab"}
        try:
            make_parts(outputs, range(6), make, "unit")
        except KeyboardInterrupt:
            assert made == [0, 1, 2, 3]
            assert [len(list((tmp_path / name).iterdir())) for name in "ab"] == [1, 1]
    assert made == [0, 1, 2, 3, 2, 3, 4, 5]
    assert all(unit in outputs["b"] for unit in range(6))
    outputs["a"].gather(tmp_path / "before.parquet")
    sorted((tmp_path / "b").iterdir())[1].unlink()  # as if the job had been killed between the two files of a part
    outputs = {name: Parts(tmp_path / name, "k") for name in "ab"}
    make_parts(outputs, range(6), make, "unit")
    assert all(unit in outputs["b"] for unit in range(6))
    outputs["a"].gather(tmp_path / "after.parquet")
    assert (tmp_path / "after.parquet").read_bytes() == (tmp_path / "before.parquet").read_bytes()
    assert 0 not in Parts(tmp_path / "a", "other")
    Parts(tmp_path / "a", "other").write({0: unit_rows(0, 1)}, 1.0)
    assert len(list((tmp_path / "a").iterdir())) == 1, "a new key replaces old parts"


def test_message_names_a_damaged_part(tmp_path):
    parts = Parts(tmp_path, "k")
    parts.write({0: unit_rows(0, 50)}, 1.0)
    [path] = tmp_path.iterdir()
    content = bytearray(path.read_bytes())
    content[100:140] = bytes(40)
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"part-000000000000-000000000000\.parquet: not a readable part .*; remove it"):
        Parts(tmp_path, "k").gather(tmp_path / "out.parquet")
    path.write_bytes(content[:-9])
    assert 0 not in Parts(tmp_path, "k"), "a truncated part is made again"


# ------------------------------------------------------------------------------------------------------------ memory
def peak_bytes(call: Callable[[], object]) -> int:
    """Return the largest total of the bytes that Python, NumPy and Arrow hold during a call."""
    default, pool = pa.default_memory_pool(), pa.proxy_memory_pool(pa.default_memory_pool())
    pa.set_memory_pool(pool)
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1] + pool.max_memory()
    finally:
        tracemalloc.stop()
        pa.set_memory_pool(default)


def test_memory_of_gathering_and_calibration_does_not_grow_with_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "ROW_GROUP", 16)
    monkeypatch.setattr(predictions, "MAPS_AT_ONCE", 16)
    monkeypatch.setattr("genseg.artifacts.parts.PART_ROWS", 16)

    def peaks(folder: Path, units: int) -> dict[str, int]:
        out, parts = folder / "out.parquet", Parts(folder / "parts", "k")
        make = peak_bytes(lambda: make_parts({"a": parts}, range(units), lambda unit: {"a": unit_rows(unit, 8)}, "unit"))
        gather = peak_bytes(lambda: parts.gather(out))
        rows = read_predictions(out).assign(height=SIDE, width=SIDE)
        return {"make": make, "gather": gather, "calibrate": peak_bytes(lambda: calibration_counts(rows, iterate_maps(out)))}

    peaks(tmp_path / "first", 10)  # fills caches
    few, many = peaks(tmp_path / "few", 10), peaks(tmp_path / "many", 100)
    additional_maps = (100 - 10) * 8 * SIDE * SIDE
    for name in few:
        assert many[name] - few[name] < 0.1 * additional_maps, f"{name} holds maps of all rows: {few}, {many}"


# ------------------------------------------------------------------------------------------------------ killed jobs
def kill_after_parts(folder: Path, count: int, *arguments: str) -> dict[Path, int]:
    """Run a command that writes a part after each unit, kill -9 it after some parts; return their modification times."""
    program = "import sys; from genseg.artifacts import parts; from genseg.refine import coarse; parts.PART_SECONDS = -1.0; "
    program += "coarse.GROUP_ROWS = 8; from genseg.cli import main; sys.exit(main(sys.argv[1:]))"
    with subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    ) as job:
        while len(list(folder.glob("part-*.parquet"))) < count:
            assert job.poll() is None, job.stderr.read().decode()
            time.sleep(0.002)
        job.send_signal(signal.SIGKILL)
        assert job.wait() == -signal.SIGKILL
    return {path: path.stat().st_mtime_ns for path in folder.glob("part-*.parquet")}


def test_killed_sampling_goes_on_after_its_last_part(study_copy, monkeypatch):
    monkeypatch.chdir(study_copy)
    results, work = Path("results/smoke/predictions/main"), Path("work/smoke/samples/main")
    before = {path.name: path.read_bytes() for path in results.iterdir()}
    for path in (*results.iterdir(), *work.iterdir()):
        path.unlink()
    params = variant(study_copy, "changed", sample__runs=["main"])
    finished = kill_after_parts(work, 3, "sample", "--params", params)
    assert 3 <= len(finished) < 13
    assert main(["sample", "--params", params]) == 0
    assert {path: path.stat().st_mtime_ns for path in finished} == finished, "finished parts are not made again"
    assert {path.name: path.read_bytes() for path in results.iterdir()} == before


def test_killed_baseline_goes_on_after_its_last_part(study_copy, monkeypatch):
    monkeypatch.chdir(study_copy)
    results, work = Path("results/smoke/baselines"), Path("work/smoke/baselines/cross_attention_class_phrases")
    before = {path: path.read_bytes() for path in results.glob("cross_attention*")}
    assert len(before) == 4
    for path in before:
        path.unlink()
    command = ("baseline", "cross_attention", "--params", "params/smoke.yaml")
    finished = kill_after_parts(work, 3, *command)
    read: list[str] = []
    from genseg.baselines import make

    monkeypatch.setattr(make, "load_image", lambda name, load=make.load_image: read.append(name) or load(name))
    assert main(list(command)) == 0
    images = read_predictions(results / "cross_attention_class_phrases.parquet")["image_id"].nunique()
    assert len(read) == images - len(finished), "only unfinished images are read, and no threshold is chosen again"
    assert {path: path.read_bytes() for path in before} == before
    assert not work.exists(), "parts are removed after their predictions are complete"


def test_killed_refinement_goes_on_after_its_last_part(study_copy, monkeypatch):
    monkeypatch.chdir(study_copy)
    monkeypatch.setattr(coarse, "GROUP_ROWS", 8)
    frame = read_predictions("results/smoke/predictions/main/predictions.parquet")
    write_predictions(frame[frame["image_id"].isin(sorted(frame["image_id"].unique())[:4])], "coarse.parquet")
    document = yaml.safe_load(Path("params/smoke.yaml").read_text())
    command = ["refine", "--params", "params/smoke.yaml", "--phrases", f"data/{document['study']}/phrases.parquet"]
    command += ["--predictions", "coarse.parquet", "--method", "no_generation", "--out"]
    assert main([*command, "undisturbed.parquet"]) == 0
    kill_after_parts(Path("refined.parts"), 2, *command, "refined.parquet")
    assert not Path("refined.parquet").exists()
    seen: list[int] = []
    from genseg.refine import files

    refine = files.refine_predictions
    monkeypatch.setattr(files, "refine_predictions", lambda *args: seen.append(len(args[1])) or refine(*args))
    assert main([*command, "refined.parquet"]) == 0
    groups = len(read_predictions("coarse.parquet")["image_id"].unique())
    assert 0 < len(seen) <= groups - 2, "finished groups are not refined again"
    assert Path("refined.parquet").read_bytes() == Path("undisturbed.parquet").read_bytes()
    assert not Path("refined.parts").exists()
    assert list(read_predictions("refined.parquet")[KEY].itertuples(index=False)) == list(
        read_predictions("coarse.parquet")[KEY].itertuples(index=False)
    )
