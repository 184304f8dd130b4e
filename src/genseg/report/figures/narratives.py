"""Figure of whole narratives in which each phrase has a colour, as in Figs. 3, 6 and 7 of the GS paper."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties

from genseg.artifacts.masks import decode
from genseg.artifacts.parquet import KEY
from genseg.report.figures import canvas
from genseg.report.figures.examples import choose_examples
from genseg.report.render import plural

_COUNT = 4
_MAX_HEIGHT = 1.6  # maximum height of a picture, in inches
LINE = 1.3 * canvas.LINE  # height of a line of a narrative, in inches
_PAD = 0.011  # width of the coloured border of a phrase, in inches
_FONT = FontProperties(family="DejaVu Sans", size=canvas.FONT)

Word = tuple[str, int | None]
"""A word and the number of the phrase that it belongs to, if any."""


def choose_narratives(per_phrase: pd.DataFrame, count: int) -> pd.DataFrame:
    """Return `image_id`, `narrative_id` and mean `iou` of narratives at equidistant quantiles of the mean IoU, best first.

    Only narratives with a colour for each of their phrases are chosen from, unless there are none.
    """
    means = per_phrase.groupby(KEY[:2], as_index=False).agg(iou=("iou", "mean"), phrases=("iou", "size"))
    coloured = means[means["phrases"] <= len(canvas.PALETTE)]
    return choose_examples((coloured if len(coloured) else means).assign(phrase_id=0), count)


def split_caption(caption: object, phrases: list[str]) -> list[Word]:
    """Return the words of a caption. The phrases are searched for in their order; one that is not found follows in brackets.

    The caption of data without narratives is null (None or nan) and gives only phrases.
    """
    words: list[Word] = []
    missing: list[Word] = []
    rest = caption if isinstance(caption, str) else ""
    for number, phrase in enumerate(phrases):
        if match := re.search(rf"(?<!\w){re.escape(phrase)}(?!\w)", rest, re.IGNORECASE):
            words += [*((word, None) for word in rest[: match.start()].split()), *((word, number) for word in match[0].split())]
            rest = rest[match.end() :]
        else:
            missing += [(word, number) for word in (f"[{phrase}]" if isinstance(caption, str) else phrase).split()]
    return words + [(word, None) for word in rest.split()] + missing


def lay_out(words: list[Word], width: float, measure: Callable[[str], float]) -> list[list[tuple[float, str, int | None]]]:
    """Break words into lines of `width` inches: for each line, the position in inches, text and phrase of its parts.

    Adjacent words of a phrase are one part. Punctuation follows the word before it. `measure` gives the width of a text.
    """
    space = measure("a a") - 2 * measure("a")
    lines: list[list[tuple[float, str, int | None]]] = [[]]
    end = 0.0
    for text, number in words:
        gap = space if any(map(str.isalnum, text)) else _PAD
        if not lines[-1]:
            gap = 0.0
        if lines[-1] and end + gap + measure(text) > width:
            lines.append([])
            end = gap = 0.0
        if lines[-1] and lines[-1][-1][2] == number and gap:
            x, before, _ = lines[-1][-1]
            lines[-1][-1] = (x, f"{before} {text}", number)
            end = x + measure(f"{before} {text}")
        else:
            lines[-1].append((end + gap, text, number))
            end += gap + measure(text)
    return lines


def draw_narratives(methods: dict[str, tuple[pd.DataFrame, pd.DataFrame]], phrases: pd.DataFrame, path: Path, dpi: int) -> str:
    """Draw for each chosen narrative its image, its ground truth, the masks of each method, and the coloured caption.

    `methods` maps the name of a method to its predictions and its scores of phrases; the first one chooses the narratives.

    Raises UserError if an image is missing or has another size than in the phrase table.
    """
    # 1. Choose the narratives, and collect their phrases with the masks of every panel.
    chooser = next(iter(methods))
    scored = methods[chooser][1]
    rows = scored[KEY].merge(phrases.rename(columns={"mask": "ground truth"}), on=KEY)
    for name, (predictions, scores) in methods.items():
        rows = rows.merge(predictions[[*KEY, "mask"]].rename(columns={"mask": name}), on=KEY, how="left")
        rows = rows.merge(scores[[*KEY, "iou"]].rename(columns={"iou": f"IoU {name}"}), on=KEY, how="left")
    by_narrative = rows.sort_values("phrase_id").set_index(KEY[:2])
    groups = [by_narrative.loc[[key]] for key in choose_narratives(scored, _COUNT)[KEY[:2]].itertuples(index=False, name=None)]

    # 2. Lay out the panels and captions; lengths in inches.
    measure = text_width(dpi)
    heads = ["image", "ground truth", *methods]
    width = (canvas.WIDTH - canvas.GAP * (len(heads) - 1)) / len(heads)
    centres = [index * (width + canvas.GAP) + width / 2 for index in range(len(heads))]
    heights = [min(_MAX_HEIGHT, width / canvas.drawn_aspect(group.iloc[0])) for group in groups]
    captions = [split_caption(group["caption"].iloc[0], group["phrase"].tolist()) for group in groups]
    lines_of_groups = [lay_out(words, canvas.WIDTH - 0.1, measure) for words in captions]
    top = 1.6 * canvas.LINE
    total_height = top + sum(heights) + LINE * (sum(map(len, lines_of_groups)) + 2 * len(groups))

    # 3. Draw them.
    with canvas.open_figure(canvas.WIDTH, total_height, path, dpi) as figure:
        for x, name in zip(centres, heads, strict=True):
            canvas.add_text(figure, x, total_height - top / 2, name)
        y = total_height - top
        for group, height, lines in zip(groups, heights, lines_of_groups, strict=True):
            first = group.iloc[0]
            image, drawn_width = canvas.load_phrase_image(first), min(width, height * canvas.drawn_aspect(first))
            for x, name in zip(centres, heads, strict=True):
                masks = enumerate(group[name]) if name in group else ()
                painted = [
                    (decode(rle, *image.shape[:2]), colour_of(number)) for number, rle in masks if isinstance(rle, bytes)
                ]
                picture = canvas.overlay_all(image, painted) if name in group else image
                axes = canvas.add_picture(figure, x - drawn_width / 2, y - height, drawn_width, height, picture)
                for mask, colour in painted:
                    canvas.outline(axes, mask, colour, "solid")
                if name in methods:
                    text = f"mean IoU {group[f'IoU {name}'].mean():.2f}"
                    canvas.add_text(figure, x, y - height - 0.55 * LINE, text)
            y -= height + LINE
            for line in lines:
                y -= LINE
                draw_words(figure, 0.05, y, line)
            y -= LINE
    few = f"with at most {len(canvas.PALETTE)} phrases " if len(groups[0]) <= len(canvas.PALETTE) else ""
    return (
        "Whole narratives (the paper's Figs. 3, 6 and 7), each phrase in the colour of its text: "
        f"{plural(len(groups), 'narrative')} of test {few}at equidistant quantiles of the mean IoU of {chooser} over the "
        "phrases of a narrative, best to worst. Where masks overlap, the smaller one is above; outlines are complete."
    )


def text_width(dpi: int) -> Callable[[str], float]:
    """Return the function that measures the width of a text of a narrative in inches."""
    renderer = FigureCanvasAgg(Figure(dpi=dpi)).get_renderer()
    return lambda text: renderer.get_text_width_height_descent(text, _FONT, ismath=False)[0] / dpi


def draw_words(figure: Figure, x: float, y: float, line: list[tuple[float, str, int | None]]) -> None:
    """Draw a line of `lay_out` from (x, y) in inches; phrases are on their colour."""
    for left, text, number in line:
        canvas.add_text(figure, x + left, y, text, ha="left", va="baseline", **_text_options(number))


def _text_options(number: int | None) -> dict[str, Any]:
    if number is None:
        return {"fontproperties": _FONT}
    colour = colour_of(number)
    box = {"facecolor": colour, "edgecolor": "none", "pad": 72 * _PAD}
    return {"fontproperties": _FONT, "bbox": box, "color": "white" if colour == canvas.PALETTE[-1] else "black"}


def colour_of(number: int) -> str:
    """Return the colour of a phrase: those of the palette, then lighter ones."""
    colour = canvas.PALETTE[number % len(canvas.PALETTE)]
    if number // len(canvas.PALETTE) % 2 == 0:
        return colour
    return to_hex([0.45 + 0.55 * channel for channel in to_rgb(colour)])
