import pytest

from penjing.report.comparison import bits, compare


def layer(name: str, params: int, weight_format: str = "float32") -> dict:
    return {
        "name": name,
        "kind": "conv",
        "shape": [params],
        "params": params,
        "format": weight_format,
    }


def test_a_factorized_layer_stays_with_its_original():
    before = {"layers": [layer("conv1", 1000), layer("conv10", 10)]}
    after = {
        "layers": [layer("conv1.0", 100, "int8"), layer("conv1.1", 60, "int4"), layer("conv10", 8)]
    }
    first, second = compare(before, after)
    assert [one["name"] for one in first.after] == ["conv1.0", "conv1.1"]
    assert (first.bytes_before, first.bytes_after) == (4000, 130)
    assert [one["name"] for one in second.after] == ["conv10"]


def test_layers_that_went_or_came():
    gone, new = compare({"layers": [layer("a", 4)]}, {"layers": [layer("b", 2)]})
    assert (gone.name, gone.after, gone.bytes_after) == ("a", [], 0)
    assert (new.name, new.before, new.bytes_after) == ("b", [], 8)


@pytest.mark.parametrize(
    ("weight_format", "width"),
    [("float32", 32), ("int8", 8), ("4-bit codebook", 4), ("ternary", 2)],
)
def test_bits(weight_format, width):
    assert bits(weight_format) == width


def test_a_format_without_width_is_refused():
    with pytest.raises(ValueError, match="names no number of bits"):
        bits("mystery")
