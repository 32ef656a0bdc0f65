"""Order rules: techniques may follow one another or not, by the kind of change that each makes."""

from __future__ import annotations

from typing import NamedTuple

from penjing.techniques.technique import Kind, Technique

STRUCTURE = {Kind.CHANNELS, Kind.FACTORS}
ZEROS = {Kind.ZEROS, Kind.BLOCKS}
INTEGERS = {Kind.GRID, Kind.SIGNS, Kind.CODED}
VALUES = INTEGERS | {Kind.CODEBOOK}


class Rule(NamedTuple):
    """Kinds of which the later are rejected behind the earlier; ``reason`` says why and what to do."""

    earlier: set[Kind]
    later: set[Kind]
    reason: str


AFTER = [
    Rule(
        VALUES,
        STRUCTURE,
        "the weights have their final values by then, which are made for the layers as they are; "
        "change the structure first",
    ),
    Rule(
        INTEGERS,
        VALUES,
        "the weights are on an integer grid already, which new values would leave; use one of the two",
    ),
    Rule(
        {Kind.CODEBOOK},
        {Kind.CODEBOOK, Kind.CODED},
        "the weights share their values already, and would no longer; use one of the two",
    ),
    Rule(
        {Kind.CODEBOOK}, ZEROS, "the codebooks have no place left for zero; prune first, then share"
    ),
    Rule(ZEROS, {Kind.FACTORS}, "the product of factors has no zeros; factorize first, then prune"),
    Rule(ZEROS, {Kind.SIGNS}, "has no zero; use weight_bits: 2 or more"),
    Rule(
        {Kind.BLOCKS},
        {Kind.CHANNELS},
        "the blocks of the pattern would fall apart; prune channels in an earlier stage",
    ),
]
"""Rules within one stage and across stages."""
BESIDE = [
    Rule(
        {Kind.CHANNELS},
        {Kind.CHANNELS},
        "the second would choose among channels that are to go; put it into a stage of its own",
    ),
    Rule(
        {Kind.CHANNELS},
        {Kind.BLOCKS},
        "the blocks of the pattern would fall apart; put it into a later stage",
    ),
]
"""Rules within one stage only."""


def objection(earlier: Technique, later: Technique, *, beside: bool = False) -> str | None:
    """Say why ``later`` cannot come after ``earlier``, or ``beside`` it in one stage, and what to do;
    None where it can."""
    how = "is in one stage with" if beside else "comes after"
    for rule in BESIDE if beside else AFTER:
        if earlier.changes in rule.earlier and later.changes in rule.later:
            return f"{_called(later)} {how} {_called(earlier)}, but {rule.reason}"
    return None


def _called(technique: Technique) -> str:
    what = {Kind.BLOCKS: " with a pattern", Kind.SIGNS: " to 1 bit"}
    return technique.name + what.get(technique.changes, "")
