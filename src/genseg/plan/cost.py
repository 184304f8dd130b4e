"""Parameters, memory, bytes, operations and hours of a study, from its params and its data's counts."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn

from genseg.data.download import SOURCES, read_sources
from genseg.errors import UserError
from genseg.latents import PSNR_IMAGES, image_store, text_store
from genseg.models.adapter import TextAdapter
from genseg.models.attention import self_attention_widths
from genseg.models.flops import GPUS, Gpu, meta_text_encoder, meta_unet, text_flops, training_flops, unet_flops, vae_flops
from genseg.models.memory import activation_bytes, decoding_bytes
from genseg.models.miniature import build_miniature
from genseg.params import Params
from genseg.plan.counts import TABLES, Counts, count_data
from genseg.plan.generator import (
    BYTES,
    Generator,
    add_artifacts,
    add_baseline_phases,
    add_refine_phases,
    find_generator,
    plan_generators,
    read_configs,
    size_of,
)
from genseg.sampling.runs import study_runs
from genseg.training.checkpoints import KEEP
from genseg.training.export import FOLDERS
from genseg.training.stages import Kind, stage_spans
from genseg.training.validation import BANDS

_TYPES = {4: "F32", 2: "BF16", 1: "U8", 8: "I64"}


def make_plan(params: Params, gpu: str, gpus: int, mfu: float) -> dict[str, Any]:
    """The plan as JSON values: `counts`, `parameters`, `memory`, `artifacts`, `phases` and what they assume.

    Nothing is loaded but configs; of a finished study what was measured stands beside what is planned.

    Raises:
        UserError: the backbone is neither a local directory nor the known hub id, the GPU is not in the table, or nothing
            tells how much data there is.
    """
    if gpu not in GPUS:
        raise UserError(f"--gpu {gpu}: known are {', '.join(GPUS)}")
    configs, origin = backbone_configs(params)
    local = Path(origin) if (Path(origin) / "tokenizer").is_dir() else None
    counts = count_data(params, str(local) if local else None)
    networks = Networks(params, configs, counts)
    own = Generator(configs, origin)
    attends = find_generator(params.baselines.backbone, "baselines.backbone", own)
    refines = find_generator(params.refine.backbone, "refine.backbone", own)
    whole = params.sample.is_whole()  # else nothing is refined
    return {
        "study": params.study,
        "backbone": origin,
        "gpu": gpu,
        "gpus": gpus,
        "mfu": mfu,
        "counts": vars(counts),
        "parameters": networks.parameters,
        "memory": plan_memory(params, networks, GPUS[gpu], gpus)
        | {"generators": plan_generators(params, counts, attends, refines, GPUS[gpu]) if whole else {}},
        "artifacts": plan_artifacts(params, networks, counts, (own, attends) if whole else None),
        "phases": plan_phases(params, networks, counts, GPUS[gpu], gpus, mfu, (attends, refines) if whole else None),
    }


def backbone_configs(params: Params) -> tuple[dict[str, dict[str, Any]], str]:
    """Configs of unet, vae, text_encoder and text_encoder_2, and where they come from."""
    backbone, trained = params.backbone, params.results_dir / "backbone" / "pipeline"
    source = str(trained) if (trained / "model_index.json").exists() else backbone.init
    if source is None:
        assert backbone.shape is not None
        pipeline = build_miniature(backbone.shape, backbone.size, [], 0)
        configs: dict[str, dict[str, Any]] = {name: dict(getattr(pipeline, name).config) for name in ("unet", "vae")}
        for name in ("text_encoder", "text_encoder_2"):
            config = getattr(pipeline, name).config.to_dict()
            configs[name] = config | {"vocab_size": max(config["vocab_size"], backbone.shape.vocabulary)}
        return configs, "backbone.shape, with the largest vocabulary it allows"
    configs = read_configs(source, "backbone.init")
    if "text_encoder_2" not in configs:
        raise UserError(f"backbone.init: {source}: no second text encoder; GS is fine-tuned from an SDXL-inpainting pipeline")
    return configs, source


class Networks:
    """The study's networks as shapes: configs, parameters, and operations and activations where they are asked for."""

    def __init__(self, params: Params, configs: dict[str, dict[str, Any]], counts: Counts) -> None:
        self.train = params.train
        labels = 1 if params.train.label == "mask" else configs["vae"]["latent_channels"]
        self.unet = configs["unet"] | {"in_channels": labels + 4, "out_channels": labels}
        self.vae, self.encoders = configs["vae"], (configs["text_encoder"], configs["text_encoder_2"])
        self.factor = 2 ** (len(self.vae["block_out_channels"]) - 1)
        self.tokens = max(2, round(counts.tokens / counts.texts))
        self.inject = params.train.inject == "all"
        unet = meta_unet(self.unet)
        self.token_width = sum(config["hidden_size"] for config in self.encoders)
        self.pooled_width = self.encoders[1]["projection_dim"]
        with torch.device("meta"):
            adapter = TextAdapter(
                token_width=self.token_width,
                pooled_width=self.pooled_width,
                widths=tuple(self_attention_widths(unet)) if self.inject else (),
                text=params.train.text,
                null_tokens=2 if params.train.text == "tokens" else 1,
            )
            vae = AutoencoderKL.from_config(self.vae)
        self.modules: dict[str, nn.Module] = {
            "unet": unet,
            "adapter": adapter,
            "vae": vae,
            "text_encoder": meta_text_encoder(self.encoders[0], projection=False),
            "text_encoder_2": meta_text_encoder(self.encoders[1], projection=True),
        }
        self.parameters = {name: size_of(module) for name, module in self.modules.items()}
        self.trained = self.parameters["unet"] + self.parameters["adapter"]
        self.largest_unit = largest_unit(unet)

    def latent(self, size: int) -> int:
        """Side of the label latent of a `size` x `size` image."""
        return size // self.factor

    def evaluation(self, size: int) -> int:
        return unet_flops(self.unet, self.latent(size), self.tokens, self.inject)

    def text(self) -> int:
        return sum(text_flops(config, self.tokens, bool(k)) for k, config in enumerate(self.encoders))

    def activations(self, size: int, batch: int, precision: str, **options: bool) -> int:
        return activation_bytes(self.unet, self.latent(size), self.tokens, self.inject, batch, precision, **options)


def largest_unit(unet: UNet2DConditionModel) -> int:
    """Parameters of the largest piece that sharding gathers at a time: a transformer block, a residual block, or the rest."""
    units = [
        size_of(module) for module in unet.modules() if type(module).__name__ in ("BasicTransformerBlock", "ResnetBlock2D")
    ]
    return max(*units, size_of(unet) - sum(units))


# ------------------------------------------------------------------------------------------------------------- memory
def plan_memory(params: Params, networks: Networks, gpu: Gpu, gpus: int) -> dict[str, Any]:
    """Bytes on each GPU. Training: fp32 weights, gradients and two moments, the average, autocast's 16-bit copies,
    a teacher where a stage distils, activations of one micro-batch; sharded (FSDP), the state is divided and one unit at a
    time is whole, the next under way.
    """
    train, sample = params.train, params.sample
    trained, half = networks.trained, train.precision != "fp32"
    distils = any(stage.objective == "distill" for stage in train.stages)
    activations = {
        checkpointing: networks.activations(train.size, train.micro_batch, train.precision, checkpointing=checkpointing)
        for checkpointing in (False, True)
    }
    training = []
    for shards in (1, *sorted({2, 4, 8, gpus} - {1})):
        state = {
            "weights": 4 * trained // shards,
            "gradients": 4 * trained // shards,
            "moments": 8 * trained // shards,
            "average": 4 * trained // shards if train.ema else 0,
            "teacher": 4 * trained // shards if distils else 0,
        }
        for checkpointing, held in activations.items():
            # Autograd keeps the 16-bit weights of all layers for the way back, unless these are computed again. Sharded, one
            # unit at a time is whole and the next under way.
            unit = 2 * half if shards == 1 else 2 * (2 if half else 4) + 4
            state["copies"] = 2 * trained * half * (not checkpointing) + unit * networks.largest_unit
            total = sum(state.values()) + held
            training.append(
                {
                    "sharding": "replicate" if shards == 1 else f"FSDP over {shards}",
                    "checkpointing": checkpointing,
                    **state,
                    "activations": held,
                    "total": total,
                    "fits": total < gpu.memory,
                    "chosen": checkpointing == train.gradient_checkpointing,
                }
            )
    rows = sample.batch * (1 if sample.main.guidance == sample.base.guidance == 1 else 2)
    weights = BYTES[sample.precision] * sum(networks.parameters.values())
    held = networks.activations(max(sample.sizes()), rows, sample.precision, training=False)
    if train.label == "vae" or any(run.readout == "vae" for run in study_runs(params)):
        held = max(held, decoding_bytes(networks.vae, max(sample.sizes()), sample.batch, sample.precision))
    return {
        "training": training,
        "micro_batch": train.micro_batch,
        "sampling": {"weights": weights, "activations": held, "total": weights + held, "fits": weights + held < gpu.memory},
        "measured_rss": {
            name: rss
            for name in ("train_gs", "train_control", "baselines", *(f"refine.shard={k}" for k in range(params.refine.shards)))
            if (rss := _benchmark(params, name, "max_rss")) is not None
        },
    }


# ---------------------------------------------------------------------------------------------------------- artifacts
def safetensors_bytes(tensors: dict[str, tuple[tuple[int, ...], int]], metadata: dict[str, str]) -> int:
    """Bytes of a safetensors file of tensors {name: (shape, bytes an element)}: length, header padded to 8, payload."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, (shape, element) in sorted(tensors.items(), key=lambda item: (-item[1][1], item[0])):
        start, end = end, end + math.prod(shape) * element
        header[name] = {"dtype": _TYPES[element], "shape": list(shape), "data_offsets": [start, end]}
    return 8 + -(-len(json.dumps(header, separators=(",", ":"))) // 8) * 8 + end


def maps_bytes(count: int, side: int) -> int:
    """Of a file of `count` soft maps."""
    return safetensors_bytes({"maps": ((count, side, side), 1)}, {})


def _module_bytes(module: nn.Module) -> int:
    tensors = {name: (tuple(tensor.shape), 4) for name, tensor in module.state_dict().items()}
    return safetensors_bytes(tensors, {"format": "pt"})


def plan_artifacts(
    params: Params, networks: Networks, counts: Counts, generators: tuple[Generator, Generator] | None
) -> list[dict[str, Any]]:
    """Every artifact: bytes; whether they are exact, given the counts; what lies there now, where something does.

    Args:
        generators: the study's own and the baselines' one, where there is refinement.
    """
    exact = "exact" if counts.exact else "follows the counts"
    rows: list[dict[str, Any]] = []

    def add(name: str, size: float, basis: str, *paths: Path) -> None:
        there = [path for path in paths if path.exists()]
        rows.append(
            {
                "artifact": name,
                "bytes": round(size),
                "basis": basis,
                "measured": sum(path.stat().st_size for path in there) if there else None,
            }
        )

    if params.data.png is not None and params.data.source == "png" and SOURCES.exists():
        png = params.data.png
        folders = {"images": png.images, "annotations": png.annotations, "narratives": png.narratives}
        published = [remote.bytes or 0 for remote in read_sources(SOURCES, folders)]
        add("downloads (and as much unpacked)", sum(published), "published sizes; narratives not published")
    elif counts.picture_bytes is not None:
        add("images", counts.picture_bytes, exact if counts.exact else "estimate")
    rows_of_tables = counts.train + counts.val + counts.rows["test"] + counts.rows["class_phrases"]
    tables = [params.data_dir / name for name in TABLES]
    add("phrase tables", counts.row_bytes * rows_of_tables, "estimate", *tables)
    for size, images in counts.image_latents.items():
        side, element = networks.latent(size), BYTES[params.latents.precision]
        shard, shards = params.latents.shard_rows, math.ceil(images / params.latents.shard_rows)
        metadata = {"key": "0" * (16 + 1 + len(str(size)) + 1 + 64)}
        parts = [min(shard, images - number * shard) for number in range(shards)]
        total = sum(safetensors_bytes({"latent": ((part, 4, side, side), element)}, metadata) for part in parts)
        add(f"image latents {size}", total, exact, *image_store(params, size).glob("shard-*.safetensors"))
    text = 4 * (counts.tokens * networks.token_width + counts.texts * networks.pooled_width) + 8 * (counts.texts + 1)
    basis = exact + ", but for headers" if counts.exact else exact
    add("text embeddings", text, basis, *text_store(params).glob("shard-*.safetensors"))
    for kind, folder in FOLDERS.items():
        weights = sum(_module_bytes(module) for module in networks.modules.values())
        add(f"{folder}: weights", weights, "exact", *(params.results_dir / folder).glob("*/*.safetensors"))
        copies = 4 * networks.trained * (1 + 2 + bool(params.train.ema))
        kept = sorted((params.work_dir / "train").glob(f"{kind}-*/step-*.pt"))[-KEEP:]
        add(f"{folder}: {KEEP} checkpoints (a third while one is written)", KEEP * copies, "exact, but for headers", *kept)
        if kind == "gs" and (distilled := sum(stage.objective == "distill" for stage in params.train.stages)):
            kept = sorted((params.work_dir / "train").glob(f"{kind}-*/teacher-*.pt"))
            add(f"{folder}: teachers", 4 * networks.trained * distilled, "exact, but for headers", *kept)
    maps, predictions, found_maps, found = 0, 0.0, [], []
    for run in study_runs(params):
        count = counts.rows[run.phrases]
        predictions += counts.row_bytes * count
        path = params.results_dir / "predictions" / run.name / "predictions.parquet"
        found.append(path)
        if run.size is not None and count:
            decoded = params.train.label == "vae" and run.method == "gs"
            side = run.size if decoded else networks.latent(run.size)
            maps += maps_bytes(count, side)
            found_maps.append(path.with_suffix(".safetensors"))
    add("soft label maps", maps, exact, *found_maps)
    add("predictions", predictions, "estimate", *found)
    if generators is not None:
        add_artifacts(add, maps_bytes, params, counts, *generators)
    return rows


# ------------------------------------------------------------------------------------------------------------- phases
def plan_phases(
    params: Params,
    networks: Networks,
    counts: Counts,
    gpu: Gpu,
    gpus: int,
    mfu: float,
    generators: tuple[Generator, Generator] | None,
) -> list[dict[str, Any]]:
    """Evaluations (U-Net passes for one phrase; a training sample's forward and backward are one), operations, hours.

    Training counts a recomputed forward pass where checkpointing asks for one.

    Args:
        mfu: part of the peak that is reached.
        generators: that of the baselines and that of refinement, where there is refinement.
    """
    train, sample = params.train, params.sample
    rows: list[dict[str, Any]] = []

    def add(
        phase: str,
        what: str,
        evaluations: int,
        flops: float,
        precision: str | None,
        *benchmarks: str,
        seconds: float | None = None,
    ) -> None:
        """`precision`: None for work on the CPU; `seconds`: measured elsewhere than in Snakemake's `benchmarks`."""
        peak = gpu.single if precision == "fp32" else gpu.half
        found = [value for name in benchmarks if (value := _benchmark(params, name, "s")) is not None]
        rows.append(
            {
                "phase": phase,
                "what": what,
                "evaluations": evaluations,
                "flops": flops,
                "hours": None if precision is None else flops / (peak * mfu * gpus) / 3600,
                "measured_seconds": sum(found) if len(found) == len(benchmarks) and found else seconds,
            }
        )

    encoding = 0
    for size, images in counts.image_latents.items():
        encode, decode = vae_flops(networks.vae, size)
        encoding += images * encode + min(images, PSNR_IMAGES) * (encode + decode)
    count = sum(counts.image_latents.values())
    text = counts.texts * networks.text()
    what = f"{count:,} images, {counts.texts:,} texts"
    add("latents", what, 0, encoding + text, params.latents.encode_precision, "latents", "latents_train")

    forward = networks.evaluation(train.size)
    rules: dict[Kind, str] = {"gs": "train_gs", "discriminative": "train_control"}
    for kind, rule in rules.items():
        parts = stage_spans(train, counts.train, kind)
        steps, encodes = sum(part.steps for part in parts), kind == "gs" and train.label == "vae"
        validations = math.ceil(steps / train.validate_every) * min(counts.val, train.validate_phrases)
        validations *= len(BANDS) if kind == "gs" else 1
        taught = train.batch * sum(part.steps * part.teacher_passes for part in parts)
        flops = steps * train.batch * training_flops(forward, train.gradient_checkpointing) + (taught + validations) * forward
        if encodes:
            flops += (steps * train.batch + validations) * vae_flops(networks.vae, train.size)[0]
        what = f"{kind}: {steps:,} steps of {train.batch}"
        add("train", what, steps * train.batch + taught + validations, flops, train.precision, rule)

    if generators is not None:
        add_baseline_phases(add, params, counts, generators[0])
    for size in sample.sizes():
        evaluations, decoding = 0, 0
        for run in study_runs(params):
            if run.size == size and run.role != "readout":
                evaluations += counts.rows[run.phrases] * (run.evaluations or 0)
            if run.size == size and run.readout == "vae":
                decoding += counts.rows[run.phrases] * vae_flops(networks.vae, size)[1]
            if run.size == size and run.role != "readout" and run.method == "gs" and train.label == "vae":
                decoding += counts.rows[run.phrases] * (run.ensemble or 1) * vae_flops(networks.vae, size)[1]
        flops = decoding + evaluations * networks.evaluation(size)
        benchmarks = [f"sample.size={size:04d}.shard={shard}" for shard in range(sample.shards)]
        add("sample", f"all runs at {size}", evaluations, flops, sample.precision, *benchmarks)
    main = counts.rows["test"] * sample.main.evaluations
    add("sample", "  of these the main row", main, main * networks.evaluation(sample.main.size), sample.precision)
    classes = counts.rows["class_phrases"] * sample.main.evaluations
    flops = classes * networks.evaluation(sample.main.size)
    add("sample", "  and the class phrases (mIoU)", classes, flops, sample.precision)
    if generators is not None:
        add_refine_phases(add, params, counts, generators[1])
    return rows


def _benchmark(params: Params, name: str, column: str) -> float | None:
    """A figure of a rule's last run as Snakemake measured it: `s` in seconds, `max_rss` in bytes."""
    path = params.work_dir / "benchmarks" / f"{name}.tsv"
    if not path.exists():
        return None
    with path.open(newline="") as handle:
        row = next(csv.DictReader(handle, delimiter="\t"))
    return float(row[column]) * (2**20 if column == "max_rss" else 1)
