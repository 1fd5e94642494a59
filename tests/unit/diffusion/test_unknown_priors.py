"""Networks of unknown kind as priors: tried once on a copy, refused for what they return and for nothing else."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from restoreloss import DiffLoss, NoiseLevels, WeightedSum


class Net(nn.Module):
    def __init__(self, size: int | None = None) -> None:
        super().__init__()
        self.layer, self.size, self.calls = nn.Conv2d(3, 3, 3, padding=1), size, 0

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        self.calls += 1
        if self.size not in (None, x_t.shape[-1]):
            raise ValueError(f"expected images of {self.size} pixels")
        found: Tensor = self.layer(x_t)
        return found if labels is None else found + labels.view(-1, 1, 1, 1)


class Pooled(Net):
    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        return super().forward(x_t, t).mean(dim=(2, 3))


class Hidden(Net):
    @torch.no_grad()
    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        return super().forward(x_t, t)


def pair(size: int = 16) -> tuple[Tensor, Tensor]:
    z, x = torch.rand(2, 4, 3, size, size, generator=torch.Generator().manual_seed(0))
    return z.requires_grad_(), x


def test_what_returns_no_prediction_is_refused_and_left_as_it_was() -> None:
    network = Pooled().train()
    with pytest.raises(ValueError, match="`denoiser` should be a diffusion model, called with .* found a Pooled"):
        DiffLoss(network, h_space_weight=0)
    assert network.training and all(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.parametrize(("network", "options"), [(Net(16), {}), (Net(), {"conditioning": torch.arange(4.0)})])
def test_one_that_reads_another_size_or_rows_of_conditioning_is_taken(network: Net, options: dict[str, Any]) -> None:
    before = torch.get_rng_state()
    loss = DiffLoss(network, h_space_weight=0, **options)
    assert network.calls == 0  # a copy was tried, if any
    assert torch.equal(torch.get_rng_state(), before)
    loss(*pair()).backward()


def test_a_traced_network_is_taken() -> None:
    traced = torch.jit.trace(Net().eval(), (torch.zeros(4, 3, 16, 16), torch.zeros(4, dtype=torch.long)))
    DiffLoss(traced, h_space_weight=0)(*pair()).backward()


def test_a_pass_without_a_graph_is_told() -> None:
    z, x = pair()
    objective = WeightedSum({"pixel": nn.L1Loss(), "diff": DiffLoss(Hidden(), h_space_weight=0)})
    with pytest.raises(ValueError, match="`denoiser` should pass a gradient to `restored`, found none in 'noise'"):
        objective(z, x)
    with torch.no_grad():
        objective(z, x)


def test_a_failed_optimizer_is_no_owner() -> None:
    network = Net()
    with pytest.raises(ValueError, match="Invalid learning rate") as failure:
        torch.optim.Adam(network.parameters(), lr=-1.0)
    assert failure.value.__traceback__ is not None  # keeps the optimizer alive
    DiffLoss(Net(), h_space_weight=0)


def test_a_prior_of_weak_noise_reads_images_as_it_was_trained_on_them() -> None:
    seen = []

    def residual(x_t: Tensor, t: Tensor) -> Tensor:
        seen.append(x_t.detach())
        return 0.1 * x_t

    z, x = pair()
    DiffLoss(residual, NoiseLevels.ir_sde(), h_space_weight=0)(z, x, timestep=1, noise=torch.zeros_like(x))
    torch.testing.assert_close(seen[0], x)


@pytest.mark.parametrize("default", [False, "train"])
def test_a_restorer_with_a_switch_is_no_prior(default: Any) -> None:
    class Restorer(Net):
        def forward(self, image: Tensor, mode: Any = default) -> Tensor:  # type: ignore[override]
            found: Tensor = self.layer(image)
            return found

    with pytest.raises(ValueError, match=r"`denoiser` should be called as f\(x_t, t\)"):
        DiffLoss(Restorer(), h_space_weight=0)
