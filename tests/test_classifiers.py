"""Blocks of common classifiers, captured from torch: bounds are finite, contain samples, and nest."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import calipers as cp
from calipers.bounds import alpha_crown, crown, crown_ibp, interval
from calipers.errors import UnsupportedOp
from calipers.ops import OPS, monotone, register
from calipers.spec import Spec
from networks import Builder


class Block(nn.Module):
    """A transformer block: attention of two heads and an MLP, each behind a layer norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        _, tokens, width = x.shape
        q, k, v = (
            part.reshape(-1, tokens, 2, width // 2).transpose(1, 2)
            for part in self.qkv(self.first(x)).chunk(3, -1)
        )
        heads = F.scaled_dot_product_attention(q, k, v)
        x = x + self.out(heads.transpose(1, 2).reshape(-1, tokens, width))
        return x + self.mlp(self.second(x))


class Transformer(nn.Module):
    """Patches of 4 x 4 pixels, a class token, positions."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.places = nn.Parameter(0.1 * torch.randn(1, 5, width))
        self.block = Block(width)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.patches(x).flatten(2).transpose(1, 2)
        h = torch.cat([self.token.expand(x.shape[0], -1, -1), h], 1) + self.places
        return self.head(self.norm(self.block(h))[:, 0])


class Convnext(nn.Module):
    """A depthwise convolution, layer norm over channels, an inverted bottleneck with GELU, a scaled skip."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.stem, self.deep = (
            nn.Conv2d(1, width, 2, 2),
            nn.Conv2d(width, width, 3, 1, 1, groups=width),
        )
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.scale = nn.Parameter(torch.full((width,), 0.5))
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        h = self.norm(self.deep(x).permute(0, 2, 3, 1))
        h = self.scale * self.down(F.gelu(self.up(h)))
        return self.head((x + h.permute(0, 3, 1, 2)).mean((2, 3)))


class Excitation(nn.Module):
    """Squeeze and excitation: channels scaled by gates computed from their means."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3, 2, 1), nn.GroupNorm(2, 4)
        self.down, self.up, self.head = nn.Linear(4, 2), nn.Linear(2, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.hardswish(self.norm(self.conv(x)))
        gate = torch.sigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool2d(h, 1).flatten(1)))))
        return self.head((h * gate[:, :, None, None]).amax((2, 3)))


class Dense(nn.Module):
    """DenseNet: every layer reads all before it; ELU, average pooling, softmax at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(1 + 3 * i, 3, 3, 1, 1) for i in range(3))
        self.norm, self.head = nn.BatchNorm2d(10), nn.Linear(40, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.cat([x, F.elu(layer(x))], 1)
        return self.head(F.avg_pool2d(self.norm(x), 4).flatten(1)).softmax(1)


class Free(nn.Module):
    """Without normalisation: SiLU, PReLU, a gated unit, upsampling, a transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(1, 4, 4, 4), nn.ConvTranspose2d(4, 2, 2, 2)
        self.prelu, self.head = nn.PReLU(2), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.down(x))
        h = self.prelu(self.up(h)) + F.interpolate(h[:, :2], scale_factor=2, mode="bilinear")
        h = F.glu(torch.cat([h, F.softplus(h)], 1), 1)
        return self.head(h.flatten(1)) / 2.0


class Arithmetic(nn.Module):
    """What control networks are made of: quotients, powers, waves, comparisons, minima."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(64, 5), nn.Linear(64, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.first(x.flatten(1)), self.second(x.flatten(1))
        h = torch.maximum(a, b) - torch.minimum(a, b.abs()) + (a - b) / (1 + b * b)
        h = (
            h
            + torch.sin(a) * torch.cos(b)
            + a**3 / 10
            + torch.sqrt(1 + b.square())
            - torch.where(a > b, a, 0.5)
        )
        h = (
            h
            + torch.exp(-a.abs())
            + torch.log(2 + torch.tanh(b))
            + a / torch.linalg.vector_norm(b + 5, dim=1, keepdim=True)
        )
        return self.head(h).log_softmax(1)


class Encoder(nn.Module):
    """torch's own transformer layer and attention, and attention with one product for queries, keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.qkv, self.head = nn.Linear(8, 24), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x[:, 0, ::2])
        h = h + self.attention(h, h, h)[0]
        q, k, v = self.qkv(h).reshape(x.shape[0], 4, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        h = h + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.head(h.mean(1))


class Decoder(nn.Module):
    """Attention that may not look ahead, or only where a mask lets it; windows of uneven size."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)
        self.head = nn.Linear(12, 3)
        self.register_buffer("mask", torch.linspace(-2, 2, 16).reshape(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        seen = torch.ones(4, 4, dtype=torch.bool).tril()
        h = self.layer(x[:, 0, ::2], src_mask=~seen)
        h = h + F.scaled_dot_product_attention(h, 2 * h, h, is_causal=True)
        h = h + F.scaled_dot_product_attention(h, h, h - 1, attn_mask=self.mask)
        pooled = F.adaptive_avg_pool2d(h.unsqueeze(1), (3, 3)).flatten(1)
        return self.head(torch.cat([pooled, F.adaptive_avg_pool1d(h.flatten(1), 3)], 1))


class Contraction(nn.Module):
    """Sums of products by their letters."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.head = nn.Parameter(torch.randn(8, 3, 4) / 4), nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.einsum("bti,ijk->bkjt", x[:, 0], self.weight)
        return self.head(torch.einsum("bkjt,bkls->bjl", h, h).flatten(1) / 16)


class Rounded(nn.Module):
    """A network on a binarised image."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.round())


MODULES: dict[str, Callable[[], nn.Module]] = {
    c.__name__: c
    for c in (Transformer, Convnext, Excitation, Dense, Free, Arithmetic, Encoder, Decoder, Rounded)
}


BOUNDED = MODULES | {"Contraction": Contraction}  # which ONNX files are not read with


@pytest.mark.parametrize("name", BOUNDED)
def test_bounds_of_common_classifiers(name: str) -> None:
    torch.manual_seed(0)
    module = BOUNDED[name]().eval()
    x = torch.rand(2, 1, 8, 8)
    network = cp.capture(module, x)
    region = cp.ThreatModel(float("inf"), 0.01).around(x)
    spec = Spec.functional(torch.cat([torch.eye(3), -torch.eye(3)]).expand(2, -1, -1))
    weak, strong = (
        method(network, region, spec, dtype=torch.float64) for method in (interval, crown)
    )
    raw = crown(network, region, spec, dtype=torch.float64, raw=True)
    assert torch.isfinite(weak).all()
    assert torch.isfinite(raw).all()
    assert (strong >= weak).all()
    t = torch.rand(500, 2, 1, 8, 8, dtype=torch.float64)
    t = torch.where(torch.rand(500, 1, 1, 1, 1) < 0.5, t.round(), t)
    points = region.lower + t * (region.upper - region.lower)
    y = network.in_double()(points.flatten(0, 1)).reshape(500, 2, 1, 3) @ spec.C[0].double().T
    least = y.squeeze(2).amin(0)
    assert (strong <= least + 1e-9).all(), (strong - least).max()
    assert (raw <= least + 1e-9).all()
    rigorous = crown(network, region, spec, dtype=torch.float64, rigorous=True)
    assert (rigorous <= strong + 1e-12).all()
    assert (rigorous >= strong - 1e-6 * (1 + strong.abs())).all()


def partial_network(op: Callable[..., Tensor]) -> cp.Network:
    """A function with a domain, of x − 0.5."""
    b = Builder((2,))
    b.linear(b(op, b(torch.add, b.x, -0.5)), 2)
    return b.network()


@pytest.mark.parametrize("op", [torch.log, torch.sqrt, torch.rsqrt, torch.reciprocal])
@pytest.mark.parametrize("method", [interval, crown_ibp, crown, alpha_crown])
def test_intervals_that_leave_the_domain_prove_nothing(
    op: Callable[..., Tensor], method: Callable[..., Tensor]
) -> None:
    network = partial_network(op)
    x = torch.full((2, 2), 0.5)
    x[1] += 0.4
    region = cp.ThreatModel(float("inf"), 0.1).around(x)
    low = method(network, region, Spec.functional(torch.eye(2).expand(2, 2, 2)), rigorous=True)
    assert not (low[0] > -1e30).any()  # -inf or NaN
    assert torch.isfinite(low[1]).all()


def test_tight_intermediate_bounds_keep_a_function_in_its_domain() -> None:
    b = Builder((1,))
    half = b(torch.add, b.x, b(torch.neg, b(torch.mul, b.x, 0.5)))  # which intervals do not see
    b.linear(b(torch.log, b(torch.add, half, 0.2)), 2)
    network = b.network()
    region = cp.ThreatModel(float("inf"), 0.3, lower=-1.0).around(torch.zeros(1, 1))
    spec = Spec.functional(torch.eye(2)[None])
    assert not torch.isfinite(interval(network, region, spec)).any()
    low = crown(network, region, spec)
    assert torch.isfinite(low).all()
    y = network(torch.linspace(-0.3, 0.3, 601)[:, None])
    assert (low <= y.amin(0) + 1e-6).all()


def test_an_op_with_nothing_but_a_range(monkeypatch: pytest.MonkeyPatch) -> None:
    b = Builder((3,))
    b.linear(b(torch.asinh, b.linear(b.x, 4)), 2)
    network = b.network()
    x = torch.rand(2, 3)
    region, spec = (
        cp.ThreatModel(float("inf"), 0.1).around(x),
        Spec.functional(torch.eye(2).expand(2, 2, 2)),
    )
    with pytest.raises(UnsupportedOp, match="asinh"):
        crown(network, region, spec)
    monkeypatch.setitem(OPS, torch.asinh, None)  # restored afterwards
    register(torch.asinh, monotone(torch.asinh))
    try:
        low = crown(network, region, spec, rigorous=True)
        assert (low >= interval(network, region, spec, rigorous=True)).all()
        for _ in range(20):
            assert (low <= network(region.sample(torch.randint(1 << 30, (2,))).float())).all()
    finally:
        monkeypatch.undo()
        register(torch.relu, OPS[torch.relu])  # forget what was looked up
