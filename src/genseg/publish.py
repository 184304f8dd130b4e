"""Upload of a trained model to the Hugging Face hub."""

from typing import Any

from huggingface_hub import EvalResult, HfApi, ModelCard

from genseg.artifacts.files import file_sha256
from genseg.artifacts.manifest import read_manifest
from genseg.artifacts.scores import read_summary
from genseg.errors import UserError
from genseg.params import OperatingPoint, Params
from genseg.training.card import NOT_SCORED
from genseg.training.stages import Kind

SPLITS = ("overall", "singulars", "plurals", "things", "stuff")


def publish(params: Params, kind: Kind, repo_id: str, private: bool) -> str:
    """Upload `results/<study>/model/<kind>` to the hub of HF_ENDPOINT, and return the URL of the repository.

    The card gets the scores of the study if they are those of this model.

    Raises UserError if the model is missing or incomplete, the id is not valid, or the upload fails.
    """
    folder = params.model_dir(kind)
    read_manifest(folder / "manifest.json", verify=True)
    card = scored_card(params, kind)
    card.text = card.text.replace('from_pretrained("ID")', f'from_pretrained("{repo_id}")')
    api = HfApi()
    try:
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=folder, ignore_patterns="README.md")
        api.upload_file(repo_id=repo_id, path_or_fileobj=str(card).encode(), path_in_repo="README.md")
    except Exception as error:  # huggingface_hub and its HTTP client raise many types
        detail = " ".join(str(error).split())[:200]
        raise UserError(f"{repo_id}: not published ({detail}); check HF_ENDPOINT, and log in with `hf auth login`") from None
    return str(url)


def scored_card(params: Params, kind: Kind) -> ModelCard:
    """Return the card of a trained model with the scores of the study, if they are those of this model."""
    path = params.model_dir(kind) / "README.md"
    if not path.exists():
        raise UserError(f"{path}: no model card; run `genseg train --model {kind}` again, which writes it")
    card = ModelCard.load(path)
    run = "main" if kind == "gs" else kind
    scores, manifest = params.results_dir / "scores" / f"{run}.json", params.model_dir(kind) / "manifest.json"
    predictions = params.results_dir / "predictions" / run / "predictions.parquet"
    try:
        sampled = read_manifest(params.results_dir / "predictions/manifest.json", verify=True)["inputs"]
        scored = read_manifest(params.results_dir / "scores/manifest.json", verify=True)["inputs"]
        is_current = all(
            inputs[str(file)] == file_sha256(file) for inputs, file in ((sampled, manifest), (scored, predictions))
        )
    except (UserError, OSError, KeyError):
        is_current = False
    if is_current:
        summary = read_summary(scores)
        card.text = card.text.replace(NOT_SCORED, score_text(summary))
        card.data.model_name = repo_name = params.study
        card.data.eval_results = [
            EvalResult("image-segmentation", params.data.source, repo_name, name, value, dataset_split=summary["split"])
            for name, value in (("average_recall", summary["ar"]["overall"]), ("mean_iou", (summary["miou"] or {}).get("mean")))
            if value is not None
        ]
    return card


def score_text(summary: dict[str, Any]) -> str:
    """Return the scores of one run as Markdown: AR of each split and mIoU with 95 % intervals."""
    point = OperatingPoint.model_validate(summary["run"]["point"]) if summary["run"]["point"] else None
    counts = summary["counts"]
    lines = [
        f"Measured on {summary['split']} of the study's own data: {counts['images']:,} images, {counts['phrases']:,} phrases, "
        f"protocol `{summary['protocol']}`, {point or 'one forward pass'}. Intervals are 95 % bootstrap intervals over images.",
        "",
        "| score | value | interval |",
        "|---|---|---|",
    ]
    rows = [(f"AR, {name}", summary["ar"][name], summary["interval"][name]) for name in SPLITS]
    if miou := summary["miou"]:
        rows.append(("mIoU", miou["mean"], miou["interval"]))
    for name, value, interval in rows:
        if value is not None:
            bounds = "-" if interval is None else "{:.1f} to {:.1f}".format(*(100 * bound for bound in interval))
            lines.append(f"| {name} | {100 * value:.1f} | {bounds} |")
    return "\n".join(lines)
