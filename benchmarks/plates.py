"""Plates at a parking gate: RapidOCR on whole frames against penjing's detector before its recognizer.

Detectors are trained on the train part (about an hour each on two cores, kept in the cache), the
geometry of the crops is learned there, too; the test part is read at the end. Needs the packages
``rapidocr-onnxruntime`` 1.4.4 and, from its own models, PP-OCRv4's recognizer.
"""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import rapidocr_onnxruntime
from rapidocr_onnxruntime import RapidOCR

import results
from frontier import CACHE, SHARED, need, penjing, row, unpack
from penjing.attention import Crop, Detector, Motion, Pipeline
from penjing.attention.crop import jittered, learn
from penjing.targets.onnxruntime import runtime
from penjing.targets.timing import time_calls
from penjing.tasks import coco
from penjing.tasks.frames import read

HOME = CACHE / "plates"
MODELS = Path(rapidocr_onnxruntime.__file__).parent / "models"
RECOGNIZER = MODELS / "ch_PP-OCRv4_rec_infer.onnx"
TEXT_DETECTOR = MODELS / "ch_PP-OCRv4_det_infer.onnx"
PEER = "RapidOCR 1.4.4 on the whole frame"
KEPT = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
BUDGETS = {"detector": 45_000, "small": 20_000}
SIGHT = {"height": 48, "bgr": True, "mean": (0.5,) * 3, "std": (0.5,) * 3, "max_width": 400}
"""How the recognizer wants its input."""
VIEWS = (
    Crop(**SIGHT, top=-0.12, bottom=-0.12, stretch=1.2, min_width=200),
    Crop(**SIGHT, left=0.13, right=0.13, top=0.05, bottom=0.05, min_width=160),
    Crop(**SIGHT, top=0.05, bottom=0.05, min_width=160),
)
"""Views of a plate, of which the one read with most confidence counts; margins to begin with."""
TRIALS, JITTER = 12, 0.06
"""For each view; the detector's sides are off by about so much of the plate's on validation images."""
TRUST = 0.3
"""Weight of a format's frequency against the characters' mean log probability: chosen by five-fold
cross-validation on the train part's texts."""
SURE = 0.9
"""Confidence with which a view in a known format is enough: chosen in the same way, so that it loses
no plate (1.5 of 3 views are then read)."""


def main() -> None:
    cv2.setNumThreads(1)
    data = {part: _data(part) for part in ("train", "test")}
    cards = {name: _train(name, budget, data) for name, budget in BUDGETS.items()}
    samples, truth = _samples(data["train"])
    reader = Reader(truth)
    views = _views(reader, samples, truth)
    detector = Detector.load(HOME / "detector" / "model.penjing")
    ours = Pipeline(detector, views, RECOGNIZER, postprocess=reader.readings, enough=reader.is_sure)
    peer = RapidOCR(intra_op_num_threads=1, inter_op_num_threads=1)
    images = coco.read(data["test"])
    texts = _texts(data["test"])
    frames = [read(image.path) for image in images]
    table = [
        *_detection_rows(cards, detector, frames),
        *_reading_rows(ours, peer, images, frames, texts),
        *_speed_rows(ours, peer, images, frames),
        *_size_rows(cards),
    ]
    results.write("plates", table, "python benchmarks/plates.py")


class Reader:
    """Text of the recognizer's probabilities, of A-Z and 0-9 only.

    A plate's format says which of its characters are letters and which are digits. How often a
    format occurs among ``texts``, the train part's, helps to tell O from 0 and I from 1.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self.formats = Counter(map(_format, texts))
        self.session = runtime.session(RECOGNIZER)
        known = self.session.get_modelmeta().custom_metadata_map["character"].splitlines()
        self.columns = [0] + [known.index(character) + 1 for character in KEPT]

    def run(self, crop: np.ndarray) -> np.ndarray:
        """Probabilities ``[T, characters]`` of a crop ``[1, 3, 48, W]``."""
        return self.session.run(None, {self.session.get_inputs()[0].name: crop})[0][0]

    def read(self, probabilities: np.ndarray) -> tuple[str, float]:
        """The text by greedy CTC decoding, and the mean probability of its characters."""
        part = probabilities[:, self.columns]
        best = part.argmax(axis=1)
        new = (best != 0) & (best != np.append(-1, best[:-1]))
        sure = part.max(axis=1)[new]
        text = "".join(KEPT[index - 1] for index in best[new])
        return text, float(sure.mean()) if len(sure) else 0.0

    def readings(self, views: Sequence[np.ndarray]) -> dict[str, str]:
        """The text of the view that is read with most confidence, ``alone`` and with ``formats``."""
        alone = max((self.read(view) for view in views), key=lambda found: found[1])[0]
        options = [option for view in views for option in self._with_formats(view)]
        return {"alone": alone, "formats": max(options, default=(0.0, ""))[1]}

    def is_sure(self, view: np.ndarray) -> bool:
        """Whether a view is read so well, in a known format, that others need not be read."""
        text, confidence = self.read(view)
        return confidence >= SURE and _format(text) in self.formats

    def _with_formats(self, probabilities: np.ndarray) -> list[tuple[float, str]]:
        """The best text in each known format of its length, and in its own, with a score."""
        part = probabilities[:, self.columns]
        best = part.argmax(axis=1)
        logs = np.log(np.maximum(part[(best != 0) & (best != np.append(-1, best[:-1]))], 1e-5))
        if not len(logs):
            return []
        letters, digits = logs[:, 1:27], logs[:, 27:]
        own = "".join(
            "D" if d > a else "L" for a, d in zip(letters.max(1), digits.max(1), strict=True)
        )
        total = self.formats.total() + len(self.formats) / 2
        options = []
        for form in {own} | {known for known in self.formats if len(known) == len(logs)}:
            kinds = [digits[i] if kind == "D" else letters[i] for i, kind in enumerate(form)]
            names = [KEPT[26:] if kind == "D" else KEPT[:26] for kind in form]
            text = "".join(name[kind.argmax()] for name, kind in zip(names, kinds, strict=True))
            rare = np.log((self.formats[form] + 0.5) / total)
            options.append((float(np.mean([kind.max() for kind in kinds]) + TRUST * rare), text))
        return options


def _data(part: str) -> Path:
    """The COCO file of a part, with its images beside it."""
    folder = unpack(SHARED / "data" / "plates" / f"{part}.tar", HOME / "data" / part)
    target = folder / "annotations.json"
    shutil.copyfile(need(SHARED / "data" / "plates" / f"{part}.json"), target)
    target.chmod(0o644)
    return target


def _texts(path: Path) -> dict[str, list[str]]:
    """Plates that have a text, by the image's name."""
    document = json.loads(path.read_text())
    names = {entry["id"]: entry["file_name"] for entry in document["images"]}
    found: dict[str, list[str]] = {}
    for annotation in document["annotations"]:
        if annotation.get("text"):
            found.setdefault(names[annotation["image_id"]], []).append(_kept(annotation["text"]))
    return found


def _format(text: str) -> str:
    return "".join("D" if character.isdigit() else "L" for character in text)


def _kept(text: str) -> str:
    return "".join(character for character in text.upper() if character in KEPT)


def _train(name: str, budget: int, data: dict[str, Path]) -> dict[str, Any]:
    options = ("--data", data["train"], "--test", data["test"], "--budget", budget)
    return penjing("attend", "train", *options, "-o", HOME / name)


def _views(
    reader: Reader, samples: list[tuple[np.ndarray, np.ndarray]], truth: list[str]
) -> list[Crop]:
    """The views with margins learned on the train part's true boxes, moved at random as a detector
    moves them: each learns to read what the others cannot."""
    kept = HOME / "views.json"
    begun = [*(json.loads(view.model_dump_json()) for view in VIEWS), TRIALS, JITTER]
    if kept.exists() and (known := json.loads(kept.read_text()))["begun"] == begun:
        return [Crop(**view) for view in known["learned"]]
    moved = jittered(samples, JITTER, seed=1)
    views = list(VIEWS)
    for index in range(len(views)):
        others = [_read_all(reader, view, moved) for view in views if view is not views[index]]

        def right(crops: list[np.ndarray], others: list = others) -> float:
            mine = [reader.read(reader.run(crop)) for crop in crops]
            return _count([mine, *others], truth)

        views[index] = learn(views[index], moved, right, trials=TRIALS, jitter=0.0)
    learned = [json.loads(view.model_dump_json()) for view in views]
    kept.write_text(json.dumps({"begun": begun, "learned": learned}))
    return views


def _read_all(
    reader: Reader, view: Crop, samples: list[tuple[np.ndarray, np.ndarray]]
) -> list[tuple[str, float]]:
    return [reader.read(reader.run(view.cut(frame, box))) for frame, box in samples]


def _count(readings: list[list[tuple[str, float]]], truth: list[str]) -> float:
    """Plates that the most confident view reads, plus the mean confidence to decide between equals."""
    best = [max(options, key=lambda item: item[1]) for options in zip(*readings, strict=True)]
    right = sum(text == true for (text, _), true in zip(best, truth, strict=True))
    return right + float(np.mean([sure for _, sure in best]))


def _samples(train: Path) -> tuple[list[tuple[np.ndarray, np.ndarray]], list[str]]:
    document = json.loads(train.read_text())
    names = {entry["id"]: entry["file_name"] for entry in document["images"]}
    samples, truth = [], []
    for annotation in document["annotations"]:
        if annotation.get("text"):
            left, top, width, height = annotation["bbox"]
            box = np.array([left, top, left + width, top + height])
            samples.append((read(train.parent / names[annotation["image_id"]]), box))
            truth.append(_kept(annotation["text"]))
    return samples, truth


def _detection_rows(
    cards: dict[str, dict[str, Any]], detector: Detector, frames: list[np.ndarray]
) -> list[dict[str, Any]]:
    turning = cycle(frames)
    (time,) = time_calls([lambda: detector(next(turning))], runs=3 * len(frames), settled=0)
    table = []
    for name, goal in (("detector", 45_056), ("small", 20_480)):
        card, figures = cards[name], cards[name]["figures"]
        work = f"plate detector, {BUDGETS[name] // 1000} KB"
        recall = figures["recall at 0.1 false positives an image"]
        wanted = 0.95 if name == "detector" else None
        table += [
            row(work, "packed file, bytes", card["packed_bytes"], None, "", goal,
                card["packed_bytes"] <= goal),
            row(work, "recall at 0.1 false positives an image, IoU 0.5, test", recall, None, "",
                wanted, recall >= wanted if wanted else None),
            row(work, "AP50, test", figures["AP50"], None, "", None, None),
            row(work, "AP50:95, test", figures["AP"], None, "", None, None),
            row(work, "recall at the file's threshold, test", figures["recall at the threshold"],
                None, "", None, None),
            row(work, "false positives an image at the file's threshold, test",
                figures["false positives an image at the threshold"], None, "", None, None),
        ]  # fmt: skip
    table.append(row("plate detector, 45 KB", "ms a decoded frame, 1 thread", time.median_ms, None,
                     "", "at most 5", time.median_ms <= 5))  # fmt: skip
    return table


def _reading_rows(
    ours: Pipeline,
    peer: RapidOCR,
    images: list[coco.Annotated],
    frames: list[np.ndarray],
    texts: dict[str, list[str]],
) -> list[dict[str, Any]]:
    read_by: Counter[tuple[str, bool]] = Counter()
    for image, frame in zip(images, frames, strict=True):
        true = texts.get(image.path.name, [])
        if not true:
            continue
        ours.reset()
        found = [item.output for item in ours(frame)]
        lines = peer(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))[0] or []
        said = {way: [reading[way] for reading in found] for way in ("alone", "formats")}
        said["peer"] = [_kept(line[1]) for line in lines]
        for way, readings in said.items():
            read_by[way, True] += sum(text in readings for text in true)
            read_by[way, False] += sum(any(text in r for r in readings) for text in true)
    total = sum(map(len, texts.values()))
    table = []
    for exact in (True, False):
        measure_name = (
            f"plates read of {total}, test{'' if exact else ', as part of what was read'}"
        )
        theirs = read_by["peer", exact]
        for way, how in (
            ("alone", "recognizer alone"),
            ("formats", "with the train part's formats"),
        ):
            mine, judged = read_by[way, exact], way == "formats"
            goal = "no fewer than the peer" if judged else None
            met = mine >= theirs if judged else None
            table.append(row(f"reading plates, {how}", measure_name, mine, theirs, PEER, goal, met))
    return table


def _speed_rows(
    ours: Pipeline, peer: RapidOCR, images: list[coco.Annotated], frames: list[np.ndarray]
) -> list[dict[str, Any]]:
    """Milliseconds a frame with its plates, and with the plates painted over."""
    # RapidOCR takes blue first, in one piece of memory.
    turned = {id(frame): np.ascontiguousarray(frame[..., ::-1]) for frame in frames}
    covered = [_covered(frame, image) for frame, image in zip(frames, images, strict=True)]
    turned |= {id(frame): np.ascontiguousarray(frame[..., ::-1]) for frame in covered}
    ways = {"postprocess": ours.postprocess, "enough": ours.enough}
    gated = Pipeline(ours.detector, ours.crops, ours.model, motion=Motion(), **ways)
    table = []
    for work, shown, goal in (
        ("plates in view", frames, 1 / 8),
        ("no plate in view", covered, 1 / 20),
    ):
        mine, theirs, still = time_calls(
            [
                _each(shown, lambda frame: (ours.reset(), ours(frame))),
                _each(shown, lambda frame: peer(turned[id(frame)])),
                _each([shown[0]], gated),
            ],
            runs=len(shown),
            warmup=2,
            seconds=math.inf,
            settled=0,
        )
        words = f"at most 1/{round(1 / goal)} of the peer"
        table.append(row(work, "median ms a frame, 1 thread", mine.median_ms, theirs.median_ms, PEER,
                         words, mine.median_ms <= theirs.median_ms * goal))  # fmt: skip
        if shown is covered:
            table.append(row("still scene, motion gate", "median ms a frame, 1 thread",
                             still.median_ms, theirs.median_ms, PEER, None, None))  # fmt: skip
    return table


def _each(frames: list[np.ndarray], call: Callable[[np.ndarray], object]) -> Callable[[], object]:
    turning: Iterator[np.ndarray] = cycle(frames)
    return lambda: call(next(turning))


def _covered(frame: np.ndarray, image: coco.Annotated) -> np.ndarray:
    """The frame with every plate painted in the mean colour of its surroundings."""
    picture = frame.copy()
    height, width = frame.shape[:2]
    for box in image.boxes[:, :4] * [width, height, width, height]:
        left, top, right, bottom = Crop(height=1, left=0.1, right=0.1, top=0.2, bottom=0.2).region(
            box, height, width
        )
        around = picture[max(0, top - 10) : bottom + 10, max(0, left - 10) : right + 10]
        picture[top:bottom, left:right] = around.mean(axis=(0, 1))
    return picture


def _size_rows(cards: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    packed = cards["detector"]["packed_bytes"]
    smallest = penjing("profile", "penjing:heat_map_12kb", "--image-size", "96")[0]
    peak = smallest["peak_activation_bytes"]
    return [
        row("finding plates", "file, bytes", packed, TEXT_DETECTOR.stat().st_size, PEER, None, None),
        row("reading plates", "files, bytes", packed + RECOGNIZER.stat().st_size,
            TEXT_DETECTOR.stat().st_size + RECOGNIZER.stat().st_size, PEER, None, None),
        row("detector of 12 KB at 96 x 96 px", "peak activations, float32, bytes", peak, None, "",
            262_144, peak <= 262_144),
    ]  # fmt: skip


if __name__ == "__main__":
    main()
