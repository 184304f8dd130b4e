"""Parameters, memory, disk space, operations and hours of a study, from its params and data counts."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import torch
from diffusers import UNet2DConditionModel

from genseg.data.download import SOURCES, read_sources
from genseg.diffusion.guidance import count_evaluations
from genseg.errors import UserError
from genseg.latents import PSNR_IMAGES, image_store, text_store
from genseg.models.adapter import TextAdapter
from genseg.models.attention import self_attention_widths
from genseg.models.flops import GPUS, Gpu, training_flops, vae_flops
from genseg.models.memory import activation_bytes, decoding_bytes
from genseg.models.miniature import build_miniature
from genseg.params import Params
from genseg.plan import generator
from genseg.plan.counts import TABLES, Counts, count_data
from genseg.plan.jobs import plan_jobs
from genseg.plan.rows import BYTES, Artifacts, Phases, maps_bytes, memory_row, read_benchmark, safetensors_bytes
from genseg.sampling.runs import predictions_path, study_runs
from genseg.training.losses import BANDS
from genseg.training.stages import Kind, stage_spans
from genseg.training.steps import KEEP


def make_plan(
    params: Params, gpu: str, gpus: int, mfu: float, commits: Mapping[str, str | None] | None = None
) -> dict[str, Any]:
    """Return the plan as JSON values: its assumptions, `counts`, `parameters`, `memory`, `artifacts`, `phases` and `jobs`.

    Only configs are loaded, no weights. If the study has run, measured values are added to the planned ones.

    Args:
        gpu: name of the GPU, a key of `GPUS`.
        gpus: number of GPUs that share the work.
        mfu: model FLOPs utilisation, the fraction of the peak rate that is reached, in (0, 1].
        commits: commits of the hub ids by params key (see `generator.study_configs`).

    Raises:
        UserError: the GPU or a backbone is unknown, or the amount of data cannot be determined.
    """
    if gpu not in GPUS:
        raise UserError(f"--gpu {gpu}: unknown GPU; expected one of {', '.join(GPUS)}")

    # 1. Count the data, and determine the shapes of the networks.
    configs, origin = backbone_configs(params, commits)
    counts = count_data(params, origin if (Path(origin) / "tokenizer").is_dir() else None)
    networks = Networks(params, configs, origin, counts)
    backbone = generator.Generator(configs, origin)
    baseline_generator = generator.find_generator(params, "baselines.backbone", backbone, commits)
    refine_generator = generator.find_generator(params, "refine.backbone", backbone, commits)

    # 2. Plan the study's own networks.
    memory: dict[str, Any] = {"training": [], "sampling": None, "measured_rss": {}, "generators": {}}
    artifacts, phases = Artifacts(), Phases(params, GPUS[gpu], gpus, mfu)
    _add_data_artifacts(artifacts, params, counts)
    if params.sample.runs:
        memory |= plan_memory(params, networks, GPUS[gpu], gpus)
        _add_artifacts(artifacts, params, networks, counts)
        _add_model_phases(phases, params, networks, counts)

    # 3. Plan baselines, sampling and refinement, in this order.
    has_tables = params.sample.has_tables()
    if has_tables:
        if params.baselines.attention:
            attention = generator.attention_bytes(params.baselines, baseline_generator, counts.attended["most_texts"])
            row = generator.generator_memory(baseline_generator, params.baselines, attention, GPUS[gpu])
            memory["generators"]["baselines"] = row
            generator.add_baseline_phases(phases, params, counts, baseline_generator)
        refinement = generator.refinement_bytes(params.refine, refine_generator)
        memory["generators"]["refine"] = generator.generator_memory(refine_generator, params.refine, refinement, GPUS[gpu])
        generator.add_artifacts(artifacts, params, counts, baseline_generator)
    if params.sample.runs:
        _add_sample_phases(phases, params, networks, counts)
    if has_tables:
        generator.add_refine_phases(phases, params, counts, refine_generator)
    assumptions = {"study": params.study, "backbone": origin, "gpu": gpu, "gpus": gpus, "mfu": mfu, "counts": vars(counts)}
    results = {"parameters": networks.components, "memory": memory, "artifacts": artifacts.rows, "phases": phases.rows}
    return assumptions | results | {"jobs": plan_jobs(params, counts, memory, phases, networks.parameters)}


# ----------------------------------------------------------------------------------------------------------- networks
def backbone_configs(params: Params, commits: Mapping[str, str | None] | None) -> tuple[generator.Configs, str]:
    """Return the configs of unet, vae, text_encoder and text_encoder_2, and their directory, hub id or description.

    Raises UserError if the configs are missing or unreadable, or the pipeline has only one text encoder.
    """
    backbone, trained = params.backbone, params.results_dir / "backbone" / "pipeline"
    source = str(trained) if (trained / "model_index.json").exists() else backbone.init
    if source is None:
        assert backbone.shape is not None
        pipeline = build_miniature(backbone.shape, backbone.size, [], 0)
        configs: generator.Configs = {name: dict(getattr(pipeline, name).config) for name in ("unet", "vae")}
        for name in ("text_encoder", "text_encoder_2"):
            config = getattr(pipeline, name).config.to_dict()
            configs[name] = config | {"vocab_size": max(config["vocab_size"], backbone.shape.vocabulary)}
        return configs, "backbone.shape with the largest possible vocabulary"
    configs = (
        generator.read_configs(source, None, "backbone.init")
        if Path(source).is_dir()
        else generator.study_configs(params, "backbone.init", commits)
    )
    if "text_encoder_2" not in configs:
        raise UserError(f"backbone.init: {source}: missing second text encoder; GS needs an SDXL-inpainting pipeline")
    return configs, source


class Networks(generator.Generator):
    """The study's own networks: a generator whose U-Net denoises labels, and the text adapter."""

    def __init__(self, params: Params, configs: generator.Configs, origin: str, counts: Counts) -> None:
        train = params.train
        label_channels = 1 if train.label == "mask" else configs["vae"]["latent_channels"]
        unet = configs["unet"] | {"in_channels": label_channels + 4, "out_channels": label_channels}
        super().__init__(configs | {"unet": unet}, origin, max(2, round(counts.tokens / counts.texts)), train.token_injection)
        self.token_width = sum(config["hidden_size"] for config in self.encoders)
        self.pooled_width = self.encoders[1]["projection_dim"]
        widths = tuple(self_attention_widths(self.meta_unet)) if train.token_injection else ()
        null_tokens = 2 if train.text == "tokens" else 1
        with torch.device("meta"):
            adapter = TextAdapter(self.token_width, self.pooled_width, widths, text=train.text, null_tokens=null_tokens)
        self.modules = {"unet": self.meta_unet, "adapter": adapter} | self.modules
        self.components = {name: generator.count_parameters(module) for name, module in self.modules.items()}
        self.parameters = sum(self.components.values())
        self.trained = self.components["unet"] + self.components["adapter"]

    def activations(self, size: int, batch: int, precision: str, **options: bool) -> int:
        """Return the peak bytes of activations (see `activation_bytes`)."""
        return activation_bytes(self.unet, self.latent(size), self.tokens, self.inject, batch, precision, **options)


def largest_unit(unet: UNet2DConditionModel) -> int:
    """Return the number of parameters of the largest unit that FSDP gathers: a transformer or residual block, or the rest."""
    blocks = ("BasicTransformerBlock", "ResnetBlock2D")
    units = [generator.count_parameters(module) for module in unet.modules() if type(module).__name__ in blocks]
    return max(*units, generator.count_parameters(unet) - sum(units))


# ------------------------------------------------------------------------------------------------------------- memory
def plan_memory(params: Params, networks: Networks, gpu: Gpu, gpus: int) -> dict[str, Any]:
    """Return the bytes on each GPU for training and sampling, and the measured resident memory in bytes."""
    # 1. Plan sampling at the largest size, where decoding may need more memory than denoising.
    train, sample = params.train, params.sample
    is_guided = sample.main.guidance_scale != 1 or sample.base.guidance_scale != 1
    rows = sample.batch * (2 if is_guided else 1)
    activations = networks.activations(max(sample.sizes()), rows, sample.precision, training=False)
    if train.label == "vae" or any(run.readout == "vae" for run in study_runs(params)):
        decoding = decoding_bytes(networks.vae, max(sample.sizes()), sample.batch, sample.precision)
        activations = max(activations, decoding)

    # 2. Read measured values.
    names = ["train_gs", "train_discriminative", "baselines"]
    names += [f"refine.shard={shard}" for shard in range(params.resources.refine.shards)]
    rss = {name: read_benchmark(params, name, "max_rss") for name in names}
    return {
        "training": _training_memory(params, networks, gpu, gpus),
        "micro_batch": train.micro_batch,
        "sampling": memory_row(networks.parameters, sample.precision, activations, gpu),
        "measured_rss": {name: value for name, value in rss.items() if value is not None},
    }


def _training_memory(params: Params, networks: Networks, gpu: Gpu, gpus: int) -> list[dict[str, Any]]:
    """Return one row per sharding, with and without gradient checkpointing.

    A GPU holds fp32 weights, gradients and two moments, the weight average, the teacher of distillation, 16-bit copies of
    weights made by autocast, and activations of one micro-batch. FSDP divides the state among the GPUs.
    """
    train, trained = params.train, networks.trained
    half = train.precision != "fp32"
    distils = any(stage.objective == "distill" for stage in train.stages)
    sizes = {"weights": 4, "gradients": 4, "moments": 8, "average": 4 if train.ema else 0, "teacher": 4 if distils else 0}
    # Bytes per parameter of a unit. Without FSDP: the copy made by autocast. With FSDP: the gathered weights of two units (the
    # current and the next one) and the full fp32 gradient of one.
    autocast, gathered = (2, 2) if half else (0, 4)
    unit, rows = largest_unit(networks.meta_unet), []
    for shards in (1, *sorted({2, 4, 8, gpus} - {1})):
        state = {name: size * trained // shards for name, size in sizes.items()}
        for checkpointing in (False, True):
            activations = networks.activations(train.size, train.micro_batch, train.precision, checkpointing=checkpointing)
            copies = unit * (autocast if shards == 1 else 2 * gathered + 4)
            if half and not checkpointing:  # autograd keeps the 16-bit weights of all layers for the backward pass
                copies += 2 * trained
            state |= {"copies": copies, "activations": activations}
            total = sum(state.values())
            name = "replicate" if shards == 1 else f"FSDP over {shards}"
            row = {"sharding": name, "checkpointing": checkpointing, **state, "total": total, "fits": total < gpu.memory}
            rows.append(row | {"chosen": checkpointing == train.gradient_checkpointing})
    return rows


# ---------------------------------------------------------------------------------------------------------- artifacts
def _add_data_artifacts(artifacts: Artifacts, params: Params, counts: Counts) -> None:
    """Add the images and the tables of data assembly."""
    if params.data.png is not None and params.data.source == "png" and SOURCES.exists():
        png = params.data.png
        folders = {"images": png.images, "annotations": png.annotations, "narratives": png.narratives}
        published = [remote.bytes or 0 for remote in read_sources(SOURCES, folders)]
        artifacts.add("downloads (unpacked files need the same again)", sum(published), "published sizes, without narratives")
    elif counts.picture_bytes is not None:
        artifacts.add("images", counts.picture_bytes, counts.basis if counts.exact else "estimate")
    rows = counts.train + counts.val + counts.rows["test"] + counts.class_rows
    artifacts.add("phrase tables", counts.row_bytes * rows, "estimate", *(params.data_dir / name for name in TABLES))


def _add_artifacts(artifacts: Artifacts, params: Params, networks: Networks, counts: Counts) -> None:
    """Add the artifacts of latents, training and sampling."""
    # 1. Add latents.
    element, shard = BYTES[params.latents.precision], params.latents.shard_rows
    for size, images in counts.image_latents.items():
        side = networks.latent(size)
        metadata = {"key": "0" * (16 + 1 + len(str(size)) + 1 + 64)}
        shard_images = [min(shard, images - start) for start in range(0, images, shard)]
        total = sum(safetensors_bytes({"latent": ((count, 4, side, side), element)}, metadata) for count in shard_images)
        artifacts.add(f"image latents {size}", total, counts.basis, *image_store(params, size).glob("shard-*.safetensors"))
    text = 4 * (counts.tokens * networks.token_width + counts.texts * networks.pooled_width) + 8 * (counts.texts + 1)
    basis = "exact except headers" if counts.exact else counts.basis
    artifacts.add("text embeddings", text, basis, *text_store(params).glob("shard-*.safetensors"))

    # 2. Add models and checkpoints.
    tensors = [module.state_dict() for module in networks.modules.values()]
    shapes = [{name: (tuple(tensor.shape), 4) for name, tensor in state.items()} for state in tensors]
    weights = sum(safetensors_bytes(shape, {"format": "pt"}) for shape in shapes)
    state = 4 * networks.trained * (4 if params.train.ema else 3)  # weights, two moments and the average
    stages = sum(stage.objective == "distill" for stage in params.train.stages)
    work = params.work_dir / "train"
    for kind in get_args(Kind):
        artifacts.add(f"{kind}: weights", weights, "exact", *params.model_dir(kind).glob("*/*.safetensors"))
        checkpoints = sorted(work.glob(f"{kind}-*/step-*.pt"))[-KEEP:]
        name = f"{kind}: {KEEP} checkpoints ({KEEP + 1} while writing)"
        artifacts.add(name, KEEP * state, "exact except headers", *checkpoints)
        if kind == "gs" and stages:
            teachers = sorted(work.glob(f"{kind}-*/teacher-*.pt"))
            artifacts.add(f"{kind}: teachers", 4 * networks.trained * stages, "exact except headers", *teachers)

    # 3. Add predictions.
    runs = study_runs(params)
    maps, map_paths = 0, []
    for run in runs:
        count = counts.rows[run.phrases]
        if run.point is not None and count:
            is_decoded = params.train.label == "vae" and run.method == "gs"
            maps += maps_bytes(count, run.point.size if is_decoded else networks.latent(run.point.size))
            map_paths.append(predictions_path(params, run).with_suffix(".safetensors"))
    artifacts.add("soft label maps", maps, counts.basis, *map_paths)
    predictions = counts.row_bytes * sum(counts.rows[run.phrases] for run in runs)
    artifacts.add("predictions", predictions, "estimate", *(predictions_path(params, run) for run in runs))


# ------------------------------------------------------------------------------------------------------------- phases
def _add_model_phases(phases: Phases, params: Params, networks: Networks, counts: Counts) -> None:
    """Add the work of the phases `latents` and `train`."""
    flops = counts.texts * networks.text_flops()
    for size, images in counts.image_latents.items():
        encode, decode = vae_flops(networks.vae, size)
        flops += images * encode + min(images, PSNR_IMAGES) * (encode + decode)
    what = f"{sum(counts.image_latents.values()):,} images, {counts.texts:,} texts"
    phases.add(
        "latents", what, 0, flops, params.latents.encode_precision, phases.seconds("latents", "latents_train"), "latents"
    )

    train = params.train
    forward = networks.evaluation_flops(train.size)
    for kind in get_args(Kind):
        spans = stage_spans(train, counts.train, kind)
        steps = spans[-1].end
        samples = steps * train.batch
        extra_passes = round(train.batch * sum(span.steps * span.extra_passes for span in spans))
        bands = len(BANDS) if kind == "gs" else 1
        validations = bands * math.ceil(steps / train.validate_every) * min(counts.val, train.validate_phrases)
        flops = samples * training_flops(forward, train.gradient_checkpointing) + (extra_passes + validations) * forward
        if kind == "gs" and train.label == "vae":  # labels are encoded in every step
            flops += (samples + validations) * vae_flops(networks.vae, train.size)[0]
        what = f"{kind}: {steps:,} steps of batch {train.batch}"
        evaluations = samples + extra_passes + validations
        phases.add("train", what, evaluations, flops, train.precision, phases.seconds(f"train_{kind}"), f"train_{kind}")


def _add_sample_phases(phases: Phases, params: Params, networks: Networks, counts: Counts) -> None:
    """Add the work of sampling at each size, and how much of it the main row and the class phrases need."""
    train, sample, rows = params.train, params.sample, counts.rows
    for size in sample.sizes():
        runs = [run for run in study_runs(params) if run.point is not None and run.point.size == size]
        sampled = [run for run in runs if run.role != "readout"]
        evaluations = sum(rows[run.phrases] * (run.evaluations or 0) for run in sampled)
        decoded = sum(rows[run.phrases] for run in runs if run.readout == "vae")
        if train.label == "vae":  # the label maps themselves are decoded
            decoded += sum(rows[run.phrases] * run.point.ensemble_size for run in sampled if run.point and run.method == "gs")
        flops = decoded * vae_flops(networks.vae, size)[1] + evaluations * networks.evaluation_flops(size)
        seconds = phases.seconds(*(f"sample.size={size:04d}.shard={k}" for k in range(params.resources.sample.shards)))
        phases.add("sample", f"all runs at {size}", evaluations, flops, sample.precision, seconds, f"sample.size={size:04d}")
    forward = networks.evaluation_flops(sample.main.size)
    for what, part in (("main row", "test"), ("class phrases (mIoU)", "class_phrases")):
        if rows[part]:
            evaluations = rows[part] * count_evaluations(sample.main)
            phases.add("sample", f"  of which {what}", evaluations, evaluations * forward, sample.precision)
