"""Shard a task's network over two processes, and write down what its optimizer's groups hold.

python sharded.py OUT
"""

import os
import sys
import tempfile
from pathlib import Path

import lightning.pytorch as pl
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.fsdp import FullyShardedDataParallel

from lightning_msnn.tasks import SpikingClassifier


def main(rank: int, out: str, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    task = SpikingClassifier()
    sharded = FullyShardedDataParallel(task, use_orig_params=True, device_id=torch.device("cpu"))
    task.trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    task.hparams["schedule"] = "constant"
    groups = task.configure_optimizers().param_groups
    sharded(torch.randn(2, 3, 8, 8)).sum().backward()
    result = {
        "dimensions": sorted({p.ndim for group in groups for p in group["params"]}),
        "sizes": [sum(p.numel() for p in group["params"]) for group in groups],
    }
    torch.save(result, Path(out) / f"rank_{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(main, (sys.argv[1], os.path.join(folder, "store")), nprocs=2)
