"""The SR4IR trainer, on a few steps: every method, every task, resumption, two processes, bad input."""

import json
import logging
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args
from urllib.error import URLError

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision.transforms.v2.functional import normalize

from examples.common.data.degrade import low_resolution
from examples.common.data.task_data import datasets, on_grid
from examples.common.data.tasks import Task
from examples.common.engine.batches import Batches, chance, loader
from examples.common.engine.recognition import Recognition, features_of
from examples.common.networks.restorers import EDSR, load_weights, recogniser, restorer
from examples.experiments import sr4ir as experiment
from examples.sr4ir import train
from examples.sr4ir.config import Config, MethodName
from examples.sr4ir.methods import METHODS
from examples.sr4ir.train import Trainer, rate
from restoreloss import CQMix
from restoreloss.normalization import IMAGENET
from tests.helpers.processes import ROOT
from tests.recipes.test_datasets import filled, make_cars, make_cub, make_mask, make_voc, note, thing

TINY = Config(out=Path(), steps=4, batch=4, train_count=20, test_count=12, save_every=2, cpu=True)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("prepared")
    for task in ("classification", "segmentation", "detection"):
        Trainer(replace(TINY, out=folder / task, method="oracle", task=task)).run()
    return {task: folder / task for task in ("classification", "segmentation", "detection")}


def run(out: Path, prepared: dict[str, Path], **changes: Any) -> dict[str, Any]:
    judge = prepared[changes.get("task", "classification")]
    return Trainer(replace(TINY, out=out, fixed_hr=judge, judge=judge, foreign=judge, **changes)).run()


def weights(run: Path, network: str = "restorer") -> dict[str, Tensor]:
    return load_file(run / f"{network}.safetensors")


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_and_trains_whom_it_says(method: str, tmp_path: Path, prepared: dict[str, Path]) -> None:
    results = run(tmp_path / "run", prepared, method=method)
    described = METHODS[method]
    expected = {"fixed_hr", "judge", "judge_distance", "seconds", "num_classes"}
    expected |= {"score", "score_on_hr"} if described.recogniser_inputs else set()
    expected |= {"psnr", "ssim"} if described.reads != "hr" else set()
    assert set(results) == expected
    assert all(math.isfinite(value) for value in results.values())
    assert (tmp_path / "run" / "samples" / "test.png").exists()
    torch.manual_seed(chance(TINY.seed))
    datasets(TINY, 1)
    start = EDSR(4, features=24, blocks=4, light=True).state_dict()
    assert equal(weights(tmp_path / "run"), start) == (not described.restorer_terms)


def test_method_names_are_those_of_the_config() -> None:
    assert set(get_args(MethodName)) == set(METHODS)


def test_a_tdp_loss_without_gradient_is_no_tdp_loss(tmp_path: Path, prepared: dict[str, Path]) -> None:
    for method in ("no_tdp", "tdp_detached", "sr4ir"):
        run(tmp_path / method, prepared, method=method)
    for network in ("restorer", "recogniser"):
        assert equal(weights(tmp_path / "no_tdp", network), weights(tmp_path / "tdp_detached", network))
    assert not equal(weights(tmp_path / "no_tdp"), weights(tmp_path / "sr4ir"))


@pytest.mark.parametrize("task", ["segmentation", "detection"])
@pytest.mark.parametrize("method", ["oracle", "l_to_t", "t_to_s", "joint", "sr4ir"])
def test_other_tasks(task: str, method: str, tmp_path: Path, prepared: dict[str, Path]) -> None:
    results = run(tmp_path / "run", prepared, method=method, task=task)
    assert 0 <= results["score"] <= 100
    assert (tmp_path / "run" / "samples.pt").exists()


def test_warm_start_and_pretrained_restorer(tmp_path: Path, prepared: dict[str, Path]) -> None:
    run(tmp_path / "pretrained", prepared, method="pretrain")
    changes = {"start": "hr", "h_weights": prepared["classification"], "s_weights": tmp_path / "pretrained"}
    trainer = Trainer(replace(TINY, out=tmp_path / "warm", **changes))
    assert equal(weights(tmp_path / "pretrained"), trainer.s.state_dict())
    assert equal(weights(prepared["classification"], "recogniser"), trainer.h.state_dict())


@pytest.mark.parametrize("method", ["sr4ir", "s_to_t"])
def test_a_stopped_run_resumes_with_the_same_numbers(
    method: str, tmp_path: Path, prepared: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(tmp_path / "whole", prepared, method=method, steps=5)
    for stop in (4, 8) if method == "s_to_t" else (4,):  # in the first and in the second stage
        with monkeypatch.context() as patch:
            steps, step = [0], train.Alternation.step

            def count(self: Any, *batches: Any, steps: list[int] = steps, stop: int = stop, step: Any = step) -> Any:
                steps[0] += 1
                if steps[0] == stop:
                    raise KeyboardInterrupt
                return step(self, *batches)

            patch.setattr(train.Alternation, "step", count)
            with pytest.raises(KeyboardInterrupt):
                run(tmp_path / f"stopped{stop}", prepared, method=method, steps=5)
        resumed = run(tmp_path / f"stopped{stop}", prepared, method=method, steps=5)
        assert {**resumed, "seconds": 0} == {**whole, "seconds": 0}
        for network in ("restorer", "recogniser"):
            assert equal(weights(tmp_path / "whole", network), weights(tmp_path / f"stopped{stop}", network))
        lines = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", f"stopped{stop}")]
        assert lines[0] == lines[1]


def test_a_finished_run_is_not_done_again(tmp_path: Path, prepared: dict[str, Path]) -> None:
    first = run(tmp_path / "run", prepared)
    shutil.rmtree(tmp_path / "run" / "samples")
    assert run(tmp_path / "run", prepared) == first
    assert not (tmp_path / "run" / "samples").exists()
    with pytest.raises(ValueError, match="`steps` was 4 and is 5"):
        run(tmp_path / "run", prepared, steps=5)


@pytest.mark.slow  # test_distributed.py has the full method
def test_two_processes_train_the_restorer_that_one_trains(tmp_path: Path) -> None:
    options = ["--steps=3", "--batch=4", "--train_count=20", "--test_count=8", "--method=no_tdp", "--cpu=true"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    for processes in (1, 2):
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}",
            "-m", "examples.sr4ir.train", f"--out={tmp_path / str(processes)}", *options,
        ]  # fmt: skip
        result = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert result.returncode == 0, result.stderr[-3000:]
    assert f"{2} processes" in result.stderr
    one, two = weights(tmp_path / "1"), weights(tmp_path / "2")
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-6)


def test_yaml_and_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "config.yaml").write_text("method: l_to_t\nsteps: 100\nbatch: 4\ntrain_count: 20\ntest_count: 8\n")
    arguments = [
        "train",
        f"--config={tmp_path / 'config.yaml'}",
        f"--out={tmp_path / 'run'}",
        "--steps=2",
        "--cpu=true",
    ]
    monkeypatch.setattr(sys, "argv", arguments)
    train.main()
    assert "score_on_hr" in capsys.readouterr().out
    assert [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()] == [2]


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
        ({"method": "tdp_joint", "task": "detection"}, "`task` should not be 'detection'"),
        ({"batch": 21}, "`batch` should be between 1 and the 20 training samples, found 21"),
        ({"scale": 5}, "`scale` should be one of"),
        ({"restorer": "edrs"}, "`restorer` should be one of"),
        ({"restorer": "file"}, "restorer .file. should be given a file of weights"),
        ({"recogniser": "resnet"}, "`recogniser` should be"),
        ({"data": "cub200"}, "`root` should be the folder"),
        ({"judge": Path("nowhere")}, "should be the directory of a finished run"),
        ({"layers": ["stage7"]}, "`layers` should name modules"),
        ({"grid": 49}, "`grid` should have no more cells"),
    ],
)
def test_bad_settings_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        Trainer(replace(TINY, out=tmp_path / "run", **changes)).run()


def test_a_label_that_is_no_class_is_named() -> None:
    names = ("a", "b", "c")
    Recognition("segmentation", names).check(torch.tensor([[0, 2, 255]]))
    with pytest.raises(ValueError, match="Labels should be from 0 to 2, found 1 to 3"):
        Recognition("classification", names).check(torch.tensor([1, 3]))
    with pytest.raises(ValueError, match="Labels should be from 1 to 2, found 0 to 0"):
        Recognition("detection", names).check([{"labels": torch.tensor([0])}])
    Recognition("detection", names).check([{"labels": torch.empty(0, dtype=torch.long)}])
    with pytest.raises(ValueError, match="`targets` should be as many as `images`"):
        Recognition("classification", names).loss(torch.nn.Identity(), torch.rand(2, 3, 4, 4), torch.tensor([1]))


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
    if data == "voc2012":  # test pictures of unequal size, and one that is broken
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


def test_a_detector_that_began_with_imagenet_keeps_its_frozen_normalisation(tmp_path: Path) -> None:
    from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_fpn
    from torchvision.ops import FrozenBatchNorm2d

    torch.manual_seed(0)
    network = recogniser("paper", "detection", 3, pretrained=False)
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            network.set_submodule(name, FrozenBatchNorm2d(module.num_features, eps=module.eps))
    save_file(network.state_dict(), tmp_path / "frozen.safetensors")
    again = recogniser("paper", "detection", 3, pretrained=False)
    load_weights(again, tmp_path / "frozen.safetensors")
    assert not any(isinstance(module, nn.BatchNorm2d) for module in again.modules())
    image = [torch.rand(3, 64, 64)]
    one, other = (net.eval()(image)[0]["scores"] for net in (network, again))
    assert torch.equal(one, other)
    assert all(weight.requires_grad for weight in again.parameters())
    live = fasterrcnn_mobilenet_v3_large_fpn(weights=None, weights_backbone=None, num_classes=3)
    save_file(live.state_dict(), tmp_path / "live.safetensors")
    load_weights(fresh := recogniser("paper", "detection", 3, pretrained=False), tmp_path / "live.safetensors")
    assert any(isinstance(module, nn.BatchNorm2d) for module in fresh.modules())


def test_patches_are_cut_where_the_seed_says(tmp_path: Path) -> None:
    config = Config(out=tmp_path / "run", method="pretrain", patch=16, steps=1, batch=4, train_count=8, test_count=4)
    run = Trainer(config)
    pictures, targets = next(run.read(0, 1))
    batch = run.batch(pictures, targets, 0, 1)
    assert batch.hr.shape == (4, 3, 16, 16)
    for picture, patch in zip(pictures, batch.hr, strict=True):
        places = picture.unfold(1, 16, 1).unfold(2, 16, 1)  # every square
        assert ((places - patch[:, None, None]).abs().amax(dim=(0, 3, 4)) == 0).any()
    assert torch.equal(run.batch(pictures, targets, 0, 1).hr, batch.hr)
    with pytest.raises(ValueError, match="`patch` should fit"):
        Trainer(replace(config, patch=64, out=tmp_path / "large")).batch(pictures, targets, 0, 1)
    with pytest.raises(ValueError, match="`patch` should be left out"):
        Trainer(replace(config, method="sr4ir", out=tmp_path / "other"))


def test_pictures_without_a_box_train_a_detector() -> None:
    network = recogniser("small", "detection", 3).train()
    targets = [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)} for _ in range(2)]
    loss = Recognition("detection", ("background", "a", "b")).loss(network, torch.rand(2, 3, 48, 48), targets)
    loss.backward()
    assert loss.isfinite()


def test_rate_is_a_cosine_begun_anew() -> None:
    values = [rate(step, 100, 0.1, 0) for step in range(100)]
    assert values[0] == 1 and values[10] == 1
    assert values[5] == pytest.approx(0.5)
    assert values[55] == pytest.approx(0.5)
    assert values[9] == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.9)))
    assert [rate(step, 100, 0.0, 4) for step in range(3)] == pytest.approx(
        [(step + 1) / 4 * 0.5 * (1 + math.cos(math.pi * step / 100)) for step in range(3)]
    )


def test_batches_are_a_function_of_seed_and_step() -> None:
    whole = list(Batches(10, 4, seed=1, first=0, last=6))
    assert list(Batches(10, 4, seed=1, first=3, last=6)) == whole[3:]
    assert len({index for batch in whole[:2] for index, _ in batch}) == 8  # an epoch shows no picture twice
    parts = [list(Batches(10, 4, seed=1, first=0, last=6, rank=rank, processes=2)) for rank in range(2)]
    assert [one + other for one, other in zip(*parts, strict=True)] == whole
    assert list(Batches(10, 4, seed=2, first=0, last=6)) != whole


def test_samples_are_drawn_with_their_own_seed() -> None:
    class Noisy:
        task: Task = "classification"
        class_names = ("a", "b")

        def __len__(self) -> int:
            return 6

        def __getitem__(self, index: int) -> Any:
            return torch.rand(3, 2, 2), torch.tensor(index)

    data = Noisy()
    first, again = (list(loader(data, Batches(6, 3, seed=1, first=0, last=4), workers=n)) for n in (0, 1))
    for (images, labels), (same_images, same_labels) in zip(first, again, strict=True):
        assert torch.equal(images, same_images) and torch.equal(labels, same_labels)
    assert not torch.equal(first[0][0], first[2][0])


def test_low_resolution_is_bicubic_in_eight_bits() -> None:
    picture = torch.rand(1, 3, 16, 24)
    lr = low_resolution(picture, 4)
    # the bicubic kernel (a = -0.75) half-way between two pixels: -3/32, 19/32, 19/32, -3/32
    kernel = torch.tensor([-3.0, 19.0, 19.0, -3.0]) / 32
    blocks = picture.unfold(2, 4, 4).unfold(3, 4, 4)
    expected = torch.einsum("nchwij,i,j->nchw", blocks, kernel, kernel).clamp(0, 1)
    torch.testing.assert_close(lr, (expected * 255).round() / 255, atol=1 / 255 + 1e-6, rtol=0)
    assert ((lr * 255).round() / 255 - lr).abs().max() < 1e-7
    assert low_resolution(picture, 4, blur=2.0).var() < lr.var()
    with pytest.raises(ValueError, match="multiples of 4"):
        low_resolution(torch.rand(1, 3, 15, 24), 4)


def test_pictures_are_cut_to_multiples_with_their_boxes_and_masks() -> None:
    hr, mask = torch.rand(2, 3, 10, 11), torch.randint(5, (2, 10, 11))
    cut, cut_mask = on_grid(hr, mask, 4)
    assert torch.equal(cut, hr[:, :, :8, :8]) and torch.equal(cut_mask, mask[:, :8, :8])
    target = {"boxes": torch.tensor([[1.0, 2, 11, 9], [9, 0, 11, 10]]), "labels": torch.tensor([3, 4])}
    (picture,), (cut_target,) = on_grid([hr[0]], [target], 4)
    assert torch.equal(picture, hr[0, :, :8, :8])
    assert cut_target["boxes"].tolist() == [[1, 2, 8, 8]] and cut_target["labels"].tolist() == [3]


@pytest.mark.parametrize("scale", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("light", [False, True])
def test_edsr_enlarges_by_its_scale(scale: int, light: bool) -> None:
    assert EDSR(scale, features=4, blocks=1, light=light)(torch.rand(1, 3, 5, 7)).shape == (1, 3, 5 * scale, 7 * scale)


def test_swinir_and_files_of_spandrel(tmp_path: Path) -> None:
    network = restorer("swinir-light", 4).eval()
    lr = torch.rand(1, 3, 16, 16)
    assert network(lr).shape == (1, 3, 64, 64)
    torch.save(network.state_dict(), tmp_path / "swinir.pth")
    loaded = restorer("file", 4, tmp_path / "swinir.pth").eval()
    torch.testing.assert_close(loaded(lr), network(lr))
    assert all(p.requires_grad for p in loaded.parameters())
    with pytest.raises(ValueError, match="scale 2"):
        restorer("file", 2, tmp_path / "swinir.pth")


def test_without_imagenet_weights_it_says_so(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise URLError("no route")

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", refuse)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)
    with caplog.at_level(logging.WARNING):
        network = recogniser("paper", "classification", 7)
    assert "starts from scratch" in caplog.text
    assert network(torch.rand(1, 3, 64, 64)).shape == (1, 7)


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


# what the methods do


def trainer_and_batch(tmp_path: Path, prepared: dict[str, Path], method: str, progress: float) -> tuple[Trainer, Any]:
    judge = prepared["classification"]
    other = tmp_path / "other"
    Trainer(replace(TINY, out=other, method="oracle", seed=7)).run()
    names = {"fixed_hr": judge, "judge": other, "foreign": other}
    trainer = Trainer(replace(TINY, out=tmp_path / method, method=method, **names))  # type: ignore[arg-type]
    pictures, targets = next(trainer.read(0, 1))
    return trainer, replace(trainer.batch(pictures, targets, 0, 4), progress=progress)


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
    method: str, progress: float, expected: set[str], tmp_path: Path, prepared: dict[str, Path]
) -> None:
    trainer, batch = trainer_and_batch(tmp_path, prepared, method, progress)
    restored = trainer.s(batch.lr)
    trainer.h.eval()
    seen_by = {"fixed_task": trainer.judges.fixed_hr, "fixed_foreign": trainer.judges.judge}.get(method, trainer.h)
    assert seen_by is not None
    wanted = {
        "pixel": (restored - batch.hr).abs().mean(),
        "tdp": l1(seen_by, restored, batch.hr),
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
def test_one_loss_for_both(method: str, tmp_path: Path, prepared: dict[str, Path]) -> None:
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


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.recogniser_inputs])
def test_the_recogniser_reads_the_pictures_of_its_method(
    method: str, separate: bool, tmp_path: Path, prepared: dict[str, Path], monkeypatch: pytest.MonkeyPatch
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
    coins = [torch.Generator().set_state(generator.get_state()) for generator in batch.coins]
    wanted = {
        "hr": batch.hr,
        "sr": restored,
        "bilinear": F.interpolate(batch.lr, scale_factor=4.0, mode="bilinear"),
    }
    expected = [
        mix(restored, batch.hr, generator=coins.pop(0)) if name == "mix" else wanted[name]
        for name in METHODS[method].recogniser_inputs
    ]
    read: list[tuple[Tensor, Tensor]] = []
    loss = Recognition.loss

    def note(self: Recognition, network: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        assert network is trainer.h
        read.append((images, targets))
        return loss(self, network, images, targets)

    monkeypatch.setattr(Recognition, "loss", note)
    objective = trainer._joint_terms if together else lambda b: {"task": trainer._recogniser_loss(b)["task"]}
    value = objective(batch)["task"]
    assert len(read) == (len(expected) if separate else 1)
    torch.testing.assert_close(torch.cat([images for images, _ in read]), torch.cat(expected))
    assert torch.equal(torch.cat([targets for _, targets in read]), batch.targets.repeat(len(expected)))
    if not separate and not together:
        assert not read[0][0].requires_grad
        torch.testing.assert_close(value, task_loss(trainer, torch.cat(expected), batch.targets.repeat(len(expected))))


def test_learning_rates_follow_their_cosines(tmp_path: Path, prepared: dict[str, Path]) -> None:
    judge = prepared["classification"]
    changes: dict[str, Any] = {"steps": 8, "restart": 0.5, "h_warm_up": 2, "fixed_hr": judge, "judge": judge}
    trainer = Trainer(replace(TINY, out=tmp_path / "run", **changes))
    seen: dict[str, list[float]] = {"restorer": [], "recogniser": []}
    (stage,) = trainer.stages
    for step, (pictures, targets) in enumerate(trainer.read(0, 8)):
        for phase in stage.alternation.phases:  # type: ignore[attr-defined]
            seen[phase.name].append(phase.optimizers[0].param_groups[0]["lr"])
        stage.alternation.step(trainer.batch(pictures, targets, step, 8))
    cosine = [0.5 * (1 + math.cos(math.pi * k / 4)) for k in (0, 1, 2, 3)] * 2
    assert seen["restorer"] == pytest.approx([1e-3 * value for value in cosine])
    rise = [0.5, 1, 1, 1, 1, 1, 1, 1]
    assert seen["recogniser"] == pytest.approx([2e-3 * a * b for a, b in zip(cosine, rise, strict=True)])


def test_the_figures_are_what_they_are_called(tmp_path: Path, prepared: dict[str, Path]) -> None:
    trainer, _ = trainer_and_batch(tmp_path, prepared, "sr4ir", 0.5)
    with torch.no_grad():  # so that no two readers agree
        trainer.h.fc.weight.normal_(generator=torch.Generator().manual_seed(5))
    figures, samples = trainer.evaluate()
    data = trainer.test_data
    hr = torch.stack([data[k][0] for k in range(len(data))])  # type: ignore[index]
    labels = torch.stack([data[k][1] for k in range(len(data))])  # type: ignore[index]
    lr = low_resolution(hr, 4)
    networks = [trainer.s, trainer.h, trainer.judges.fixed_hr, trainer.judges.judge]
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
        ({"start": "hr", "h_weights": Path("nowhere")}, "no such file"),
        ({"s_weights": Path("nowhere")}, "no such file"),
        ({"s_weights": "another scale"}, "should hold the weights of this EDSR"),
        ({"restorer": "file", "s_weights": "broken"}, "should be a whole file of torch.save"),
        ({"recogniser": "timm/nosuch"}, "model of timm"),
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
    tmp_path: Path, prepared: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path / "first", prepared, method="pretrain", steps=1)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("older ones do not read safetensors")

    monkeypatch.setattr(torch, "load", refuse)
    trainer = Trainer(replace(TINY, out=tmp_path / "second", method="pretrain", s_weights=tmp_path / "first"))
    assert equal(weights(tmp_path / "first"), trainer.s.state_dict())


def test_networks_of_timm_are_shown_what_they_were_trained_on() -> None:
    network = recogniser("timm/vit_tiny_patch16_224", "classification", 3, pretrained=False)
    shown: list[Tensor] = []
    network.register_forward_pre_hook(lambda m, i: shown.append(i[0]))
    Recognition("classification", "abc").predict(network.eval(), torch.full((1, 3, 224, 224), 0.5))
    assert shown[0].abs().max() < 1e-6
    features_of(network, ["blocks.0"])(torch.full((1, 3, 224, 224), 0.5))
    assert shown[1].abs().max() < 1e-6
