"""Tests of the benchmarks in tiny mode: reports are complete and their values plausible. Times are not checked."""

import json
import math
import os

import pytest

from conftest import PROJECT, run

COMPARED = {"sampling", "precompute", "training", "refinement", "scoring"}


def report_of(command, cwd, tmp_path):
    """Run a benchmark command and return its JSON; check that its Markdown has a section for every benchmark."""
    path = os.pathsep.join([str(PROJECT), os.environ.get("PYTHONPATH", "")])
    run("python", "-m", *command, "--tiny", "--json", str(tmp_path / "out.json"), cwd=cwd, PYTHONPATH=path, OMP_NUM_THREADS="1")
    document = json.loads((tmp_path / "out.json").read_text())
    table = (tmp_path / "out.md").read_text()
    assert all(f"## {name}\n" in table for name in document["benchmarks"])
    return document


def test_all_benchmarks_of_a_finished_study_report_valid_rows(finished_study, tmp_path):
    document = report_of(["benchmarks.run", "--params", "params/smoke.yaml"], finished_study, tmp_path)
    rows = {name: entry["rows"] for name, entry in document["benchmarks"].items()}
    assert set(rows) == {*COMPARED, "accuracy", "shares"}
    for row in (row for name in COMPARED for row in rows[name]):
        assert row["ours_s"] > 0
        assert row["ratio"] == pytest.approx(row["reference_s"] / row["ours_s"], rel=1e-6)  # one repetition
    assert all(row["max_difference"] < 1e-3 for row in rows["sampling"]), "both loops give the same maps"
    [row] = rows["refinement"]
    assert (row["images"], row["evaluations"]) == (1, 6)  # base point of smoke: three steps with guidance
    assert row["masks"] > 1
    assert [row["evaluations"] for row in rows["accuracy"]] == [1, 2, 2]
    assert all(0 <= row["ar"] <= 1 for row in rows["accuracy"])
    for row in rows["shares"]:
        assert math.isclose(sum(row[name] for name in ("text", "VAE", "U-Net", "read-out", "rest")), 1, abs_tol=0.05)
    assert abs(rows["scoring"][0]["ar"] - rows["scoring"][0]["brute_ar"]) < 2e-5


def test_benchmarks_without_their_study_are_skipped_and_others_run(tmp_path):
    command = ["benchmarks.run", "--params", str(PROJECT / "params/smoke.yaml"), "--only", "shares", "scoring"]
    document = report_of(command, tmp_path, tmp_path)
    assert "run `make` first" in document["benchmarks"]["shares"]["skipped"]
    assert document["benchmarks"]["scoring"]["rows"]


def test_gpu_benchmark_reports_valid_rows_with_tiny_shapes(tmp_path):
    benchmarks = report_of(["benchmarks.gpu"], tmp_path, tmp_path)["benchmarks"]
    assert [row["evaluations"] for row in benchmarks["evaluations"]["rows"]] == [1, 2, 4, 6]
    rows = {(row["mode"], row["backend"]): row for row in benchmarks["variants"]["rows"]}
    assert {mode for mode, _ in rows} == {"eager", "channels last", "compiled blocks", "compiled"}
    for (_, backend), row in rows.items():
        assert (row["unavailable"] is None) == ("masks_per_s" in row)
        assert row["unavailable"] is None or backend != "native"
    kinds = {row["operator"]: row for row in benchmarks["operators"]["rows"]}
    assert {"convolution", "matrix product", "attention", "norm"} <= set(kinds)
    assert math.isclose(sum(row["share"] for row in kinds.values()), 1)
    batch = 5 * math.ceil(benchmarks["equal lengths"]["rows"][0]["batch"] / 5)
    unet = benchmarks["operations"]["rows"][0]["tflop"]
    assert sum(row["tflop"] or 0 for row in kinds.values()) == pytest.approx(batch * unet, rel=1e-6)
