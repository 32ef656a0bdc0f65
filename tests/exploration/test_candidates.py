from __future__ import annotations

import itertools

import optuna
import pytest

from penjing.exploration import candidates
from penjing.exploration.candidates import (
    Candidate,
    is_sensible,
    is_trained,
    ladder,
    seeds,
    suggest,
)
from penjing.techniques import techniques


def test_the_ladder_climbs_every_technique_alone_before_combinations() -> None:
    used = [{t.name for t in entry.recipe().techniques} for entry in ladder()]
    alone = set().union(*(names for names in used if len(names) == 1))
    trained = {name for name, kind in techniques().items() if kind.needs_training}
    # Rounded biases alone save nothing that is worth a candidate.
    assert alone == set(techniques()) - {"distill", "round_biases"} - trained
    assert trained <= {t.name for entry in seeds(1.0) for t in entry.recipe().techniques}
    assert any(len(names) > 1 for names in used)
    sizes = [len(names) for names in used]
    assert sizes == sorted(sizes)


@pytest.mark.parametrize("entry", [*ladder(), *seeds(1.0)], ids=lambda entry: entry.name)
def test_what_is_planned_is_sensible_and_named_once(entry: Candidate) -> None:
    assert is_sensible(entry)
    entry.recipe().check()


@pytest.mark.parametrize(
    ("settings", "name", "folder"),
    [
        ({"weights": "int4", "integers": True}, "W4A8", "W4A8"),
        ({"weights": "int16"}, "W16", "W16"),
        ({"weights": "shared5"}, "32 shared values", "32-shared-values"),
        ({"weights": "grid24"}, "rate–distortion 2⁻²⁴", "rate-distortion-2-24"),
        (
            {"sparsity": 0.5, "weights": "int8", "integers": True},
            "50 % sparse + W8A8",
            "50-sparse-W8A8",
        ),
        (
            {"channels": 0.35, "ranks": 0.3, "epochs": 1.2},
            "35 % channel pruning + 30 % low rank + 1.2 epochs",
            "35-channel-pruning-30-low-rank-1.2-epochs",
        ),
        (
            {"variance": 0.998, "weights": "small20", "epochs": 1.0},
            "low rank keeping 99.8 % + entropy penalty 20× + 1 epoch",
            "low-rank-keeping-99.8-entropy-penalty-20-1-epoch",
        ),
        ({}, "original", "original"),
    ],
)
def test_names_are_the_fields_words_and_folders_are_safe(
    settings: dict, name: str, folder: str
) -> None:
    entry = Candidate.model_validate(settings)
    assert (entry.name, entry.folder) == (name, folder)


def test_names_and_folders_tell_all_candidates_apart() -> None:
    space = {
        "channels": candidates.CHANNELS,
        "ranks": candidates.RANKS,
        "variance": candidates.VARIANCES,
        "sparsity": candidates.SPARSITY,
        "weights": candidates.WEIGHTS,
        "integers": (True, False),
        "epochs": (0.0, 0.064, 1.0, 3.0),
    }
    every = [
        Candidate.model_construct(**dict(zip(space, values, strict=True)))
        for values in itertools.product(*space.values())
        if not values[5] or values[4] in ("int8", "int4", "int2", "int1")
    ]
    for kind in ("name", "folder"):
        assert len({getattr(entry, kind) for entry in every}) == len(every)
    assert all(is_trained(entry.name) == (entry.epochs > 0) for entry in every)


def test_every_sensible_combination_has_a_recipe_in_a_sensible_order() -> None:
    space = itertools.product(
        (0.0, 0.5),
        (0.0, 0.3),
        (0.0, 0.99),
        (0.0, 0.9),
        candidates.WEIGHTS,
        (True, False),
        (0.0, 1.0),
    )
    names = ("channels", "ranks", "variance", "sparsity", "weights", "integers", "epochs")
    for values in space:
        entry = Candidate(**dict(zip(names, values, strict=True)))
        if is_sensible(entry):
            recipe = entry.recipe()
            recipe.check()
            assert all((stage.train is not None) == (entry.epochs > 0) for stage in recipe.stages)


def test_one_bit_has_no_zero_to_prune_to() -> None:
    assert not is_sensible(Candidate(sparsity=0.5, weights="int1"))
    assert not is_sensible(Candidate())


def test_layers_are_factorized_once() -> None:
    assert is_sensible(Candidate(variance=0.99))
    assert not is_sensible(Candidate(ranks=0.3, variance=0.99))


def test_a_sampler_can_be_told_what_was_tried() -> None:
    entry = seeds(2.0)[1]
    study = optuna.create_study(directions=["minimize"] * 3)
    study.enqueue_trial(entry.model_dump(), skip_if_exists=False)
    assert suggest(study.ask(), 2.0) == entry
