"""The first stage of UniRestore is Eqs. 2 and 3 and trains CFRM, Controller and SC-Tuner alone."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from restoreloss import DenoisingLoss, NoiseSchedule
from restoreloss.restorers import UniRestoreFirstStage
from tests.helpers.restorers import learned, networks, normal, small, uniform

T = torch.tensor([999, 249])


@pytest.mark.parametrize("weights", [None, [0.5, 3.0]])
def test_the_terms_are_the_equations(weights: Any) -> None:
    model = learned(small(adapter=None))
    vae, _ = networks(model)
    clean, degraded = uniform(2, 3, 16, 16), uniform(2, 3, 16, 16, seed=1)
    terms = UniRestoreFirstStage(model, weights)(degraded, clean, T, torch.Generator().manual_seed(5))
    with torch.no_grad():
        z_0 = vae.encode(2 * clean - 1).latent_dist.mode() * vae.config.scaling_factor
        noise = torch.randn(z_0.shape, generator=torch.Generator().manual_seed(5))
        z_t = model.schedule.add_noise(z_0, noise, T)
        condition, features = model.encode(degraded)
        found = model.predict(z_t, condition, T)
        h, wanted = vae.encoder.conv_in(2 * clean - 1), []
        for block in vae.encoder.down_blocks[:-1]:
            h = block(h)
            wanted.append(h)
        lambdas = weights or [0.1, 0.01]
        cfrm = sum(w * F.mse_loss(one, other) for w, one, other in zip(lambdas, features, wanted, strict=True))
    torch.testing.assert_close(terms["control"], F.mse_loss(found, z_0))
    torch.testing.assert_close(terms["cfrm"], cfrm)

    # Eq. 3 is the denoising loss of a network that predicts the latents, to the bit for each sample.
    loss = DenoisingLoss(
        lambda z, t: model.predict(z, condition, t), NoiseSchedule.scaled_linear(prediction_type="sample"),
        input_range=None, reduction="none",
    )  # fmt: skip
    with torch.no_grad():
        values = loss(z_0, timestep=T, noise=noise)
    assert torch.equal(values, torch.stack([F.mse_loss(a, b) for a, b in zip(found, z_0, strict=True)]))


def test_the_gradient_reaches_what_stage_1_trains() -> None:
    model = learned(small())
    sum(UniRestoreFirstStage(model)(uniform(2, 3, 20, 17), uniform(2, 3, 20, 17, seed=1), T).values()).backward()
    reached = {name.partition(".")[0] for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached == {"cfrm", "controller", "tuners"}
    assert all(p.grad is None for network in networks(model) for p in network.parameters())


def test_an_image_may_have_a_generator_of_its_own() -> None:
    stage = UniRestoreFirstStage(learned(small(adapter=None, cfrm=False)))
    clean, degraded = uniform(2, 3, 16, 16), uniform(2, 3, 16, 16, seed=1)
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    with torch.no_grad():
        both = stage(degraded, clean, T, generators)
        alone = [
            stage(degraded[k : k + 1], clean[k : k + 1], T[k : k + 1], torch.Generator().manual_seed(k + 1))["control"]
            for k in range(2)
        ]
    assert list(both) == ["control"]
    torch.testing.assert_close(both["control"], torch.stack(alone).mean())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: UniRestoreFirstStage(small(), [0.1]), r"`cfrm_weights` should be 2 numbers, found \[0.1\]"),
        (lambda: UniRestoreFirstStage(small(), [0.1, -1.0]), "`cfrm_weights` should be a finite number of at least 0"),
        (lambda: UniRestoreFirstStage(None), "`model` should be a UniRestore, found None"),  # type: ignore[arg-type]
        (
            lambda: UniRestoreFirstStage(small())(normal(1, 3, 16, 16), normal(1, 3, 16, 24), 999),
            "`clean` should have the shape of `degraded`",
        ),
    ],
)
def test_what_does_not_fit_is_refused(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
