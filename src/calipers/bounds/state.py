"""What all bounds of one call share: bound parameters, the set in one dtype, a reference trace, intervals.

Linear bounds are written in *deviations from a reference* z: they bound A·(h − z) instead of A·h. Any z will do that
an affine op maps to the next; then affine ops contribute no constant, only activations do, and numbers stay small,
which is good for rounding too. Interval propagation leaves such a reference behind at no cost: the centres of its
boxes.
"""

from __future__ import annotations

import math
import operator
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from calipers.errors import UnsupportedOp
from calipers.graph.graph import Graph, Network, Node, bind, resolve
from calipers.ops import Activation, Facts, Kind, facts
from calipers.sets import Frame, Interval, Region
from calipers.spec import Spec
from calipers.work import spend

T = TypeVar("T")
Choose = Callable[[Activation, Interval, Sequence[Any]], tuple[Tensor, Tensor] | None]
DEFAULT_MEMORY = 1 << 30  # bytes of working memory that bounds plan for
CACHE = 8 << 20  # on a CPU, backward rows are worked on in pieces of this many bytes: it is faster
PIECE = 1 << 19  # and passes over their elements in pieces of this many
SMALL = 1 << 14  # so few elements are summed without a matrix product, which has calls of its own


@dataclass(eq=False)
class State:
    """One bound computation over a batch of regions. ``boxes`` and ``cache`` fill as it goes.

    Args:
        facts: what the op table says about the graph.
        env: parameters, constants and the reference, by value name.
        frame: the region in the working dtype.
        gamma: n -> rounding allowance for a sum of n terms; zero where rounding is not accounted for.
        memory: bytes of working memory to plan for.
        choose: picks the lines of activations, the same for all rows, by kind, interval and further arguments (see
            `Tuned`); None, here or as its answer: `Activation.relax`.
        deadline: a value of `time.perf_counter`, after which the next step raises `TimeoutError`.
        whole: rows are not cut into pieces for the cache: for training, where each piece's gradient is as large as all.
    """

    network: Network
    region: Region
    facts: Facts
    env: dict[str, Any]
    frame: Frame
    rigorous: bool
    memory: int
    boxes: dict[str, Interval] = field(default_factory=dict)
    widths: dict[str, Tensor] = field(default_factory=dict)  # of boxes, where they are at hand
    cache: dict[tuple[str, str], Any] = field(default_factory=dict)
    off_centre: set[str] = field(
        default_factory=set
    )  # refined: the reference is not the box's centre
    changed: set[str] = field(default_factory=set)  # since it was first propagated
    choose: Choose | None = None
    deadline: float = math.inf
    whole: bool = False
    parent: State | None = None
    span: slice | Tensor = field(default_factory=lambda: slice(None))  # of the parent's examples

    @property
    def dtype(self) -> torch.dtype:
        return self.frame.origin.dtype

    @property
    def batch(self) -> int:
        return self.frame.origin.shape[0]

    @property
    def budget(self) -> int:
        """Bytes for the rows of one backward pass."""
        cached = self.frame.origin.device.type == "cpu" and not self.whole
        return min(self.memory, CACHE) if cached else self.memory

    @property
    def root(self) -> State:
        """The computation over the whole batch that this is a part of."""
        return self if self.parent is None else self.parent.root

    def gamma(self, n: int) -> float:
        """The rounding factor of a sum of n products in any order, doubled for the accounting's own rounding."""
        if not self.rigorous or n <= 0:
            return 0.0
        unit = torch.finfo(self.dtype).eps / 2
        product = (n + 2) * unit
        return 2 * product / (1 - product) if product < 0.5 else math.inf

    @property
    def tiny(self) -> float:
        """What sums of products may lose by underflow: one product loses at most half the smallest number, which this
        exceeds 2^64 times or more, and longer sums have no `gamma`. So much more than needed because products of
        weights with the smallest normal number would be subnormal, which processors take a hundred times longer for.
        Zero where rounding is not accounted for."""
        return torch.finfo(self.dtype).tiny * 2.0**40 if self.rigorous else 0.0

    def kind(self, node: Node) -> Kind:
        kind = self.facts.kinds[node.name]
        if kind is None:  # `start` has refused such graphs
            raise UnsupportedOp([describe(node)], REMEDY)
        return kind

    def arguments(self, node: Node) -> tuple[list[Any], Mapping[str, Any]]:
        """The node's arguments at the reference trace."""
        kwargs = {k: resolve(v, self.env) for k, v in node.kwargs.items()} if node.kwargs else {}
        return node.fill(self.env), kwargs

    def shape(self, name: str) -> tuple[int, ...]:
        """The per-example shape of a value."""
        graph = self.network.graph
        return self.network.input_shape if name in graph.inputs else graph.node[name].shape

    def once(self, what: str, name: str, make: Callable[[State, str], T]) -> T:
        """``make(state, name)``, computed once for the whole batch and cut to this part of it."""
        if self.parent is not None:
            part: T = _cut(self.parent.once(what, name, make), self.span)
            return part
        key = (what, name)
        if key not in self.cache:
            self.cache[key] = make(self, name)
        value: T = self.cache[key]
        return value

    def outdated(self, node: Node) -> bool:
        """Whether a node's interval is missing, or something that it is made of has changed since."""
        if node.name not in self.env:
            return True
        if self.changed.isdisjoint(node.operands):
            return False
        self.change(node.name)
        return True

    def change(self, name: str) -> None:
        """Note that a value's interval changes: what was derived from it no longer holds."""
        self.changed.add(name)
        self.widths.pop(name, None)
        for key in [k for k in self.cache if k[1] in (name, "table")]:
            del self.cache[key]

    def replace(self, name: str, box: Interval) -> None:
        """From here on this is the interval of ``name``, wherever its reference lies."""
        self.off_centre.add(name)
        self.change(name)
        self.boxes[name] = box

    def forget(self, name: str) -> None:
        """Nobody will ask for this value's interval again."""
        del self.boxes[name], self.env[name]
        self.widths.pop(name, None)

    def spend(self, rows: int) -> None:
        """Count ``rows`` taken through one node: through all of them they would be as many passes of the network.

        Raises:
            TimeoutError: the deadline has passed.
        """
        if self.deadline < math.inf and time.perf_counter() > self.deadline:
            raise TimeoutError("the deadline passed while bounds were computed")
        spend(rows / len(self.facts.steps))

    def over(self, region: Region) -> State:
        """A computation over other regions, with the parameters as they are bound and the same deadline."""
        active = self.network.graph.active
        env = {k: v for k, v in self.env.items() if k not in active}
        state = _placed(
            self.network, region, self.facts, env, self.dtype, self.rigorous, self.memory
        )
        state.deadline = self.deadline
        return state

    def part(self, span: slice | Tensor) -> State:
        """The same computation for some of the examples: of a slice views, not copies."""
        active = self.network.graph.active
        return State(
            self.network,
            self.region[span],
            self.facts,
            {k: v[span] if k in active else v for k, v in self.env.items()},
            _cut(self.frame, span),
            self.rigorous,
            self.memory,
            {k: _cut(v, span) for k, v in self.boxes.items()},
            choose=self.choose,
            deadline=self.deadline,
            whole=self.whole,
            parent=self,
            span=span,
        )

    def select(self, index: Tensor) -> State:
        """The same computation for the examples ``index``, on its own: what it refines is its own."""
        other = self.part(index)
        other.parent, other.span = None, slice(None)
        other.off_centre, other.changed = set(self.off_centre), set(self.changed)
        return other


def detached(state: State) -> State:
    """The same computation from its start, without gradients."""
    env = {k: v.detach() if isinstance(v, Tensor) else v for k, v in state.env.items()}
    frame = _detached(state.frame)
    source = state.network.graph.inputs[0]
    return State(
        state.network,
        state.region,
        state.facts,
        env,
        frame,
        state.rigorous,
        state.memory,
        {source: frame.hull},
        choose=state.choose,
        deadline=state.deadline,
        whole=state.whole,
    )


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach()
    return type(value)(*map(_detached, value)) if isinstance(value, tuple) else value


def _cut(value: Any, span: slice | Tensor) -> Any:
    """The examples ``span`` of a tensor or of each tensor in a named tuple."""
    if isinstance(value, Tensor):
        return value[span]
    if isinstance(value, tuple):
        return type(value)(*(_cut(v, span) for v in value))  # named tuples only
    return value


def flat(value: Tensor, lead: int = 1) -> Tensor:
    """All but the first ``lead`` dimensions in one (also where there are none)."""
    return value if value.ndim == lead + 1 else value.reshape(*value.shape[:lead], -1)


def joined(parts: list[Tensor], dim: int) -> Tensor:
    return torch.cat(parts, dim) if len(parts) > 1 else parts[0]


def stacked(parts: Sequence[Interval], dim: int = 0) -> Interval:
    """The intervals of all parts, one after the other."""
    return Interval(*(joined(list(ends), dim) for ends in zip(*parts, strict=True)))


def met(known: Interval, new: Interval) -> Interval:
    """Their intersection; ``known`` where they do not meet (by rounding, on a point region) or one is NaN."""
    low, high = torch.maximum(known.lower, new.lower), torch.minimum(known.upper, new.upper)
    good = low <= high
    return Interval(torch.where(good, low, known.lower), torch.where(good, high, known.upper))


def dot(A: Tensor, v: Tensor, *, size: bool = False, own: bool = False) -> Tensor:
    """Σ over features of A (S, B, ...), or with ``size`` of |A|, times v (B, ...): (S, B). With ``own`` nobody needs A
    any more."""
    rows, vector = flat(A, 2), flat(v)
    tracked = torch.is_grad_enabled() and (rows.requires_grad or vector.requires_grad)
    own = own and not tracked
    if rows.numel() <= SMALL:
        return ((rows.abs() if size else rows) * vector).sum(-1)
    single = vector.shape[0] == 1
    # these passes stay in the cache; many products with one column each are slow in float32
    whole = single or tracked or A.device.type != "cpu"
    step = len(rows) if whole else max(1, PIECE // (vector.numel() * vector.itemsize))
    found = []
    for first in range(0, rows.shape[0], step):
        piece = rows[first : first + step]
        if size:
            piece = piece.abs_() if own else piece.abs()
        if single or vector.dtype == torch.float64 or A.device.type != "cpu":
            product = torch.bmm(piece.transpose(0, 1), vector.unsqueeze(-1)).squeeze(-1).T
        else:
            product = (piece * vector).sum(-1)
        found.append(product)
    return joined(found, 0)


REMEDY = "bounds need an entry in the op table (calipers.ops.register); attacks work without one"


def describe(node: Node) -> str:
    name = getattr(node.op, "__name__", str(node.op))
    where = f" in {node.path!r}" if node.path else ""
    return f"{name}{where} ({node.source})" if node.source else f"{name}{where}"


def start(
    network: Network,
    region: Region,
    *,
    dtype: torch.dtype | None,
    rigorous: bool,
    memory: int | None,
    statistics: Mapping[str, Tensor] | None,
) -> State:
    """Bind parameters and place the region.

    Raises:
        UnsupportedOp: naming every op without an entry.
        ValueError: the region does not fit the network's input.
    """
    graph = network.graph
    known = facts(graph)
    if known.unsupported:
        raise UnsupportedOp(dict.fromkeys(describe(n) for n in known.unsupported), REMEDY)
    if region.center.shape[1:] != network.input_shape:
        raise ValueError(
            f"region: examples have shape {tuple(region.center.shape[1:])}, "
            f"the network takes {network.input_shape}"
        )
    working = dtype or network.dtype
    env = bind(graph, network.module, dtype=working, statistics=statistics)
    _require_eval(graph, env)
    if rigorous:
        require_ieee(working, region.center.device)
    for node in known.fixed:
        kwargs = {k: resolve(v, env) for k, v in node.kwargs.items()}
        env[node.name] = node.op(*node.fill(env), **kwargs)
    return _placed(network, region, known, env, working, rigorous, memory or DEFAULT_MEMORY)


def _placed(
    network: Network,
    region: Region,
    known: Facts,
    env: dict[str, Any],
    dtype: torch.dtype,
    rigorous: bool,
    memory: int,
) -> State:
    frame, name = region.frame(dtype), network.graph.inputs[0]
    env[name] = _center(frame)
    state = State(network, region, known, env, frame, rigorous, memory)
    state.boxes[name] = frame.hull
    return state


def with_sparse_weights(state: State, *, size: int = 1 << 14, share: float = 0.05) -> State:
    """The same computation with large, mostly zero weights of linear layers stored sparsely; sums lose only zeros."""
    for step in state.facts.steps:
        if step.node.op is not F.linear:
            continue
        name = step.node.operands[1]
        weight = state.env[name]
        large = weight.numel() >= size and weight.layout == torch.strided
        if large and int(weight.count_nonzero()) <= share * weight.numel():
            with warnings.catch_warnings():  # that the layout is in beta state
                warnings.simplefilter("ignore", UserWarning)
                state.env[name] = weight.to_sparse_csr()
    return state


def _center(frame: Frame) -> Tensor:
    """The centre of the hull; of an unbounded side, the origin."""
    if frame.above is frame.below:  # then the origin is the centre
        return frame.origin
    center = (frame.hull.lower + frame.hull.upper) * 0.5
    return torch.where(torch.isfinite(center), center, frame.origin)


PRECISION = tuple(
    f"{part}fp32_precision" for part in ("", "mkldnn.", "mkldnn.matmul.", "mkldnn.conv.")
)
FAST = ("tf32", "bf16")  # products that are not what their dtype says


def require_ieee(dtype: torch.dtype, device: torch.device) -> None:
    """Refuse settings under which sums of products round more than their dtype promises.

    Raises:
        ValueError: autocast is on; or subnormal numbers are flushed to zero; or float32 with reduced-precision
            products allowed, or away from the CPU, where libraries may use transforms (Winograd) with other error
            bounds. Float64 has none of the latter.
    """
    if torch.is_autocast_enabled(device.type):
        raise ValueError("rigorous: autocast is on; leave it before computing bounds for a verdict")
    if dtype.itemsize >= 4:
        smallest = torch.full((), torch.finfo(dtype).tiny, dtype=dtype, device=device)
        if not smallest / 2 > 0:
            raise ValueError(
                "rigorous: subnormal numbers are flushed to zero; call torch.set_flush_denormal(False)"
            )
    if dtype.itemsize >= 8:
        return
    if dtype != torch.float32 or device.type != "cpu":
        raise ValueError(
            f"rigorous: {dtype} on {device.type} has no error bound; use dtype=torch.float64"
        )
    read = {name: operator.attrgetter(name)(torch.backends) for name in PRECISION}
    fast = [f"torch.backends.{name}={value}" for name, value in read.items() if value in FAST]
    if fast:
        raise ValueError(
            f"rigorous: {', '.join(fast)} lets float32 products round to fewer bits; "
            "set it to 'ieee' or use dtype=torch.float64"
        )


def _require_eval(graph: Graph, env: Mapping[str, Any]) -> None:
    active = [name for value, name in graph.modes.items() if env[value]]
    if active:
        raise ValueError(
            f"network: {', '.join(active)} in training mode: the output of one example then depends on others; "
            "call .eval(), or pass statistics= of a clean batch"
        )


def working_dtype(
    network: Network, spec: Spec | None, dtype: torch.dtype | None, *, rigorous: bool
) -> torch.dtype:
    """``dtype``, or the network's; for a proof one that holds the parameters and the specification exactly."""
    chosen = dtype or network.dtype
    if not rigorous or chosen.itemsize < 4:  # which `start` refuses
        return chosen
    chosen = torch.promote_types(chosen, network.dtype)
    if spec is not None and not all(torch.equal(v.to(chosen).to(v), v) for v in (spec.C, spec.d)):
        chosen = torch.float64
    return chosen


def check_spec(state: State, spec: Spec) -> tuple[Tensor, Tensor]:
    """C and d in the working dtype."""
    outputs = state.shape(state.network.graph.output)
    if len(outputs) != 1 or spec.C.shape[0] != state.batch or spec.C.shape[2] != outputs[0]:
        raise ValueError(
            f"spec: C has shape {tuple(spec.C.shape)}, expected ({state.batch}, M, {outputs[0]}) "
            "for this batch and network"
        )
    like = state.frame.origin
    return spec.C.to(like), spec.d.to(like)


def absolute(args: Sequence[Any]) -> list[Any]:
    """Every tensor and number of ``args`` by absolute value, also inside lists; whatever else as it is."""

    def visit(item: Any) -> Any:
        if isinstance(item, Tensor):
            return item.abs()
        if isinstance(item, list):
            return [visit(i) for i in item]
        return abs(item) if type(item) in (int, float) else item

    return [visit(a) for a in args]


def at(args: Sequence[Any], values: Mapping[int, Any]) -> list[Any]:
    """``args`` with the value arguments (tensors, also inside lists) numbered in ``values`` replaced."""
    count = -1

    def visit(item: Any) -> Any:
        nonlocal count
        if isinstance(item, (list, tuple)) and any(isinstance(i, Tensor) for i in item):
            return [visit(i) for i in item]
        if isinstance(item, Tensor):
            count += 1
            return values.get(count, item)
        return item

    return [visit(a) for a in args]
