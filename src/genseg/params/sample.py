"""Params of the phase `sample`: operating points and the runs that use them."""

from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Field, PositiveInt, model_validator

from genseg.params.base import Fraction, ImageSize, PositiveFraction, Precision, Section

GuidanceScale = Annotated[float, Field(ge=1, lt=100)]
NumInferenceSteps = Annotated[int, Field(gt=0, le=1000)]
GuidanceInterval = tuple[Fraction, Fraction]
SamplerName = Literal["ddim", "ddpm", "dpmpp", "mean"]
TimestepSpacing = Literal["trailing", "leading"]
Readout = Literal["bilinear", "nearest", "vae"]
RunGroup = Literal["main", "controls", "grid", "val"]


class OperatingPoint(Section):
    """How a mask is sampled: image size, sampler and guidance."""

    size: ImageSize
    """Side of the square image in pixels."""
    num_inference_steps: NumInferenceSteps
    """Denoising steps."""
    guidance_scale: GuidanceScale
    """w of classifier-free guidance (the paper, Eq. 10); 1 is no guidance and costs one evaluation per step instead of two."""
    sampler: SamplerName = "ddim"
    """DDIM (the paper, section 4.2), DDPM (Eq. 11), DPM-Solver++(2M), or fresh noise on the mean of all estimates of x_0."""
    guidance_interval: GuidanceInterval | None = None
    """Ascending bounds of the part of the schedule with guidance: 0 is the clean label, 1 is pure noise; null: all of it."""
    ensemble_size: Annotated[int, Field(gt=0, lt=100)] = 1
    """Number of samples with different seeds whose soft maps are averaged."""
    mirror: bool = False
    """Whether every second sample of the ensemble is that of the mirrored image; not for phrases that say left or right."""

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if self.guidance_interval is not None and self.guidance_interval[0] > self.guidance_interval[1]:
            raise ValueError(f"guidance_interval {list(self.guidance_interval)} must be ascending")
        if self.mirror and self.ensemble_size == 1:
            raise ValueError("mirror needs an ensemble_size of at least 2")
        return self

    @property
    def single(self) -> "OperatingPoint":
        """The point of the first sample of the ensemble."""
        return self.model_copy(update={"ensemble_size": 1, "mirror": False})

    @property
    def label(self) -> str:
        """Name in tables and messages, without the size; default values are omitted."""
        steps = "1 step" if self.num_inference_steps == 1 else f"{self.num_inference_steps} steps"
        interval = " in [{:g}, {:g}]".format(*self.guidance_interval) if self.guidance_interval else ""
        sampler = {"ddim": "", "ddpm": ", DDPM", "dpmpp": ", DPM-Solver++", "mean": ", mean of estimates"}[self.sampler]
        ensemble = f", {self.ensemble_size} samples" if self.ensemble_size > 1 else ""
        ensemble += ", mirrored" if self.mirror else ""
        return f"{steps}, w = {self.guidance_scale:g}{interval}{sampler}{ensemble}"

    def __str__(self) -> str:
        return f"size {self.size}, {self.label}"


class Grid(Section):
    """Values that replace one coordinate of the base point at a time (Tables 3-5)."""

    sizes: list[ImageSize] = [96, 64]
    """Image sizes of Table 3."""
    num_inference_steps: list[NumInferenceSteps] = [10, 5]
    """Steps of Table 4."""
    guidance_scale: list[GuidanceScale] = [8.0, 7.0]
    """Guidance scales of Table 5."""


def _default_points(fields: dict[str, Any]) -> list[OperatingPoint]:
    """Return the default operating points at the size of the main point, which is validated before them."""
    options: list[dict[str, Any]] = [
        {"num_inference_steps": 1, "guidance_scale": 1.0},
        {"num_inference_steps": 2, "guidance_scale": 1.0, "sampler": "mean"},
        {"num_inference_steps": 4, "guidance_scale": 1.0, "sampler": "mean"},
        {"num_inference_steps": 8, "guidance_scale": 1.0, "sampler": "mean"},
        {"num_inference_steps": 4, "guidance_scale": 1.0},
        {"num_inference_steps": 8, "guidance_scale": 1.0},
        {"num_inference_steps": 4, "guidance_scale": 1.0, "sampler": "ddpm"},
        {"num_inference_steps": 1, "guidance_scale": 1.5},
        {"num_inference_steps": 1, "guidance_scale": 1.0, "ensemble_size": 2},
        {"num_inference_steps": 1, "guidance_scale": 1.0, "ensemble_size": 2, "mirror": True},
        {"num_inference_steps": 2, "guidance_scale": 1.0, "sampler": "mean", "ensemble_size": 2, "mirror": True},
        {"num_inference_steps": 4, "guidance_scale": 1.0, "sampler": "mean", "ensemble_size": 2, "mirror": True},
    ]
    return [OperatingPoint(size=fields["main"].size, **option) for option in options]


class Sample(Section):
    """Predictions of the trained models."""

    runs: list[RunGroup] = ["main", "controls", "grid", "val"]
    """Groups of runs to sample; []: GS is not trained, and only baselines are refined. Baselines, refinement and tables need
    all four groups or none."""
    main: OperatingPoint = OperatingPoint(size=128, num_inference_steps=1, guidance_scale=1.0, ensemble_size=2, mirror=True)
    """Operating point of the main row, which is sampled on all of test."""
    base: OperatingPoint = OperatingPoint(size=128, num_inference_steps=20, guidance_scale=7.5)
    """Operating point of the base row of Tables 3-5."""
    grid: Grid = Grid()
    grid_fraction: PositiveFraction = 0.25
    """Fraction of test, chosen by a hash of the image id, on which the grid is sampled; 0.07 in the paper."""
    operating_points: list[OperatingPoint] = Field(default_factory=_default_points)
    """Points of the table of AR against evaluations, on the grid's images and a part of val. Their size is that of `main`."""
    select_fraction: PositiveFraction = 0.2
    """Fraction of val, chosen by a hash of the image id, on which operating points are compared."""
    timestep_spacing: TimestepSpacing = "trailing"
    """Spacing of the timesteps."""
    clip_sample: bool = True
    """Whether the estimate of x_0 is clipped to [-b, b] in every step but the last."""
    readout: Readout = "bilinear"
    """Conversion of the soft map from latent size to image size."""
    threshold: Fraction = 0.45
    """Minimum value of the soft map at a foreground pixel."""
    batch: PositiveInt = 16
    """Batch size in phrases. It affects masks only through rounding."""
    precision: Precision = "bf16"
    """Precision of the networks."""

    @model_validator(mode="before")
    @classmethod
    def _points_have_size_of_main(cls, document: Any) -> Any:
        if not isinstance(document, dict) or not isinstance(document.get("operating_points"), list):
            return document
        main = document.get("main")
        size = main.get("size", 128) if isinstance(main, dict) else getattr(main, "size", 128)
        points = [{"size": size} | point if isinstance(point, dict) else point for point in document["operating_points"]]
        return document | {"operating_points": points}

    @model_validator(mode="after")
    def _points_have_one_size(self) -> Self:
        if any(point.size != self.main.size for point in self.operating_points):
            raise ValueError(f"sample.operating_points must have the size of sample.main ({self.main.size})")
        return self

    def grid_points(self) -> list[OperatingPoint]:
        """Return the base point, then variants with one coordinate replaced, including guidance scale 1 (Fig. 4)."""
        points = [self.base]
        for field, values in (
            ("size", self.grid.sizes),
            ("num_inference_steps", self.grid.num_inference_steps),
            ("guidance_scale", [*self.grid.guidance_scale, 1.0]),
        ):
            points += [self.base.model_copy(update={field: value}) for value in values]
        return list(dict.fromkeys(points))

    def val_points(self) -> list[OperatingPoint]:
        """Return the points that are compared on val: the main point and `operating_points`, without duplicates."""
        return list(dict.fromkeys([self.main, *self.operating_points]))

    def test_subset_points(self) -> list[OperatingPoint]:
        """Return all points that are sampled on the grid's part of test, base first."""
        return list(dict.fromkeys([*self.grid_points(), *self.val_points()]))

    def uses_mirror(self) -> bool:
        """Return whether any operating point mirrors images."""
        return any(point.mirror for point in self.test_subset_points())

    def sizes(self) -> list[int]:
        """Return the image sizes for which latents are computed, ascending."""
        return sorted({self.main.size, *(point.size for point in self.grid_points())})

    def run_sizes(self) -> list[int]:
        """Return the image sizes of the runs that are sampled, ascending."""
        return self.sizes() if "grid" in self.runs else [self.main.size]

    def has_tables(self) -> bool:
        """Return whether the study has baselines, refinement and tables: it samples all groups of runs, or none."""
        return not self.runs or set(self.runs) == set(get_args(RunGroup))
