"""Masks per second of SDXL's shape with random weights in bf16 on a GPU, all stages included.

    python -m benchmarks.gpu [--json results/benchmarks/gpu.json] [--peak TFLOPS]
    python -m benchmarks.gpu --tiny              the same code with tiny shapes, anywhere

Five phrases an image. Batch sizes first, then attention backends at the best one, then compilation with the best backend; the
best of all is what the number of evaluations is varied with. The report is written after every row, so that a run which is cut
short keeps what it measured.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention_dispatch import attention_backend
from PIL import Image
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from benchmarks.harness import Effort, Row, interleaved, machine, report, synchronize
from benchmarks.sampling import stage_shares
from genseg.diffusion.pipeline import GSPipeline
from genseg.diffusion.schedule import make_scheduler
from genseg.models import sdxl
from genseg.models.adapter import TextAdapter
from genseg.models.attention import self_attention_widths
from genseg.models.flops import find_gpu, meta_inputs, meta_unet, text_flops, unet_flops, vae_flops
from genseg.models.miniature import learn_tokenizer
from genseg.models.unet import label_unet, run_unet

PHRASES = ("the grass", "two people", "a man in a red shirt", "the white wall behind them", "a dog that looks up at the ball")
POINTS = ((1, 1.0), (2, 1.0), (2, 2.0), (50, 7.5))
"""(steps, guidance): 1, 2, 4 and 100 evaluations."""
BACKENDS = ("native", "_native_cudnn", "_native_efficient", "_native_flash", "flash", "_flash_3", "sage", "flex")
TINY_UNET = {
    "block_out_channels": [32, 64, 64],
    "attention_head_dim": [1, 2, 2],
    "transformer_layers_per_block": [1, 1, 2],
    "cross_attention_dim": 64,
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 32 + 6 * 8,
}
TINY_TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2, "projection_dim": 32}


@dataclass(frozen=True)
class Variant:
    """batch: phrases in one call of the U-Net (twice as many samples with guidance)."""

    batch: int
    backend: str = "native"
    mode: str = "eager"


def build(tiny: bool, device: torch.device, size: int) -> GSPipeline:
    """SDXL-inpainting as a label-diffusion pipeline (5 input channels, 1 output channel, injected text), random weights."""
    torch.manual_seed(0)
    text, text_2 = sdxl.TEXT_ENCODER | (TINY_TEXT if tiny else {}), sdxl.TEXT_ENCODER_2 | (TINY_TEXT if tiny else {})
    vae_config = sdxl.VAE | ({"block_out_channels": [32] * 4} if tiny else {})
    with device:
        unet = label_unet(UNet2DConditionModel.from_config(sdxl.UNET | (TINY_UNET if tiny else {})), "masked_image")
        pipeline = GSPipeline(
            vae=AutoencoderKL.from_config(vae_config),
            text_encoder=CLIPTextModel(CLIPTextConfig(**text)),
            text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**text_2)),
            tokenizer=learn_tokenizer(PHRASES, 200, "<|endoftext|>"),
            tokenizer_2=learn_tokenizer(PHRASES, 200, "!"),
            unet=unet,
            adapter=TextAdapter(
                text["hidden_size"] + text_2["hidden_size"], text_2["projection_dim"], tuple(self_attention_widths(unet))
            ),
            scheduler=make_scheduler(
                {name: sdxl.SCHEDULER[name] for name in ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule")},
                prediction="v",
                zero_terminal_snr=True,
            ),
            prediction="v",
            image_size=size,
        )
    for module in pipeline.components.values():
        if isinstance(module, torch.nn.Module):
            module.eval().requires_grad_(False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)  # attends in bf16 by itself on a CPU


def pictures(count: int, size: int) -> list[Image.Image]:
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 256, (size, size, 3), np.uint8)) for _ in range(count)]


@contextlib.contextmanager
def prepared(unet: UNet2DConditionModel, variant: Variant, tiny: bool) -> Iterator[None]:
    """The U-Net compiled as the variant says, its attention by the variant's backend; afterwards as it was."""
    options: dict[str, Any] = {"backend": "eager"} if tiny else {}  # traced, but no kernel is made
    unet.to(memory_format=torch.contiguous_format if variant.mode == "eager" else torch.channels_last)
    if variant.mode == "compiled blocks":
        unet.compile_repeated_blocks(**options)
    elif variant.mode == "compiled":
        unet.forward = torch.compile(unet.forward, **options)  # not unet.compile: hooks that time it stay outside
    try:
        with attention_backend(variant.backend):
            yield
    finally:
        unet.__dict__.pop("forward", None)
        for module in unet.modules():
            module._compiled_call_impl = None
        torch._dynamo.reset()


class Bench:
    """The pipeline and how it is timed."""

    def __init__(
        self, tiny: bool, device: torch.device, peak: float | None, size: int, keep: Callable[[str, Row], None]
    ) -> None:
        self.tiny, self.device, self.effort, self.size, self.keep = tiny, device, Effort(tiny), size, keep
        self.pipeline = build(tiny, device, self.size)
        tokens = max(len(self.pipeline.tokenizer(phrase).input_ids) for phrase in PHRASES)
        self.latent = self.size // 8
        self.config = self.pipeline.unet.config
        self.evaluation = unet_flops(self.config, self.latent, tokens, inject=True)
        self.tokens, self.peak = tokens, peak

    def rates(
        self, section: str, variant: Variant, points: Sequence[tuple[int, float]], phrases: tuple[str, ...] = PHRASES
    ) -> list[Row]:
        """A row for each (steps, guidance), the variant prepared once."""
        rows = []
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(prepared(self.pipeline.unet, variant, self.tiny))
                impossible = None
            except Exception as error:  # a backend that is not installed
                impossible = error
            for steps, guidance in points:
                rows.append(self.rate(variant, steps, guidance, phrases, impossible))
                print(" ".join(f"{name} {value}" for name, value in rows[-1].items()), file=sys.stderr, flush=True)
                self.keep(section, rows[-1])
        return rows

    def rate(
        self, variant: Variant, steps: int, guidance: float, phrases: tuple[str, ...], impossible: Exception | None
    ) -> Row:
        """Masks per second through `GSPipeline`, from pictures to bool masks on the host; where the time goes; MFU of the
        U-Net; peak memory. What a variant cannot do on this machine is said in `unavailable`."""
        steps = min(steps, self.effort(steps, 3))
        if steps >= 10:  # many evaluations fill the device with fewer masks
            variant = replace(variant, batch=min(variant.batch, 10))
        evaluations = steps * (1 if guidance == 1 else 2)
        row: Row = {"mode": variant.mode, "backend": variant.backend, "batch": variant.batch, "evaluations": evaluations}
        images = pictures(-(-variant.batch // len(phrases)), self.size)
        texts = [list(phrases)] * len(images)
        cuda = self.device.type == "cuda"
        masks = len(images) * len(phrases)

        def sample() -> None:
            self.pipeline(images, texts, steps, guidance, batch_size=variant.batch)

        try:
            if impossible:
                raise impossible
            begun = time.perf_counter()
            self.pipeline(images, texts, 1, guidance, batch_size=variant.batch)
            synchronize()
            first = time.perf_counter() - begun
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            seconds = interleaved({"": sample}, self.effort(5 if steps < 10 else 1, 1))[""]
            memory = torch.cuda.max_memory_allocated() / 1e9 if cuda else None
            shares = stage_shares(self.pipeline, images, texts, steps, guidance, variant.batch)
        except Exception as error:  # a backend that takes no mask, or no memory left: any of a dozen kinds
            return row | {"unavailable": f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"}
        rate = masks / float(np.median(seconds))
        flops = self.evaluation * evaluations / (shares["U-Net"] * shares["s_per_mask"])
        row |= {"masks_per_s": rate, "unet_tflops": flops / 1e12, "unet_mfu": flops / self.peak if self.peak else None}
        row |= {name: shares[name] for name in ("text", "VAE", "U-Net", "read-out", "rest")}
        return row | {"peak_gb": memory, "first_call_s": first, "unavailable": None}

    def fastest(
        self, section: str, variants: Sequence[Variant], rows: list[Row], phrases: tuple[str, ...] = PHRASES
    ) -> Variant:
        """One evaluation a mask under each variant; of these and those in `rows`, which they join, the fastest one."""
        for variant in variants:
            rows += self.rates(section, variant, [(1, 1.0)], phrases)
        ran = [row for row in rows if row["unavailable"] is None]
        if not ran:
            raise RuntimeError(f"no variant runs here: {rows}")
        top = max(ran, key=lambda row: row["masks_per_s"])
        return Variant(top["batch"], top["backend"], top["mode"])

    def sweep(self) -> Variant:
        """The fastest variant, found one choice at a time."""
        rows: list[Row] = []
        best = self.fastest("variants", [Variant(size) for size in ((5, 10, 20, 40, 80) if not self.tiny else (2, 5))], rows)
        best = self.fastest("variants", [replace(best, backend=name) for name in self.backends()[1:]], rows)
        modes = ("channels last", "compiled blocks", "compiled")
        return self.fastest("variants", [replace(best, mode=mode) for mode in modes], rows)

    def equal_lengths(self, best: Variant) -> None:
        """Phrases of one token length, whose attention needs no mask: flash attention takes none. Every backend in eager mode,
        the fastest in the best mode, too."""
        phrases, rows = PHRASES[1:2] * len(PHRASES), list[Row]()
        eager = [replace(best, backend=name, mode="eager") for name in self.backends()]
        winner = self.fastest("equal lengths", eager, rows, phrases)
        if best.mode != "eager":
            self.rates("equal lengths", replace(winner, mode=best.mode), [(1, 1.0)], phrases)

    def backends(self) -> tuple[str, ...]:
        return BACKENDS[: self.effort(len(BACKENDS), 3)]

    def operators(self, variant: Variant) -> list[Row]:
        """Device time of one U-Net evaluation of a batch by kind of operator, in eager mode, and the rate where operations are
        counted."""
        images = pictures(-(-variant.batch // len(PHRASES)), self.size)
        texts = [list(PHRASES)] * len(images)
        unet, batch = self.pipeline.unet, len(images) * len(PHRASES)
        meta = meta_unet(self.config)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            run_unet(meta, **meta_inputs(meta, self.latent, self.tokens, True, batch))
        flops: dict[str, int] = {}
        for operator, count in counter.get_flop_counts()["Global"].items():
            flops[kind_of(str(operator))] = flops.get(kind_of(str(operator)), 0) + count
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if self.device.type == "cuda" else [])
        cuda = self.device.type == "cuda"
        times: dict[str, float] = {}

        def profiled(*_: Any) -> None:
            synchronize()
            trace.start()

        def stopped(*_: Any) -> None:
            synchronize()
            trace.stop()

        with prepared(unet, replace(variant, mode="eager"), self.tiny):
            self.pipeline(images, texts, 1, 1.0, batch_size=batch)
            trace = profile(activities=activities)
            hooks = [unet.register_forward_pre_hook(profiled), unet.register_forward_hook(stopped)]
            self.pipeline(images, texts, 1, 1.0, batch_size=batch)
            for hook in hooks:
                hook.remove()
        for event in trace.key_averages():
            if event.key.startswith("aten::"):
                spent = event.self_device_time_total if cuda else event.self_cpu_time_total
                times[kind_of(event.key)] = times.get(kind_of(event.key), 0) + spent / 1e6
        total = sum(times.values())
        if not total:
            return [{"operator": "unavailable: the profiler tells no times here", "ms": None, "share": None}]
        rows = []
        for kind, seconds in sorted(times.items(), key=lambda item: -item[1]):
            done = flops.get(kind)
            rate = done / seconds if done and seconds else None
            mfu = rate / self.peak if rate and self.peak else None
            row = {"operator": kind, "ms": seconds * 1e3, "share": seconds / total, "tflop": done and done / 1e12}
            rows.append(row | {"tflops": rate and rate / 1e12, "mfu": mfu})
        return rows

    def stages(self) -> list[Row]:
        """Operations of one mask, counted: one evaluation, an image's share of the VAE encoder, a phrase's text."""
        encode, _ = vae_flops(self.pipeline.vae.config, self.size)
        text = sum(
            text_flops(model.config.to_dict(), self.tokens, projection)
            for model, projection in ((self.pipeline.text_encoder, False), (self.pipeline.text_encoder_2, True))
        )
        counted = {"U-Net, one evaluation": self.evaluation, "VAE encoder, a fifth": encode / 5, "text": text}
        return [{"stage": name, "tflop": value / 1e12} for name, value in counted.items()]


def kind_of(operator: str) -> str:
    """The kind of an operator, by its name in a trace or a count; batched products are attention's, layer by layer the U-Net's
    other products are not batched."""
    name = operator.replace("aten::", "").replace("aten.", "").split(".")[0]
    kinds = {
        "attention": ("scaled_dot_product", "attention_forward", "flash_attention", "efficient_attention", "bmm"),
        "convolution": ("conv",),
        "matrix product": ("mm", "matmul", "linear"),
        "norm": ("norm",),
        "activation": ("silu", "gelu", "softmax", "sigmoid"),
        "copy": ("copy", "cat", "contiguous", "clone", "_to", "fill"),
    }
    return next((kind for kind, parts in kinds.items() if any(part in name for part in parts)), "other")


def matmul_tflops(device: torch.device, side: int) -> float:
    """Rate of a large bf16 product of random matrices here: what of the data sheet's peak can be had at all."""
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    a @ b
    seconds = interleaved({"": lambda: [a @ b for _ in range(10)]}, 5)[""]
    return 10 * 2 * side**3 / float(np.median(seconds)) / 1e12


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.partition("\n")[0])
    parser.add_argument("--json", default="results/benchmarks/gpu.json", help="where the results go (default: %(default)s)")
    parser.add_argument("--peak", type=float, help="dense bf16 peak in TFLOP/s, where the GPU is not known here")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, on any machine: its times mean nothing")
    arguments = parser.parse_args()
    if not arguments.tiny and not torch.cuda.is_available():
        parser.error("torch sees no GPU; --tiny runs the same code anywhere")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpu = find_gpu(torch.cuda.get_device_name()) if device.type == "cuda" else None
    peak = arguments.peak * 1e12 if arguments.peak else gpu.half if gpu else None
    what = {
        "evaluations": "Masks/s against evaluations, all stages, with the fastest variant.",
        "variants": "One evaluation a mask, all stages. MFU counts the U-Net's operations over its time.",
        "equal lengths": "Phrases of one token length: attention then needs no mask.",
        "operators": "One U-Net evaluation of a batch, eager mode.",
        "operations": "Operations of one mask, two per multiply-add.",
    }
    found: dict[str, dict[str, Any]] = {name: {"what": text, "rows": []} for name, text in what.items()}
    effort = Effort(arguments.tiny)
    rate = matmul_tflops(device, effort(8192, 64))
    size = effort(1024, 64)
    document = {
        "title": f"GPU benchmark, {size} x {size}, bf16, random weights",
        "tiny": arguments.tiny,
        "machine": machine(device) | {"peak_tflops": peak and peak / 1e12, "matmul_tflops": rate},
        "wanted": {"masks_per_s": 40, "unet_mfu": 0.4},
        "benchmarks": found,
    }
    text = ""

    def keep(section: str, row: Row) -> None:
        nonlocal text
        found[section]["rows"].append(row)
        text = report(document, Path(arguments.json))

    bench = Bench(arguments.tiny, device, peak, size, keep)
    for row in bench.stages():
        keep("operations", row)
    best = bench.sweep()
    bench.rates("evaluations", best, POINTS)
    for row in bench.operators(best):
        keep("operators", row)
    bench.equal_lengths(best)
    print(text, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
