"""A real BasicSR: wrong options, import and registration."""

import copy
import inspect
import sys
from types import ModuleType

import pytest
import torch

import restoreloss
from restoreloss.integrations import basicsr_model, options
from restoreloss.integrations.basicsr import load_resume_state, register
from restoreloss.integrations.basicsr_model import read_labels
from tests.helpers.basicsr import PAGE, batch, build, iterate, needs_basicsr, run, with_reader, write_importance
from tests.integrations.frameworks import REGISTRY

SHIM = "torchvision.transforms.functional_tensor"


def test_the_importance_has_the_defaults_of_the_library():
    known = inspect.signature(restoreloss.ParameterImportance).parameters
    found = basicsr_model.ImportanceOptions(path="importance.pth")
    for name in ("estimator", "strength", "normalize", "layer_weights"):
        assert getattr(found, name) == known[name].default, name


# --- options that are wrong


def changed(**values):
    """A change to the options: train's keys by name, those of the rest as `top_`, a nested one as "a__b"."""

    def change(opt):
        for name, value in values.items():
            place = opt if name.startswith("top_") else opt["train"]
            *path, last = name.removeprefix("top_").split("__")
            for key in path:
                place = place[key]
            if value is None:
                del place[last]
            else:
                place[last] = value

    return change


WRONG = {
    "slot of pixel_opt": (
        changed(pixel_opt={"type": "PerceptualDiffLoss"}), "`type` of `pixel_opt` should be 'DiffLoss', found 'Percep"
    ),
    "slot of perceptual_opt": (
        changed(perceptual_opt={"type": "DiffLoss"}),
        "`type` of `perceptual_opt` should be 'PerceptualDiffLoss', found 'DiffLoss'",
    ),
    "opt": (
        changed(percetual_opt={"type": "DiffLoss"}), "no option 'percetual_opt'; did you mean 'perceptual_opt'"
    ),
    "task": (changed(task_opt__tpd_weight=1.0), "`task_opt` has no option 'tpd_weight'; did you mean 'tdp_weight'"),
    "text": (changed(task_opt__tdp_weight="1e-3"), "`tdp_weight` of `task_opt` .* a number, found the text '1e-3'"),
    "text of an optimizer": (changed(optim_t__lr="1e-2"), "`lr` of `optim_t` .* a number, found the text '1e-2'"),
    "option of an optimizer": (changed(optim_t__momentun=0.9), "`optim_t` .* 'momentun'; did you mean 'momentum'"),
    "no labels": (changed(task_opt={"p": 0.5}), r"`task_opt` should be given \['labels'\]"),
    "labels": (changed(task_opt={"labels": "absent.txt"}), "`labels` should be a text file, found none at absent.txt"),
    "no mapping": (changed(task_opt="labels.txt"), "`task_opt` should be a mapping of options, found 'labels.txt'"),
    "grid": (changed(task_opt__grid=[4]), "`grid` should be"),
    "one number for a grid": (changed(task_opt__grid=4), "`grid` should be"),
    "layer": (changed(task_opt__layers=["layer5"]), "layer5"),
    "network": (
        changed(top_network_t__weight="random"), "`network_t` has no option 'weight'; did you mean 'weights'"
    ),
    "no weights": (changed(top_network_t__weights=None), r"`network_t` should be given \['weights'\]"),
    "no optimizer": (changed(optim_t=None), r"`network_t`, `task_opt`, `optim_t` should be given .* no \['optim_t'\]"),
    "no network": (changed(top_network_t=None), r"should be given together, found no \['network_t'\]"),
    "optimizer": (changed(optim_t__type="Lion3"), "`type` of `optim_t` should be .*, found 'Lion3'"),
    "no importance": (changed(importance_opt={"path": "absent.pth"}), "`path` of `importance_opt` should be a file, "),
    "importance": (
        changed(importance_opt={"path": "absent.pth", "strenght": 1.0}), "no option 'strenght'; did you mean 'strength'"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_options_are_named_when_the_model_is_built(name, opt):
    change, message = WRONG[name]
    opt = with_reader(opt)
    build(copy.deepcopy(opt))  # as it is, it is right
    change(opt)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        build(opt)


def test_unknown_option_of_a_loss_is_named(opt):
    opt["train"]["pixel_opt"] = {"type": "DiffLoss", "timestep": [100, 600]}
    with pytest.raises(ValueError, match="no option 'timestep'; did you mean 'timesteps'"):
        build(opt)


def test_plain_model_fails_at_the_wrong_slot_as_the_docs_say(opt):
    for key, name in (("pixel_opt", "PerceptualDiffLoss"), ("perceptual_opt", "DiffLoss")):
        plain = build(opt | {"model_type": "SRModel", "train": opt["train"] | {key: {"type": name}}})
        with pytest.raises(TypeError) as error:
            iterate(plain, [1])
        assert str(error.value) in PAGE.replace("\n", " ")


def test_importance_of_another_network_is_refused(opt, tmp_path):
    write_importance(torch.nn.Conv2d(3, 3, 1), tmp_path / "importance.pth")
    opt["train"]["importance_opt"] = {"path": str(tmp_path / "importance.pth")}
    with pytest.raises(ValueError, match="was it another network"):
        build(opt)


def test_batches_without_a_label_are_named(opt):
    model = build(with_reader(opt))
    model.feed_data(batch() | {"gt_path": ["/data/gt/a.png", "/data/gt/z.png"]})
    with pytest.raises(ValueError, match=r"`labels` should have a line for each clean image, found none for 'z\.png'"):
        model.optimize_parameters(1)
    model.feed_data({name: batch()[name] for name in ("lq", "gt")})
    with pytest.raises(ValueError, match="`gt_path`"):
        model.optimize_parameters(1)


def test_label_beyond_the_classes_is_named(opt):
    opt = with_reader(opt)
    opt["network_t"]["num_classes"] = 3
    model = build(opt)
    model.feed_data(batch())
    with pytest.raises(ValueError, match=r"`network_t` should give .* \(N, 4 or more\), found of shape \(6, 3\)"):
        model.optimize_parameters(1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.png\n", r"found 'a\.png' in line 1"), ("a.png 1\n\nb.png x\n", "in line 3"), ("a.png -1", "in line 1"),
        ("a.png 1\na.png 2\n", "in line 2"), ("\n", "at least one line"),
    ],
)  # fmt: skip
def test_labels_that_cannot_be_read_are_named(text, message, tmp_path):
    path = tmp_path / "labels.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_labels(path)


def test_labels_are_read_by_names_that_may_have_folders_and_spaces(tmp_path):
    path = tmp_path / "labels.txt"
    path.write_text("birds/0 1.png 7\n\n 0002.png\t0 \n")
    assert read_labels(path) == {"birds/0 1.png": 7, "0002.png": 0}


# --- import and registration


@needs_basicsr
def test_registration_twice_is_once_and_a_taken_name_is_told(monkeypatch):
    register()
    from basicsr.utils.registry import LOSS_REGISTRY, MODEL_REGISTRY

    before = [*LOSS_REGISTRY], [*MODEL_REGISTRY]
    register()
    assert ([*LOSS_REGISTRY], [*MODEL_REGISTRY]) == before
    assert {"DiffLoss", "PerceptualDiffLoss", "WeightedSum", "PerceptualTDPLoss"} <= set(LOSS_REGISTRY.keys())
    for registry, name in ((LOSS_REGISTRY, "DiffLoss"), (MODEL_REGISTRY, "RestorelossModel")):
        with monkeypatch.context() as patch:
            patch.setitem(registry._obj_map, name, torch.nn.MSELoss)
            with pytest.raises(ValueError, match=f"The name '{name}' should be free, found .*MSELoss"):
                register()


@needs_basicsr
def test_losses_return_what_their_slots_take():
    register()
    from basicsr.losses import build_loss

    restored, target = torch.rand(1, 3, 16, 16), torch.rand(1, 3, 16, 16)
    given = {"task": "timm/test_resnet", "weights": "random", "loss_weight": 0.5}
    pixel, perceptual = build_loss({"type": "TDPLoss"} | given), build_loss({"type": "PerceptualTDPLoss"} | given)
    assert pixel(restored, target).shape == ()
    value, style = perceptual(restored, target)
    assert value.shape == () and style is None
    assert isinstance(perceptual, options.Criterion)
    unweighted = restoreloss.TDPLoss(pixel.objective.task.network, normalize="model")(restored, target)
    torch.testing.assert_close(pixel(restored, target), 0.5 * unweighted)


@needs_basicsr
def test_removed_module_is_replaced_only_when_asked_and_only_if_missing(tmp_path):
    code = f"""
import sys, torch
import restoreloss.integrations.basicsr as integration
print({SHIM!r} in sys.modules, "basicsr" in sys.modules)
integration.import_basicsr()
image = torch.rand(1, 3, 4, 4)
import torchvision.transforms.functional as F
from tests.helpers.processes import ROOT
print(torch.equal(sys.modules[{SHIM!r}].rgb_to_grayscale(image), F.rgb_to_grayscale(image)))
kept = sys.modules[{SHIM!r}]
print(integration.import_basicsr().__version__[:4], sys.modules[{SHIM!r}] is kept)
"""
    code, output = run(tmp_path, ["-c", code])
    assert (code, output.splitlines()[-3:]) == (0, ["False False", "True", "1.4. True"]), output


def test_absent_basicsr_is_told_with_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, SHIM, ModuleType(SHIM))
    monkeypatch.delitem(sys.modules, "basicsr", raising=False)

    class Absent:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name == "basicsr":
                raise ModuleNotFoundError("No module named 'basicsr'", name="basicsr")

    monkeypatch.setattr(sys, "meta_path", [Absent, *sys.meta_path])
    with pytest.raises(ImportError, match="not installed: pip install --no-build-isolation basicsr, of the version"):
        register()


def vendored(monkeypatch, files):
    """A `basicsr` without a version, as forks carry it, in the place of an installed one."""
    monkeypatch.setitem(sys.modules, SHIM, ModuleType(SHIM))
    for name in [name for name in sys.modules if name.partition(".")[0] == "basicsr"]:
        monkeypatch.delitem(sys.modules, name)
    found = ModuleType("basicsr")
    found.__path__ = [str(files)]
    monkeypatch.setitem(sys.modules, "basicsr", found)


def write(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
        (folder / name).with_name("__init__.py").touch()


def test_a_fork_with_a_registry_and_no_version_is_given_our_losses(monkeypatch, tmp_path):
    write(tmp_path, {"utils/registry.py": REGISTRY.replace("NAME_OF_STRING", "name").replace("NAME", "cls.__name__")})
    vendored(monkeypatch, tmp_path)
    register()
    registry = sys.modules["basicsr.utils.registry"].LOSS_REGISTRY
    assert {"DiffLoss", "PerceptualDiffLoss", "HLFLoss", "WeightedSum"} <= set(registry.found)
    before = dict(registry.found)
    register()
    assert registry.found == before


def test_a_fork_with_a_module_of_losses_is_given_ours_as_attributes(monkeypatch, tmp_path):
    write(tmp_path, {"utils/misc.py": "", "models/losses/losses.py": ""})
    (tmp_path / "models/losses/__init__.py").write_text("from torch.nn import L1Loss\n")
    vendored(monkeypatch, tmp_path)
    register()
    losses = sys.modules["basicsr.models.losses"]
    assert losses.PerceptualTDPLoss and losses.WeightedSum


def test_a_fork_with_neither_is_told(monkeypatch, tmp_path):
    vendored(monkeypatch, tmp_path)
    with pytest.raises(ValueError, match="`basicsr` should have a registry of losses .* or a module of them"):
        register()


@needs_basicsr
def test_latest_state_is_resumed_by_number(tmp_path):
    register()
    for number in (5, 999, 1000):
        torch.save({"iter": number}, tmp_path / f"{number}.state")
    (tmp_path / "1001.tmp").write_bytes(b"a save that was interrupted")
    opt = {"path": {"training_states": str(tmp_path), "models": "models"}, "auto_resume": True, "network_g": {}}
    assert load_resume_state(opt) == {"iter": 1000}
    assert opt["path"]["pretrain_network_g"] == "models/net_g_1000.pth"
    opt |= {"auto_resume": False}
    opt["path"]["resume_state"] = str(tmp_path / "5.state")
    assert load_resume_state(opt) == {"iter": 5}
    opt["path"]["resume_state"] = None
    assert load_resume_state(opt) is None
    opt = {"path": {"training_states": str(tmp_path / "none")}, "auto_resume": True}
    assert load_resume_state(opt) is None


def test_page_names_every_option():
    for given in (basicsr_model.TaskOptions, basicsr_model.ImportanceOptions):
        for name in given.__dataclass_fields__:
            assert f"`{name}`" in PAGE or f"_opt: {name}`" in PAGE, name
