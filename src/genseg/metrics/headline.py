"""The headline of a study: the few numbers that `dvc metrics` and `dvc exp show` compare."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from genseg.artifacts.files import read_json
from genseg.params import OperatingPoint, Params
from genseg.sampling.runs import Run

_CONTROLS = ("discriminative", "text_permuted", "colour_threshold")


def headline(params: Params, runs: Sequence[Run]) -> dict[str, Any]:
    """Return the main numbers from the files in `results/<study>/scores`, in points (0 to 100), rounded to 0.01.

    * "AR": of the main run by split, and "mIoU", if it was scored.
    * "controls": AR of the controls.
    * "grid": AR of the base point of Tables 3-5, and of each point that replaces one of its values, by that value.
    * "G4Seg": mean change of mIoU and AR by refinement, over the baselines made without ground truth.
    """
    folder = params.results_dir / "scores"
    numbers: dict[str, Any] = {}
    names = {run.name for run in runs}
    if "main" in names:
        main = read_json(folder / "main.json")
        numbers["AR"] = {split: _points(value) for split, value in main["ar"].items()}
        if main.get("miou"):
            numbers["mIoU"] = _points(main["miou"]["mean"])
    numbers["controls"] = {name: _ar(folder / f"{name}.json") for name in _CONTROLS if name in names}
    base, points = params.sample.base, params.sample.grid_points()
    by_point = {run.point: run.name for run in runs if run.role == "grid"}
    numbers["grid"] = {
        _difference(base, point) or "base": _ar(folder / f"{by_point[point]}.json") for point in points if point in by_point
    }
    if params.sample.has_tables():
        means = read_json(folder / "refinement.json")["means"]
        mean = next((row for row in means if row["refiner"] == "g4seg" and row["over"] == "real"), None)
        scores = {name: mean[key] for name, key in (("mIoU", "miou"), ("AR", "ar")) if mean and mean[key]}
        numbers["G4Seg"] = {f"{name} gain": _points(score["difference"]) for name, score in scores.items()}
    return {name: value for name, value in numbers.items() if value != {}}


def _ar(path: Path) -> float | None:
    return _points(read_json(path)["ar"]["overall"])


def _points(fraction: float | None) -> float | None:
    return None if fraction is None else round(100 * fraction, 2)


def _difference(base: OperatingPoint, point: OperatingPoint) -> str:
    """Return the values of a point that differ from the base point, such as "guidance_scale=8.0"."""
    return ", ".join(f"{name}={value}" for name, value in point.model_dump().items() if value != getattr(base, name))
