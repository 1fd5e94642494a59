"""The reader of weight files: what it unwraps, what it refuses, and what it says."""

import argparse
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from examples.common.networks.edsr import EDSR
from examples.common.networks.restorers import restorer
from examples.common.networks.weights import load_weights
from restoreloss.weights import load_state, read_weights


def network() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


STATE = network().state_dict()
OTHER = {name: value + 1 for name, value in STATE.items()}
Form = Callable[[dict[str, Tensor]], Any]


def under(name: str) -> Form:
    return lambda state: {name: state, "epoch": 3}


FORMS: dict[str, Form] = {
    "plain": lambda state: state,
    **{name: under(name) for name in ("state_dict", "model", "model_state_dict", "params", "params_ema", "ema")},
    **{name: under(name) for name in ("network", "generator")},
    "an unknown name": lambda state: {"netG_weights": state, "step": 4},
    "nested": lambda state: {"ema": {"module": {f"module.{name}": value for name, value in state.items()}}},
    "arguments beside it": lambda state: {"model": state, "args": argparse.Namespace(lr=0.1, sizes=[1, 2])},
    "module.": lambda state: {f"module.{name}": value for name, value in state.items()},
    "_orig_mod.": lambda state: {f"_orig_mod.{name}": value for name, value in state.items()},
    "module._orig_mod.module.": lambda state: {f"module._orig_mod.module.{name}": v for name, v in state.items()},
    "a compiled part": lambda state: {name.replace("0.", "0._orig_mod.", 1): value for name, value in state.items()},
    "an optimizer beside it": lambda state: {"state_dict": state, "optimizer": {"state": {0: {"m": torch.ones(2)}}}},
    "averaged": lambda state: {"n_averaged": torch.tensor(3)} | {f"module.{name}": v for name, v in state.items()},
}


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return list(found) == list(expected) and all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("form", FORMS)
def test_the_weights_are_found_in_whatever_they_are_wrapped(form: str, tmp_path: Path) -> None:
    torch.save(FORMS[form](STATE), tmp_path / "w.pth")
    assert same(read_weights(tmp_path / "w.pth"), STATE)
    fresh = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    load_state(fresh, read_weights(tmp_path / "w.pth"), "w.pth")
    assert same(fresh.state_dict(), STATE)


def test_the_network_may_be_wrapped_too() -> None:
    compiled: Any = torch.compile
    for wrap in (compiled, nn.DataParallel, lambda net: nn.DataParallel(compiled(net))):
        wrapped: Any = wrap(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
        load_state(wrapped, STATE, "w.pth")
        assert all(torch.equal(a, b) for a, b in zip(wrapped.state_dict().values(), STATE.values(), strict=True))


@pytest.mark.parametrize(
    ("preferred", "other"), [("params_ema", "params"), ("model_ema", "model"), ("state_dict_ema", "state_dict")]
)
def test_averaged_weights_come_first_and_the_log_says_so(
    preferred: str, other: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save({other: OTHER, preferred: STATE}, tmp_path / "w.pth")
    with caplog.at_level(logging.INFO, logger="restoreloss.weights"):
        assert same(read_weights(tmp_path / "w.pth"), STATE)
    assert f"the weights under '{preferred}' are taken; it also holds {other}" in caplog.text


def test_safetensors_and_torch_are_told_apart_by_what_is_in_the_file(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "w.safetensors")
    save_file(STATE, tmp_path / "tensors.pth")
    torch.save(STATE, tmp_path / "torch.safetensors")
    torch.save(STATE, tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    for name in ("w.safetensors", "tensors.pth", "torch.safetensors", "legacy.pth"):
        found = read_weights(tmp_path / name)
        assert set(found) == set(STATE) and all(torch.equal(found[key], STATE[key]) for key in STATE)


class Code:
    def __reduce__(self) -> Any:
        return print, ("code in a pickle ran",)


def test_files_of_something_else_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "w.pth"

    def refused(message: str) -> None:
        with pytest.raises(ValueError, match=f"{file.name} should {message}"):
            read_weights(file)

    torch.save({"model": STATE, "hook": Code()}, file)
    refused("hold tensors only, found a pickle that wants .*print, which is not loaded")
    file.write_bytes(pickle.dumps(Code()))
    refused("hold tensors only")
    assert "ran" not in capsys.readouterr().out
    torch.save(network(), file)  # the whole network, not its state dict
    refused("hold tensors only, found a pickle that wants torch.nn.modules.container.Sequential")
    assert argparse.Namespace not in torch.serialization.get_safe_globals()
    for content, message in (
        (b"", "be a whole file of torch.save"),
        (b"version https://git-lfs.github.com/spec/v1\n", "be a file of weights, found a pointer of Git LFS"),
        (b"<!DOCTYPE html>", "be a file of weights, found a web page"),
        (b"no weights at all", "be a whole file of torch.save, found one that begins with b'no weigh'"),
    ):
        file.write_bytes(content)
        refused(message)
    for save, name in ((torch.save, "cut.pth"), (save_file, "cut.safetensors")):
        file = tmp_path / name
        save(STATE, file)
        file.write_bytes(file.read_bytes()[:-100])
        refused("(hold tensors only|be a whole)")
    for held, message in (
        ([1, 2], "hold a state dict, found a list"),
        ({}, "hold a state dict, found no tensors: .* has the keys none"),
        ({"epoch": 3, "lr": 0.1}, "hold a state dict, found no tensors: .* has the keys epoch, lr"),
        ({"a": STATE, "b": STATE}, "hold a state dict, found no tensors: .* has the keys a, b"),
        ({"ema": {"updates": 3}, "x": {"y": {}}}, "hold a state dict, found no tensors"),
        ({"0.a": torch.ones(1), "_orig_mod.0.a": torch.ones(1)}, "hold each weight once"),
    ):
        torch.save(held, file)
        refused(message)
    with pytest.raises(FileNotFoundError):
        read_weights(tmp_path / "none.pth")


def test_weights_that_do_not_fit_are_named() -> None:
    def refused(state: dict[str, Tensor], message: str) -> None:
        before = network()
        with pytest.raises(ValueError, match=message):
            load_state(before, state, "w.pth")
        assert same(before.state_dict(), STATE)

    refused(
        {name: value for name, value in STATE.items() if name != "1.bias"}, r"Sequential, found that it lacks 1.bias\."
    )
    refused(STATE | {"extra": torch.ones(1)}, r"found that it has besides extra\.")
    refused(STATE | {"0.bias": torch.ones(5)}, r"in another shape 0.bias \(5,\) instead of \(4,\)\.")
    refused({f"x.{name}": value for name, value in STATE.items()}, r"lacks 0.weight, .* and 3 more; has besides x.0")


# the files of other EDSRs


def by_its_authors(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names of the authors' code."""
    names: dict[str, Tensor] = {}
    for name, value in state.items():
        for ours, theirs in (
            ("tail.", "tail.1."), ("upsample.0.", "tail.0."), ("head.", "head.0."), ("after_body.", "body.4."),
            (".conv1", ".body.0"), (".conv2", ".body.2"),
        ):  # fmt: skip
            name = name.replace(ours, theirs)
        names[name] = value
    return names


def test_the_order_stands_in_for_the_names_of_another_edsr(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source, file = EDSR(2, features=8, blocks=4), tmp_path / "edsr.pth"
    torch.save({"params": by_its_authors(source.state_dict())}, file)
    load_weights(loaded := EDSR(2, features=8, blocks=4), file)
    assert same(loaded.state_dict(), source.state_dict())
    assert "read in its order" in caplog.text and "img_range=255" in caplog.text
    for other in (
        EDSR(3, features=8, blocks=4),
        EDSR(2, features=8, blocks=3),
        EDSR(2, features=8, blocks=4, light=True),
    ):
        with pytest.raises(ValueError, match="should hold the weights of this EDSR, found that it lacks head.weight"):
            load_weights(other, file)
    torch.save(by_its_authors(source.state_dict()) | {"more": torch.ones(1)}, file)
    with pytest.raises(ValueError, match="should hold the weights of this EDSR"):
        load_weights(source, file)


@pytest.mark.parametrize("multiplied", [1.0, 255.0])
def test_an_edsr_file_that_says_its_mean_gives_the_same_images(multiplied: float, tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = EDSR(2, features=8, blocks=4)
    mean = torch.tensor([0.4488, 0.4371, 0.4040])
    eye = torch.eye(3)[..., None, None]
    shift = {
        "sub_mean.weight": eye, "sub_mean.bias": -multiplied * mean, "add_mean.weight": eye,
        "add_mean.bias": multiplied * mean,
    }  # fmt: skip
    torch.save(shift | by_its_authors(source.state_dict()), tmp_path / "edsr.pt")
    load_weights(loaded := EDSR(2, features=8, blocks=4), tmp_path / "edsr.pt")
    image = torch.rand(1, 3, 40, 40)
    with torch.no_grad():
        features = source.head(multiplied * (image - mean.view(3, 1, 1)))
        features = features + source.after_body(source.body(features))
        expected = source.tail(source.upsample(features)) / multiplied + mean.view(3, 1, 1)
        found = loaded(image)
    inner = (..., slice(26, -26), slice(26, -26))  # what padding does not reach
    torch.testing.assert_close(found[inner], expected[inner], rtol=1e-4, atol=1e-5)


def test_spandrel_is_given_what_the_reader_found(tmp_path: Path) -> None:
    source, file = restorer("nafnet-small", 1), tmp_path / "w.pth"
    torch.save(
        {"model": {f"_orig_mod.{k}": v for k, v in source.state_dict().items()}, "args": argparse.Namespace()}, file
    )
    assert same(dict(restorer("file", 1, file).state_dict()), dict(source.state_dict()))
    torch.save(STATE, file)
    with pytest.raises(
        ValueError, match=r"should hold a network that spandrel knows, found one that begins with \['0.w"
    ):
        restorer("file", 1, file)
    torch.save(source.state_dict(), file)
    with pytest.raises(ValueError, match="should hold a network of scale 2"):
        restorer("file", 2, file)
