"""Masks per second of SDXL's architecture with random weights in bf16 on a GPU, from image and text to masks.

    python -m benchmarks.gpu [--json results/benchmarks/gpu.json] [--peak TFLOPS]
    python -m benchmarks.gpu --tiny              tiny shapes, on any machine

Every image has five phrases. Batch sizes are compared first, then attention backends at the best batch size, then compilation
modes with the best backend. The number of evaluations is then varied with the fastest variant. The report is written after
every row, so that an interrupted run keeps its results.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
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

from benchmarks.harness import Effort, Row, evaluations_per_mask, machine, report, synchronize, time_call
from benchmarks.sampling import stage_shares
from genseg.diffusion.objectives import make_scheduler
from genseg.diffusion.pipeline import GSPipeline
from genseg.models import sdxl
from genseg.models.adapter import TextAdapter
from genseg.models.attention import self_attention_widths
from genseg.models.flops import find_gpu, meta_inputs, meta_unet, text_flops, unet_flops, vae_flops
from genseg.models.miniature import learn_tokenizer
from genseg.models.unet import label_unet, run_unet

PHRASES = ("the grass", "two people", "a man in a red shirt", "the white wall behind them", "a dog that looks up at the ball")
POINTS = ((1, 1.0), (2, 1.0), (2, 2.0), (50, 7.5))
"""(steps, guidance scale): 1, 2, 4 and 100 evaluations."""
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
    """Batch size, attention backend and compilation mode of the U-Net."""

    batch: int
    """Phrases in one forward pass (twice as many rows with guidance)."""
    backend: str = "native"
    mode: str = "eager"


def build(tiny: bool, device: torch.device, size: int) -> GSPipeline:
    """Build SDXL-inpainting as a label-diffusion pipeline (5 input channels, 1 output channel), randomly initialised."""
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
                prediction_type="v_prediction",
                zero_terminal_snr=True,
            ),
            prediction_type="v_prediction",
            default_processing_resolution=size,
        )
    for module in pipeline.components.values():
        if isinstance(module, torch.nn.Module):
            module.eval().requires_grad_(False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)


def random_images(count: int, size: int) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (size, size, 3), np.uint8)) for _ in range(count)]


@contextlib.contextmanager
def prepared(unet: UNet2DConditionModel, variant: Variant, tiny: bool) -> Iterator[None]:
    """Within the context, compile the U-Net as `variant.mode` says, and use its attention backend."""
    options: dict[str, Any] = {"backend": "eager"} if tiny else {}  # trace without generating kernels
    unet.to(memory_format=torch.contiguous_format if variant.mode == "eager" else torch.channels_last)
    if variant.mode == "compiled blocks":
        unet.compile_repeated_blocks(**options)
    elif variant.mode == "compiled":
        unet.forward = torch.compile(unet.forward, **options)  # unlike unet.compile, does not compile timing hooks
    try:
        with attention_backend(variant.backend):
            yield
    finally:
        unet.__dict__.pop("forward", None)
        for module in unet.modules():
            module._compiled_call_impl = None
        torch._dynamo.reset()


class Bench:
    """Measurements of one pipeline.

    Args:
        peak: peak rate of the GPU in FLOP/s; None omits the MFU.
        size: side of the images in pixels.
        keep: called with the name of the section and each row, to store it.
    """

    def __init__(
        self, tiny: bool, device: torch.device, peak: float | None, size: int, keep: Callable[[str, Row], None]
    ) -> None:
        self.tiny, self.device, self.effort, self.peak, self.size, self.keep = tiny, device, Effort(tiny), peak, size, keep
        self.pipeline = build(tiny, device, size)
        self.tokens = max(len(self.pipeline.tokenizer(phrase).input_ids) for phrase in PHRASES)
        self.latent, self.config = size // 8, self.pipeline.unet.config
        self.evaluation = unet_flops(self.config, self.latent, self.tokens, inject=True)

    def rates(
        self, section: str, variant: Variant, points: Sequence[tuple[int, float]], phrases: tuple[str, ...] = PHRASES
    ) -> list[Row]:
        """Prepare a variant once, measure it at each (steps, guidance scale), and store and return the rows."""
        rows = []
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(prepared(self.pipeline.unet, variant, self.tiny))
                failure = None
            except Exception as error:  # a backend that is not installed
                failure = error
            for steps, guidance in points:
                rows.append(self.rate(variant, steps, guidance, phrases, failure))
                print(" ".join(f"{name} {value}" for name, value in rows[-1].items()), file=sys.stderr, flush=True)
                self.keep(section, rows[-1])
        return rows

    def rate(self, variant: Variant, steps: int, guidance: float, phrases: tuple[str, ...], failure: Exception | None) -> Row:
        """Return masks per second through `GSPipeline`, from images to bool masks on the host, with stage shares, MFU of
        the U-Net and peak memory. If the variant fails on this machine, column `unavailable` gives the reason."""
        # 1. Prepare the inputs.
        steps = min(steps, self.effort(steps, 3))
        if steps >= 10:  # with many evaluations, fewer masks are enough
            variant = replace(variant, batch=min(variant.batch, 10))
        evaluations = evaluations_per_mask(steps, guidance)
        row: Row = {"mode": variant.mode, "backend": variant.backend, "batch": variant.batch, "evaluations": evaluations}
        images = random_images(math.ceil(variant.batch / len(phrases)), self.size)
        texts = [list(phrases)] * len(images)
        is_cuda = self.device.type == "cuda"

        def sample(steps: int) -> None:
            self.pipeline(images, texts, steps, guidance, batch_size=variant.batch)

        # 2. Measure.
        try:
            if failure:
                raise failure
            [first] = time_call(partial(sample, 1), 1)
            if is_cuda:
                torch.cuda.reset_peak_memory_stats()
            seconds = time_call(partial(sample, steps), self.effort(5 if steps < 10 else 1, 1))
            memory = torch.cuda.max_memory_allocated() / 1e9 if is_cuda else None
            shares = stage_shares(self.pipeline, images, texts, steps, guidance, variant.batch)
        except Exception as error:  # many types: no support for attention masks, out of memory, and others
            return row | {"unavailable": f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"}

        # 3. Compute rates.
        rate = len(images) * len(phrases) / float(np.median(seconds))
        flops = self.evaluation * evaluations / (shares["U-Net"] * shares["s_per_mask"])
        row |= {"masks_per_s": rate, "unet_tflops": flops / 1e12, "unet_mfu": flops / self.peak if self.peak else None}
        row |= {name: shares[name] for name in ("text", "VAE", "U-Net", "read-out", "rest")}
        return row | {"peak_gb": memory, "first_call_s": first, "unavailable": None}

    def fastest(
        self, section: str, variants: Sequence[Variant], rows: list[Row], phrases: tuple[str, ...] = PHRASES
    ) -> Variant:
        """Measure variants with one evaluation per mask, append their rows to `rows`, and return the fastest of all rows."""
        for variant in variants:
            rows += self.rates(section, variant, [(1, 1.0)], phrases)
        available = [row for row in rows if row["unavailable"] is None]
        if not available:
            raise RuntimeError(f"no variant runs on this machine: {rows}")
        best = max(available, key=lambda row: row["masks_per_s"])
        return Variant(best["batch"], best["backend"], best["mode"])

    def sweep(self) -> Variant:
        """Return the fastest variant; batch size, backend and mode are chosen one after the other."""
        rows: list[Row] = []
        batches = (2, 5) if self.tiny else (5, 10, 20, 40, 80)
        best = self.fastest("variants", [Variant(batch) for batch in batches], rows)
        best = self.fastest("variants", [replace(best, backend=name) for name in self.backends()[1:]], rows)
        modes = ("channels last", "compiled blocks", "compiled")
        return self.fastest("variants", [replace(best, mode=mode) for mode in modes], rows)

    def equal_lengths(self, best: Variant) -> None:
        """Measure phrases of equal token length, which need no attention mask (flash attention supports none): every backend in
        eager mode, and the fastest one also in the best mode."""
        phrases = PHRASES[1:2] * len(PHRASES)
        eager = [replace(best, backend=name, mode="eager") for name in self.backends()]
        fastest = self.fastest("equal lengths", eager, [], phrases)
        if best.mode != "eager":
            self.rates("equal lengths", replace(fastest, mode=best.mode), [(1, 1.0)], phrases)

    def backends(self) -> tuple[str, ...]:
        return BACKENDS[: self.effort(len(BACKENDS), 3)]

    def operators(self, variant: Variant) -> list[Row]:
        """Return the device time of one U-Net evaluation of a batch by kind of operator, in eager mode, and the FLOP/s of the
        kinds whose operations are counted."""
        # 1. Count operations on the meta device.
        images = random_images(math.ceil(variant.batch / len(PHRASES)), self.size)
        texts = [list(PHRASES)] * len(images)
        unet, batch = self.pipeline.unet, len(images) * len(PHRASES)
        meta = meta_unet(self.config)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            run_unet(meta, **meta_inputs(meta, self.latent, self.tokens, True, batch))
        flops: Counter[str] = Counter()
        for operator, count in counter.get_flop_counts()["Global"].items():
            flops[kind_of(str(operator))] += count

        # 2. Profile the U-Net only.
        is_cuda = self.device.type == "cuda"
        trace = profile(activities=[ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if is_cuda else []))

        def start(*_: Any) -> None:
            synchronize()
            trace.start()

        def stop(*_: Any) -> None:
            synchronize()
            trace.stop()

        with prepared(unet, replace(variant, mode="eager"), self.tiny):
            self.pipeline(images, texts, 1, 1.0, batch_size=batch)  # warm-up
            hooks = [unet.register_forward_pre_hook(start), unet.register_forward_hook(stop)]
            self.pipeline(images, texts, 1, 1.0, batch_size=batch)
            for hook in hooks:
                hook.remove()
        times: dict[str, float] = defaultdict(float)
        for event in trace.key_averages():
            if event.key.startswith("aten::"):
                times[kind_of(event.key)] += (event.self_device_time_total if is_cuda else event.self_cpu_time_total) / 1e6

        # 3. Compute shares and rates.
        total = sum(times.values())
        if not total:
            return [{"operator": "unavailable: the profiler reports no times on this machine", "ms": None, "share": None}]
        rows = []
        for kind, seconds in sorted(times.items(), key=lambda item: -item[1]):
            rate = flops[kind] / seconds if flops[kind] and seconds else None
            row = {"operator": kind, "ms": seconds * 1e3, "share": seconds / total}
            row |= {"tflop": flops[kind] / 1e12 if flops[kind] else None, "tflops": rate / 1e12 if rate else None}
            rows.append(row | {"mfu": rate / self.peak if rate and self.peak else None})
        return rows

    def stages(self) -> list[Row]:
        """Return the operations of one mask: one U-Net evaluation, a fifth of an image encoding, and one phrase encoding."""
        encode, _ = vae_flops(self.pipeline.vae.config, self.size)
        encoders = ((self.pipeline.text_encoder, False), (self.pipeline.text_encoder_2, True))
        text = sum(text_flops(model.config.to_dict(), self.tokens, projection) for model, projection in encoders)
        flops = {"U-Net, one evaluation": self.evaluation, "VAE encoder, one fifth": encode / len(PHRASES), "text": text}
        return [{"stage": name, "tflop": value / 1e12} for name, value in flops.items()]


def kind_of(operator: str) -> str:
    """Return the kind of an operator, given its name in a trace or a count. Batched matrix products count as attention,
    because no other product in the U-Net is batched."""
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
    """Return the TFLOP/s of a large bf16 product of random matrices, a practical bound below the data sheet's peak."""
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    a @ b
    seconds = time_call(lambda: [a @ b for _ in range(10)], 5)
    return 10 * 2 * side**3 / float(np.median(seconds)) / 1e12


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.partition("\n")[0])
    parser.add_argument("--json", default="results/benchmarks/gpu.json", help="output file (default: %(default)s)")
    parser.add_argument("--peak", type=float, help="peak dense bf16 rate of an unknown GPU in TFLOP/s")
    parser.add_argument("--tiny", action="store_true", help="use tiny shapes, on any machine, for tests of the benchmark")
    arguments = parser.parse_args()
    if not arguments.tiny and not torch.cuda.is_available():
        parser.error("torch finds no GPU; --tiny runs the same code on any machine")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpu = find_gpu(torch.cuda.get_device_name()) if device.type == "cuda" else None
    peak = arguments.peak * 1e12 if arguments.peak else gpu.half if gpu else None
    descriptions = {
        "evaluations": "Masks/s by evaluations per mask, including all stages, with the fastest variant.",
        "variants": "One evaluation per mask, including all stages. MFU: FLOP/s of the U-Net over the GPU's peak.",
        "equal lengths": "Phrases of equal token length, which need no attention mask.",
        "operators": "One U-Net evaluation of a batch, eager mode.",
        "operations": "Operations of one mask; a multiply-add counts as two.",
    }
    entries: dict[str, dict[str, Any]] = {name: {"what": text, "rows": []} for name, text in descriptions.items()}
    effort = Effort(arguments.tiny)
    rate = matmul_tflops(device, effort(8192, 64))
    size = effort(1024, 64)
    document = {
        "title": f"GPU benchmark, {size} x {size}, bf16, random weights",
        "tiny": arguments.tiny,
        "machine": machine(device) | {"peak_tflops": peak / 1e12 if peak else None, "matmul_tflops": rate},
        "wanted": {"masks_per_s": 40, "unet_mfu": 0.4},
        "benchmarks": entries,
    }
    text = ""

    def keep(section: str, row: Row) -> None:
        nonlocal text
        entries[section]["rows"].append(row)
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
