"""A recipe: an ordered list of stages, each a list of techniques and perhaps a training.

In YAML::

    name: small
    about: Fewer channels, then 8 bits.
    stages:
      - techniques:
          - prune_channels: {ratio: 0.4}
        train: {epochs: 2, lr: 0.01}
      - techniques:
          - quantize: {weight_bits: 8, activation_bits: 8}
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import shutil
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationError,
    field_serializer,
    field_validator,
)
from torch import nn

from penjing import __version__, files
from penjing.errors import PenjingError, invalid
from penjing.identity import UnidentifiedError
from penjing.identity import of as hash_of
from penjing.net import snapshot
from penjing.net.plain import plain
from penjing.progress import say
from penjing.recipes import read
from penjing.tasks import Task
from penjing.techniques import Technique, bake, techniques
from penjing.techniques.order import objection
from penjing.training import TrainSettings, train


class Stage(BaseModel):
    """Techniques attached together, trained together when ``train`` is given, baked together."""

    model_config = ConfigDict(extra="forbid")

    techniques: list[SerializeAsAny[Technique]] = Field(default_factory=list)
    train: TrainSettings | None = None

    @field_validator("techniques", mode="before")
    @classmethod
    def _by_name(cls, entries: Any) -> Any:
        if not isinstance(entries, list):
            raise ValueError("techniques must be a list such as [quantize: {weight_bits: 8}]")
        return [entry if isinstance(entry, Technique) else _technique(entry) for entry in entries]

    @field_serializer("techniques")
    def _named(self, entries: list[Technique]) -> list[dict[str, Any]]:
        return [{entry.name: entry.model_dump(exclude_defaults=True)} for entry in entries]


class Recipe(BaseModel):
    """Stages in the order in which they run; ``about`` says in a line what they are for."""

    model_config = ConfigDict(extra="forbid")

    name: str = "recipe"
    about: str = ""
    stages: list[Stage] = Field(default_factory=list)

    @property
    def techniques(self) -> list[Technique]:
        """All techniques in the order in which they are attached."""
        return [technique for stage in self.stages for technique in stage.techniques]

    def check(self) -> None:
        """Raise ``PenjingError`` if a technique cannot follow those before it, or lacks a training."""
        for stage in self.stages:
            for technique in stage.techniques:
                if technique.needs_training and stage.train is None:
                    raise PenjingError(
                        f"recipe {self.name!r} cannot run: {technique.name} works in training only; "
                        f"give its stage a train:, or leave it out ({technique.needs_training})"
                    )
            for earlier, later in combinations(stage.techniques, 2):
                self._reject(objection(earlier, later, beside=True))
        for earlier, later in combinations(self.techniques, 2):
            self._reject(objection(earlier, later))

    def _reject(self, reason: str | None) -> None:
        if reason is not None:
            raise PenjingError(f"recipe {self.name!r} cannot run: {reason}")

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as in YAML: settings left at their defaults are left out."""
        return self.model_dump(exclude_defaults=True, mode="json") | {"name": self.name}

    def save(self, path: Path) -> None:
        """Write the recipe as YAML."""
        files.write_text(path, yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True))


def load(recipe: str | Path) -> Recipe:
    """The recipe in a YAML file, or the one of that name among those that come with penjing.

    Raises:
        PenjingError: there is no such file or name, the file is not YAML, or it holds an unknown
            technique or setting.
    """
    try:
        data = yaml.safe_load(read(recipe))
    except yaml.YAMLError as error:
        raise PenjingError(f"{recipe} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise PenjingError(
            f"{recipe} must hold a mapping with the key 'stages', found {data!r:.40}"
        )
    return parse({"name": Path(recipe).stem} | data, str(recipe))


def parse(data: dict[str, Any], where: str = "recipe") -> Recipe:
    """A recipe from plain data; ``where`` names it in errors."""
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        place, reason = invalid(error)
        raise PenjingError(f"{where}: {place}: {reason}") from error
    recipe.check()
    return recipe


def compress(
    model: nn.Module,
    task: Task,
    recipe: Recipe,
    *,
    teacher: nn.Module | None = None,
    cache: Path | None = None,
    progress: bool = False,
) -> nn.Module:
    """A compressed copy of ``model``; the model itself is left as it is.

    Args:
        teacher: what stages with ``distill`` learn from; default: ``model`` as given.
        cache: a folder in which the model after each stage is kept under the hash of all that made
            it: the model's code and weights, the data, the code of loss and score, the stages so far,
            the versions of penjing and PyTorch. A stage found there is not run again, and a training
            that was interrupted resumes from its last checkpoint. Where something cannot be
            identified (see ``penjing.identity``) nothing is cached, which is said once.
        progress: show progress bars on standard error.

    Raises:
        PenjingError: the recipe's order is invalid, the cache cannot be written, the model cannot be
            brought into plain form (``penjing.net.plain``), or a technique cannot be used on it.
    """
    recipe.check()
    keys = _keys(model, task, recipe, teacher if teacher is not None else model, cache)
    device = next((p.device for p in model.parameters()), task.example.device)
    model = plain(model, task.example.to(device))
    teacher = teacher if teacher is not None else model
    start, current = _latest(model, keys, cache)
    for index, stage in list(enumerate(recipe.stages))[start:]:
        kept = cache / keys[index] if cache and keys else None
        checkpoint = kept.with_name(f"{kept.name}.checkpoint") if kept else None
        _run_stage(current, task, stage, teacher, checkpoint, progress)
        if kept and checkpoint:
            snapshot.save(current, kept)
            checkpoint.unlink(missing_ok=True)
    return current


def stage_keys(model: nn.Module, task: Task, recipe: Recipe, teacher: nn.Module) -> list[str]:
    """For each stage, the hash of what its result depends on.

    Raises:
        UnidentifiedError: the model, the teacher or the task's loss or score cannot be identified.
    """
    digest = identity(task, model, teacher)
    keys = []
    for stage in recipe.stages:
        # With defaults, too: another version may have others.
        techniques = [[one.name, one.model_dump(mode="json")] for one in stage.techniques]
        training = stage.train.model_dump(mode="json") if stage.train else None
        # Keys in their order: of the patterns of a setting by layer, the first that fits counts.
        digest.update(json.dumps([techniques, training]).encode())
        digest.update(hash_of([type(one) for one in stage.techniques]))
        keys.append(digest.hexdigest()[:16])
    return keys


def identity(task: Task, *models: nn.Module) -> hashlib._Hash:
    """A SHA-256 over the versions of penjing and PyTorch, the task (data, loss, score) and the models
    (structure, code, weights), to which more may be added.

    Raises:
        UnidentifiedError: a model, or the task's loss or score, cannot be identified.
    """
    digest = hashlib.sha256(hash_of(__version__, torch.__version__, task.fingerprint))
    for model in models:
        digest.update(hash_of(model))
    return digest


def _keys(
    model: nn.Module, task: Task, recipe: Recipe, teacher: nn.Module, cache: Path | None
) -> list[str]:
    """Return the keys of the stages; none without a cache, or where it cannot be used."""
    if cache is None:
        return []
    try:
        return stage_keys(model, task, recipe, teacher)
    except UnidentifiedError as error:
        _say_once(f"Stages are not cached: {error}")
        return []


@functools.cache
def _say_once(line: str) -> None:
    say(line)


def _latest(model: nn.Module, keys: list[str], cache: Path | None) -> tuple[int, nn.Module]:
    """How many stages are in the cache, and the model after them."""
    for done in range(len(keys), 0, -1):
        folder = (cache or Path()) / keys[done - 1]
        if snapshot.exists(folder):
            try:
                kept = snapshot.load(copy.deepcopy(model), folder)
                return done, kept.to(next(model.parameters()).device)
            except PenjingError as error:
                say(f"A damaged stage is made anew: {error}")
                shutil.rmtree(folder, ignore_errors=True)
    return 0, copy.deepcopy(model)


def _run_stage(
    model: nn.Module,
    task: Task,
    stage: Stage,
    teacher: nn.Module,
    checkpoint: Path | None,
    progress: bool,
) -> None:
    attached = [technique.attach(model, task) for technique in stage.techniques]
    if stage.train is not None:
        train(
            model,
            task,
            stage.train,
            attached,
            teacher=teacher if stage.train.distill else None,
            checkpoint=checkpoint,
            discard=True,
            progress=progress,
        )
    bake(attached, model, task)
    model.eval()


def _technique(entry: Any) -> Technique:
    if isinstance(entry, str):
        entry = {entry: {}}
    if not isinstance(entry, dict) or len(entry) != 1:
        raise ValueError(f"expected one technique such as 'quantize: {{...}}', found {entry!r}")
    (name, settings), known = next(iter(entry.items())), techniques()
    if name not in known:
        raise ValueError(f"no technique is called {name!r}; there are {', '.join(sorted(known))}")
    try:
        return known[name](**(settings or {}))
    except ValidationError as error:
        place, reason = invalid(error)
        raise ValueError(f"{name}.{place}: {reason}") from error
