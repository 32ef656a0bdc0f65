"""The combinations that exploration considers, from settings to recipe."""

from __future__ import annotations

import re
import unicodedata
from typing import Any, Literal

import optuna
from pydantic import BaseModel, ConfigDict

from penjing.recipe import Recipe, parse

CHANNELS = (0.0, 0.2, 0.35, 0.5, 0.65, 0.8)
RANKS = (0.0, 0.3, 0.5, 0.7)
VARIANCES = (0.0, 0.99, 0.998)
SPARSITY = (0.0, 0.5, 0.7, 0.8, 0.9, 0.95)
WEIGHTS = (
    "float",
    "int16",
    "int8",
    "int4",
    "int2",
    "int1",
    "shared5",
    "shared4",
    "grid24",
    "grid20",
    "small10",
    "small20",
    "small40",
)
SUPERSCRIPTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
PATIENCE = 8.0
"""A training may take so many times what the same epochs of the original take."""
LEAST_TRAINING_S = 30.0


class Candidate(BaseModel):
    """One combination.

    Attributes:
        channels: fraction of MACs removed by channel pruning.
        ranks: fraction of weights removed by factorization.
        variance: fraction of the variance of every layer's outputs that factorization keeps; 0 = no
            factorization by outputs.
        sparsity: fraction of single weights pruned.
        weights: how weights are stored; ``grid24`` is ``compress_weights`` at a distortion of 2**-24,
            ``small20`` is ``penalize_entropy`` to a file 20 times smaller.
        integers: whether activations are 8-bit too, so that integer kernels run.
        epochs: of training, spread over the stages; 0 = post-training only.
    """

    model_config = ConfigDict(frozen=True)

    channels: float = 0.0
    ranks: float = 0.0
    variance: float = 0.0
    sparsity: float = 0.0
    weights: Literal[WEIGHTS] = "float"  # type: ignore[valid-type]
    integers: bool = False
    epochs: float = 0.0

    @property
    def name(self) -> str:
        """A name for people, such as ``35 % channel pruning + 50 % sparse + W4A8 + 2 epochs``."""
        parts = [
            f"{self.channels:.0%} channel pruning" if self.channels else "",
            f"{self.ranks:.0%} low rank" if self.ranks else "",
            f"low rank keeping {self.variance * 100:.3g}%" if self.variance else "",
            f"{self.sparsity:.0%} sparse" if self.sparsity else "",
            self._weights_name(),
            f"{self.epochs:.3g} epoch{'' if self.epochs == 1 else 's'}" if self.epochs else "",
        ]
        return " + ".join(filter(None, parts)).replace("%", " %") or "original"

    @property
    def folder(self) -> str:
        """``name`` in letters, digits, dots and dashes, such as ``50-sparse-W4A8``."""
        plain = unicodedata.normalize("NFKD", self.name)
        return re.sub(r"[^A-Za-z0-9.]+", "-", plain).strip("-")

    def _weights_name(self) -> str:
        kind, number = re.fullmatch(r"([a-z]+)(\d*)", self.weights).groups()  # type: ignore[union-attr]
        if kind == "int":
            return f"W{number}A8" if self.integers else f"W{number}"
        exponent = number.translate(SUPERSCRIPTS)
        return {
            "float": "",
            "shared": f"{2 ** int(number or 0)} shared values",
            "grid": f"rate–distortion 2⁻{exponent}",
            "small": f"entropy penalty {number}×",
        }[kind]

    def recipe(self, epoch_s: float | None = None) -> Recipe:
        """Structure first, then values: each group is one trained stage; untrained, each technique
        is a stage of its own so that its contribution can be told.

        Args:
            epoch_s: seconds that an epoch of the original takes; trainings that turn out much slower
                are cut short, schedules and all. None for no limit.
        """
        groups = [group for group in (self._structure(), self._values()) if group]
        if not self.epochs:
            stages: list[dict[str, Any]] = [
                {"techniques": [entry]} for group in groups for entry in group
            ]
        else:
            share = self.epochs / len(groups)
            stages = [
                {
                    "techniques": group,
                    "train": _training(share, epoch_s, gentle=group is not groups[0]),
                }
                for group in groups
            ]
        return parse({"name": self.name, "stages": stages}, self.name)

    def _structure(self) -> list[dict[str, Any]]:
        techniques: list[dict[str, Any]] = []
        if self.channels:
            importance = "taylor" if self.epochs else "magnitude"
            techniques.append(
                {"prune_channels": {"ratio": self.channels, "importance": importance}}
            )
        if self.ranks:
            techniques.append({"factorize": {"ratio": self.ranks}})
        if self.variance:
            techniques.append({"factorize": {"variance": self.variance}})
        return techniques

    def _values(self) -> list[dict[str, Any]]:
        techniques: list[dict[str, Any]] = []
        if self.sparsity:
            techniques.append({"prune_weights": {"sparsity": self.sparsity}})
        if self.weights.startswith("shared"):
            techniques.append({"share_weights": {"bits": int(self.weights.removeprefix("shared"))}})
        elif self.weights.startswith("grid"):
            distortion = 2.0 ** -int(self.weights.removeprefix("grid"))
            techniques.append({"compress_weights": {"distortion": distortion}})
        elif self.weights.startswith("small"):
            smaller = int(self.weights.removeprefix("small"))
            techniques.append({"penalize_entropy": {"times_smaller": smaller}})
        elif self.weights != "float":
            bits = int(self.weights.removeprefix("int"))
            activations = 8 if self.integers else None
            techniques.append({"quantize": {"weight_bits": bits, "activation_bits": activations}})
        return techniques


def _training(epochs: float, epoch_s: float | None, gentle: bool) -> dict[str, Any]:
    """Settings that hold for most nets: AdamW is insensitive to the scale of folded weights."""
    settings: dict[str, Any] = {
        "epochs": round(epochs, 3),
        "optimizer": "adamw",
        "lr": 5e-4 if gentle else 1e-3,
        "schedule": "one_cycle",
        "distill": {},
    }
    if epoch_s is not None:
        settings["time_budget"] = round(LEAST_TRAINING_S + PATIENCE * epochs * epoch_s, 1)
    return settings


def is_sensible(candidate: Candidate) -> bool:
    """Whether it is worth a try: zeros need more than one bit and do not come twice, integer kernels
    take at most eight, a penalty needs a training, and layers are factorized once."""
    if candidate.ranks and candidate.variance:
        return False
    penalized = candidate.weights.startswith("small")
    if candidate.sparsity and (candidate.weights == "int1" or penalized):
        return False
    if penalized and not candidate.epochs:
        return False
    if candidate.integers and candidate.weights not in ("int8", "int4", "int2", "int1"):
        return False
    return bool(candidate._structure() or candidate._values())


def is_trained(name: str) -> bool:
    """Whether the candidate that bears ``name`` is trained."""
    return name.endswith((" epoch", " epochs"))


def ladder() -> list[Candidate]:
    """Single techniques, then combinations, all post-training: seconds each."""
    singles = [
        {"weights": "int8", "integers": True},
        {"weights": "int16"},
        {"weights": "int4", "integers": True},
        {"weights": "shared5"},
        {"weights": "grid24"},
        {"weights": "grid20"},
        {"weights": "int2", "integers": True},
        {"sparsity": 0.5},
        {"sparsity": 0.7},
        {"channels": 0.2},
        {"ranks": 0.3},
        {"variance": 0.998},
        {"weights": "int1", "integers": True},
    ]
    combinations = [
        {"sparsity": 0.5, "weights": "int8", "integers": True},
        {"sparsity": 0.5, "weights": "int4", "integers": True},
        {"channels": 0.2, "weights": "int8", "integers": True},
        {"ranks": 0.3, "weights": "int8", "integers": True},
        {"variance": 0.998, "weights": "grid24"},
        {"variance": 0.99, "weights": "int8", "integers": True},
        {"sparsity": 0.7, "weights": "shared4"},
    ]
    return [Candidate.model_validate(settings) for settings in singles + combinations]


def seeds(epochs: float) -> list[Candidate]:
    """Trained combinations from moderate to strong, which experience says are worth a try."""
    settings: list[dict[str, Any]] = [
        {"channels": 0.35, "sparsity": 0.5, "weights": "int4", "integers": True},
        {"channels": 0.65, "sparsity": 0.8, "weights": "int4", "integers": True},
        {"sparsity": 0.5, "weights": "int4", "integers": True},
        {"sparsity": 0.9, "weights": "int4", "integers": True},
        {"channels": 0.5, "weights": "int8", "integers": True},
        {"channels": 0.8, "sparsity": 0.9, "weights": "int4", "integers": True},
        {"ranks": 0.5, "sparsity": 0.7, "weights": "int4", "integers": True},
        {"sparsity": 0.95, "weights": "shared4"},
        {"variance": 0.99, "sparsity": 0.7, "weights": "int4", "integers": True},
        {"weights": "small20"},
        {"channels": 0.5, "weights": "small20"},
    ]
    return [Candidate.model_validate(entry | {"epochs": epochs}) for entry in settings]


def suggest(trial: optuna.Trial, epochs: float) -> Candidate:
    """The trained candidate that a trial's sampler proposes."""
    return Candidate(
        channels=trial.suggest_categorical("channels", CHANNELS),
        ranks=trial.suggest_categorical("ranks", RANKS),
        variance=trial.suggest_categorical("variance", VARIANCES),
        sparsity=trial.suggest_categorical("sparsity", SPARSITY),
        weights=trial.suggest_categorical("weights", WEIGHTS),
        integers=trial.suggest_categorical("integers", [True, False]),
        epochs=epochs,
    )
