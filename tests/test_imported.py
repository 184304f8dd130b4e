"""Imported baselines: masks exported from the finished smoke study, imported under other names, and run by the DAG."""

import json
import os
from pathlib import Path

import pandas as pd
import pytest
import yaml

from conftest import run
from genseg.cli.main import main

GS = {"phrases": "main", "class_phrases": "class_phrases"}
PREDICTIONS = "results/smoke/predictions/{}/predictions.parquet"
SNAKEMAKE = ("snakemake", "--cores", "all", "--resources", "gpu=8", "--configfile", "less.yaml")
SPLITS = ["overall", "things", "stuff", "singulars", "plurals"]


def genseg(*arguments):
    assert main(list(arguments)) == 0


def export(table, form, out):
    tables = ["--predictions", PREDICTIONS.format(GS[table]), "--phrases", f"data/smoke/{table}.parquet"]
    genseg("export", *tables, "--format", form, "--out", out)


def rows(name):
    return pd.read_csv(f"results/smoke/tables/{name}.csv")


def test_imported_copies_of_gs_have_its_scores_and_empty_cells_for_missing_predictions(study_copy, monkeypatch, capsys):
    monkeypatch.chdir(study_copy)
    export("phrases", "coco", "phrases.json")
    export("class_phrases", "index_png", "pngs")
    results, pngs = ("--format", "coco_results", "--source", "phrases.json"), ("--format", "index_masks", "--source", "pngs")
    for name, sources in (("whole", [results, pngs]), ("masks-only", [results]), ("labels-only", [pngs])):
        for source in sources:
            genseg("import", name, *source, "--params", "params/smoke.yaml")
    document = yaml.safe_load(Path("params/smoke.yaml").read_text())
    document["refine"] |= {"controls": ["crf"], "sensitivity": document["refine"]["sensitivity"] | {"baselines": []}}
    Path("less.yaml").write_text(yaml.safe_dump(document))
    first = run(*SNAKEMAKE, cwd=study_copy)
    assert "3 of 11 to make" in (study_copy / "work/smoke/logs/baselines.log").read_text()
    second = run(*SNAKEMAKE, "--dry-run", cwd=study_copy)
    assert "Nothing to be done" in second.stdout + second.stderr, first.stderr

    for _, by_protocol in rows("table2").query("source == 'measured'").groupby("protocol"):
        table = by_protocol.set_index("method")
        assert (table.loc["whole", SPLITS] == table.loc["GS", SPLITS]).all()
        assert (table.loc["masks-only", SPLITS] == table.loc["GS", SPLITS]).all()
        assert table.loc["labels-only", SPLITS].isna().all()
        assert set(table.loc[["whole", "masks-only", "labels-only"], "venue"]) == {"imported"}
    table = rows("refinement").set_index("baseline")
    of_phrases = [f"{name}_{side}" for name in ("ar", "boundary_iou") for side in ("before", "after")]
    for name in ("whole", "masks-only"):
        assert table.loc[name, of_phrases].tolist() == pytest.approx(table.loc["gs", of_phrases].tolist())
    for name in ("whole", "labels-only"):
        assert table.loc[name, "miou_before"] == pytest.approx(table.loc["gs", "miou_before"])
    assert table.loc["labels-only", "miou_after"] == table.loc["whole", "miou_after"]  # from hard masks; GS has soft maps
    assert table.loc["masks-only", ["miou_before", "miou_after", "delta"]].isna().all()
    assert table.loc["labels-only", of_phrases].isna().all()
    single = table[table["kind"] == "method"]
    for name, group in (("all", single), ("real", single[single["real"]])):
        for column in ("miou_before", "miou_after", "delta", "ar_before", "ar_delta", "boundary_iou_delta"):
            assert table.loc[name, column] == pytest.approx(group[column].mean())
    assert "labels-only, masks-only: only class masks" in Path("results/smoke/tables/refinement.md").read_text()
    main_row = json.loads(Path("results/smoke/scores/main.json").read_text())
    for name in ("whole", "labels-only"):
        own = json.loads(Path(f"results/smoke/scores/baselines/{name}.json").read_text())
        assert own["miou"]["mean"] == pytest.approx(main_row["miou"]["mean"], abs=1e-12)

    # Ids that are not in the phrase table are an error. A baseline whose files are removed leaves the study.
    imported = Path("data/imported/smoke")
    frame = pd.read_parquet(imported / "whole.parquet")
    frame.assign(narrative_id=frame["narrative_id"] + "x").to_parquet(imported / "masks-only.parquet")
    capsys.readouterr()
    assert main(["baseline", "--params", "less.yaml"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "is not a phrase of test" in line
    assert "genseg import masks-only" in line
    for path in imported.glob("masks-only*"):
        os.remove(path)
    genseg("baseline", "--params", "less.yaml")
    names = [entry["name"] for entry in json.loads(Path("results/smoke/baselines/manifest.json").read_text())["baselines"]]
    assert names[-2:] == ["labels-only", "whole"]
    assert not Path("results/smoke/baselines/masks-only.parquet").exists()
