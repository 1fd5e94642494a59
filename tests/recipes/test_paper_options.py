"""Options of EDTR and SR4IR that their papers or their authors' code set otherwise than a small run does."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

from examples.common.data.datasets import IGNORED, voc2012
from examples.common.data.task_data import image_side, pad_to_multiple
from examples.common.engine.evaluation import evaluate
from examples.common.engine.recognition import Recognition
from examples.common.networks.recognizers import recognizer
from examples.common.networks.restorers import restorer
from examples.edtr.config import Config as EDTRConfig
from examples.edtr.no_prior import NoPrior
from examples.edtr.prepare import Config as PrepareConfig
from examples.edtr.train import Trainer as EDTRTrainer
from examples.sr4ir.config import Config as SR4IRConfig
from examples.sr4ir.images import bilinear
from examples.sr4ir.train import Trainer as SR4IRTrainer
from examples.sr4ir.train import rate
from restoreloss.restorers import small_latent_prior
from restoreloss.restorers.edtr import color_levels_of
from restoreloss.restorers.tiling import crop_to
from tests.helpers.datasets import make_voc
from tests.recipes import cases


@pytest.fixture(scope="module")
def prepared(prepared: cases.Prepared) -> Path:
    return prepared.edtr


def edtr(out: Path, prepared: Path, **changes: Any) -> EDTRTrainer:
    return EDTRTrainer(replace(cases.EDTR, out=out, prepared=prepared, **changes))


def test_the_levels_of_the_color_fix_follow_the_size() -> None:
    assert [color_levels_of(side) for side in (512, 256, 96, 48, 8)] == [5, 4, 3, 2, 1]
    assert image_side(SR4IRConfig(out=Path())) == 48
    assert image_side(SR4IRConfig(out=Path(), data="cub200")) == 224


@pytest.mark.parametrize(("changes", "levels"), [({}, 1), ({"color_levels": 3}, 3), ({"smallest": 64}, 2)])
def test_a_run_takes_the_levels_that_fit(changes: dict[str, Any], levels: int, tmp_path: Path, prepared: Path) -> None:
    fix = edtr(tmp_path / "run", prepared, **changes).restorer.color_fix
    assert fix is not None and fix.levels == levels


def test_a_score_is_the_mean_over_draws_of_the_noise(tmp_path: Path, prepared: Path) -> None:
    run = edtr(tmp_path / "run", prepared, steps=1, draws=3)
    results = run.run()
    each = [run.evaluate_task("classification", seed=seed)[0] for seed in range(3)]
    assert results["psnr"] == pytest.approx(sum(figures["psnr"] for figures in each) / 3)
    assert results["score_over_draws"] == pytest.approx(float(torch.tensor([f["score"] for f in each]).std()))
    without = edtr(tmp_path / "without", prepared, steps=1, draws=3, method="no_prior").run()
    assert "score_over_draws" not in without


def test_the_restorer_may_learn_from_the_whole_batch(tmp_path: Path, prepared: Path) -> None:
    half, whole = (edtr(tmp_path / name, prepared, whole_batch=name == "whole") for name in ("half", "whole"))
    images, targets = next(half.read(0, 1))
    one, all_of = (run.batch(images, targets, 0, 3) for run in (half, whole))
    assert len(one.hint.image) == 2 and len(all_of.hint.image) == len(all_of.generators) == 4
    torch.testing.assert_close(all_of.hint.image[:2], one.hint.image)
    seeds = [generator.initial_seed() for generator in all_of.generators]
    assert seeds[:2] == [generator.initial_seed() for generator in one.generators] and len(set(seeds)) == 4
    seen: list[int] = []
    inner = whole.edtr.forward
    whole.edtr.forward = lambda hint, *a, **k: seen.append(len(hint.latents)) or inner(hint, *a, **k)  # type: ignore[method-assign,func-returns-value]
    whole._restorer_terms(all_of)
    terms = whole._recognizer_terms(all_of)
    assert seen == [4, 2] and terms["task"].isfinite()


def test_the_task_network_may_read_what_is_not_clamped(tmp_path: Path, prepared: Path) -> None:
    for clamp in (True, False):
        run = edtr(tmp_path / str(clamp), prepared, clamp=clamp)
        batch = run.batch(*next(run.read(0, 1)), 0, 3)
        run.restorer.forward = lambda hint, *a, **k: 3 * hint.image  # type: ignore[method-assign]
        read: list[Tensor] = []
        (reader,) = run.readers.values()
        reader.network.register_forward_pre_hook(lambda m, inputs, read=read: read.append(inputs[0]))
        run._recognizer_terms(batch)
        scaled = read[0][:2] * torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1) + torch.tensor(
            [0.485, 0.456, 0.406]
        ).view(3, 1, 1)
        assert (float(scaled.max()) > 1.5) == (not clamp)


def test_options_reach_the_optimizers_of_edtr(tmp_path: Path, prepared: Path) -> None:
    run = edtr(tmp_path / "run", prepared, weight_decay=0.01, lr_min=1e-5, lr=1e-3, h_lr=1e-3)
    (alternation,) = run.stages[0].alternation.alternations.values()  # type: ignore[attr-defined]
    optimizer: Any = alternation.phases[0].optimizers
    assert optimizer.param_groups[0]["weight_decay"] == 0.01
    for step in range(3):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(
            1e-5 + (1e-3 - 1e-5) * 0.5 * (1 + math.cos(math.pi * step / 3))
        )
        run.stages[0].alternation.step(run.batch(*next(run.read(step, step + 1)), step, 3))


def test_noise_without_a_prior_stays_in_the_latents() -> None:
    noisy, plain = (
        NoPrior(nn.Identity(), small_latent_prior(4), t_p=200, color_fix=False, noisy=noisy) for noisy in (True, False)
    )
    noisy.load_state_dict(plain.state_dict())
    hint, calls = plain.hint(torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))), []
    noise = torch.randn(hint.latents.shape, generator=torch.Generator().manual_seed(1))
    for network in (noisy, plain):
        for parameter in network.projection.parameters():
            nn.init.zeros_(parameter)
        network.finish = lambda latents, hint: calls.append(latents) or latents  # type: ignore[method-assign,func-returns-value]
        network(hint, [200], noise=noise)
    abar = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)[200]
    torch.testing.assert_close(calls[1], hint.latents)
    torch.testing.assert_close(calls[0], hint.latents + float(((1 - abar) / abar).sqrt()) * noise, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [(64, 64), (40, 70)])
def test_the_pre_restoration_of_the_paper_keeps_the_size(size: tuple[int, int]) -> None:
    with torch.no_grad():
        network = restorer("swinir-unshuffle", 1)
        assert network(torch.rand(1, 3, *size)).shape == (1, 3, *size)
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(15.8e6, rel=0.01)
    with pytest.raises(ValueError, match="`scale` should be 1"):
        restorer("swinir-unshuffle", 4)


@pytest.mark.parametrize("file", sorted(Path("examples").glob("*/configs/*.yaml")), ids=lambda file: file.stem)
def test_the_files_of_the_papers_hold_options(file: Path) -> None:
    settings = yaml.safe_load(file.read_text())
    kind: Any = SR4IRConfig if "sr4ir" in file.parts else PrepareConfig if "prepare" in file.stem else EDTRConfig
    kind(out=Path(), **settings)


def test_the_cosine_may_end_above_0_and_begin_anew(tmp_path: Path) -> None:
    assert rate(0, 100, 0.1, 0, 0.2) == 1 and rate(10, 100, 0.1, 0, 0.2) == 1
    assert rate(99, 100, 0.1, 0, 0.2) == pytest.approx(0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi * 89 / 90)))
    for restart, anew in ((0.5, True), (0.0, False)):
        changes: dict[str, Any] = {"steps": 10, "restart": restart, "s_lr_min": 1e-4, "s_lr": 1e-3}
        run = SR4IRTrainer(replace(cases.SR4IR, out=tmp_path / str(anew), method="s_to_t", **changes))
        (phase, *_) = run.stages[0].alternation.phases  # type: ignore[attr-defined]
        factor = phase.schedulers.lr_lambdas[0] if hasattr(phase.schedulers, "lr_lambdas") else None
        factor = factor or phase.schedulers[0].lr_lambdas[0]
        assert (factor(5) == 1) == anew
        if not anew:
            assert factor(10) == pytest.approx(0.1)


def test_the_auxiliary_head_learns_ten_times_as_fast(tmp_path: Path) -> None:
    network = recognizer("paper", "segmentation", 4, pretrained=False, aux=True).eval()
    images, targets = torch.rand(2, 3, 64, 64), torch.randint(4, (2, 64, 64))
    with torch.no_grad():
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        output = network((images - mean) / std)
        main, aux = (F.cross_entropy(output[name], targets) for name in ("out", "aux"))
        plain, both = (Recognition("segmentation", "abcd", aux_weight=weight) for weight in (0.0, 0.5))
        torch.testing.assert_close(plain.loss(network, images, targets), main)
        torch.testing.assert_close(both.loss(network, images, targets), main + 0.5 * aux)
    config = replace(
        cases.SR4IR, out=tmp_path / "run", task="segmentation", recognizer="paper", aux_weight=0.5, h_lr=1e-3,
        h_optimizer="sgd", h_weight_decay=1e-6, method="oracle",
    )  # fmt: skip
    run = SR4IRTrainer(config)
    (phase,) = run.stages[0].alternation.phases  # type: ignore[attr-defined]
    optimizer = phase.optimizers if hasattr(phase.optimizers, "param_groups") else phase.optimizers[0]
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([1e-3, 1e-2])
    assert {group["weight_decay"] for group in optimizer.param_groups} == {1e-6}


def test_test_images_may_be_continued_and_cut_back() -> None:
    image = torch.rand(1, 3, 10, 13)
    whole = pad_to_multiple(image, 4)
    assert whole.shape == (1, 3, 12, 16) and torch.equal(whole[..., 11, :13], image[..., 9, :])
    assert torch.equal(crop_to(whole, image), image)
    (one,) = crop_to(pad_to_multiple([image[0]], 8), [image[0]])
    assert torch.equal(one, image[0])

    class One:
        task, class_names = "classification", ("a", "b")
        __len__ = lambda self: 1  # noqa: E731
        __getitem__ = lambda self, index: (image[0], torch.tensor(1))  # noqa: E731

    network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
    for pad, size in ((True, (10, 13)), (False, (8, 12))):
        _, sheet = evaluate(
            One(), Recognition("classification", ("a", "b")), degrade=lambda hr, _: hr[..., ::4, ::4],  # type: ignore[arg-type]
            restore=lambda hr, lr: F.interpolate(lr, scale_factor=4.0), trained=[network], readers={"score": network},
            multiple=4, pad=pad,
        )  # fmt: skip
        assert sheet["restored"].shape[2:] == sheet["hr"].shape[2:] == size


def test_corners_may_lie_on_corners() -> None:
    small = torch.rand(1, 3, 3, 4)
    found = bilinear(small, 4, align_corners=True)
    assert found.shape == (1, 3, 12, 16) and torch.allclose(found[..., -1, -1], small[..., -1, -1])
    assert not torch.allclose(found, bilinear(small, 4))


def test_voc_may_be_scaled_at_random(tmp_path: Path) -> None:
    make_voc(tmp_path)
    train = voc2012(tmp_path, "train", "segmentation", size=64, scales=(0.5, 2.0))
    torch.manual_seed(0)
    found = [train[0] for _ in range(8)]
    assert all(sample is not None and sample[0].shape == (3, 64, 64) for sample in found)
    ignored = [float((sample[1] == IGNORED).float().mean()) for sample in found if sample is not None]
    assert len({round(share, 3) for share in ignored}) > 2
    test = voc2012(tmp_path, "test", "segmentation", size=64, scales=(0.5, 2.0))
    resized = voc2012(tmp_path, "test", "segmentation", size=64)
    whole, small = test[0], resized[0]
    assert whole is not None and small is not None and whole[0].shape != small[0].shape
