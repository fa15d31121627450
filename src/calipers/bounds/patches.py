"""Rows of convolutional neurons as small windows instead of whole feature maps.

A neuron of a convolution sees a window of each earlier map, at a regular grid of places. Its rows are kept as that
window's coefficients and its place, so the work is that of the window. Windows may reach outside the map (into its
padding); coefficients there multiply nothing. `dense` turns a patch into ordinary rows where an op has no rule for
windows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from calipers.graph import primitives as prim
from calipers.graph.graph import Graph, Node, Ref
from calipers.ops.affine import batch_norm_scale, pull_back

Shape = tuple[int, ...]


class Grid(NamedTuple):
    """Where windows start on a map: place i·width + j starts at (y + i·down, x + j·right)."""

    height: int
    width: int
    y: int
    x: int
    down: int
    right: int


@dataclass(frozen=True, eq=False)
class Patch:
    """Rows over values of shape (C, H, W): (S, B, C, h, w) of the window at ``place`` (S, B) of ``grid``;
    ``clipped`` if those outside the map are zero."""

    data: Tensor
    place: Tensor
    grid: Grid
    clipped: bool = False

    def __neg__(self) -> Patch:
        return self.moved(-self.data)

    def mirrored(self) -> Patch:
        """Every row followed by its negative."""
        return self.repeated(torch.cat([self.data, -self.data]), self.clipped)

    def repeated(self, data: Tensor, clipped: bool) -> Patch:
        """Twice the rows at the same places, with these coefficients."""
        return Patch(data, self.place.repeat(2, 1), self.grid, clipped)

    def moved(self, data: Tensor, clipped: bool | None = None) -> Patch:
        return Patch(data, self.place, self.grid, self.clipped if clipped is None else clipped)


Rows = Tensor | Patch  # (S, B, *shape), or windows of it
Parts = dict[int, Rows]  # operand number -> rows


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (tuple(value) * 2)[:2]


def _geometry(node: Node) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """(stride, padding) of a plain 2-D convolution: no groups, no dilation, numeric padding."""
    if node.op is not torch.conv2d:
        return None
    settings = [*node.args[3:], *(1, 0, 1, 1)[len(node.args[3:]) :]]
    stride, padding, dilation, groups = settings
    if isinstance(padding, str) or _pair(dilation) != (1, 1) or groups != 1:
        return None
    return _pair(stride), _pair(padding)


def start(node: Node, index: Tensor, weight: Tensor) -> Patch | None:
    """Unit rows of a convolution's outputs ``index`` (S, B), already pulled back through it."""
    plain = _geometry(node)
    if plain is None or len(node.shape) != 3:
        return None
    (sy, sx), (py, px) = plain
    _, height, width = node.shape
    size = height * width
    return Patch(weight[index // size], index % size, Grid(height, width, -py, -px, sy, sx))


DENSER = 8  # times the products of a convolution that one matrix product may have to be faster


def _through_conv(
    node: Node, rows: Patch, weight: Tensor, known: dict[tuple[str, str], Any]
) -> Patch | None:
    plain = _geometry(node)
    if plain is None:
        return None
    (sy, sx), (py, px) = plain
    data = clip(rows, node.shape).data
    flat, window = data.flatten(0, 1), tuple(data.shape[2:])
    (h, w), (ky, kx) = window[1:], weight.shape[2:]
    tall, broad = (h - 1) * sy + ky, (w - 1) * sx + kx
    wide = tall * broad > DENSER * ky * kx or len(flat) < math.prod(window)
    if wide or weight.requires_grad or data.requires_grad:
        grown = pull_back(flat, weight, (sy, sx))
    else:  # the transpose of the windows, once, as a matrix
        key = (f"{window} of {node.name}", "window")
        if key not in known:
            unit = torch.eye(math.prod(window), dtype=data.dtype, device=data.device)
            known[key] = pull_back(unit.reshape(-1, *window), weight, (sy, sx)).flatten(1)
        grown = (flat.flatten(1) @ known[key]).reshape(-1, weight.shape[1], tall, broad)
    g = rows.grid
    grid = g._replace(y=g.y * sy - py, x=g.x * sx - px, down=g.down * sy, right=g.right * sx)
    return Patch(grown.reshape(*rows.data.shape[:2], *grown.shape[1:]), rows.place, grid)


def through_affine(
    node: Node, rows: Patch, shape: Shape, args: list[Any], known: dict[tuple[str, str], Any]
) -> Patch | None:
    """The transpose of an affine op on windows, or None where it has no rule for them; ``known`` keeps what serves
    further rows."""
    if node.op is torch.conv2d:
        return _through_conv(node, rows, args[1], known)
    if node.op is torch.add:
        return rows if shape == node.shape and not node.kwargs else None
    if node.op is torch.neg:
        return -rows
    if node.op is prim.batch_norm:
        weight, var, eps = args[1], args[4], args[6]
        return rows.moved(rows.data * batch_norm_scale(weight, var, eps, rows.data[0]))
    return None


def table(value: Tensor, h: int, w: int, grid: Grid) -> Tensor:
    """All windows of ``value`` (B, C, H, W) at the places of ``grid``: (B·places, C·h·w), zero outside the map."""
    batch, _, height, width = value.shape
    below = grid.y + grid.down * (grid.height - 1) + h - height
    right = grid.x + grid.right * (grid.width - 1) + w - width
    padded = F.pad(value, (-grid.x, right, -grid.y, below))
    frame = padded.unfold(2, h, grid.down).unfold(3, w, grid.right)
    return frame.permute(0, 2, 3, 1, 4, 5).reshape(batch * grid.height * grid.width, -1)


def windows(known: Tensor, rows: Patch) -> Tensor:
    """The windows that ``rows`` lie on, out of their `table`: (S, B, C, h, w)."""
    places = rows.grid.height * rows.grid.width
    base = torch.arange(rows.place.shape[1], device=known.device) * places
    picked = known.index_select(0, (rows.place + base).flatten())
    return picked.reshape(*rows.place.shape, -1, *rows.data.shape[-2:])


def _coordinates(rows: Patch) -> tuple[Tensor, Tensor]:
    """Where each window's lines and columns lie on the map: (S, B, h) and (S, B, w)."""
    g, place = rows.grid, rows.place
    h, w = (torch.arange(n, device=place.device) for n in rows.data.shape[-2:])
    y = (place // g.width * g.down + g.y).unsqueeze(-1) + h
    return y, (place % g.width * g.right + g.x).unsqueeze(-1) + w


def _inside(rows: Patch, shape: Shape) -> Tensor:
    """Which of a window's positions lie on the map: (S, B, h, w)."""
    _, height, width = shape
    y, x = _coordinates(rows)
    return ((y >= 0) & (y < height)).unsqueeze(-1) & ((x >= 0) & (x < width)).unsqueeze(-2)


def clip(rows: Patch, shape: Shape) -> Patch:
    """The same rows, zero outside the map."""
    if rows.clipped:
        return rows
    return rows.moved(rows.data * _inside(rows, shape).unsqueeze(2), clipped=True)


def dense(rows: Patch, shape: Shape) -> Tensor:
    """The same rows as (S, B, C, H, W)."""
    channels, height, width = shape
    S, B = rows.place.shape
    y, x = _coordinates(rows)
    flat = y.clamp(0, height - 1).unsqueeze(-1) * width + x.clamp(0, width - 1).unsqueeze(-2)
    data = clip(rows, shape).data
    out = data.new_zeros(S, B, channels, height * width)
    flat = flat.flatten(2).unsqueeze(2).expand(-1, -1, channels, -1)
    return out.scatter_add(3, flat, data.flatten(3)).reshape(S, B, *shape)


def added(first: Patch, second: Patch) -> Patch | None:
    """The sum of two patches of one value if one window contains the other, else None."""
    if first.data.shape[-2] < second.data.shape[-2]:
        first, second = second, first
    y, x = second.grid.y - first.grid.y, second.grid.x - first.grid.x
    (H, W), (h, w) = first.data.shape[-2:], second.data.shape[-2:]
    if first.grid._replace(y=0, x=0) != second.grid._replace(y=0, x=0):
        return None
    if not (0 <= y <= H - h and 0 <= x <= W - w):
        return None
    data = first.data + F.pad(second.data, (x, W - w - x, y, H - h - y))
    return first.moved(data, first.clipped and second.clipped)


def worthwhile(rows: Patch, shape: Shape) -> bool:
    """Whether the window is still clearly smaller than the map."""
    h, w = rows.data.shape[-2:]
    return 2 * h * w <= shape[1] * shape[2]


def elements(graph: Graph, env: Mapping[str, Any], name: str, input_shape: Shape) -> int | None:
    """The most coefficients of one row on its way from ``name`` to the input; None if it is no plain convolution."""
    if _geometry(graph.node[name]) is None:
        return None
    most, size = 1, {name: (1, 1)}
    for node in reversed(graph.nodes[: graph.position[name] + 1]):
        if node.name not in size:
            continue
        h, w = size[node.name]
        plain = _geometry(node)
        if plain is not None and isinstance(node.args[1], Ref):
            ky, kx = env[node.args[1].name].shape[2:]
            h, w = (h - 1) * plain[0][0] + ky, (w - 1) * plain[0][1] + kx
        for operand in set(node.operands) & graph.active:
            known = size.get(operand, (0, 0))
            size[operand] = h, w = max(known[0], h), max(known[1], w)
            shape = graph.node[operand].shape if operand in graph.node else input_shape
            full = math.prod(shape)
            small = len(shape) == 3 and 2 * h * w <= shape[1] * shape[2]
            most = max(most, shape[0] * h * w if small else full)
    return most
