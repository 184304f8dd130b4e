"""The embedded data set: generated scenes with narratives, in the formats of COCO panoptic and Panoptic Narrative Grounding.

A scene has two or three regions of *stuff* and several *things* that differ in shape, colour, surface and size. Distractors
differ from another thing in one attribute only, so a model that ignores a word of the phrase selects the wrong thing. Things
and regions have similar hues, and shading, shadows, noise and low contrast are added, so colour alone does not solve the task.
Some (colour, shape) pairs occur only in the test scenes (`COMPOSITIONAL`), unless the params set `hold_back` to false.
"""

import io
import json
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from genseg.artifacts.files import atomic_directory
from genseg.artifacts.seeds import derive_seed
from genseg.params.data import Scenes

Field = NDArray[np.float32]

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
PLURALS = {"cross": "crosses"}
STUFF = ("grass", "water", "sand", "bricks", "snow", "sky")
COLOURS = {
    "red": (0.80, 0.16, 0.14),
    "green": (0.20, 0.58, 0.20),
    "blue": (0.16, 0.34, 0.78),
    "yellow": (0.88, 0.76, 0.20),
    "purple": (0.55, 0.22, 0.66),
    "white": (0.88, 0.88, 0.90),
}
SURFACES = ("plain", "striped", "dotted")
SIZES = ("small", "large")
COMPOSITIONAL = frozenset({("red", "star"), ("green", "circle"), ("blue", "cross"), ("yellow", "square"), ("purple", "ring")})
"""(colour, shape) pairs that are held back from the training scenes."""
NUMBERS = {2: "two", 3: "three", 4: "four"}
STUFF_ID = 101
ANNOTATORS = 2
"""Number of narratives per scene."""
JPEG_QUALITY = 93


# --------------------------------------------------------------------------------------------------------- attributes
@dataclass(frozen=True)
class Thing:
    """Attributes of a thing in a scene."""

    shape: str
    colour: str
    surface: str
    size: str


Attributes = dict[str, tuple[str, ...]]
"""Values of each attribute in a data set, by the attribute's name."""
ATTRIBUTES: Attributes = {"shape": SHAPES, "colour": tuple(COLOURS), "surface": SURFACES, "size": SIZES}


def attributes_of(scenes: Scenes) -> Attributes:
    """Return the attributes of a study's scenes: all sizes, and the shapes, colours and surfaces of its params."""
    return ATTRIBUTES | {"shape": tuple(scenes.shapes), "colour": tuple(scenes.colours), "surface": tuple(scenes.surfaces)}


# ----------------------------------------------------------------------------------------------------------- data set
def write_scenes(scenes: Scenes, root: Path, workers: int = 1) -> None:
    """Write the scenes of `train2017` and `val2017` to `root` in the layout of COCO panoptic and PNG, atomically.

    A scene depends only on the seed, its split and its id, so the bytes do not depend on the number of processes.
    """
    categories = [{"id": i + 1, "name": name, "isthing": 1, "supercategory": "shape"} for i, name in enumerate(SHAPES)]
    categories += [{"id": STUFF_ID + i, "name": name, "isthing": 0, "supercategory": "region"} for i, name in enumerate(STUFF)]
    with atomic_directory(root) as target, ProcessPoolExecutor(workers) as pool:
        annotations = target / "annotations"
        for split, count, first_id in (("train", scenes.train_images, 1), ("val", scenes.test_images, 500_001)):
            folders = (target / f"{split}2017", annotations / f"panoptic_{split}2017")
            for folder in folders:
                folder.mkdir(parents=True)
            write = partial(_write_scene, scenes, split, *folders)
            records = pool.map(write, range(first_id, first_id + count), chunksize=16)
            images, infos, narratives = zip(*records, strict=True)
            document = {"images": images, "annotations": infos, "categories": categories}
            (annotations / f"panoptic_{split}2017.json").write_text(json.dumps(document))
            (annotations / f"png_coco_{split}2017.json").write_text(json.dumps(list(chain(*narratives))))


def sample_scenes(scenes: Scenes, split: str, count: int) -> tuple[float, float]:
    """Estimate the mean number of grounded phrases and the mean JPEG size in bytes per scene from `count` scenes.

    `split` is `train` or `val` (the test scenes).
    """
    phrase_count, jpeg_bytes = 0, 0
    for image_id in range(count):
        rng = np.random.default_rng(derive_seed(scenes.seed, "sample scene", split, image_id))
        image, _, things, regions = _draw(rng, scenes, unseen_pairs=split == "val" or not scenes.hold_back)
        ids = [str(number) for number in range(len(things) + len(regions))]
        for annotator in range(ANNOTATORS):
            parts = _narrate(rng, image_id, annotator, things, regions, ids)["segments"]
            phrase_count += sum(bool(part["segment_ids"]) for part in parts)
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=JPEG_QUALITY)
        jpeg_bytes += len(file.getvalue())
    return phrase_count / count, jpeg_bytes / count


def _write_scene(
    scenes: Scenes, split: str, images: Path, masks: Path, image_id: int
) -> tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]]]:
    """Write the image and the panoptic PNG of a scene; return its `images` and `annotations` records and its narratives."""
    # 1. Draw the scene.
    rng, size = np.random.default_rng(derive_seed(scenes.seed, "scene", split, image_id)), scenes.size
    image, segments, things, regions = _draw(rng, scenes, unseen_pairs=split == "val" or not scenes.hold_back)
    name = f"{image_id:012d}"
    Image.fromarray(image).save(images / f"{name}.jpg", quality=JPEG_QUALITY)

    # 2. Write the segments with random ids.
    segment_ids = [int(value) for value in rng.choice((1 << 24) - 1, size=len(things) + len(regions), replace=False) + 1]
    categories = [SHAPES.index(thing.shape) + 1 for thing in things] + [STUFF_ID + STUFF.index(name) for name in regions]
    segments_info = []
    colours = np.zeros((size, size, 3), np.uint8)
    for position, (segment_id, category) in enumerate(zip(segment_ids, categories, strict=True)):
        inside = segments == position
        colours[inside] = (segment_id & 255, segment_id >> 8 & 255, segment_id >> 16)
        ys, xs = np.nonzero(inside)
        box = [int(xs.min()), int(ys.min()), int(np.ptp(xs)) + 1, int(np.ptp(ys)) + 1]
        segments_info.append({"id": segment_id, "category_id": category, "iscrowd": 0, "bbox": box, "area": int(inside.sum())})
    Image.fromarray(colours).save(masks / f"{name}.png", compress_level=1)

    # 3. Return the records.
    ids = [str(segment_id) for segment_id in segment_ids]
    return (
        {"id": image_id, "file_name": f"{name}.jpg", "height": size, "width": size},
        {"image_id": image_id, "file_name": f"{name}.png", "segments_info": segments_info},
        [_narrate(rng, image_id, annotator, things, regions, ids) for annotator in range(ANNOTATORS)],
    )


# ------------------------------------------------------------------------------------------- content and narratives
def _choose_things(rng: np.random.Generator, attributes: Attributes, unseen_pairs: bool) -> list[Thing]:
    """Return a referent, distractors that differ from it in one attribute, and sometimes similar and random things."""

    def pick(attribute: str) -> str:
        return str(rng.choice(attributes[attribute]))

    def random_thing() -> Thing:
        return Thing(pick("shape"), pick("colour"), pick("surface"), pick("size"))

    # 1. Draw the referent. With `unseen_pairs`, 40 % of the referents are forced to be a `COMPOSITIONAL` pair.
    referent = random_thing()
    pairs = [pair for pair in sorted(COMPOSITIONAL) if pair[0] in attributes["colour"] and pair[1] in attributes["shape"]]
    if unseen_pairs and pairs and rng.random() < 0.4:
        colour, shape = pairs[rng.integers(len(pairs))]
        referent = Thing(shape, colour, referent.surface, referent.size)

    # 2. Add distractors that differ from it in one attribute.
    things = [referent]
    for attribute in rng.permutation(("shape", "colour", "colour", "surface", "size"))[: rng.integers(1, 3)]:
        other_value = str(rng.choice([value for value in attributes[attribute] if value != getattr(referent, attribute)]))
        things.append(Thing(**{**vars(referent), attribute: other_value}))

    # 3. Sometimes add things of the same shape, colour and size (for plurals), and a random thing.
    if rng.random() < 0.6:
        prototype = things[rng.integers(len(things))] if rng.random() < 0.5 else random_thing()
        for _ in range(rng.integers(1, 3)):
            surface = prototype.surface if rng.random() < 0.6 else pick("surface")
            things.append(Thing(prototype.shape, prototype.colour, surface, prototype.size))
    things += [random_thing() for _ in range(rng.integers(0, 2))]

    # 4. Without `unseen_pairs`, remove the held-back pairs. Shuffle.
    if not unseen_pairs:
        things = [thing for thing in things if (thing.colour, thing.shape) not in COMPOSITIONAL]
        if not things:
            seen_colours = [colour for colour in attributes["colour"] if (colour, referent.shape) not in COMPOSITIONAL]
            things = [replace(referent, colour=seen_colours[0])]
    return [things[i] for i in rng.permutation(len(things))]


def _describe(rng: np.random.Generator, things: list[Thing], target: int, plural: bool) -> tuple[str, list[int]] | None:
    """Return a noun phrase and the indices of the things that it describes, or None if there is no such phrase.

    A singular phrase describes `target` alone; a plural phrase describes `target` and at least one other thing.
    """
    order = [str(attribute) for attribute in rng.permutation(["colour", "surface", "size"])]
    for count in rng.permutation([0, 1, 1] if plural else [1, 1, 2, 0, 3]):
        described = {key: getattr(things[target], key) for key in ["shape", *order[:count]]}
        matches = [i for i, thing in enumerate(things) if described.items() <= vars(thing).items()]
        if (len(matches) == 1) == plural or len(matches) > max(NUMBERS):
            continue
        words = [described[key] for key in ("size", "surface", "colour") if key in described]
        noun = described["shape"]
        if plural:
            noun = PLURALS.get(noun, noun + "s")
            head = str(rng.choice([NUMBERS[len(matches)], "the"]))
        else:
            head = str(rng.choice(["a", "the"]))
        return " ".join([head, *words, noun]), matches
    return None


def _narrate(
    rng: np.random.Generator, image_id: int, annotator: int, things: list[Thing], regions: list[str], ids: list[str]
) -> dict[str, Any]:
    """Return a narrative in the format of PNG: a caption and its parts (grounded nouns, ungrounded nouns and other text).

    Args:
        regions: names of the stuff regions.
        ids: segment ids of the things, then of the regions.
    """
    # 1. Select up to three phrases about things, and one or two about regions.
    mentions: list[tuple[str, list[str], bool, list[str]]] = []
    mentioned: set[tuple[int, ...]] = set()
    for target in rng.permutation(len(things)):
        plural = rng.random() < 0.5
        description = _describe(rng, things, int(target), plural) or _describe(rng, things, int(target), not plural)
        if description is None or tuple(description[1]) in mentioned:
            continue
        phrase, members = description
        mentioned.add(tuple(members))
        pair = (things[members[0]].colour, things[members[0]].shape)
        tags = ["compositional"] if pair in COMPOSITIONAL and pair[0] in phrase else []
        mentions.append((phrase, [ids[i] for i in members], len(members) > 1, tags))
        if len(mentions) == 3:
            break
    for region in rng.permutation(len(regions))[: rng.integers(1, 3)]:
        phrase = f"{rng.choice(['the', 'some'])} {regions[region]}"
        mentions.append((phrase, [ids[len(things) + int(region)]], False, []))
    mentions = [mentions[i] for i in rng.permutation(len(mentions))]

    # 2. Join them into a caption.
    parts = [
        _part(str(rng.choice(["In", "On"]))),
        _part(str(rng.choice(["this picture", "this image", "the photo"])), noun=True),
        _part(str(rng.choice(["we can see", "there is", "I can see"]))),
    ]
    for position, (phrase, segment_ids, is_plural, tags) in enumerate(mentions):
        if position:
            parts.append(_part(str(rng.choice([", beside", ", and also", ", near", "and"]))))
        part = _part(phrase, noun=True) | {"segment_ids": segment_ids, "plural": is_plural}
        parts.append(part | ({"tags": tags} if tags else {}))
    parts.append(_part("."))
    caption = " ".join(part["utterance"] for part in parts).replace(" ,", ",").replace(" .", ".")
    return {"image_id": str(image_id), "annotator_id": annotator, "caption": caption, "segments": parts}


def _part(text: str, noun: bool = False) -> dict[str, Any]:
    """Return a part of a narrative without segments."""
    return {"utterance": text, "segment_ids": [], "plural": False, "noun": noun}


# ---------------------------------------------------------------------------------------------------------- drawing
def _draw(
    rng: np.random.Generator, scenes: Scenes, unseen_pairs: bool
) -> tuple[NDArray[np.uint8], NDArray[np.int32], list[Thing], list[str]]:
    """Draw a scene.

    Returns:
        Image [size, size, 3], segment indices [size, size] (things, then regions), things, and names of the regions.
    """
    # 1. Draw the regions of stuff.
    size, radii = scenes.size, {str(name): span for name, span in scenes.radii.items()}
    y, x = (axis.astype(np.float32) for axis in np.mgrid[:size, :size])
    names = [str(name) for name in rng.choice(STUFF, size=rng.integers(2, 4), replace=False)]
    ground = _partition(rng, x, y, size, len(names))
    canvas = np.zeros((size, size, 3), np.float32)
    for index, name in enumerate(names):
        canvas[ground == index] = _surface_of_stuff(rng, name, x, y, size)[ground == index]

    # 2. Draw the things on top. A thing is dropped if at twelve random places it hides over 40 % of an earlier one.
    owner = np.full((size, size), -1, np.int32)
    things: list[Thing] = []
    full_areas: list[int] = []
    for thing in _choose_things(rng, attributes_of(scenes), unseen_pairs)[: scenes.most_things]:
        for _ in range(12):
            radius = size * rng.uniform(*radii[thing.size])
            cx, cy = rng.uniform(0.9 * radius, size - 0.9 * radius, 2)
            distance = _distance(thing.shape, x - cx, y - cy, radius, rng.uniform(0, 2 * np.pi))
            trial = np.where(distance < 0, len(things), owner)
            if all(np.sum(trial == i) >= 0.6 * area for i, area in enumerate(full_areas)):
                break
        else:
            continue
        if rng.random() < 0.7:  # soft shadow
            dx, dy = rng.uniform(-0.3, 0.3, 2) * radius
            shadow = _distance(thing.shape, x - cx - dx, y - cy - dy, radius * 1.05, 0.0)
            canvas *= 1 - 0.45 * np.clip(0.5 - shadow / (0.3 * radius), 0, 1)[..., None]
        colour = _surface_of_thing(rng, thing, x - cx, y - cy, radius)
        alpha = np.clip(0.5 - distance, 0, 1)[..., None]
        canvas = canvas * (1 - alpha) + colour * alpha
        owner = trial
        things.append(thing)
        full_areas.append(int(np.sum(distance < 0)))

    # 3. Number the segments; a region may be covered completely.
    segments = np.where(owner >= 0, owner, len(things) + ground).astype(np.int32)
    present = [index for index in range(len(names)) if np.any(segments == len(things) + index)]
    for position, index in enumerate(present):
        segments[(owner < 0) & (ground == index)] = len(things) + position

    # 4. Add light from one side, contrast and noise.
    angle = rng.uniform(0, 2 * np.pi)
    slope = (np.cos(angle) * (x - size / 2) + np.sin(angle) * (y - size / 2)) / size
    canvas *= (1 + rng.uniform(0, 0.6) * slope)[..., None]
    canvas = 0.5 + (canvas - 0.5) * rng.uniform(0.65, 1.05)
    canvas += rng.normal(0, rng.uniform(0.01, 0.05), canvas.shape).astype(np.float32)
    image = np.rint(np.clip(canvas, 0, 1) * 255).astype(np.uint8)
    return image, segments, things, [names[index] for index in present]


def _partition(rng: np.random.Generator, x: Field, y: Field, size: int, count: int) -> NDArray[np.int32]:
    """Return the region index [size, size] of an image that is divided by one or two wavy lines."""
    region = np.zeros(x.shape, np.int32)
    angle = rng.uniform(0, 2 * np.pi)
    across = np.cos(angle) * (x - size / 2) + np.sin(angle) * (y - size / 2)
    along = -np.sin(angle) * (x - size / 2) + np.cos(angle) * (y - size / 2)
    offsets = (rng.uniform(-0.15, 0.15),) if count == 2 else (rng.uniform(-0.28, -0.12), rng.uniform(0.12, 0.28))
    for offset in offsets:
        wave = rng.uniform(0.01, 0.06) * size * np.sin(along * rng.uniform(4, 14) / size + rng.uniform(0, 6.3))
        region += (across > offset * size + wave).astype(np.int32)
    return region


def _smooth_noise(rng: np.random.Generator, size: int, cells: tuple[int, int]) -> Field:
    """Return noise [size, size] in about [-1, 1] with features of size / cells pixels (rows, columns)."""
    coarse = Image.fromarray(rng.uniform(-1, 1, cells).astype(np.float32))
    return np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC), np.float32)


def _surface_of_stuff(rng: np.random.Generator, name: str, x: Field, y: Field, size: int) -> Field:
    """Return the texture [size, size, 3] of a stuff class, in about [0, 1].

    Each class has two possible hues, which other classes or things share, so the texture identifies it, not the colour.
    """
    scale = size / 128
    phase = rng.uniform(0, 6.3)
    if name == "grass":
        bases, tone = ((0.24, 0.52, 0.18), (0.66, 0.60, 0.30)), 0.30 * _smooth_noise(rng, size, (14, 56))
    elif name == "water":
        wave = np.sin((y + 2.5 * scale * np.sin(x / (9 * scale) + phase)) / (2.2 * scale) + phase)
        bases, tone = ((0.18, 0.38, 0.66), (0.26, 0.50, 0.34)), 0.20 * wave + 0.1 * _smooth_noise(rng, size, (8, 8))
    elif name == "sand":
        bases, tone = ((0.80, 0.70, 0.42), (0.64, 0.42, 0.32)), 0.22 * rng.uniform(-1, 1, x.shape).astype(np.float32)
    elif name == "bricks":
        row = np.floor(y / (7 * scale))
        mortar = ((y % (7 * scale)) < 1.3 * scale) | (((x + 7 * scale * (row % 2) + phase) % (14 * scale)) < 1.3 * scale)
        bases, tone = ((0.62, 0.26, 0.18), (0.50, 0.54, 0.62)), np.where(mortar, 0.45, 0.08 * _smooth_noise(rng, size, (18, 9)))
    elif name == "snow":
        flakes = 0.10 * _smooth_noise(rng, size, (28, 28)) - 0.06 * _smooth_noise(rng, size, (5, 5))
        bases, tone = ((0.86, 0.88, 0.92), (0.56, 0.66, 0.86)), flakes
    else:
        clouds = 0.26 * np.clip(_smooth_noise(rng, size, (5, 4)), 0, 1) + 0.16 * (y / size - 0.5)
        bases, tone = ((0.45, 0.62, 0.86), (0.84, 0.58, 0.40)), clouds
    base = np.asarray(bases[rng.integers(len(bases))], np.float32)
    colour = base * rng.uniform(0.85, 1.15) + rng.uniform(-0.05, 0.05, 3).astype(np.float32)
    return (colour + np.asarray(tone, np.float32)[..., None]).astype(np.float32)


def _surface_of_thing(rng: np.random.Generator, thing: Thing, x: Field, y: Field, radius: float) -> Field:
    """Return the colour [size, size, 3] of a thing, with x and y relative to its centre: base colour, pattern and shading."""
    colour = np.asarray(COLOURS[thing.colour], np.float32) * rng.uniform(0.8, 1.15)
    colour = colour + rng.uniform(-0.07, 0.07, 3).astype(np.float32)
    angle = rng.uniform(0, np.pi)
    u, v = np.cos(angle) * x + np.sin(angle) * y, -np.sin(angle) * x + np.cos(angle) * y
    pattern = np.zeros_like(x)
    period = max(4.5, radius * rng.uniform(0.35, 0.5))
    if thing.surface == "striped":
        pattern = np.clip(3 * np.sin(u * 2 * np.pi / period), -1, 1)
    elif thing.surface == "dotted":
        pattern = np.clip(6 * (np.cos(u * 2 * np.pi / period) + np.cos(v * 2 * np.pi / period) - 0.7), -1, 1)
    shading = 1 - 0.25 * (x * np.cos(angle) + y * np.sin(angle)) / radius
    shade = np.where(pattern > 0, -0.38, 0.08) * np.abs(pattern)
    return (colour * (shading + shade)[..., None]).astype(np.float32)


def _distance(shape: str, x: Field, y: Field, radius: float, rotation: float) -> Field:
    """Return the distance in pixels to the outline of a shape, negative inside (approximate far from the outline)."""
    u, v = np.cos(rotation) * x + np.sin(rotation) * y, -np.sin(rotation) * x + np.cos(rotation) * y
    r = np.hypot(u, v)
    if shape == "circle":
        return r - 0.95 * radius
    if shape == "ring":
        return np.abs(r - 0.72 * radius) - 0.3 * radius
    if shape == "square":
        return np.maximum(np.abs(u), np.abs(v)) - 0.85 * radius
    if shape == "cross":
        arm = np.maximum(np.abs(u) - radius, np.abs(v) - 0.34 * radius)
        return np.minimum(arm, np.maximum(np.abs(v) - radius, np.abs(u) - 0.34 * radius))
    if shape == "triangle":
        sides = [np.cos(a) * u + np.sin(a) * v for a in (np.pi / 2, np.pi * 7 / 6, np.pi * 11 / 6)]
        return np.maximum.reduce(sides) - 0.62 * radius
    # A star is symmetric: fold the plane into one of its five wedges.
    theta = np.mod(np.arctan2(v, u), 2 * np.pi / 5) - np.pi / 5
    inner, outer = 0.5 * radius, 1.1 * radius
    tip = np.array([outer * np.cos(np.pi / 5), outer * np.sin(np.pi / 5)])
    px, py = r * np.cos(theta), r * np.abs(np.sin(theta))
    edge = tip - np.array([inner, 0.0])
    normal = np.array([edge[1], -edge[0]]) / np.hypot(*edge)
    return ((px - inner) * normal[0] + py * normal[1]).astype(np.float32)
