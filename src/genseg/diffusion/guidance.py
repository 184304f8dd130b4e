"""The steps in which an operating point uses classifier-free guidance, and its number of evaluations."""

from genseg.params.sample import OperatingPoint


def step_is_guided(point: OperatingPoint, step: int) -> bool:
    """Return whether a step is guided; step 0 starts from pure noise.

    Step i of n starts at the fraction (n - i) / n of the schedule: about (t + 1) / 1000 with trailing spacing.
    The step is guided if w != 1 and the fraction lies in the guidance interval, bounds included.
    """
    start = (point.num_inference_steps - step) / point.num_inference_steps
    interval = point.guidance_interval
    return point.guidance_scale != 1 and (interval is None or interval[0] <= start <= interval[1])


def count_evaluations(point: OperatingPoint) -> int:
    """Return the number of evaluations (U-Net passes for one phrase) per mask. A guided step costs two."""
    guided = sum(step_is_guided(point, step) for step in range(point.num_inference_steps))
    return point.ensemble_size * (point.num_inference_steps + guided)
