"""Bounds as recorded programs.

What `interval` and `crown_ibp` do, and the first and the last pass of `crown`, depends on shapes alone, never on
numbers. On small networks finding it out costs as much as the arithmetic, so the second time that a network is bounded
at the same shapes, the tensor operations are written down as they run, and from then on only these run: the same
operations on the same values in the same order, so with the same bits. Parameters are inputs of the program, read anew
at each call.

A course that does depend on numbers cannot be recorded. Where a tensor's number becomes Python's, or an operation is
not one of those whose shapes follow from shapes, it is given up, and such bounds are computed as they were at first.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection, Sequence
from itertools import islice
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from calipers.bounds.state import State
from calipers.ops import Facts
from calipers.work import counting, spend

Core = Callable[[State, Tensor, Tensor], Tensor]
MOST = 32  # programs of one network; batches of ever new sizes do not pile up
NUMBERS = 1 << 22  # with more to compute, the arithmetic takes the time
PLAIN = (Tensor, torch.nn.Parameter, torch.nn.Buffer)
# what they say of a tensor follows from shapes and from how it was made
STRUCTURE = frozenset(
    ("__get__", "__len__", "dim", "size", "stride", "numel", "nelement", "element_size", "is_floating_point",
     "is_contiguous", "untyped_storage", "_set_grad_enabled")
)  # fmt: skip
# whose results have shapes that follow from shapes; torch's own guard against others takes a second to import
STEADY = frozenset(
    ("__and__", "__eq__", "__get__", "__getitem__", "__iadd__", "__imul__", "__invert__", "__isub__", "__or__",
     "__rdiv__", "__rsub__", "__setitem__", "abs", "abs_", "add", "add_", "addcmul", "addcmul_", "addmm", "amax",
     "amin", "any", "avg_pool2d", "baddbmm", "batch_norm", "bmm", "cat", "clamp", "clamp_", "clamp_max", "clamp_min",
     "clone", "contiguous", "conv2d", "conv_transpose2d", "convolution_backward", "cos", "cosh", "detach", "div",
     "empty", "empty_like", "exp", "expand", "expand_as", "flatten", "fmax", "fold", "ge", "getitem", "gt", "le",
     "leaky_relu", "linear", "log", "lt", "matmul", "max", "max_pool2d", "maximum", "min", "minimum", "mm", "mul",
     "mul_", "neg", "new_empty", "new_zeros", "pad", "permute", "relu", "reshape", "rsqrt", "scatter_add", "sigmoid",
     "sign", "sin", "split", "sqrt", "square", "squeeze", "stack", "sub", "sub_", "sum", "tanh", "thnn_conv2d", "to",
     "transpose", "unsqueeze", "where", "zeros", "zeros_like")
)  # fmt: skip

# a state's field, a key in it, and the class of what is there, made of tensors, or the value itself
Held = tuple[str, Any, Any]


class Program(NamedTuple):
    """What was recorded: a function of the inputs, which returns the bound and then what it left in the state, and the
    passes of the network that it counts as."""

    run: Callable[..., tuple[Tensor, ...]]
    passes: float
    fills: tuple[Held, ...]

    def __call__(self, state: State, inputs: Sequence[Tensor]) -> Tensor:
        bound, *found = self.run(*inputs)
        spend(self.passes)
        left = iter(found)
        for field, key, kind in self.fills:
            value = next(left) if kind is Tensor else kind(*islice(left, len(kind._fields)))
            getattr(state, field)[key] = value
        return bound


def recorded(core: Core, *, fills: bool = False) -> Core:
    """``core(state, C, d)``, from its second time at the same shapes on as a program; with ``fills`` the intervals and
    the reference that it leaves in the state are there, too."""

    def bound(state: State, C: Tensor, d: Tensor) -> Tensor:
        if not _suits(state, C):
            return core(state, C, d)
        places, inputs = _held(state)
        inputs += [state.frame.above, C, d]
        programs = _PROGRAMS.setdefault(state.facts, {})
        key = (
            core, fills, C.shape, C.stride(), state.dtype, C.device, state.rigorous, state.memory,
            frozenset(state.off_centre), frozenset(state.changed), *places,
            *(tensor.layout for tensor in inputs),
        )  # fmt: skip
        known = programs.get(key)
        if isinstance(known, Program):
            return known(state, inputs)
        if known == "refused":
            return core(state, C, d)
        if known is None:
            if len(programs) >= MOST:
                programs.clear()
            programs[key] = "seen"
            return core(state, C, d)
        programs[key] = "refused"  # until it has worked
        tape = Tape(inputs)
        with counting() as work, tape:
            result = core(state, C, d)
        filled, tensors = _held(state, set(places)) if fills else ([], [])
        if run := tape.written([result, *tensors]):
            programs[key] = Program(run, work.passes, tuple(filled))
        return result

    return bound


_PROGRAMS: WeakKeyDictionary[Facts, dict[tuple[Any, ...], Program | str]] = WeakKeyDictionary()


def _suits(state: State, C: Tensor) -> bool:
    """Whether what the key has tells states apart: for a bounded box, without gradients; and not so large that what a
    recording keeps would count."""
    return (
        not torch.is_grad_enabled()
        and state.region.p == math.inf
        and state.frame.bounded
        and state.deadline == math.inf
        and state.choose is None
        and state.parent is None
        and not state.whole
        and state.batch * (1 + C.shape[1]) * state.network.sizes[0] <= NUMBERS
    )


def _held(state: State, before: Collection[Held] = ()) -> tuple[list[Held], list[Tensor]]:
    """What a state holds, but for what it held ``before``, and the tensors that this is made of."""
    places: list[Held] = []
    tensors: list[Tensor] = []
    place: Held
    parts: Sequence[Tensor]
    for field in ("env", "boxes", "widths", "cache"):
        for key, value in getattr(state, field).items():
            if isinstance(value, Tensor):
                place, parts = (field, key, Tensor), (value,)
            elif isinstance(value, tuple) and hasattr(value, "_fields"):  # an interval, or lines
                place, parts = (field, key, type(value)), value
            elif field == "env":  # a module's mode
                place, parts = (field, key, value), ()
            else:
                continue  # of the cache: found anew if need be
            if place not in before:
                places.append(place)
                tensors.extend(parts)
    return places, tensors


class _Noted(NamedTuple):
    """One operation; what it reads, by number, by place and by keyword."""

    op: Callable[..., Any]
    reads: tuple[int, ...]
    keywords: dict[str, int]
    value: int
    changes: bool  # one of its arguments


class Tape(TorchFunctionMode):
    """Writes down the operations on tensors that run inside it; `refused` says why it cannot."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.values: list[Any] = list(inputs)  # all of them, so that no identity is taken twice
        self.number = {id(value): i for i, value in enumerate(inputs)}
        self.inputs = len(inputs)
        self.constant: set[int] = set()
        self.noted: list[_Noted] = []
        self.refused: str | None = None
        if any(type(value) not in PLAIN for value in inputs):
            self.refused = "a tensor of another class"
        elif len(self.number) < len(inputs):
            self.refused = "the same tensor twice, which may be two another time"

    def __torch_function__(
        self, func: Callable[..., Any], _types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self.refused is None:
            self._note(func, args, kwargs, result)
        return result

    def written(self, results: Sequence[Tensor]) -> Callable[..., tuple[Tensor, ...]] | None:
        """What was written down, as a function of the inputs, without what the results do not need and with each value
        dropped after its last use; None if something was refused."""
        if self.refused is None and any(id(result) not in self.number for result in results):
            self.refused = "a result that is no operation's"
        if self.refused is not None:
            return None
        wanted = [self.number[id(result)] for result in results]
        needed, steps = set(wanted), []
        for step in reversed(self.noted):
            if step.changes or step.value in needed:
                needed.update(step.reads, step.keywords.values())
                steps.append(step)
        steps.reverse()
        last = {
            i: at for at, step in enumerate(steps) for i in (*step.reads, *step.keywords.values())
        }
        dead: list[list[str]] = [[] for _ in steps]
        for i, at in last.items():
            if i not in self.constant and i not in wanted:
                dead[at].append(f"v{i}")
        names: dict[str, Any] = {f"v{i}": self.values[i] for i in self.constant}
        lines = [f"def run({', '.join(f'v{i}' for i in range(self.inputs))}):"]
        for step, gone in zip(steps, dead, strict=True):
            keywords = [f"{k}=v{i}" for k, i in step.keywords.items()]
            given = ", ".join([*(f"v{i}" for i in step.reads), *keywords])
            lines.append(f" v{step.value} = f{step.value}({given})")
            lines += [f" del {', '.join(gone)}"] if gone else []
            names[f"f{step.value}"] = step.op
        lines.append(f" return {', '.join(f'v{i}' for i in wanted)},")
        exec("\n".join(lines), names)  # noqa: S102 - names made here alone
        run: Callable[..., tuple[Tensor, ...]] = names["run"]
        return run

    def _note(
        self, func: Callable[..., Any], args: Any, kwargs: dict[str, Any], result: Any
    ) -> None:
        name = getattr(func, "__name__", "")
        if name == "_set_grad_enabled" and args[0]:
            self.refused = "automatic differentiation"
            return
        if name in STRUCTURE and not _holds_tensors(result):
            return
        changes = _in_place(name) or "out" in kwargs
        if not (changes or _holds_tensors(result)):
            self.refused = f"{name} turns tensors into {type(result).__name__}"
            return
        picks = name == "__getitem__" and _holds_tensors(args[1])
        if name not in STEADY or picks or (name == "where" and len(args) + len(kwargs) < 3):
            self.refused = f"{name} may have results of any shape"
            return
        if not all(map(str.isidentifier, kwargs)):  # they are written into the program
            self.refused = f"{name} has keywords that are no names"
            return
        reads = tuple(self._place(arg) for arg in args)
        keywords = {k: self._place(arg) for k, arg in kwargs.items()}
        self._add(func, reads, keywords, result, changes=changes)

    def _add(
        self, op: Callable[..., Any], reads: tuple[int, ...], keywords: dict[str, int], result: Any, *,
        changes: bool = False,
    ) -> int:  # fmt: skip
        number = len(self.values)
        self.values.append(result)
        self.noted.append(_Noted(op, reads, keywords, number, changes))
        if isinstance(result, Tensor):
            self.number[id(result)] = number
        elif isinstance(result, (tuple, list)):
            for i, item in enumerate(result):
                if isinstance(item, Tensor):
                    self._add(operator.getitem, (number, self._constant(i)), {}, item)
        return number

    def _place(self, arg: Any) -> int:
        """The number of an argument; lists that hold tensors are put together by a step of their own."""
        if isinstance(arg, Tensor):
            found = self.number.get(id(arg))
            if found is None:
                self.refused = "a tensor that is neither an input nor made from them"
                return self._constant(None)
            return found
        if _holds_tensors(arg):
            if type(arg) not in (tuple, list):
                self.refused = f"tensors in a {type(arg).__name__}"
                return self._constant(None)
            parts = tuple(self._place(item) for item in arg)
            number = len(self.values)
            self.values.append(arg)
            self.noted.append(_Noted(_PACK[type(arg)], parts, {}, number, changes=False))
            return number
        return self._constant(arg)

    def _constant(self, value: Any) -> int:
        self.values.append(value)
        self.constant.add(len(self.values) - 1)
        return len(self.values) - 1


def _listed(*items: Any) -> list[Any]:
    return list(items)


def _tupled(*items: Any) -> tuple[Any, ...]:
    return items


_PACK: dict[type, Callable[..., Any]] = {list: _listed, tuple: _tupled}


def _in_place(name: str) -> bool:
    """Whether an operation of this name changes an argument: ``add_``, ``__iadd__`` and their like."""
    if name.startswith("__"):
        return name == "__setitem__" or (name.startswith("__i") and name != "__invert__")
    return name.endswith("_")


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(_holds_tensors(item) for item in value)
    if isinstance(value, slice):
        return any(isinstance(v, Tensor) for v in (value.start, value.stop, value.step))
    return isinstance(value, Tensor)
