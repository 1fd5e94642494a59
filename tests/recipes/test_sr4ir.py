"""The SR4IR trainer, on a few steps: every method, every task, resumption, two processes, bad input."""

import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.transforms.v2.functional import normalize

from examples.common.data.degrade import low_resolution
from examples.common.data.task_data import datasets
from examples.common.engine.recognition import Recognition
from examples.common.networks.edsr import EDSR
from examples.common.seeds import derive_seed
from examples.experiments import sr4ir as experiment
from examples.sr4ir import train
from examples.sr4ir.config import Config, MethodName
from examples.sr4ir.methods import METHODS
from examples.sr4ir.train import Trainer, rate
from restoreloss import CQMix
from restoreloss.normalization import IMAGENET
from tests.helpers.datasets import filled, make_cars, make_cub, make_mask, make_voc, note, thing
from tests.helpers.processes import ROOT
from tests.recipes import cases

TINY = replace(cases.SR4IR, steps=4, test_count=12)


def run(out: Path, prepared: cases.Prepared, **changes: Any) -> dict[str, Any]:
    judge = prepared.oracle(changes.get("task", "classification"))
    foreign = judge if changes.get("method") == "fixed_foreign" else None
    return Trainer(replace(TINY, out=out, **{"fixed_hr": judge, "judge": judge, "foreign": foreign, **changes})).run()


def weights(run: Path, network: str = "restorer") -> dict[str, Tensor]:
    return load_file(run / f"{network}.safetensors")


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_and_trains_whom_it_says(method: str, tmp_path: Path, prepared: cases.Prepared) -> None:
    results = run(tmp_path / "run", prepared, method=method)
    described = METHODS[method]
    expected = {"fixed_hr", "judge", "judge_distance", "seconds", "num_classes"}
    expected |= {"score", "score_on_hr"} if described.recognizer_inputs else set()
    expected |= {"psnr", "ssim", "psnr_of_mse"} if described.reads != "hr" else set()
    assert set(results) == expected
    assert all(math.isfinite(value) for value in results.values())
    assert (tmp_path / "run" / "samples" / "test.png").exists()
    torch.manual_seed(derive_seed(TINY.seed))
    datasets(TINY, 1)
    start = EDSR(4, features=24, blocks=4, light=True).state_dict()
    assert equal(weights(tmp_path / "run"), start) == (not described.restorer_terms)


def test_data_of_other_classes_are_read_by_networks_that_know_them(
    tmp_path: Path, prepared: cases.Prepared, caplog: pytest.LogCaptureFixture
) -> None:
    done = replace(TINY, out=tmp_path / "run")
    Trainer(done).run()
    eleven = {"data": "photos", "out": tmp_path / "unseen"}
    config = replace(done, **eleven, evaluate=done.out)
    with pytest.raises(ValueError, match="`fixed_hr` or `judge` should read the 11 classes of `data`, found neither"):
        Trainer(config)
    knows_ten = prepared.oracle("classification")
    with pytest.raises(ValueError, match="for classification with 11 classes, .* for classification with 10"):
        Trainer(replace(config, judge=knows_ten))
    assert not (tmp_path / "unseen").exists()
    oracle = replace(TINY, **{**eleven, "out": tmp_path / "oracle"}, method="oracle")
    Trainer(oracle).run()
    caplog.clear()
    results = Trainer(replace(config, judge=oracle.out)).run()
    assert "The 11 classes of the data are not the 10 of" in caplog.text
    assert results["num_classes"] == 11 and "score" not in results and 0 <= results["judge"] <= 100
    names = tmp_path / "run" / "classes.json"
    names.write_text(names.read_text().replace("stripes", "lines"))  # as many classes, under other names
    again = replace(done, out=tmp_path / "again", evaluate=done.out)
    with pytest.raises(ValueError, match="`fixed_hr` or `judge` should read the 10 classes of `data`, found neither"):
        Trainer(again)
    with pytest.raises(ValueError, match="should be a network for the classes .*, found"):
        Trainer(replace(done, out=tmp_path / "again", judge=done.out))
    with pytest.raises(ValueError, match="for segmentation with .* classes, as the data have them, found one"):
        run(tmp_path / "segments", prepared, task="segmentation", judge=oracle.out)


def test_method_names_are_those_of_the_config() -> None:
    assert set(get_args(MethodName)) == set(METHODS)


def test_a_tdp_loss_without_gradient_is_no_tdp_loss(tmp_path: Path, prepared: cases.Prepared) -> None:
    for method in ("no_tdp", "tdp_detached", "sr4ir"):
        run(tmp_path / method, prepared, method=method)
    for network in ("restorer", "recognizer"):
        assert equal(weights(tmp_path / "no_tdp", network), weights(tmp_path / "tdp_detached", network))
    assert not equal(weights(tmp_path / "no_tdp"), weights(tmp_path / "sr4ir"))


@pytest.mark.parametrize(
    ("task", "method"),
    [
        ("segmentation", "t_to_s"),
        ("segmentation", "sr4ir"),
        ("detection", "oracle"),
        ("detection", "l_to_t"),
        ("detection", "sr4ir"),
    ],
)
def test_other_tasks(task: str, method: str, tmp_path: Path, prepared: cases.Prepared) -> None:
    results = run(tmp_path / "run", prepared, method=method, task=task)
    assert 0 <= results["score"] <= 100
    assert (tmp_path / "run" / "samples.pt").exists()


def test_warm_start_and_pretrained_restorer(tmp_path: Path, prepared: cases.Prepared) -> None:
    run(tmp_path / "pretrained", prepared, method="pretrain")
    changes = {"start": "hr", "h_weights": prepared.oracle("classification"), "s_weights": tmp_path / "pretrained"}
    trainer = Trainer(replace(TINY, out=tmp_path / "warm", **changes))
    assert equal(weights(tmp_path / "pretrained"), trainer.s.state_dict())
    assert equal(weights(prepared.oracle("classification"), "recognizer"), trainer.h.state_dict())


@pytest.mark.parametrize("name", ["cars_x8", "cub_x8", "voc_segmentation_x8", "voc_detection_x8"])
def test_configs_of_the_paper_are_valid_and_ask_for_the_data(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    config = ROOT / "examples" / "sr4ir" / "configs" / f"{name}.yaml"
    monkeypatch.setattr(sys, "argv", ["train", f"--config={config}", f"--out={tmp_path / 'run'}"])
    with pytest.raises(SystemExit):
        train.main()
    assert "`root` should be the folder of the data set" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"start": "hr"}, "`h_weights` should be the run directory of an oracle"),
        ({"method": "fixed_task"}, "`fixed_hr` should be"),
        ({"method": "fixed_foreign"}, "`foreign` should be"),
        ({"batch": 13}, "`batch` should be between 1 and the 12 training samples, found 13"),
        ({"scale": 5}, "`scale` should be one of"),
        ({"restorer": "edrs"}, "`restorer` should be one of"),
        ({"restorer": "file"}, "restorer .file. should be given a file of weights"),
        ({"recognizer": "resnet"}, "`recognizer` should be"),
        ({"data": "cub200"}, "`root` should be the folder"),
        ({"judge": Path("nowhere")}, "should be a finished run"),
        ({"layers": ["stage7"]}, "`layers` should name modules"),
        ({"grid": 49}, "`grid` should have no more cells"),
    ],
)
def test_bad_settings_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        Trainer(replace(TINY, out=tmp_path / "run", **changes)).run()


@pytest.mark.parametrize(
    ("data", "task", "make"),
    [
        ("cub200", "classification", make_cub),
        ("cars", "classification", make_cars),
        ("voc2012", "segmentation", make_voc),
        ("voc2012", "detection", make_voc),
    ],
)
def test_data_sets_on_disk(data: Any, task: Any, make: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = make(tmp_path)
    if data == "voc2012":  # test images of unequal size, and one that is broken
        Image.new("RGB", (50, 36)).save(folder / "JPEGImages" / "w.jpg")
        make_mask(folder / "SegmentationClass" / "w.png", filled((6, 10, 16, 25), 3, (50, 36)))
        note(folder / "Annotations" / "w.xml", thing("bird", (7, 11, 16, 25)), size=(50, 36))
        for name in ("b", "v"):
            (folder / "JPEGImages" / f"{name}.jpg").write_bytes(b"nothing")
    config = replace(TINY, out=tmp_path / "run", data=data, task=task, root=tmp_path, size=32, batch=3)
    results = Trainer(config).run()
    assert all(math.isfinite(value) for value in results.values())
    assert ("b.jpg" in caplog.text) == (data == "voc2012")


def test_a_score_that_cannot_be_computed_is_found_before_the_first_step(tmp_path: Path) -> None:
    folder = make_voc(tmp_path)
    for name in ("v", "w"):
        note(folder / "Annotations" / f"{name}.xml")
    options: dict[str, Any] = {"data": "voc2012", "task": "detection", "root": tmp_path, "size": 32, "batch": 3}
    with pytest.raises(ValueError, match="should hold a box, found none in 2 images"):
        Trainer(replace(TINY, out=tmp_path / "run", **options))
    Trainer(replace(TINY, out=tmp_path / "pre", method="pretrain", **options))  # nothing reads the images


def test_rate_is_a_cosine_begun_anew() -> None:
    values = [rate(step, 100, 0.1, 0) for step in range(100)]
    assert values[0] == 1 and values[10] == 1
    assert values[5] == pytest.approx(0.5)
    assert values[55] == pytest.approx(0.5)
    assert values[9] == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.9)))
    assert [rate(step, 100, 0.0, 4) for step in range(3)] == pytest.approx(
        [(step + 1) / 4 * 0.5 * (1 + math.cos(math.pi * step / 100)) for step in range(3)]
    )


def test_an_experiment_prepares_every_seed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configs: list[Config] = []

    class Noted:
        def __init__(self, config: Config) -> None:
            configs.append(config)

        def run(self) -> dict[str, Any]:
            return {}

    monkeypatch.setattr(experiment, "Trainer", Noted)
    for steps in (500, 1000):
        base = replace(TINY, out=tmp_path, steps=steps)
        experiment.table(tmp_path, base, [1, 2], ["scratch", "hr"], ["l_to_t", "fixed_foreign"])
    folders: dict[Path, Config] = {}
    for config in configs:
        known = folders.setdefault(config.out, config)
        assert known == config  # one folder, one run
    prepared = [config for out, config in folders.items() if "prepared" in out.parts]
    assert len(prepared) == 2 * 4 and {config.steps for config in prepared} == {500, 1000}
    compared = [config for out, config in folders.items() if "table" in out.parts]
    assert len(compared) == 2 * 2 * 2 * 2
    for config in compared:
        seeds = {folders[path].seed for path in (config.s_weights, config.h_weights, config.fixed_hr) if path}
        assert seeds == {config.seed} and config.judge is not None
        assert folders[config.judge].seed == config.seed + 1000


def trainer_and_batch(tmp_path: Path, prepared: cases.Prepared, method: str, progress: float) -> tuple[Trainer, Any]:
    judge = prepared.oracle("classification")
    other = tmp_path / "other"
    Trainer(replace(TINY, out=other, method="oracle", seed=7)).run()
    names = {"fixed_hr": judge, "judge": other, "foreign": other if method == "fixed_foreign" else None}
    trainer = Trainer(replace(TINY, out=tmp_path / method, method=method, **names))  # type: ignore[arg-type]
    images, targets = next(trainer.read(0, 1))
    return trainer, replace(trainer.batch(images, targets, 0, 4), progress=progress)


def features(network: nn.Module, images: Tensor) -> Tensor:
    kept: list[Tensor] = []
    hook = network.get_submodule("backbone").register_forward_hook(lambda m, i, o: kept.append(o))
    network(normalize(images, *map(list, IMAGENET)))
    hook.remove()
    return kept[0]


def l1(network: nn.Module, one: Tensor, other: Tensor) -> Tensor:
    return (features(network, one) - features(network, other)).abs().mean()


def task_loss(trainer: Trainer, images: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(trainer.h(normalize(images, *map(list, IMAGENET))), targets)


@pytest.mark.parametrize(
    ("method", "progress", "expected"),
    [
        ("pretrain", 1.0, {"pixel"}),
        ("squared", 0.0, {"pixel", "squared"}),
        ("gradients", 0.0, {"pixel", "gradients"}),
        ("squared_tdp", 0.0, {"pixel", "squared", "tdp"}),
        ("sr4ir_squared", 0.0, {"pixel", "squared"}),
        ("s_to_t", 1.0, {"pixel"}),
        ("no_tdp", 1.0, {"pixel"}),
        ("sr4ir", 0.0, {"pixel"}),
        ("sr4ir", 0.0999, {"pixel"}),
        ("sr4ir", 0.1, {"pixel", "tdp"}),
        ("no_cqmix", 0.1, {"pixel", "tdp"}),
        ("fixed_task", 0.5, {"pixel", "tdp"}),
        ("fixed_foreign", 0.5, {"pixel", "tdp"}),
        ("t_to_s", 0.0, {"pixel", "task"}),
        ("tdsr", 0.33, {"pixel"}),
        ("tdsr", 0.34, {"pixel", "task"}),
    ],
)
def test_the_restorer_learns_from_the_terms_of_its_method(
    method: str, progress: float, expected: set[str], tmp_path: Path, prepared: cases.Prepared
) -> None:
    trainer, batch = trainer_and_batch(tmp_path, prepared, method, progress)
    restored = trainer.s(batch.lr)
    trainer.h.eval()
    fixed = dict.fromkeys(("fixed_task", "squared_tdp"), trainer.fixed_hr)
    seen_by = {**fixed, "fixed_foreign": trainer.judge}.get(method, trainer.h)
    assert seen_by is not None
    wanted = {
        "pixel": (restored - batch.hr).abs().mean(),
        "squared": METHODS[method].restorer_terms.get("squared", 0) * (restored - batch.hr).square().mean(),
        "gradients": METHODS[method].restorer_terms.get("gradients", 0)
        * sum((restored - batch.hr).diff(dim=dim).square().mean() for dim in (2, 3)),
        "tdp": METHODS[method].restorer_terms.get("tdp", 0) * l1(seen_by, restored, batch.hr),
        "task": METHODS[method].restorer_terms.get("task", 0) * task_loss(trainer, restored, batch.targets),
    }
    terms = trainer._restorer_terms(batch)
    assert set(terms) == expected
    weights = list(trainer.s.parameters())
    for name, value in terms.items():
        torch.testing.assert_close(value, wanted[name])
        mine, theirs = (torch.autograd.grad(x, weights, retain_graph=True) for x in (value, wanted[name]))
        assert any(gradient.abs().max() > 0 for gradient in mine)
        for one, other in zip(mine, theirs, strict=True):
            torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("method", ["joint", "tdp_joint", "rsrssn"])
def test_one_loss_for_both(method: str, tmp_path: Path, prepared: cases.Prepared) -> None:
    trainer, batch = trainer_and_batch(tmp_path, prepared, method, 0.5)
    terms = trainer._joint_terms(batch)
    weight = {"joint": None, "tdp_joint": 1.0, "rsrssn": 0.1}[method]
    assert set(terms) == {"pixel", "task"} | ({"tdp"} if weight else set())
    restored = trainer.s(batch.lr)
    torch.testing.assert_close(terms["pixel"], (restored - batch.hr).abs().mean())
    torch.testing.assert_close(terms["task"], task_loss(trainer, restored, batch.targets))
    of_task = torch.autograd.grad(terms["task"], list(trainer.s.parameters()), retain_graph=True)
    assert any(gradient.abs().max() > 0 for gradient in of_task)
    if weight:
        torch.testing.assert_close(terms["tdp"], weight * l1(trainer.h, restored, batch.hr))
        for network in (trainer.s, trainer.h):  # the mistake that the ablation is about
            gradients = torch.autograd.grad(
                terms["tdp"], list(network.parameters()), retain_graph=True, allow_unused=True
            )
            assert any(gradient is not None and gradient.abs().max() > 0 for gradient in gradients)


def test_one_loss_for_a_detector_too(tmp_path: Path) -> None:
    trainer: Any = Trainer(replace(TINY, out=tmp_path / "run", method="rsrssn", task="detection"))
    batch = trainer.batch(*next(trainer.read(0, 1)), 0, 4)
    before = {name: value.clone() for name, value in trainer.h.named_buffers()}
    trainer.recognition.loss = lambda *_: torch.zeros(())  # whose pass in train mode moves the batch statistics
    tdp = trainer._joint_terms(batch)["tdp"]
    assert trainer.h.training and all(torch.equal(value, before[name]) for name, value in trainer.h.named_buffers())
    trainer.h.eval()
    seen, wanted = (trainer.tdp.features(images) for images in ([trainer.s(lr[None])[0] for lr in batch.lr], batch.hr))
    distances = [(seen[name] - wanted[name]).abs().mean() for name in seen]
    torch.testing.assert_close(tdp, 0.1 * sum(distances) / len(distances))
    trained = [*trainer.s.parameters(), *trainer.h.parameters()]
    alone = torch.autograd.grad(tdp, trained, retain_graph=True, allow_unused=True)
    for gradients in (alone[: len(list(trainer.s.parameters()))], alone[len(list(trainer.s.parameters())) :]):
        assert any(gradient is not None and gradient.abs().max() > 0 for gradient in gradients)
    del trainer.recognition.loss
    trainer.h.train()
    terms = trainer._joint_terms(batch)  # whose task term moves the statistics before the one backward pass
    for one, other in zip(torch.autograd.grad(terms["tdp"], trained, allow_unused=True), alone, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("method", "separate"),
    [
        (name, separate) for name, method in METHODS.items() if method.recognizer_inputs
        for separate in ((False, True) if len(method.recognizer_inputs) > 1 else (False,))
    ],
)  # fmt: skip
def test_the_recognizer_reads_the_images_of_its_method(
    method: str, separate: bool, tmp_path: Path, prepared: cases.Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, batch = trainer_and_batch(tmp_path, prepared, method, 0.5)
    trainer.config = replace(trainer.config, separate=separate)
    with torch.no_grad():
        raw = trainer.s(batch.lr)
        # out of range, so that a clamp shows
        trainer.s.register_forward_hook(lambda m, i, o: 3 * o - 1)
    together = METHODS[method].stages[-1][-1] == "both"
    restored = 3 * raw - 1 if together else (3 * raw - 1).clamp(0, 1)
    mix = CQMix((4, 4))
    generators = [torch.Generator().set_state(generator.get_state()) for generator in batch.generators]
    wanted = {
        "hr": batch.hr,
        "restored": restored,
        "bilinear": F.interpolate(batch.lr, scale_factor=4.0, mode="bilinear"),
    }
    expected = [
        mix(restored, batch.hr, generator=generators.pop(0)) if name == "mix" else wanted[name]
        for name in METHODS[method].recognizer_inputs
    ]
    read: list[tuple[Tensor, Tensor]] = []
    loss = Recognition.loss

    def note(self: Recognition, network: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        assert network is trainer.h
        read.append((images, targets))
        return loss(self, network, images, targets)

    monkeypatch.setattr(Recognition, "loss", note)
    objective = trainer._joint_terms if together else lambda b: {"task": trainer._recognizer_terms(b)["task"]}
    value = objective(batch)["task"]
    assert len(read) == (len(expected) if separate else 1)
    torch.testing.assert_close(torch.cat([images for images, _ in read]), torch.cat(expected))
    assert torch.equal(torch.cat([targets for _, targets in read]), batch.targets.repeat(len(expected)))
    if not separate and not together:
        assert not read[0][0].requires_grad
        torch.testing.assert_close(value, task_loss(trainer, torch.cat(expected), batch.targets.repeat(len(expected))))


def test_learning_rates_follow_their_cosines(tmp_path: Path, prepared: cases.Prepared) -> None:
    judge = prepared.oracle("classification")
    changes: dict[str, Any] = {"steps": 8, "restart": 0.5, "warm_up": 2, "fixed_hr": judge, "judge": judge}
    trainer = Trainer(replace(TINY, out=tmp_path / "run", **changes))
    seen: dict[str, list[float]] = {"restorer": [], "recognizer": []}
    (stage,) = trainer.stages
    for step, (images, targets) in enumerate(trainer.read(0, 8)):
        for phase in stage.alternation.phases:  # type: ignore[attr-defined]
            seen[phase.name].append(phase.optimizers[0].param_groups[0]["lr"])
        stage.alternation.step(trainer.batch(images, targets, step, 8))
    cosine = [0.5 * (1 + math.cos(math.pi * k / 4)) for k in (0, 1, 2, 3)] * 2
    rise = [0.5, 1, 1, 1, 1, 1, 1, 1]
    assert seen["restorer"] == pytest.approx([1e-3 * a * b for a, b in zip(cosine, rise, strict=True)])
    assert seen["recognizer"] == pytest.approx([2e-3 * a * b for a, b in zip(cosine, rise, strict=True)])


def test_the_figures_are_what_they_are_called(tmp_path: Path, prepared: cases.Prepared) -> None:
    trainer, _ = trainer_and_batch(tmp_path, prepared, "sr4ir", 0.5)
    with torch.no_grad():  # so that no two readers agree
        trainer.h.fc.weight.normal_(generator=torch.Generator().manual_seed(5))
    figures, samples = trainer.evaluate()
    data = trainer.test_data
    hr = torch.stack([data[k][0] for k in range(len(data))])  # type: ignore[index]
    labels = torch.stack([data[k][1] for k in range(len(data))])  # type: ignore[index]
    lr = low_resolution(hr, 4)
    networks = [trainer.s, trainer.h, trainer.fixed_hr, trainer.judge]
    s, h, fixed, judge = (network.eval() for network in networks if network is not None)
    with torch.no_grad():
        seen = s(lr).clamp(0, 1)

        def accuracy(network: nn.Module, images: Tensor) -> float:
            return 100 * float((network(normalize(images, *map(list, IMAGENET))).argmax(1) == labels).float().mean())

        expected = {
            "score": accuracy(h, seen), "score_on_hr": accuracy(h, hr), "fixed_hr": accuracy(fixed, seen),
            "judge": accuracy(judge, seen),
        }  # fmt: skip
        gaps = (features(judge, seen) - features(judge, hr)).abs().flatten(1).mean(1)
        expected["judge_distance"] = float((gaps / features(judge, hr).abs().flatten(1).mean(1)).mean())
        squares = (seen - hr).square().flatten(1).mean(1)
        expected["psnr"] = float((-10 * squares.log10()).mean())
    for name, value in expected.items():
        assert figures[name] == pytest.approx(value, rel=1e-4), name
    torch.testing.assert_close(samples["restored"], seen[:8])
    assert torch.equal(samples["hr"], hr[:8]) and torch.equal(samples["lr"], lr[:8])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"start": "hr", "h_weights": Path("nowhere")}, "should be a finished run"),
        ({"s_weights": Path("nowhere")}, "no such file"),
        ({"s_weights": "another scale"}, "should hold the weights of this EDSR"),
        ({"restorer": "file", "s_weights": "broken"}, "should be a whole file of torch.save"),
        ({"recognizer": "timm/nosuch"}, "model of timm"),
        ({"save_every": 0}, "`save_every` should be at least 1"),
        ({"steps": 0}, "`steps` should be at least 1"),
        ({"degradation": "mixture_b"}, "`scale` should be 1 for mixture_b"),
    ],
)
def test_what_cannot_be_is_named_and_leaves_no_folder(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    if changes.get("s_weights") == "another scale":
        torch.save(EDSR(2, features=24, blocks=4, light=True).state_dict(), tmp_path / "x2.pt")
        changes = {**changes, "s_weights": tmp_path / "x2.pt"}
    elif changes.get("s_weights") == "broken":
        (tmp_path / "broken.pth").write_bytes(b"no weights")
        changes = {**changes, "s_weights": tmp_path / "broken.pth"}
    with pytest.raises(ValueError, match=message):
        Trainer(replace(TINY, out=tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_weights_load_without_the_help_of_torch(
    tmp_path: Path, prepared: cases.Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path / "first", prepared, method="pretrain", steps=1)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("older ones do not read safetensors")

    monkeypatch.setattr(torch, "load", refuse)
    trainer = Trainer(replace(TINY, out=tmp_path / "second", method="pretrain", s_weights=tmp_path / "first"))
    assert equal(weights(tmp_path / "first"), trainer.s.state_dict())
