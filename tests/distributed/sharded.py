"""Shard a task's network over two processes, and write down what its optimizer's groups hold."""

from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel

from lightning_msnn.tasks import SpikingClassifier, parameter_groups


def main(rank: int, out: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{out}/store", rank=rank, world_size=2)
    task = SpikingClassifier()
    sharded = FullyShardedDataParallel(task, use_orig_params=True, device_id=torch.device("cpu"))
    groups = parameter_groups(task.network, 0.1, task._decayed)
    sharded(torch.randn(2, 3, 8, 8)).sum().backward()
    result = {
        "dimensions": sorted({p.ndim for group in groups for p in group["params"]}),
        "sizes": [sum(p.numel() for p in group["params"]) for group in groups],
    }
    torch.save(result, Path(out) / f"rank_{rank}.pt")
    dist.destroy_process_group()
