"""ATen operators to the graph's vocabulary: one table, one short function where arguments need care.

A lowering gets a `Call` (arguments with `Ref` for values, the output shape without the batch) and returns what
replaces it: ``(op, args)`` or ``(op, args, kwargs)``; several nodes are made through ``call.emit``.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from calipers.errors import CaptureError
from calipers.graph import composites
from calipers.graph import primitives as prim
from calipers.graph.lower import affine, functions
from calipers.graph.lower.calls import Call, Lowered, as_it_is, aten, same

SELU_ALPHA, SELU_SCALE = 1.6732632423543772, 1.0507009873554805
# what may share memory with its argument
VIEWS = frozenset(
    {
        aten.view.default,
        aten.reshape.default,
        aten.permute.default,
        aten.t.default,
        aten.unsqueeze.default,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.expand.default,
        aten.contiguous.default,
        aten.chunk.default,
        aten.split.Tensor,
        aten.split_with_sizes.default,
        aten.unbind.int,
        aten.detach.default,
        aten.alias.default,
        aten.slice.Tensor,
        aten.select.int,
        aten.transpose.int,
        aten.flatten.using_ints,
        aten.unflatten.int,
        operator.getitem,
    }
)

# where the batch size may stand, because the output's shape says it all
SHAPED = frozenset(
    {
        aten.view.default,
        aten.reshape.default,
        aten._unsafe_view.default,  # noqa: SLF001
        aten.expand.default,
        aten.unflatten.int,
        aten.slice.Tensor,
    }
)

_reshaped: Callable[[Call], Lowered] = lambda c: (prim.reshape, (c.args[0], c.shape))  # noqa: E731
_passed: Callable[[Call], Lowered] = lambda c: (prim.identity, (c.args[0],))  # noqa: E731


def _converted(c: Call) -> Lowered:
    """To another floating-point dtype: the graph computes in one."""
    dtypes = [a for a in c.args[1:] if isinstance(a, torch.dtype)]
    return _passed(c) if all(d.is_floating_point for d in dtypes) else as_it_is(c)


LOWER: dict[Any, Callable[[Call], Lowered]] = {
    aten.linear.default: same(F.linear),
    aten.matmul.default: affine.matmul,
    aten.mm.default: affine.matmul,
    aten.addmm.default: functions.addmm,
    aten.conv1d.default: same(torch.conv1d),
    aten.conv2d.default: same(torch.conv2d),
    aten.conv3d.default: same(torch.conv3d),
    aten.conv1d.padding: same(torch.conv1d),
    aten.conv2d.padding: same(torch.conv2d),
    aten.conv_transpose1d.default: same(torch.conv_transpose1d),
    aten.conv_transpose3d.input: same(torch.conv_transpose3d),
    aten.conv_transpose2d.input: same(torch.conv_transpose2d),
    aten.relu.default: same(torch.relu),
    aten.leaky_relu.default: lambda c: (F.leaky_relu, (c.args[0], c.arg(1, 0.01))),
    aten.sigmoid.default: same(torch.sigmoid),
    aten.tanh.default: same(torch.tanh),
    aten.abs.default: same(torch.abs),
    aten.neg.default: same(torch.neg),
    aten.clamp.default: affine.clamp,
    aten.clamp_min.default: lambda c: (torch.clamp, (c.args[0], c.args[1], None)),
    aten.clamp_max.default: lambda c: (torch.clamp, (c.args[0], None, c.args[1])),
    aten.hardtanh.default: lambda c: (torch.clamp, (c.args[0], c.arg(1, -1.0), c.arg(2, 1.0))),
    aten.relu6.default: lambda c: (torch.clamp, (c.args[0], 0.0, 6.0)),
    aten.add.Tensor: affine.add,
    aten.sub.Tensor: affine.sub,
    aten.rsub.Scalar: affine.rsub,
    aten.rsub.Tensor: affine.rsub,
    aten.mul.Tensor: functions.mul,
    aten.div.Tensor: functions.div,
    aten.bmm.default: affine.matmul,
    **{
        getattr(aten, name).default: functions.unary(op)
        for name, op in {
            "exp": torch.exp,
            "log": torch.log,
            "sqrt": torch.sqrt,
            "rsqrt": torch.rsqrt,
            "erf": torch.erf,
            "reciprocal": torch.reciprocal,
            "sin": torch.sin,
            "cos": torch.cos,
            "atan": torch.atan,
            "silu": F.silu,
            "mish": F.mish,
            "hardswish": F.hardswish,
            "sign": torch.sign,
            "round": torch.round,
            "floor": torch.floor,
            "ceil": torch.ceil,
        }.items()
    },
    aten.square.default: lambda c: (torch.pow, (c.args[0], 2.0)),
    aten.pow.Tensor_Scalar: functions.power,
    aten.gelu.default: functions.gelu,
    aten.elu.default: functions.elu,
    aten.selu.default: lambda c: (prim.elu, (c.args[0], SELU_ALPHA, SELU_SCALE, 1.0)),
    aten.celu.default: functions.celu,
    aten.softplus.default: functions.softplus,
    aten.log_sigmoid.default: functions.log_sigmoid,
    aten.hardsigmoid.default: functions.hardsigmoid,
    aten.prelu.default: functions.prelu,
    aten.glu.default: functions.glu,
    aten.gt.Scalar: functions.compare(1, 0.0),
    aten.gt.Tensor: functions.compare(1, 0.0),
    aten.ge.Scalar: functions.compare(1, 1.0),
    aten.ge.Tensor: functions.compare(1, 1.0),
    aten.lt.Scalar: functions.compare(-1, 0.0),
    aten.lt.Tensor: functions.compare(-1, 0.0),
    aten.le.Scalar: functions.compare(-1, 1.0),
    aten.le.Tensor: functions.compare(-1, 1.0),
    aten.where.self: functions.where,
    aten.where.ScalarSelf: functions.where,
    aten.where.ScalarOther: functions.where,
    aten.where.Scalar: functions.where,
    aten.masked_fill.Scalar: functions.masked_fill,
    aten.maximum.default: functions.larger,
    aten.minimum.default: functions.smaller,
    aten.max.other: functions.larger,
    aten.min.other: functions.smaller,
    aten.amin.default: functions.smallest,
    aten.softmax.int: functions.softmax(composites.softmax),
    aten.log_softmax.int: functions.softmax(composites.log_softmax),
    aten.layer_norm.default: functions.layer_norm,
    aten.rms_norm.default: functions.rms_norm,
    aten.group_norm.default: functions.group_norm,
    aten.instance_norm.default: functions.instance_norm,
    aten.scaled_dot_product_attention.default: functions.attention,
    aten.einsum.default: affine.einsum,
    aten.var.correction: functions.variance,
    aten.linalg_vector_norm.default: functions.norm,
    aten.expand_as.default: lambda c: (prim.expand, (c.args[0], c.shape)),
    aten.upsample_nearest1d.vec: functions.interpolate("nearest"),
    aten.upsample_nearest2d.vec: functions.interpolate("nearest"),
    aten.upsample_nearest3d.vec: functions.interpolate("nearest"),
    aten.upsample_linear1d.vec: functions.interpolate("linear"),
    aten.upsample_bilinear2d.vec: functions.interpolate("bilinear"),
    aten.pixel_shuffle.default: functions.pixel_shuffle,
    aten.repeat.default: functions.repeat,
    aten.index_select.default: functions.index_select,
    aten.batch_norm.default: affine.batch_norm,
    aten.dropout.default: lambda c: (prim.dropout, (c.args[0], c.args[1], c.training(c.args[2]))),
    aten.feature_dropout.default: lambda c: (
        prim.dropout,
        (c.args[0], c.args[1], c.training(c.args[2])),
    ),
    aten.view.default: _reshaped,
    aten.reshape.default: _reshaped,
    aten._unsafe_view.default: _reshaped,  # noqa: SLF001
    aten.flatten.using_ints: _reshaped,
    aten.unflatten.int: _reshaped,
    aten.squeeze.default: _reshaped,
    aten.squeeze.dim: _reshaped,
    aten.squeeze.dims: _reshaped,
    aten.unsqueeze.default: _reshaped,
    aten.expand.default: lambda c: (prim.expand, (c.args[0], c.shape)),
    aten.permute.default: affine.permute,
    aten.transpose.int: affine.transpose,
    aten.slice.Tensor: affine.slice_,
    aten.select.int: affine.select,
    aten.cat.default: affine.cat,
    aten.stack.default: affine.stack,
    aten.pad.default: affine.pad,
    aten.constant_pad_nd.default: affine.pad,
    aten.mean.dim: affine.reduce(torch.mean),
    aten.sum.dim_IntList: affine.reduce(torch.sum),
    aten.amax.default: affine.reduce(prim.maximum),
    aten.avg_pool1d.default: affine.avg_pool(1),
    aten.avg_pool2d.default: affine.avg_pool(2),
    aten.avg_pool3d.default: affine.avg_pool(3),
    aten.max_pool1d.default: affine.max_pool(1),
    aten.max_pool2d.default: affine.max_pool(2),
    aten.max_pool3d.default: affine.max_pool(3),
    aten.adaptive_avg_pool1d.default: affine.adaptive_pool(1),
    aten.adaptive_avg_pool2d.default: affine.adaptive_pool(2),
    aten.contiguous.default: _passed,
    aten.to.dtype: _converted,
    aten.type_as.default: _converted,
    aten._to_copy.default: _converted,  # noqa: SLF001
    aten.clone.default: _passed,
    aten.detach.default: _passed,
    aten.alias.default: _passed,
    aten.lift_fresh_copy.default: _passed,
}
# In-place operators mean the same once capture has renamed the values they overwrite.
INPLACE: dict[Any, Any] = {
    aten.relu_.default: aten.relu.default,
    aten.silu_.default: aten.silu.default,
    aten.elu_.default: aten.elu.default,
    aten.celu_.default: aten.celu.default,
    aten.selu_.default: aten.selu.default,
    aten.hardswish_.default: aten.hardswish.default,
    aten.hardsigmoid_.default: aten.hardsigmoid.default,
    aten.mish_.default: aten.mish.default,
    aten.gelu_.default: aten.gelu.default,
    aten.leaky_relu_.default: aten.leaky_relu.default,
    aten.sigmoid_.default: aten.sigmoid.default,
    aten.tanh_.default: aten.tanh.default,
    aten.abs_.default: aten.abs.default,
    aten.neg_.default: aten.neg.default,
    aten.clamp_.default: aten.clamp.default,
    aten.hardtanh_.default: aten.hardtanh.default,
    aten.relu6_.default: aten.relu6.default,
    aten.add_.Tensor: aten.add.Tensor,
    aten.sub_.Tensor: aten.sub.Tensor,
    aten.mul_.Tensor: aten.mul.Tensor,
    aten.div_.Tensor: aten.div.Tensor,
    aten.dropout_.default: aten.dropout.default,
    aten.detach_.default: aten.detach.default,
    aten.masked_fill_.Scalar: aten.masked_fill.Scalar,
    aten.masked_fill_.Tensor: aten.masked_fill.Tensor,
}


def _swapped(node: Any) -> list[int]:
    order = list(range(node.args[0].meta["val"].ndim))
    i, j = node.args[1], node.args[2]
    order[i], order[j] = order[j], order[i]
    return order


# what may be done to a value while its batch is not first
PERMUTES: dict[Any, Callable[[Any], list[int]]] = {
    aten.permute.default: lambda node: [d % len(node.args[1]) for d in node.args[1]],
    aten.transpose.int: _swapped,
}
PASSES = frozenset({aten.contiguous.default, aten.clone.default})
MOVES = PASSES | {*PERMUTES, aten.unbind.int, aten.select.int}
REPEATS = frozenset({aten.expand.default, aten.repeat.default})
SPLITS = frozenset({aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default})


def splits(call: Call, sizes: Sequence[int], dim: int) -> list[tuple[Any, ...]]:
    """The arguments of `slice_` for each part of a split."""
    if dim == 0:
        raise CaptureError("splitting dimension 0 cuts the batch; split features only")
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [(call.args[0], dim, s, s + n, 1) for s, n in zip(starts, sizes, strict=True)]
