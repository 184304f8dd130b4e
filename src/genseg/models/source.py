"""Source of a pipeline's weights: a local directory or a hub id, its commit, and a hash of the weights."""

import fcntl
from pathlib import Path
from typing import Any, NamedTuple

from genseg.artifacts.files import file_sha256, read_json, write_json
from genseg.artifacts.manifest import read_manifest
from genseg.errors import UserError
from genseg.params import Params, digest
from genseg.params.baselines import Baselines
from genseg.params.refine import Refine


class PipelineSource(NamedTuple):
    """Local directory or hub id (owner/name) of a pipeline, its commit (None for a directory), and `weights_hash`."""

    path_or_id: str
    revision: str | None
    weights_hash: str


class Commit(NamedTuple):
    """Commit of a hub repository (40 hexadecimal digits), and the licence in its model card; None for a directory."""

    sha: str | None
    licence: str | None


def backbones(params: Params) -> dict[str, tuple[str, str | None]]:
    """Return the params key of each pretrained pipeline that the study loads, with its (directory or hub id, revision)."""
    chosen = {"backbone.init": (params.backbone.init, params.backbone.revision)}
    if params.sample.has_tables():
        if params.baselines.attention:
            chosen["baselines.backbone"] = (params.baselines.backbone, params.baselines.revision)
        chosen["refine.backbone"] = (params.refine.backbone, params.refine.revision)
    return {key: (source, revision) for key, (source, revision) in chosen.items() if source is not None}


def chosen_backbone(params: Params, phase: Baselines | Refine) -> PipelineSource:
    """Return the source of the pipeline that a phase uses: its own `backbone` if set, else that of the study.

    Raises UserError if the commit of a hub id cannot be determined, or the phase `backbone` has not run.
    """
    if phase.backbone is not None:
        key = "refine.backbone" if isinstance(phase, Refine) else "baselines.backbone"
        commit = study_commit(params, key, phase.backbone, phase.revision)
        return PipelineSource(phase.backbone, commit, weights_hash(phase.backbone, commit))
    manifest = read_manifest(params.results_dir / "backbone" / "manifest.json")
    return PipelineSource(manifest["pipeline"], manifest["revision"], manifest["weights"])


def commits_path(params: Params) -> Path:
    """Return the file with the source, revision, commit and licence of each backbone by its params key."""
    return params.results_dir / "preflight" / "backbones.json"


def study_commit(params: Params, key: str, source: str, revision: str | None) -> str | None:
    """Return the commit of the backbone of a params key (see `study_backbone`); None for a local directory."""
    return None if Path(source).is_dir() else study_backbone(params, key, source, revision)["commit"]


def study_backbone(params: Params, key: str, source: str, revision: str | None) -> dict[str, Any]:
    """Return the source, revision, commit and licence of the backbone of a params key, so that all jobs load the same weights.

    They are recorded in `commits_path` by the first job that asks, which is `preflight` unless the params have changed since.

    Raises UserError as `find_commit` does.
    """
    path = commits_path(params)
    path.parent.mkdir(parents=True, exist_ok=True)
    params.work_dir.mkdir(parents=True, exist_ok=True)
    with open(params.work_dir / "backbones.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        record = recorded_backbone(params, key, source, revision)
        if record is None:
            commit = find_commit(source, revision, key)
            record = {"source": source, "revision": revision, "commit": commit.sha, "licence": commit.licence}
            write_json(path, (read_json(path) if path.exists() else {}) | {key: record})
    return record


def recorded_backbone(params: Params, key: str, source: str, revision: str | None) -> dict[str, Any] | None:
    """Return the record of a backbone in `commits_path`, or None if there is none of this source and revision."""
    path = commits_path(params)
    record = read_json(path).get(key) if path.exists() else None
    return record if record and (record["source"], record["revision"]) == (source, revision) else None


def find_commit(source: str, revision: str | None, key: str = "source") -> Commit:
    """Return the current commit of a hub id's revision, and its licence.

    If the hub cannot be reached, as on many compute nodes, or no longer has the repository, the commit in the local cache is
    used and a message is printed.

    Raises UserError, with the `key` of the params, if there is no commit and the cache has no copy.
    """
    if Path(source).is_dir():
        return Commit(None, None)
    if source.startswith((".", "/")) or source.count("/") != 1:
        raise UserError(f"{key}: {source}: no such directory and not a hub id (owner/name); set it to one of them")
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        info = HfApi().model_info(source, revision=revision, timeout=30)
        return Commit(info.sha, getattr(info.card_data, "license", None))
    except HFValidationError as error:
        raise UserError(f"{key}: {source}: not a hub id ({' '.join(str(error).split())[:200]})") from None
    except RepositoryNotFoundError:
        problem = "the hub has no such repository (withdrawn, renamed or private)"
        remedy = f"set {key} to an id that exists, such as a mirror of it, or to a local diffusers directory"
    except RevisionNotFoundError:
        problem = f"the repository has no revision {revision}"
        remedy = f"correct {key.rpartition('.')[0]}.revision, or set it to null"
    except Exception as error:  # httpx and huggingface_hub raise many unrelated types
        problem = f"cannot reach the hub ({' '.join(str(error).split())[:200]}), and the cache has no copy"
        remedy = f"run `hf download {source}` where there is a network, or set {key} to a local diffusers directory"
    cached = try_to_load_from_cache(source, "model_index.json", revision=revision)
    if not isinstance(cached, str):
        raise UserError(f"{key}: {source}: {problem}; {remedy}")
    commit = Path(cached).parent.name
    print(
        f"{key}: {source}: {problem.removesuffix(', and the cache has no copy')}; using the cached commit {commit}", flush=True
    )
    return Commit(commit, None)


def read_repository(source: str, file: str, revision: str | None, key: str) -> dict[str, Any]:
    """Read a JSON file of a pipeline directory or hub repository, without weights.

    Raises UserError, with the `key` of the params, if the file or the repository is missing, or access needs an agreement.
    """
    if Path(source).is_dir():
        if not (Path(source) / file).is_file():
            raise UserError(f"{key}: {source}: missing {file}; expected a Stable Diffusion pipeline in diffusers format")
        return read_json(Path(source) / file)
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, LocalEntryNotFoundError

    try:
        return read_json(hf_hub_download(source, file, revision=revision))
    except GatedRepoError:
        problem = f"its licence must be accepted on https://huggingface.co/{source}, with the account of `hf auth login`"
    except LocalEntryNotFoundError as error:
        reason = " ".join(str(error).split())[:200]
        problem = f"cannot download {file} ({reason}); run `hf download {source}` where there is a network"
    except EntryNotFoundError:
        problem = f"missing {file}; expected a Stable Diffusion pipeline in diffusers format"
    except Exception as error:  # httpx and huggingface_hub raise many unrelated types
        problem = (
            f"cannot download {file} ({' '.join(str(error).split())[:200]}); expected a directory or a hub id (owner/name)"
        )
    raise UserError(f"{key}: {source}: {problem}")


def weights_hash(source: str, revision: str | None) -> str:
    """Return a hash that identifies the weights: a hash of all files of a directory, or of a hub id and its commit."""
    folder = Path(source)
    if not folder.is_dir():
        return digest([source, revision])
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return digest({path.relative_to(folder).as_posix(): file_sha256(path) for path in files})
