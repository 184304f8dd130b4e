"""Tables, figures and page of a study with invented scores: contents, provenance, and errors for bad inputs."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import save_file

from genseg.artifacts.files import write_json
from genseg.artifacts.manifest import read_manifest
from genseg.artifacts.masks import encode
from genseg.artifacts.phrases import read_phrases
from genseg.baselines import registry
from genseg.cli import main
from genseg.diffusion.guidance import count_evaluations
from genseg.params import load_params, validate_params
from genseg.report.figures.evolution import Evolution, choose_timesteps
from genseg.report.figures.examples import choose_examples
from genseg.report.figures.failures import choose_failures
from genseg.report.figures.narratives import choose_narratives, lay_out, split_caption
from genseg.report.figures.readouts import read_out
from genseg.report.page import manifest_paths
from genseg.report.render import Column, Table, escape_tex, plural, to_markdown, to_tex
from genseg.report.scores import SEEDS_KEYS
from genseg.report.tables.failures import find_failures
from genseg.report.tables.parts import comparability_note
from genseg.report.tables.shares import implied_share, largest_agreement, shares
from synthetic_scores import NASTY_CLASS, RESULTS, ROOT, SPLITS, build_study, per_phrase, timed

ATTENTION = [baseline for baseline in registry.ATTENTION if baseline.name != "diffpng_sam"]  # SAM's masks are imported

NAMES = [
    "table2",
    "table3",
    "table4",
    "table5",
    "evaluations",
    "readouts",
    "controls",
    "protocols",
    "shares",
    "breakdown",
    "failures",
    "comparisons",
    "miou",
    "refinement",
    "refinement_controls",
    "refinement_sensitivity",
]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a study whose report was written. Tests must not change it."""
    root = tmp_path_factory.mktemp("study")
    build_study(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert main(["tables", "--params", "params.yaml"]) == 0
    return root


@pytest.fixture
def report_copy(report: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the study that a test may change; it is the working directory."""
    shutil.copytree(report, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def table(root: Path, name: str) -> pd.DataFrame:
    return pd.read_csv(root / f"results/made_up/tables/{name}.csv")


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(["tables"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    return lines[0]


# ------------------------------------------------------------------------------------------------------ published
@pytest.mark.parametrize("name", ["table2", "table3_size", "table4_steps", "table5_guidance"])
def test_published_numbers_match_the_paper(name: str) -> None:
    """Every row's numbers are in one line of the paper's text, in the same order."""
    paper = ROOT.parent / "shared" / "papers" / "gs.txt"
    if not paper.exists():
        pytest.skip("the paper's text is not available")
    lines = [re.sub(r"[^0-9.]+", " ", line).split() for line in paper.read_text().splitlines()]
    frame = pd.read_csv(ROOT / "data" / "published" / f"{name}.csv", dtype=str)
    for _, row in frame.iterrows():
        key = [] if name == "table2" else [row.iloc[0]]
        assert any(line[-5:] == row[SPLITS].tolist() and set(key) <= set(line) for line in lines), row.tolist()
    assert frame["source"].str.contains(f"Table {name[5]}").all()
    assert len(frame) == (16 if name == "table2" else 3)


def test_table2_separates_sixteen_published_rows_from_measured_rows(report: Path) -> None:
    frame = table(report, "table2")
    assert list(frame.columns[:10]) == ["method", "venue", "diffusion", "ps_pretrain", "source", *SPLITS]
    published, measured = frame[frame["source"] == "published"], frame[frame["protocol"] == "native"]
    assert len(published) == 16
    assert published["method"].value_counts()[["EPNG", "PPMN", "ODISE"]].tolist() == [2, 2, 2]
    assert published.set_index(["method", "ps_pretrain"])["overall"][("ODISE", True)] == 63.1
    assert measured["method"].tolist() == ["GS", "Discriminative", *(baseline.label for baseline in ATTENTION)]
    assert measured["overall"].tolist() == pytest.approx([70.0, 65.0, *[50.0] * len(ATTENTION)])
    assert measured["method"].str.contains("reimplemented|our adaptation").sum() == 3
    assert measured["data"].eq("made_up (scenes)").all()
    assert published["data"].eq("PNG").all()


def test_every_measured_row_of_table2_has_all_protocols(report: Path) -> None:
    measured = table(report, "table2").query("source == 'measured'").pivot(index="method", columns="protocol", values="overall")
    expected = {"native": 50.0, "png-official": 40.0, "ppmn": 30.0}  # synthetic_scores lowers the AR of each further protocol
    assert set(measured.index) == {"GS", "Discriminative", *(baseline.label for baseline in ATTENTION)}
    for baseline in ATTENTION:
        assert measured.loc[baseline.label].to_dict() == pytest.approx(expected)
    assert measured.loc["GS"].to_dict() == pytest.approx({name: ar + 20 for name, ar in expected.items()})
    printed = (report / "results/made_up/tables/table2.md").read_text()
    assert printed.count("| DiffPNG + self |") == 1, "only the study's own protocol is printed"


def test_protocols_are_groups_of_columns_with_one_row_of_ceilings(report: Path) -> None:
    frame, long = table(report, "protocols").set_index("method"), table(report, "table2")
    measured = long[long["source"] == "measured"]
    assert frame.index.tolist() == ["Perfect prediction", "Latent-size truth", *measured["method"].unique()]
    for _, row in measured.iterrows():
        values = frame.loc[row["method"], [f"{row['protocol']}_{split}" for split in SPLITS]]
        assert values.tolist() == pytest.approx(row[SPLITS].tolist(), nan_ok=True)
    ceilings = {"native": 100.0, "png-official": 85.0, "ppmn": 85.0}
    assert {name: frame.at["Perfect prediction", f"{name}_stuff"] for name in ceilings} == pytest.approx(ceilings)
    assert frame.loc["Latent-size truth"].filter(like="_overall").tolist() == pytest.approx([91.0, np.nan, np.nan], nan_ok=True)
    tex = (report / "results/made_up/tables/protocols.tex").read_text()
    assert r" & \multicolumn{5}{c}{native} & \multicolumn{5}{c}{png-official} & \multicolumn{5}{c}{ppmn} \\" in tex
    assert "| native all | native things |" in (report / "results/made_up/tables/protocols.md").read_text()


def test_printed_table2_separates_published_from_measured_rows(report: Path) -> None:
    for kind in ("tex", "md"):
        text = (report / f"results/made_up/tables/table2.{kind}").read_text()
        order = [
            text.index(word) for word in ("Published, on PNG", "EIPA+MLMA", "Measured here, on study made", "Discriminative")
        ]
        assert order == sorted(order)
        assert "The published rows were measured on other data, so they are not comparable with the measured ones." in " ".join(
            text.split()
        )
        assert "40 phrases in 12 images" in text


# --------------------------------------------------------------------------------------------------- measured rows
@pytest.mark.parametrize(
    ("name", "axis", "published", "measured"),
    [
        ("table3", "size", [1024, 768, 512], [128, 96, 64]),
        ("table4", "steps", [50, 30, 20], [50, 30, 20]),
        ("table5", "guidance", [7.5, 8.0, 7.0], [7.5, 8.0, 7.0]),
    ],
)
def test_ablations_start_with_the_base_row(
    report: Path, name: str, axis: str, published: list[float], measured: list[float]
) -> None:
    frame = table(report, name)
    assert frame.columns[0] == axis
    assert frame.loc[frame["source"] == "published", axis].tolist() == published
    ours = frame[frame["source"] == "measured"]
    assert ours[axis].tolist() == measured
    assert ours["overall"].iloc[0] == pytest.approx(72.0)
    assert ours["n"].tolist() == [10, 10, 10]
    assert ours["evaluations"].tolist() == (2 * ours["steps"]).tolist()
    assert np.isnan(ours["difference"].iloc[0])
    assert ours["difference"].iloc[1:].tolist() == pytest.approx([-1.23, -1.23])
    assert frame.loc[frame["source"] == "published", "overall"].iloc[0] == 71.0


def test_evaluations_have_every_operating_point_and_the_base_row(report: Path) -> None:
    frame = pd.read_csv(report / "results/made_up/tables/evaluations.csv")
    params = validate_params(yaml.safe_load((report / "params.yaml").read_text()))
    points = params.sample.val_points()
    assert sorted(frame["evaluations"]) == sorted([count_evaluations(cell) for cell in (params.sample.base, *points)])
    assert frame["evaluations"].is_monotonic_increasing
    by_role = frame.set_index("role")
    assert by_role.loc["base", "evaluations"] == 100
    assert np.isnan(by_role.loc["base", "difference"])
    assert np.isnan(by_role.loc["base", "val_ar"]), "only operating points are sampled on val"
    assert by_role.loc["main", "val_ar"] == pytest.approx(60)
    assert by_role.loc["main", "difference"] == pytest.approx(-1.23)
    assert set(frame["rule"]) == {cell.sampler for cell in [*points, params.sample.base]}
    text = (report / "results/made_up/tables/evaluations.md").read_text()
    assert "cost no more than the main one, size 128, 1 step" in text, "the note names the point that is better on val"
    assert "against" in text
    assert (report / "results/made_up/figures/reliability.png").exists()


def test_controls_and_readouts_have_the_scored_values(report: Path) -> None:
    controls = table(report, "controls")
    assert list(controls.columns[:8]) == ["control", "protocol", "n", *SPLITS]
    expected = ["none", "text_permuted", "colour_threshold", "discriminative", "discriminative_mirrored"]
    assert controls["control"].tolist() == expected
    assert controls["things"].tolist() == pytest.approx([65.0, 25.0, 15.0, 60.0, 61.0])
    assert controls["n"].tolist() == [40, 32, 40, 40, 40]
    readouts = table(report, "readouts")
    assert readouts["readout"].tolist() == ["bilinear", "nearest", "VAE decoding", "bilinear, no CFG"]
    assert readouts["evaluations"].tolist() == [100, 100, 100, 50]
    assert readouts["difference_low"].notna().tolist() == [False, True, True, True]


def test_split_without_phrases_is_null_in_csv_and_a_dash_in_print(report: Path) -> None:
    assert table(report, "controls")["plurals"].isna().all()
    row = next(line for line in (report / "results/made_up/tables/controls.md").read_text().splitlines() if "none" in line)
    assert [cell.strip() for cell in row.split("|")][1:8] == ["none", "40", "70.0", "65.0", "70.0", "70.0", "—"]
    line = next(
        line for line in (report / "results/made_up/tables/controls.tex").read_text().splitlines() if line.startswith("none &")
    )
    assert line.split(" & ")[6] == "---"


def test_every_measured_row_names_the_scores_file_of_its_numbers(report: Path) -> None:
    frame = pd.concat([table(report, name) for name in ("table2", "table3", "table4", "table5", "controls", "readouts")])
    measured = frame[frame["source"] == "measured"]
    assert len(measured) == 3 * (2 + len(ATTENTION)) + 3 * 3 + 5 + 4
    for _, row in measured.iterrows():
        content = json.loads((report / row["scores"]).read_text())
        assert row["overall"] == pytest.approx(100 * content["ar"]["overall"])
        assert row["n"] == content["counts"]["phrases"]


def test_miou_table_is_removed_without_class_phrases(report_copy: Path) -> None:
    frame = table(report_copy, "miou").set_index("class")
    assert frame["gs"].to_dict() == pytest.approx({NASTY_CLASS: 25.0, "sky": 75.0, "absent": np.nan, "mean": 50.0}, nan_ok=True)
    for name in ("main", "discriminative"):
        path = report_copy / f"results/made_up/scores/{name}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"miou": None}))
    assert main(["tables"]) == 0
    assert not list((report_copy / "results/made_up/tables").glob("miou.*"))


def test_without_miou_its_numbers_are_left_out_with_a_sentence(report_copy: Path) -> None:
    """With `score.miou: 0` the files of scores have no mIoU, and no table, caption or note names it as a result."""
    scores, tables = report_copy / "results/made_up/scores", report_copy / "results/made_up/tables"
    document = yaml.safe_load((report_copy / "params.yaml").read_text())
    document["score"]["miou"] = 0.0
    (report_copy / "params.yaml").write_text(yaml.safe_dump(document))
    for path in [scores / "main.json", scores / "discriminative.json"]:
        write_json(path, json.loads(path.read_text()) | {"miou": None})
    comparisons = json.loads((scores / "comparisons.json").read_text())
    write_json(scores / "comparisons.json", {name: value for name, value in comparisons.items() if "miou" not in name})
    refinement = json.loads((scores / "refinement.json").read_text())
    for row in [*refinement["rows"], *refinement["means"]]:
        row["miou"] = dict.fromkeys(("before", "after", "difference", "ci_low", "ci_high"))
    write_json(scores / "refinement.json", refinement)
    assert main(["tables"]) == 0
    assert not list(tables.glob("miou.*"))
    for name in ("refinement", "refinement_controls", "refinement_sensitivity"):
        frame = table(report_copy, name)
        assert not [column for column in frame.columns if "miou" in column or column == "delta"]
        assert frame["ar_delta"].notna().all()
    for path in tables.glob("*.md"):
        text = path.read_text().replace("mIoU is not scored in this study (score.miou is 0).", "")
        assert not [line for line in text.splitlines() if "mIoU" in line and "published gains" not in line], path.name
    assert all("mIoU is not scored" in (tables / f"{name}.md").read_text() for name in ("breakdown", "refinement"))


def test_comparisons_name_their_runs_and_quantities(report: Path) -> None:
    frame = table(report, "comparisons")
    assert list(frame.columns[:6]) == ["comparison", "split", "n", "difference", "ci_low", "ci_high"]
    assert frame["split"].value_counts()["miou"] == 1
    assert (frame["split"] == "things").sum() == (frame["split"] == "overall").sum()
    assert {"main − base", "size 96 − base", "20 steps − base", "guidance 1 − base", "read-out vae − base"} <= set(
        frame["label"]
    )
    miou = (report / "results/made_up/tables/miou.md").read_text()
    assert "GS minus discriminative, mean: −1.2 [−3.0, 1.0] points" in miou
    assert "GS, mean: 95 % interval [40.0, 60.0]." in miou


def test_scores_without_things_or_intervals_give_null_columns(report_copy: Path) -> None:
    """Without phrases of things the scorer omits their comparison; without a bootstrap the intervals are null."""
    scores = report_copy / "results/made_up/scores"
    other_files = ("manifest.json", "comparisons.json", "operating_points.json", "refinement.json")
    for path in [path for path in scores.rglob("*.json") if path.name not in other_files]:
        content = json.loads(path.read_text())
        path.write_text(json.dumps(content | {"ar": content["ar"] | {"things": None}, "interval": dict.fromkeys(SPLITS)}))
    comparisons = json.loads((scores / "comparisons.json").read_text())
    write_json(
        scores / "comparisons.json", {k: v | {"ci_low": None, "ci_high": None} for k, v in comparisons.items() if "(" not in k}
    )
    assert main(["tables"]) == 0
    controls = table(report_copy, "controls")
    assert controls[["things", "ci_low", "difference_low", "difference_things", "difference_things_n"]].isna().all().all()
    assert controls["difference"].notna().tolist() == [False, True, True, True, True]
    assert "minus the base row: −1.2 points on the 10 phrases" in (report_copy / "results/made_up/tables/table4.md").read_text()


# --------------------------------------------------------------------------------------------------------- shares
def test_implied_share_is_the_range_over_all_roundings() -> None:
    """The oracle tries all AR, in steps of 0.01, that are printed as the published values."""
    for row in pd.read_csv(ROOT / "data/published/table2.csv").to_dict("records"):
        for group, others in (("stuff", "things"), ("plurals", "singulars")):
            share = implied_share(row["overall"], row[group], row[others])
            assert share
            offsets = np.arange(-5, 6) / 100
            whole, part, rest = np.meshgrid(*(row[name] + offsets for name in ("overall", group, others)))
            possible = (whole - rest) / (part - rest)
            assert share[1:] == pytest.approx((possible.min(), possible.max()))
            assert share[0] * row[group] + (1 - share[0]) * row[others] == pytest.approx(row["overall"])


@pytest.mark.parametrize("share", [0.0, 0.1, 0.42, 1.0])
def test_range_of_a_share_contains_the_share_that_made_the_rounded_values(share: float) -> None:
    random = np.random.default_rng(0)
    for part, rest in random.uniform(0, 100, (200, 2)):
        rounded = [round(value, 1) for value in (share * part + (1 - share) * rest, part, rest)]
        solved = implied_share(*rounded)
        assert solved is None or solved[1] - 1e-9 <= share <= solved[2] + 1e-9


def test_equal_groups_imply_no_share() -> None:
    assert implied_share(50.0, 50.0, 50.0) is None
    assert implied_share(50.0, 50.1, 50.0) is None
    assert implied_share(50.0, 50.2, 50.0) is not None


def test_largest_agreement_is_that_of_all_sets() -> None:
    random = np.random.default_rng(1)
    for _ in range(50):
        ranges = [(low, low + width) for low, width in random.integers(0, 12, (7, 2)).tolist()]
        common = [
            members
            for size in range(1, 8)
            for members in combinations(range(7), size)
            if max(ranges[i][0] for i in members) <= min(ranges[i][1] for i in members)
        ]
        assert tuple(largest_agreement(ranges)) in [members for members in common if len(members) == len(common[-1])]
    assert largest_agreement([]) == []


def test_shares_are_implied_by_published_rows_and_counted_under_both_definitions(report: Path) -> None:
    frame = table(report, "shares")
    published, counted = frame[frame["source"] == "published"], frame[frame["source"] == "counted"]
    assert len(published) == 16
    gs = published.set_index("method").loc["GS"]
    assert gs["stuff_share"] == pytest.approx(100 * (69.7 - 65.6) / (76.5 - 65.6))
    assert gs["plurals_share"] == pytest.approx(100 * (71.3 - 69.7) / (71.3 - 63.7))
    assert counted["method"].tolist() == ["Plural: the phrase table's flag", "Plural: at least two segments"]
    assert counted["n"].tolist() == [40, 40]
    assert counted["stuff_share"].tolist() == [50, 50]
    assert counted["plurals_share"].tolist() == [0, 10], "no phrase has the flag, four of 40 have two segments"
    text = table_text(report, "shares")
    assert "Stuff: 14 of 16 rows have a share between 41.6 and 42.4 in common; not MCN, (54.2 − 48.6)" in text
    assert "Plurals: 14 of 16 rows" in text
    assert "GS, (69.7 − 71.3) / (63.7 − 71.3) = 21.1 %." in text
    assert "They are shares of these data, and say nothing about the phrases of the published rows." in text


def test_notes_on_png_data_name_the_condition_for_a_comparison(report: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(report)
    params = load_params(ROOT / "params/paper.yaml")
    notes = " ".join(shares(params, read_phrases("data/made_up/phrases.parquet")).notes)
    assert "If these are the files of the PNG benchmark, the range of a published row contains the share" in notes
    assert "say nothing" not in notes
    assert "(png-official, ppmn) and not under native" in comparability_note(params)


def test_shares_do_not_name_outliers_if_all_rows_agree(report_copy: Path) -> None:
    path = report_copy / "data/published/table2.csv"
    frame = pd.read_csv(path)
    frame[frame["method"].isin(["DiffSeg", "NICE"])].to_csv(path, index=False)
    assert main(["tables"]) == 0
    text = table_text(report_copy, "shares")
    assert "Stuff: 2 of 2 rows have a share between 41.2 and 42.5 in common." in text
    assert "not means over" not in text


# ----------------------------------------------------------------------------------------------------- refinement
def test_refinement_has_one_row_per_method_and_two_means(report: Path) -> None:
    frame = table(report, "refinement")
    assert list(frame.columns[:7]) == ["method", "real", "miou_before", "miou_after", "delta", "ci_low", "ci_high"]
    assert len(frame) == 11 + 2
    assert frame["method"].tolist()[-2:] == ["mean of all", "mean of real baselines"]
    assert frame["delta"].to_numpy() == pytest.approx((frame["miou_after"] - frame["miou_before"]).to_numpy())
    assert frame["delta"].tolist()[-2:] == pytest.approx(
        [frame["delta"][:-2].mean(), frame["delta"][:-2][frame["real"]].mean()]
    )
    assert frame["real"].sum() == 6 + 1
    assert frame["source"].eq("measured").all()


def test_refinement_controls_have_all_rows_in_csv_and_means_in_print(report: Path) -> None:
    frame = table(report, "refinement_controls")
    assert list(frame.columns[:8]) == ["control", "method", "real", "miou_before", "miou_after", "delta", "ci_low", "ci_high"]
    assert frame["control"].value_counts().to_dict() == {"crf": 13, "random": 13}
    text = (report / "results/made_up/tables/refinement_controls.md").read_text()
    assert text.count("| crf |") == 2
    assert "mean of all +5.0 [4.0, 6.0]" in text


def test_g4seg_is_labelled_ours_and_has_no_published_row(report: Path) -> None:
    for name in ("refinement", "refinement_controls", "refinement_sensitivity"):
        assert "G4Seg (ours" in table_text(report, name).split("\n")[0]
        assert "5 images of test with 20 phrases" in table_text(report, name)
    for name in NAMES:
        frame = table(report, name)
        if "method" in frame and "source" in frame:
            assert not frame.loc[frame["source"] == "published", "method"].str.contains("G4Seg").any()
    assert "published gains of +0.77 to +1.00 mIoU on three benchmarks" in table_text(report, "refinement")


def test_refinement_costs_have_a_dash_where_a_time_is_missing(report: Path) -> None:
    frame = pd.read_csv(report / "work/made_up/tables/refinement_costs.csv")
    means = frame[frame["kind"] == "mean"].set_index("refiner")
    assert means["baselines"].to_dict() == {"g4seg": 11, "crf": 1, "random": 0, "alpha=1": 0}
    assert means["seconds_per_image"].dropna().to_dict() == {"g4seg": 9.0, "crf": 0.4}  # 45 s, 2 s of 5 images
    assert means["masks_per_image"].dropna().to_dict() == {"g4seg": 12, "crf": 12}
    text = (report / "work/made_up/tables/refinement_costs.md").read_text()
    assert "| g4seg | 11 | 7 | 12.0 | 9.0 | +5.0 |" in text
    assert "| random | 0 | 7 | — | — | — |" in text
    assert "on a device in blocks of 16: g4seg; on a device in blocks of 1: crf" in text
    assert "work/made\\_up/tables/refinement\\_costs.md" in table_text(report, "refinement_controls")


def test_sampling_costs_add_up_shards_beside_the_published_time(report: Path) -> None:
    """The paper's section 4.5: 50 seconds for a batch of 16, about 3 seconds each."""
    published, measured = pd.read_csv(report / "work/made_up/tables/sampling_costs.csv").to_dict("records")
    assert (published["source"], published["device"], published["batch"]) == ("published", "A100", 16)
    assert (published["seconds_per_16"], published["seconds_per_mask"]) == (50, 3.12)
    assert (measured["source"], measured["masks"], measured["seconds_per_mask"]) == ("measured", 120, 1.0)
    assert measured["ms_per_evaluation"] == pytest.approx(1000 / measured["evaluations"])
    assert "sampling\\_costs.md" in table_text(report, "evaluations")


def test_tables_and_page_do_not_depend_on_times(report_copy: Path) -> None:
    folder = report_copy / RESULTS / "tables"
    before = {path: path.read_bytes() for path in folder.iterdir()}
    costs = report_copy / "work/made_up/tables/refinement_costs.csv"
    write_json(report_copy / "work/made_up/times/refine.json", {"g4seg/gs": timed(99)})
    shutil.rmtree(report_copy / "work/made_up/times/sample")
    assert main(["tables"]) == 0
    assert pd.read_csv(costs)["seconds"].dropna().unique().tolist() == [99], "an up-to-date phase also writes the costs"
    assert pd.read_csv(costs.with_name("sampling_costs.csv"))["source"].tolist() == ["published"]
    (report_copy / "work/made_up/times/refine.json").unlink()
    (folder / "manifest.json").unlink()
    assert main(["tables"]) == 0
    assert {path: path.read_bytes() for path in before} == before
    assert pd.read_csv(costs)["seconds"].isna().all()


def table_text(root: Path, name: str) -> str:
    return (root / f"results/made_up/tables/{name}.md").read_text()


def test_tables_of_controls_and_sensitivity_are_removed_without_scores(report_copy: Path) -> None:
    path = report_copy / RESULTS / "scores/refinement.json"
    content = json.loads(path.read_text())
    for key in ("rows", "means"):
        content[key] = [row for row in content[key] if row["refiner"] == "g4seg"]
    path.write_text(json.dumps(content))
    assert main(["tables"]) == 0
    assert {file.stem for file in (report_copy / RESULTS / "tables").glob("refinement*")} == {"refinement"}


# --------------------------------------------------------------------------------------------------------- print
def tex_cells(line: str) -> int:
    row = re.sub(r"(?<!\\)%.*", "", line).removesuffix(r"\\")
    spans = sum(int(width) - 1 for width in re.findall(r"\\multicolumn\{(\d+)\}", row))
    return len(re.findall(r"(?<!\\)&", row)) + 1 + spans


@pytest.mark.parametrize("name", NAMES)
def test_latex_is_balanced_ascii_and_has_rectangular_rows(report: Path, name: str) -> None:
    text = (report / f"results/made_up/tables/{name}.tex").read_text()
    layout = re.search(r"\\begin\{tabular\}\{@\{\}([lrc]+)@\{\}\}", text)
    assert layout
    body = text[layout.end() : text.index(r"\end{tabular}")]
    rows = [line.strip() for line in body.splitlines() if re.search(r"\\\\( %.*)?$", line.strip())]
    assert len(rows) > 1
    assert {tex_cells(row) for row in rows} == {len(layout[1])}
    for command in (r"\toprule", r"\midrule", r"\bottomrule", r"\caption", rf"\label{{tab:{name}}}"):
        assert command in text
    bare = re.sub(r"\\[{}]", "", text)
    assert bare.count("{") == bare.count("}")
    assert text.isascii(), set(filter(lambda c: not c.isascii(), text))
    for environment in ("table*", "tabular", "minipage"):
        assert text.count(rf"\begin{{{environment}}}") == text.count(rf"\end{{{environment}}}")


@pytest.mark.parametrize("columns", ["onecolumn", "twocolumn"])
def test_latex_compiles_with_booktabs_alone(report: Path, tmp_path: Path, columns: str) -> None:
    """All tables fit a page of two columns (469 pt); all but `protocols` fit one of one column (345 pt)."""
    if shutil.which("pdflatex") is None:
        pytest.skip("pdflatex is not installed")
    names = [name for name in NAMES if name != "protocols" or columns == "twocolumn"]
    inputs = "\\clearpage\n".join((report / f"results/made_up/tables/{name}.tex").read_text() for name in names)
    document = rf"\documentclass[{columns}]{{article}}\usepackage{{booktabs}}\begin{{document}}{inputs}\end{{document}}"
    (tmp_path / "paper.tex").write_text(document)
    command = ["pdflatex", "-draftmode", "-halt-on-error", "-interaction=nonstopmode", "paper.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-2000:]
    assert "Overfull" not in done.stdout


def test_latex_and_markdown_escape_special_characters(report: Path) -> None:
    tex = (report / "results/made_up/tables/miou.tex").read_text()
    assert r"50\%\_off \& \$5 \#1 \{a\textasciitilde{}b\textasciicircum{}c\textbackslash{}d\} $<$road$|$way$>$ & 25.0" in tex
    assert r"\<road\|way\> | 25.0 |" in (report / "results/made_up/tables/miou.md").read_text()


def test_latex_cell_with_leading_bracket_is_protected() -> None:
    """LaTeX reads `[` after `\\\\` as an optional argument."""
    frame = pd.DataFrame([{"a": "[x]", "ci_low": -1.0, "ci_high": 2.0, "scores": "s"}])
    text = to_tex(Table("t", "c", frame, [Column("a", "[A]", "text"), Column("ci", "CI", "interval")]))
    assert "\n{}[x] & {}[$-$1.0, 2.0]" in text
    assert "\n{}[A] & CI" in text
    assert escape_tex('a "b"\n c') == "a ''b'' c"


def test_values_are_printed_with_one_decimal_and_without_negative_zero() -> None:
    frame = pd.DataFrame([{"x": -0.04, "d": 0.04, "scores": "s"}, {"x": 12.349, "d": 1.26, "scores": "s"}])
    text = to_markdown(Table("t", "c", frame, [Column("x", "X"), Column("d", "D", "signed")]))
    assert "| 0.0 | 0.0 |" in text
    assert "| 12.3 | +1.3 |" in text


def test_plural_adds_an_s_except_for_one() -> None:
    assert [plural(count, "step") for count in (0, 1, 2)] == ["0 steps", "1 step", "2 steps"]


# --------------------------------------------------------------------------------------------------- figures, page
def test_examples_are_chosen_at_equidistant_quantiles() -> None:
    frame = per_phrase(41)
    assert choose_examples(frame, 5)["iou"].tolist() == pytest.approx([1.0, 0.75, 0.5, 0.25, 0.0])
    assert choose_examples(frame, 1)["iou"].tolist() == pytest.approx([0.5])
    assert len(choose_examples(frame.head(3), 6)) == 3
    shuffled = frame.sample(frac=1, random_state=1)
    assert choose_examples(shuffled.assign(iou=0.5), 4).equals(choose_examples(frame.assign(iou=0.5), 4))


def test_narratives_are_chosen_at_quantiles_of_their_mean_iou() -> None:
    """Image i has i + 1 phrases; those with more than seven have no colour for each phrase."""
    rows = [(image, "n", phrase, image / 10) for image in range(10) for phrase in range(image + 1)]
    frame = pd.DataFrame(rows, columns=["image_id", "narrative_id", "phrase_id", "iou"])
    chosen = choose_narratives(frame, 4)
    assert chosen["image_id"].tolist() == [6, 4, 2, 0]
    assert choose_narratives(frame.sample(frac=1, random_state=1), 4).equals(chosen)
    assert choose_narratives(frame[frame["image_id"] > 7], 4)["image_id"].tolist() == [9, 8]


def test_caption_is_split_into_words_of_its_phrases() -> None:
    caption = "A cat near the cat, beside A (red) mat."
    words = split_caption(caption, ["a cat", "the cat", "a (red) mat"])
    assert [word for word, _ in words] == ["A", "cat", "near", "the", "cat", ",", "beside", "A", "(red)", "mat", "."]
    assert [number for _, number in words] == [0, 0, None, 1, 1, None, None, 2, 2, 2, None]
    assert split_caption("Two cats", ["cat"]) == [("Two", None), ("cats", None), ("[cat]", 0)]
    assert split_caption(None, ["cat", "red mat"]) == [("cat", 0), ("red", 1), ("mat", 1)]


@pytest.mark.parametrize("width", [8.0, 13.0, 30.0])
def test_caption_lines_have_all_words_and_fit(width: float) -> None:
    words = split_caption("On the left a large red star, near some water.", ["a large red star", "some water"])
    lines = lay_out(words, width, len)
    assert [(word, part) for line in lines for _, text, part in line for word in text.split()] == words
    for line in lines:
        assert all(x + len(text) <= width for x, text, _ in line)
        assert all(a[0] + len(a[1]) <= b[0] for a, b in pairwise(line)), "parts do not overlap"
        assert line[0][0] == 0


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_each_failure_has_the_kind_of_its_definition(seed: int) -> None:
    """The oracle decodes every mask, and applies the three definitions to all failures, one at a time."""
    rng = np.random.default_rng(seed)
    boxes = [np.pad(np.ones((2, 3), bool), ((y, 4 - y), (x, 5 - x))) for y in range(5) for x in range(6)]
    masks = [np.zeros((6, 8), bool), *boxes, *(a | b for a, b in zip(boxes[::3], boxes[::-3], strict=True))]
    frame = per_phrase(24).assign(height=6, width=8, tags=None, phrase=[f"phrase {index}" for index in range(24)])
    truths, predicted = ([masks[index] for index in rng.integers(0, len(masks), 24)] for _ in range(2))
    phrases = frame.assign(mask=[encode(mask) for mask in truths])
    classes = phrases.iloc[::4].assign(mask=encode(masks[5]), phrase="class")
    predictions = frame.assign(mask=[encode(mask) for mask in predicted]).iloc[2:]

    failed = find_failures(frame, phrases, classes, predictions).set_index(["image_id", "phrase_id"])
    assert failed["iou"].is_monotonic_increasing
    for index, row in frame.iterrows():
        prediction = predicted[index] if index >= 2 else masks[0]
        others = [truth for truth, image in zip(truths, frame["image_id"], strict=True) if image == row["image_id"]]
        others = [other for other in [*others, masks[5]] if not np.array_equal(other, truths[index])]
        own, best = iou(prediction, truths[index]), max((iou(prediction, other) for other in others), default=0.0)
        kinds = {
            "wrong object": best > own and best >= 0.1,
            "boundary": own >= best and own >= 0.1,
            "missing": not prediction.any() or max(own, best) < 0.1,
        }
        assert sum(kinds.values()) == 1, "the definitions are exclusive and exhaustive"
        key = (row["image_id"], row["phrase_id"])
        assert (key in failed.index) == (own < 0.5)
        if own < 0.5:
            assert kinds[failed.loc[key, "kind"]]
            assert failed.loc[key, ["iou", "other_iou"]].tolist() == pytest.approx([own, best])


def iou(a: np.ndarray, b: np.ndarray) -> float:
    return np.count_nonzero(a & b) / max(np.count_nonzero(a | b), 1)


def test_failures_are_counted_by_kind_and_split(report: Path) -> None:
    frame = table(report, "failures").set_index("kind")
    assert frame.loc[["wrong object", "boundary", "missing"], SPLITS].sum().equals(frame.loc["all failures", SPLITS])
    assert frame.loc["all phrases", SPLITS].tolist() == [40, 20, 20, 40, 0]
    assert frame.loc["all failures", "overall"] == 40, "a diagonal line predicts no box"


def test_gallery_has_the_lowest_failures_of_each_kind_from_different_images() -> None:
    frame = per_phrase(40).assign(kind=["boundary", "missing"] * 20)
    chosen = choose_failures(frame.sample(frac=1, random_state=0), 3)
    assert {kind: len(rows) for kind, rows in chosen.items()} == {"wrong object": 0, "boundary": 3, "missing": 3}
    for kind in ("boundary", "missing"):
        best = frame[frame["kind"] == kind].groupby("image_id")["iou"].min().nsmallest(3)
        assert chosen[kind]["iou"].tolist() == best.tolist()


def test_readouts_of_a_record() -> None:
    x0 = np.array([[[[0, 0], [0, 0]], [[0, 255], [51, 204]]]], np.uint8)
    record = Evolution([999, 0], [(0, "0", 0)], x0, x0, unguided=x0[:, 0], decoded=np.full((1, 4, 4), 255, np.uint8))
    pictures = read_out(record, 0, 8, 8)
    assert np.allclose(pictures["nearest"], np.kron([[0, 1], [0.2, 0.8]], np.ones((4, 4)))), "the last estimate is read"
    assert pictures["bilinear"][0, [0, 7]].tolist() == [0, 1]
    assert pictures["VAE decoding"].shape == (8, 8)
    assert pictures["VAE decoding"].min() == 1
    assert pictures["bilinear, no CFG"].max() == 0
    assert "VAE decoding" not in read_out(replace(record, decoded=None), 0, 8, 8)


def test_evolution_shows_the_timesteps_of_the_paper_and_the_last() -> None:
    fifty = list(range(999, 0, -20))
    assert [fifty[index] for index in choose_timesteps(fifty)] == [999, 759, 519, 279, 19]
    assert choose_timesteps([999, 500, 1]) == [0, 1, 2]


def test_same_inputs_give_the_same_bytes(report_copy: Path) -> None:
    folders = [report_copy / "results/made_up" / name for name in ("tables", "figures")]
    before = {path: path.read_bytes() for folder in folders for path in folder.iterdir()}
    (folders[0] / "index.html").unlink()
    assert main(["tables"]) == 0
    assert {path: path.read_bytes() for path in before} == before
    picture = Image.open(io.BytesIO(before[folders[1] / "examples.png"]))
    assert not {"Software", "Creation Time", "Date"} & set(picture.info)


def test_page_is_self_contained_and_has_no_dead_links(report: Path) -> None:
    folder = report / "results/made_up/tables"
    page = (folder / "index.html").read_text()
    links = re.findall(r'(?:href|src)="([^"#]+)"', page)
    assert {"../figures/examples.png", "../figures/evolution.png", "table2.csv", "manifest.json"} <= set(links)
    assert all((folder / link).resolve().exists() for link in links)
    assert set(re.findall(r'href="#([^"]+)"', page)) <= set(re.findall(r'id="([^"]+)"', page))
    assert "<h1>GS label diffusion: study made_up</h1>" in page
    assert "&lt;road|way&gt;" in page
    assert "a device" in page
    assert "http" not in page


def test_manifest_lists_all_written_files(report: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(report)
    manifest = read_manifest("results/made_up/tables/manifest.json", verify=True)
    written = {
        str(path.relative_to(report))
        for name in ("tables", "figures")
        for path in (report / "results/made_up" / name).iterdir()
    }
    assert set(manifest["outputs"]) == written - {"results/made_up/tables/manifest.json"}
    assert "results/made_up/scores/main.json" in manifest["inputs"]
    provenance = {name for name in manifest["inputs"] if name.endswith("manifest.json")}
    assert provenance == {str(path) for path in manifest_paths(load_params("params.yaml")).values()}


# ------------------------------------------------------------------------------------------------------ bad input
@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("scores/main.json", "results/made_up/scores/main.json: no such file; run `genseg score`"),
        ("scores/readouts/vae.json", "readouts/vae.json: no such file; run `genseg score`"),
        ("scores/protocols/main.ppmn.json", "protocols/main.ppmn.json: no such file"),
        ("scores/protocols/baselines/diffseg.ppmn.json", "protocols/baselines/diffseg.ppmn.json: no such file"),
        (
            "scores/grid/size=0064/steps=0050/cfg=07.50.json",
            "no scores of the operating point size 64, 50 steps, w = 7.5; run `genseg sample`",
        ),
        ("predictions/evolution.safetensors", "evolution.safetensors: no such file; run `genseg sample`"),
        ("predictions/main/predictions.parquet", "no such predictions file"),
        ("scores/baselines/diffseg.json", "diffseg.json: no such file; run `genseg score`"),
        ("scores/refinement.json", "refinement.json: no such file; run `genseg score`"),
        ("model/gs/manifest.json", "results/made_up/model/gs/manifest.json: no such file"),
    ],
)
def test_missing_file_is_named(report_copy: Path, capsys: pytest.CaptureFixture[str], path: str, message: str) -> None:
    (report_copy / "results/made_up" / path).unlink()
    assert message in error_of(capsys)


def test_broken_scores_file_is_named(report_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores = report_copy / "results/made_up/scores"
    good = (scores / "main.json").read_text()
    (scores / "main.json").write_text(good[:100])
    assert "main.json: not valid JSON" in error_of(capsys)
    (scores / "main.json").write_text(json.dumps({k: v for k, v in json.loads(good).items() if k != "ceiling"}))
    assert "main.json: no ceiling in the scores" in error_of(capsys)
    (scores / "main.json").write_text(good)
    comparisons = json.loads((scores / "comparisons.json").read_text())
    del comparisons["main - discriminative (things)"]
    write_json(scores / "comparisons.json", comparisons)
    assert "comparisons.json: no comparison 'main - discriminative (things)'" in error_of(capsys)


def test_broken_published_file_is_named(report_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = report_copy / "data/published/table4_steps.csv"
    text = path.read_text()
    path.write_text(text.replace("69.3", "sixty"))
    assert "table4_steps.csv: row 1, column overall: expected a number, got 'sixty'" in error_of(capsys)
    path.write_text(text.replace("plurals", "plural"))
    assert "table4_steps.csv: no column plurals" in error_of(capsys)


def test_inconsistent_figure_inputs_are_named(report_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evolution = report_copy / "results/made_up/predictions/evolution.safetensors"
    good = evolution.read_bytes()
    evolution.write_bytes(good[:-10])
    assert "evolution.safetensors: not a readable record" in error_of(capsys)
    maps = np.zeros((1, 3, 8, 8), np.uint8)
    save_file(
        {"x0": maps, "xt": maps, "unguided": maps[:, 0]},
        evolution,
        metadata={"evolution": '{"timesteps": [999, 499, 19], "keys": [[77, "0", 0]]}'},
    )
    assert "phrase (77, '0', 0) of the evolution figure is not in the phrase table" in error_of(capsys)
    evolution.write_bytes(good)
    (report_copy / "results/made_up/figures/examples.png").unlink()
    for image in (report_copy / "data/made_up/images").iterdir():
        Image.fromarray(np.zeros((10, 10, 3), np.uint8)).save(image)
    assert "the image is 10 x 10 pixels, the phrase table says 24 x 32" in error_of(capsys)


def test_trainings_of_a_seeds_sweep_are_a_row_of_table_2(report_copy):
    params = load_params("params.yaml")
    points = {split: [70.0 + index, 1.25] for index, split in enumerate(SPLITS)} | {"miou": [50.0, 0.5]}
    summary = {"seeds": [0, 1, 2], "points": points, "scores": [], "params": params.subtree(*SEEDS_KEYS)}
    path = RESULTS / "sweeps/seeds/seeds.json"
    write_json(path, summary)
    write_json(RESULTS / "sweeps/old/seeds.json", summary | {"seeds": [0, 1, 2, 3], "params": {}})  # of other params
    assert main(["tables", "--params", "params.yaml"]) == 0
    table = pd.read_csv(RESULTS / "tables/table2.csv").set_index("method")
    row = table.loc["GS, mean of 3 trainings"]
    assert row[SPLITS].tolist() == [points[split][0] for split in SPLITS]
    assert row["scores"] == str(path)
    text = (RESULTS / "tables/table2.md").read_text()
    assert "overall 70.0 ± 1.2" in text
    assert "mIoU 50.0 ± 0.5" in text
    assert str(path) in read_manifest(RESULTS / "tables/manifest.json")["inputs"]
    path.unlink()
    assert main(["tables", "--params", "params.yaml"]) == 0
    assert "mean of 3 trainings" not in (RESULTS / "tables/table2.csv").read_text()


def test_highest_value_of_a_column_is_bold():
    frame = pd.DataFrame({"a": [3.04, 3.0, 2.0], "a_sd": [0.5, None, 0.5], "b": [None, 1.0, None], "scores": "f"})
    table = Table("t", "c", frame, [Column("a", "A", "spread", best=True), Column("b", "B", best=True)])
    rows = [line.split(" \\\\ ")[0] for line in to_tex(table).splitlines() if line.endswith("% f")]
    assert rows == [r"\textbf{3.0 $\pm$ 0.5} & ---", r"\textbf{3.0} & 1.0", r"2.0 $\pm$ 0.5 & ---"]
    assert "| **3.0** | 1.0 |" in to_markdown(table)
