"""Damaged files: the packed bytes or one PenjingError, in bounded time and memory."""

import math
import random
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutations import DIGEST, KINDS, MOST, Seed, case, check, mutated, sealed, seeds, small_streams
from onnx_files import chain

from penjing.container import arithmetic, format, inspect, unpack
from penjing.container.contexts import Kernels
from penjing.container.damage import DamageError
from penjing.container.planes import VIEWS, Content, element_type
from penjing.container.streams import number
from penjing.errors import PenjingError

MEMORY = 1 << 28
"""Bytes beyond what the process holds: NumPy's and LZMA's own, far more than a case declares."""
BATCHES, BATCH = 50, 20_000


@pytest.fixture(scope="module")
def known() -> Iterator[list[Seed]]:
    with small_streams():
        yield seeds()


@contextmanager
def memory_capped() -> Iterator[None]:
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def test_seeds_are_valid_and_of_every_kind(known, tmp_path):
    coders, views = set(), set()
    for seed in known:
        assert check(seed.data, tmp_path, known, False)
        for stream in format.decode(seed.data).streams:
            views.add(stream.decoded.view)
            coders.update(stream.decoded.coders)
    decode = arithmetic.decode
    with mock.patch.object(arithmetic, "decode", side_effect=decode) as spied:
        for seed in known:
            format.decode(seed.data)
    forms = {call.args[0][3] for call in spied.call_args_list}
    assert views == {view.name for view in VIEWS}
    assert coders == {"stored", "constant", "lzma", "huffman", "arithmetic"}
    simple = {arithmetic.UNEVEN, arithmetic.SMOOTH, arithmetic.DEPENDENT, arithmetic.SPARSE}
    assert forms == {*simple, arithmetic.SPARSE + arithmetic.EIGHTS}
    assert {seed.data[4] for seed in known} == {1, 2}
    heads = [5 + len(number(len(seed.model))) + DIGEST[seed.data[4]] for seed in known]
    layouts = {seed.data[head] for seed, head in zip(known, heads, strict=True)}
    assert layouts == {0, 1, 2}


NUMBERS = st.integers(0, 2**32 - 1)


@settings(
    max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.integers(0, 99),
    st.lists(st.tuples(st.sampled_from(KINDS), NUMBERS, NUMBERS, NUMBERS), min_size=1, max_size=3),
    st.booleans(),
)
def test_any_damage_is_one_error(known, tmp_path, which, edits, resealed):
    data = mutated(known[which % len(known)], edits, known)
    check(sealed(data) if resealed else data, tmp_path, known, resealed)


@pytest.mark.slow
@pytest.mark.parametrize("batch", range(BATCHES))
def test_a_million_damaged_files(known, tmp_path, batch):
    rng = random.Random(batch)
    accepted = 0
    with memory_capped():
        for _ in range(BATCH):
            state = rng.getstate()
            data, resealed = case(rng, known)
            try:
                accepted += check(data, tmp_path, known, resealed)
            except Exception as error:
                kept = tmp_path / "failed.penjing"
                kept.write_bytes(data)
                raise AssertionError(f"{kept}: {error!r}, {resealed=}, {hash(state)}") from error
    # Resealed damage unpacks now and then: else nothing got behind the checksums.
    assert BATCH / 100 < accepted < BATCH


# What the mutations found, each by itself.


@pytest.mark.parametrize("data_type", [1, 5, 6, 7])
def test_wide_elements_coded_as_narrow_integers_are_refused(data_type):
    """The sign bit of a wide type did not fit the byte that it was turned over in."""
    content = Content(element_type(data_type), (10,), (80,))
    integers = next(view for view in VIEWS if view.name == "integers")
    with pytest.raises(DamageError, match="another element type than its own"):
        integers.join(content, lambda shape: np.zeros(math.prod(shape), np.uint8))


def test_a_few_bytes_that_declare_much_are_refused_by_a_limit(tmp_path):
    file = chain(np.zeros(100_000, np.uint8))
    path = tmp_path / "x.penjing"
    path.write_bytes(format.encode(file, "arithmetic"))
    assert path.stat().st_size < 300
    for act in (inspect, lambda *a, **k: unpack(*a, tmp_path / "out", **k)):
        with pytest.raises(PenjingError, match=f"more than the {MOST} of the limit given"):
            act(path, most=MOST)
        act(path, most=len(file))


def test_memory_that_is_not_there_is_an_error_for_the_user(tmp_path, monkeypatch):
    path = tmp_path / "x.penjing"
    path.write_bytes(format.encode(chain(np.arange(20)), "huffman"))

    def none_left(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(format, "decode", none_left)
    with pytest.raises(PenjingError, match=r"x\.penjing cannot be unpacked.*more memory"):
        unpack(path, tmp_path / "out")


def test_bytes_after_one_block_are_refused(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, 5000).astype(np.uint8)
    data = format.encode(chain(array, array), "arithmetic")
    assert not format.decode(data).streams
    path = tmp_path / "x.penjing"
    path.write_bytes(data + b"more")
    with pytest.raises(PenjingError, match="does not have the declared size"):
        unpack(path, tmp_path / "out")


@pytest.mark.parametrize("size", [1e13, 1e15])
def test_kernels_whose_moments_exceed_float64_are_expected_to_be_zero_or_near(size):
    """Equal positions far larger than the next one: the ridge vanishes beside them."""
    kernels = Kernels(9)
    kernels.new_rows(1, 1)
    kernels.moments[:] = size
    kernels.moments[8, 8] = 1
    kernels.learn(0, np.full((1, 1), 255, np.int32))
    assert abs(int(kernels.expect(8)[0, 0])) <= 8 * 32 * 64 * 255
