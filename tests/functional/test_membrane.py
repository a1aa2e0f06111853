import torch

from lightning_msnn.functional import coupled_scan, scan, sine


def test_scan_is_its_formula():
    i = [torch.randn(2, 3, 4, 4) for _ in range(4)]
    tau = torch.rand(3, 1, 1)
    u = scan(i, tau)
    torch.testing.assert_close(u[0], i[0])
    torch.testing.assert_close(u[3], i[3] + tau * (i[2] + tau * (i[1] + tau * i[0])))


def test_coupled_scan_is_its_formula():
    i = [torch.randn(2, 3, 4, 4) for _ in range(4)]
    u1 = [torch.randn(2, 3, 4, 4) for _ in range(4)]
    theta = torch.tensor(0.25)
    u2 = coupled_scan(i, u1, torch.tensor(0.4), lambda a, b: sine(a, b, theta))
    torch.testing.assert_close(u2[0], i[0])
    for k in range(1, 4):
        torch.testing.assert_close(u2[k], i[k] + 0.4 * sine(u1[k - 1], u2[k - 1], theta))


def test_a_learnt_decay_of_zero_contains_the_network_without_windows():
    i = [torch.randn(1, 3, 2, 2) for _ in range(4)]
    tau = torch.zeros(3, 1, 1)
    for u, current in zip(coupled_scan(i, scan(i, tau), tau, torch.add), i, strict=True):
        assert torch.equal(u, current)
