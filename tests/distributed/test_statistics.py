"""Batch norm whose statistics are those of all processes, on CPUs, where torch itself has none."""

import copy

import pytest
import timm
import torch
from torch import multiprocessing, nn

import lightning_msnn  # noqa: F401  registers the networks
from lightning_msnn.kernels import native

pytestmark = pytest.mark.skipif(
    not (native.available() and torch.distributed.is_available()), reason="no kernels or no processes"
)


def network(name):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=10).train()


def learn(rank, name, file, images, sizes, results):
    """One step on a process's own images, of a batch that need not be even."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{file}", rank=rank, world_size=2)
    # Not by DistributedDataParallel, which refuses such norms on CPUs: gradients are added up by hand.
    model = nn.SyncBatchNorm.convert_sync_batchnorm(network(name))
    begin = sum(sizes[:rank])
    model(images[begin : begin + sizes[rank]]).square().sum().backward()
    for parameter in model.parameters():
        torch.distributed.all_reduce(parameter.grad)
    gradients = {n: p.grad for n, p in model.named_parameters()}
    torch.save((gradients, model.state_dict()), f"{results}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(("name", "sizes"), [("msnn_resnet12_tiny", (6, 2)), ("msnn_vit12_tiny", (4, 4))])
def test_two_processes_equal_one_with_the_whole_batch(name, sizes, tmp_path):
    images = torch.randn(sum(sizes), 3, 32, 32)
    multiprocessing.spawn(learn, (name, tmp_path / "store", images, sizes, tmp_path), nprocs=2)
    one = network(name)
    before = copy.deepcopy(one.state_dict())
    one(images).square().sum().backward()
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for name_, parameter in one.named_parameters():
        assert torch.equal(found[0][0][name_], found[1][0][name_])
        bound = 2e-3 * max(1e-2, float(parameter.grad.abs().max()))
        torch.testing.assert_close(found[0][0][name_], parameter.grad, rtol=0, atol=bound, msg=name_)
    for name_, value in one.state_dict().items():
        if "running" in name_:
            assert not torch.equal(value, before[name_])
            torch.testing.assert_close(found[0][1][name_], value, rtol=1e-3, atol=1e-4, msg=name_)
            assert torch.equal(found[0][1][name_], found[1][1][name_])
