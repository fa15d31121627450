"""What `inspect` reports, against counts made by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from calipers.graph.capture import capture
from calipers.graph.inspect import METHODS, inspect, render


def small_cnn() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, 10),
        nn.ReLU(),
        nn.Linear(10, 3),
    )


def test_counts_of_a_small_network() -> None:
    module = small_cnn()
    found = inspect(capture(module, torch.rand(1, 1, 8, 8)))
    assert found.parameters == sum(p.numel() for p in module.parameters())
    assert found.relu_neurons == 4 * 4 * 4 + 10
    assert dict(found.operators) == {
        "relu": 2,
        "linear": 2,
        "conv2d": 1,
        "batch_norm": 1,
        "reshape": 1,
    }
    assert found.input_shape == (1, 8, 8)
    assert found.output_shape == (3,)
    assert [(x.op, x.path, x.shape, x.parameters) for x in found.layers] == [
        ("conv2d", "0", (4, 4, 4), 40),
        ("batch_norm", "1", (4, 4, 4), 8),
        ("relu", "2", (4, 4, 4), 0),
        ("reshape", "3", (64,), 0),
        ("linear", "4", (10,), 650),
        ("relu", "5", (10,), 0),
        ("linear", "6", (3,), 33),
    ]
    assert dict(found.support) == dict.fromkeys(METHODS, "yes")
    assert found.warnings == ()


def test_shared_parameters_count_once() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(torch.relu(self.layer(x)))

    assert inspect(capture(Shared(), torch.rand(1, 4))).parameters == 20


class Cumulative(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.cumsum(1)


class Sorted(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sort(1).values


def test_what_bounds_cannot_read_is_named() -> None:
    module = nn.Sequential(nn.Linear(4, 4), Cumulative(), nn.Linear(4, 4), Cumulative(), Sorted())
    found = inspect(capture(module, torch.rand(1, 4)))
    assert found.support["attack"] == "yes"
    for method in METHODS[1:]:
        answer = found.support[method]
        assert answer.startswith("no: ")
        assert "cumsum" in answer
        assert "'1'" in answer
        assert "'3'" in answer
        assert "sort" in answer


def test_computed_parameters_do_not_matter_to_bounds() -> None:
    """Weight normalisation computes on parameters alone, with ops that bounds do not know."""
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))
    found = inspect(capture(nn.Sequential(layer), torch.rand(1, 4)))
    assert dict(found.support) == dict.fromkeys(METHODS, "yes")
    assert found.parameters == sum(p.numel() for p in layer.parameters())


@pytest.mark.parametrize(
    ("value", "words"),
    [(3e6, "values up to 3e+06"), (1e-12, "largest over smallest"), (float("nan"), "up to nan")],
)
def test_delicate_weights_are_reported(value: float, words: str) -> None:
    module = nn.Linear(4, 3)
    with torch.no_grad():
        module.weight[1, 2] = value
    found = inspect(capture(module, torch.rand(1, 4)))
    assert any("weight" in text and words in text for text in found.warnings)


def test_zeros_and_ordinary_ranges_are_not_reported() -> None:
    module = nn.Linear(4, 3)
    with torch.no_grad():
        module.weight.zero_()
        module.weight[0, 0] = 1e-7
        module.weight[0, 1] = 1.0
        module.bias.zero_()
    assert inspect(capture(module, torch.rand(1, 4))).warnings == ()


def test_half_precision_is_reported() -> None:
    module = nn.Linear(4, 3).bfloat16()
    found = inspect(capture(module, torch.rand(1, 4, dtype=torch.bfloat16)))
    assert "weight: stored as bfloat16" in found.warnings


def test_cancellation_is_reported() -> None:
    """(x + 1e9) - 1e9 keeps almost nothing of x in float32."""

    class Cancel(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x + 1e9) - 1e9

    found = inspect(capture(Cancel(), torch.rand(1, 4)))
    assert any("float64" in text for text in found.warnings)


def test_the_module_is_left_as_it_was() -> None:
    module = small_cnn().train()
    net = capture(module, torch.rand(2, 1, 8, 8))
    before = {k: v.clone() for k, v in module.state_dict().items()}
    state = torch.get_rng_state()
    inspect(net)
    assert torch.equal(state, torch.get_rng_state())
    assert all(m.training for m in module.modules())
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    assert all(p.dtype == torch.float32 for p in module.parameters())


def test_lines_are_a_plain_table() -> None:
    found = inspect(capture(small_cnn(), torch.rand(1, 1, 8, 8)))
    lines = found.lines()
    assert render(found) == "\n".join(lines)
    assert lines[0].split() == ["name", "op", "path", "output", "parameters"]
    assert "4 x 4 x 4" in lines[1]
    assert "parameters    731" in lines
    assert "ReLU neurons  74" in lines
    assert "bounds        yes" in lines
    assert len({line.index("conv2d") for line in lines if "conv2d  " in line}) == 1
