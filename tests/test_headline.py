"""The headline of a study, which DVC tracks as metrics, agrees with the study's tables."""

import json

import pandas as pd
import pytest


def test_headline_agrees_with_the_tables(finished_study):
    headline = json.loads((finished_study / "metrics/smoke.json").read_text())
    tables = finished_study / "results/smoke/tables"
    controls = pd.read_csv(tables / "controls.csv").set_index("control")
    for split, value in headline["AR"].items():
        assert value == round(controls.loc["none", split], 2)
    assert headline["controls"] == {name: round(controls.loc[name, "overall"], 2) for name in headline["controls"]}
    assert len(headline["controls"]) == 3
    grid = {}
    for number in (3, 4, 5):
        table = pd.read_csv(tables / f"table{number}.csv")
        measured = table[table["source"] == "measured"]
        column = {3: "size", 4: "steps", 5: "guidance"}[number]
        grid |= {(column, row[column]): round(row["overall"], 2) for _, row in measured.iterrows()}
    names = {"size": "size", "num_inference_steps": "steps", "guidance_scale": "guidance"}
    for name, value in headline["grid"].items():
        if name not in ("base", "guidance_scale=1.0"):  # unguided sampling is not in Table 5
            field, _, number = name.partition("=")
            assert grid[names[field], float(number)] == value
    refinement = pd.read_csv(tables / "refinement.csv").set_index("baseline").loc["real"]
    assert headline["G4Seg"] == {
        "mIoU gain": pytest.approx(refinement["delta"], abs=0.006),
        "AR gain": pytest.approx(refinement["ar_delta"], abs=0.006),
    }
