"""Source of a pipeline's weights: a local directory or a hub id, its commit, and a hash of the weights."""

import re
from pathlib import Path
from typing import Any, NamedTuple

from diffusers import UNet2DConditionModel

from genseg.artifacts.files import file_sha256
from genseg.artifacts.manifest import read_manifest
from genseg.errors import UserError
from genseg.models.backbone import load_config
from genseg.params import Params, digest
from genseg.params.baselines import Baselines
from genseg.params.refine import Refine


class PipelineSource(NamedTuple):
    """Local directory or hub id (owner/name) of a pipeline, its commit (None for a directory), and `weights_hash`."""

    path_or_id: str
    revision: str | None
    weights_hash: str


def chosen_backbone(params: Params, phase: Baselines | Refine) -> PipelineSource:
    """Return the source of the pipeline that a phase uses: its own `backbone` if set, else that of the study.

    Raises UserError if the commit of a hub id cannot be determined, or the phase `backbone` has not run.
    """
    if phase.backbone is not None:
        commit = find_commit(phase.backbone, phase.revision)
        return PipelineSource(phase.backbone, commit, weights_hash(phase.backbone, commit))
    manifest = read_manifest(params.results_dir / "backbone" / "manifest.json")
    return PipelineSource(manifest["pipeline"], manifest["revision"], manifest["weights"])


def find_commit(source: str, revision: str | None) -> str | None:
    """Return the current commit (40 hexadecimal digits) of a hub id's revision, so that all jobs load the same weights.

    If the hub cannot be reached, as on many compute nodes, the commit in the local cache is used and a message is printed.
    Returns None for a local directory, which has no commit.

    Raises UserError if the hub cannot be reached and the cache has no copy.
    """
    if Path(source).is_dir():
        return None
    if revision and re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision
    from huggingface_hub import HfApi, try_to_load_from_cache

    try:
        return HfApi().model_info(source, revision=revision).sha
    except Exception as error:  # httpx and huggingface_hub raise many unrelated types
        reason = " ".join(str(error).split())[:200]
    try:
        cached = try_to_load_from_cache(source, "model_index.json", revision=revision)
    except ValueError:  # not a valid hub id
        cached = None
    if not isinstance(cached, str):
        raise UserError(
            f"{source}: cannot get its commit from the hub ({reason}), and the cache has no copy; download it first"
        )
    commit = Path(cached).parent.name
    print(f"{source}: cannot reach the hub ({reason}); using the cached commit {commit}", flush=True)
    return commit


def weights_hash(source: str, revision: str | None) -> str:
    """Return a hash that identifies the weights: a hash of all files of a directory, or of a hub id and its commit."""
    folder = Path(source)
    if not folder.is_dir():
        return digest([source, revision])
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return digest({path.relative_to(folder).as_posix(): file_sha256(path) for path in files})


def load_unet_config(source: str, revision: str | None) -> dict[str, Any]:
    """Load the config of the U-Net (see `load_config`)."""
    return load_config(UNet2DConditionModel, source, "unet", revision)
