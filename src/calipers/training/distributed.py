"""Several processes, as torch's own launcher starts them: ``torchrun --nproc-per-node 2 -m calipers.cli train RECIPE``.

Every process has the whole data and takes its share of each joint batch, so that one step is the step that a single
process would take: gradients are averaged over equal shares by `DistributedDataParallel` around a module whose
``forward`` is the objective (attacks inside call the network itself, unwrapped). Batch statistics are the joint batch's
(`calipers.training.normalisation`); what is no mean over examples, Shi's regulariser, is averaged over the shares.
"""

from __future__ import annotations

import atexit
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from calipers.errors import TrainingError

PATIENCE = timedelta(hours=12)  # the others wait while the first process measures


@dataclass(frozen=True)
class Group:
    """The processes of this training; one alone by default."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process measures, writes and reports."""
        return self.rank == 0

    def share(self, rows: Tensor) -> Tensor:
        """This process's part of the joint batch.

        Raises:
            TrainingError: the batch cannot be shared equally, so that the average would not be the joint batch's.
        """
        if len(rows) % self.size:
            raise TrainingError(
                f"batch: {len(rows)} examples cannot be shared by {self.size} processes equally; change batch or "
                "the number of processes"
            )
        return rows.tensor_split(self.size)[self.rank]

    def agree(self, values: Any) -> Any:
        """What the first process has, in all of them."""
        if self.size == 1:
            return values
        box = [values]
        dist.broadcast_object_list(box, src=0)
        return box[0]


def group() -> Group:
    """The group that the environment describes (RANK, WORLD_SIZE, ... as torchrun sets them), or one process alone.

    A group that exists already is used; a new one lasts until the process ends.
    """
    if dist.is_available() and dist.is_initialized():
        return Group(dist.get_rank(), dist.get_world_size())
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return Group()
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if backend == "nccl":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group(backend, timeout=PATIENCE)
    atexit.register(dist.destroy_process_group)
    return Group(dist.get_rank(), dist.get_world_size())
