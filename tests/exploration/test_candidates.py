from __future__ import annotations

import itertools

import optuna
import pytest

from penjing.exploration import candidates
from penjing.exploration.candidates import Candidate, is_sensible, ladder, seeds, suggest
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


def test_names_tell_candidates_apart() -> None:
    planned = [*ladder(), *seeds(1.0), *seeds(5.0)]
    assert len({entry.name for entry in planned}) == len(planned)


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
