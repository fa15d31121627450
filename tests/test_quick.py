"""The graph that attacks of a training see: the module's function and input gradients, whatever reads its images."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from calipers.graph.capture import capture
from calipers.training.normalisation import fixed
from calipers.training.quick import from_image, quick

X = torch.rand(4, 2, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


class Head(nn.Module):
    """Images of 3 x 5 x 3, read in the way that a test chooses."""

    def __init__(self, read) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.conv = nn.Conv2d(2, 3, (2, 3))
        self.turned = nn.Conv2d(2, 5, (4, 3))
        self.one, self.two = nn.Linear(45, 4), nn.Linear(45, 4, bias=False)
        self.rows = nn.Linear(15, 4)
        self.read = read

    def forward(self, x):
        return self.read(self, torch.relu(self.conv(x)), x)


def twice(module, image, _):
    row = image.flatten(1)
    return module.one(row) * module.two(row)


READS = {
    "a linear layer": (lambda m, h, x: m.one(h.flatten(1)), 1),
    "no bias": (lambda m, h, x: m.two(h.reshape(-1, 45)), 1),
    "two readers of one row": (twice, 0),
    "the image itself is read too": (lambda m, h, x: m.one(h.flatten(1)) + h.sum((2, 3)).sum(1, True), 1),
    "one matrix for images of two shapes": (
        lambda m, h, x: m.one(h.flatten(1)) + m.one(m.turned(x).flatten(1)), 2,
    ),
    "rows of several pixels": (lambda m, h, x: m.rows(h.flatten(2)).sum(1), 0),
    "the input": (lambda m, h, x: m.one(x[:, :, :5, :4].flatten(1)[:, :15].repeat(1, 3)) + m.one(h.flatten(1)), 1),
}  # fmt: skip


@pytest.mark.parametrize("name", READS)
def test_the_quick_graph_has_the_modules_values_and_gradients(name):
    read, count = READS[name]
    module = Head(read).double()
    network = capture(module, X[:2])
    frozen = fixed(network).frozen()
    used = [node.op for node in quick(network.graph).graph.nodes]
    assert used.count(from_image) == count
    ours, theirs = X.clone().requires_grad_(), X.clone().requires_grad_()
    torch.testing.assert_close(frozen(ours), module(theirs))
    toward = torch.randn(4, 4, dtype=torch.float64)
    found = [torch.autograd.grad(f(x), x, toward)[0] for f, x in ((frozen, ours), (module, theirs))]
    torch.testing.assert_close(*found)
    assert found[0].abs().min() > 0


def test_the_quick_graph_sees_new_weights():
    module = Head(READS["a linear layer"][0]).double()
    network = capture(module, X[:2])
    before = fixed(network).frozen()(X)
    with torch.no_grad():
        module.one.weight.neg_()
    torch.testing.assert_close(fixed(network).frozen()(X), module(X))
    assert not torch.equal(before, module(X))
