from collections import namedtuple

import pytest
import torch

from penjing.errors import PenjingError
from penjing.tasks import outputs

Pair = namedtuple("Pair", "logits aux")
A, B = torch.zeros(2, 3), torch.ones(2, 1)


@pytest.mark.parametrize(
    "output", [A, (A, B), [A, B], {"z": A, "a": B}, Pair(A, B), {"z": [A, None], "a": (B, 3)}]
)
def test_a_form_is_kept(output):
    found = outputs.tensors(output)
    assert found[0] is A and outputs.logits(output) is A
    back = outputs.like(output, [value + 1 for value in found])
    assert type(back) is type(output)
    assert all(torch.equal(b, a + 1) for a, b in zip(found, outputs.tensors(back), strict=True))


def test_batches_are_joined_and_numbers_stacked():
    joined = outputs.concatenated([{"a": A, "n": A.sum()}, {"a": B.expand(2, 3), "n": B.sum()}])
    assert joined["a"].shape == (4, 3) and joined["n"].tolist() == [0, 2]


def test_no_tensor_is_an_error_that_names_what_came():
    with pytest.raises(PenjingError, match="returns no tensor, but NoneType"):
        outputs.tensors(None)
    with pytest.raises(PenjingError, match="expected the 2"):
        outputs.like((A, B), [A])


def test_the_order_is_that_of_the_exporter():
    class Net(torch.nn.Module):
        def forward(self, x):
            return {"z": x + 1, "a": [x.sum(), None]}

    program = torch.export.export(Net(), (A,))
    names = [spec.arg.name for spec in program.graph_signature.output_specs]
    assert names[0].startswith("add") and names[1].startswith("sum")
    assert outputs.logits(Net()(A)).tolist() == (A + 1).tolist()
