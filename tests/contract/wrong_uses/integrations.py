"""Wrong uses of what other frameworks import."""

import tempfile
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from restoreloss import GradientOrthogonality, ParameterImportance
from restoreloss.integrations import accelerate, basicsr, lightning, neosr, options, torchjd, trainner
from restoreloss.integrations.basicsr_model import read_labels
from restoreloss.integrations.drop_in import Framework
from restoreloss.integrations.task_networks import normalization, task_network
from tests.contract.wrong_uses.regularizers import measured, two
from tests.contract.wrong_uses.table import wrong
from tests.contract.wrong_uses.things import NOT_NUMBERS, clean, restored, restorer

L1 = {"type": "L1Loss"}


def made(**given: Any) -> Any:
    return options.criterion({"type": "DiffLoss", **given})


def task(**given: Any) -> Any:
    return options.criterion({"type": "TDPLoss", "task": "torchvision/resnet18", "weights": "random", **given})


def summed(**given: Any) -> Any:
    return options.criterion({"type": "WeightedSum", **given})


def labels(text: str) -> Any:
    path = Path(tempfile.mkdtemp()) / "labels.txt"
    path.write_text(text)
    return read_labels(path)


def file(text: str = "none", name: str = "weights.pth") -> Path:
    path = Path(tempfile.mkdtemp()) / name
    path.write_text(text)
    return path


def weights_of(network: nn.Module) -> Path:
    path = Path(tempfile.mkdtemp()) / "weights.pth"
    torch.save(network.state_dict(), path)
    return path


class Accelerator:
    """Looks like one."""

    def prepare(self, *objects: Any) -> Any:
        return objects


def accelerator() -> Any:
    from accelerate import Accelerator as Real

    return Real(cpu=True)


def aggregated(losses: Any = None, parameters: Any = None, aggregator: Any = None, **given: Any) -> Any:
    network = two()
    found = {"a": network(clean()).square().mean(), "b": network(clean()).mean()} if losses is None else losses
    return torchjd.aggregate(
        found, network.parameters() if parameters is None else parameters,
        torchjd.Projection() if aggregator is None else aggregator, **given,
    )  # fmt: skip


def projected(**given: Any) -> Any:
    network = two()
    whole: dict[str, Any] = {
        "accelerator": accelerator(), "orthogonality": GradientOrthogonality(network.parameters()), "network": network,
        "generation": lambda: network(clean()).square().mean(), "reconstruction": lambda: network(clean()).mean(), **given,
    }  # fmt: skip
    return accelerate.project(**whole)


class Logged:
    def log_dict(self, values: Any, **options: Any) -> None:
        pass


class Registry(dict[str, Any]):
    def register(self, one: type) -> None:
        self[one.__name__] = one


class Other:
    pass


WRONG = [
    # --- options files
    *(wrong("options.criterion", k, partial(options.criterion, v), "objective") for k, v in {"None": None, "text": "DiffLoss", "a list": [L1], "without a type": {"loss_weight": 1.0}, "a loss": nn.L1Loss(), "nothing": {}}.items()),
    *(wrong("options.criterion", f"type={v!r}", partial(lambda v: options.criterion({"type": v}), v), "`type`") for v in ("DifLoss", None, 3, nn.L1Loss, "l1", "CrossEntropyLoss", ["L1Loss"])),
    wrong("options.criterion", "a misspelled option", lambda: made(timestep=[1, 2]), "'timestep'", "timesteps"),
    wrong("options.criterion", "an unknown option", lambda: made(zzz=1), "'zzz'", "prior"),
    wrong("options.criterion", "TDPLoss without a task", lambda: options.criterion({"type": "TDPLoss"}), "task", "weights"),
    *(wrong("options.DiffLoss", f"loss_weight={k}", partial(made, loss_weight=v), "`loss_weight`") for k, v in NOT_NUMBERS.items() if k != "-1"),
    *(wrong("options.DiffLoss", f"noise_weight={k}", partial(made, noise_weight=v), "`noise_weight`") for k, v in NOT_NUMBERS.items()),
    *(wrong("options.DiffLoss", f"h_space_weight={k}", partial(made, h_space_weight=v), "`h_space_weight`") for k, v in NOT_NUMBERS.items()),
    *(wrong("options.DiffLoss", f"{o}={v!r}", partial(made, **{o: v}), f"`{o}`") for o, vs in {"prior": (None, 3, ["small"], "/nowhere/x.pth"), "timesteps": ("100,600", 5, [1], [5, 1], ["1", "2"], [0.1, 0.5], [0, 5000]), "distance": ("L1", None, 2), "size": ("crop", 64), "compare": ("x0",), "snr_power": ("0.5", None), "crop": ("0.5", 0, 1.5, True), "subset": ("0.5", 0), "every": ("2", 0, 1.5, None), "dtype": ("half16", 16, "int8"), "checkpointing": ("false", 1, None), "input_range": ("0,1", [0], [1, 0], [0, "255"]), "local_files_only": ("yes",), "grouped_heads": ("no",), "head_channels": ("64", 0)}.items() for v in vs if (o, v) != ("prior", "/nowhere/x.pth")),
    wrong("options.DiffLoss", "a prior that is no file", lambda: made(prior="/nowhere/x.pth"), "/nowhere/x.pth", by=FileNotFoundError),
    *(wrong("options.TDPLoss", f"{o}={v!r}", partial(task, **{o: v}), f"`{o}`") for o, vs in {"task": ("resnet18", "torchvision/resnet", "keras/resnet18", None, 3, ""), "weights": (None, 3), "num_classes": ("10", 0, 1.5), "image_size": (64, "64"), "layers": (3, ["layer9"], [1]), "normalize": ("yes", [0.5], [[0.5], [0.0]], "imagenet22k"), "distance": ("L1",), "layer_weights": ([1.0], {"layer4": "1"}, {"layer9": 1.0}), "input_range": ("0,1", [1, 0])}.items() for v in vs),
    wrong("options.TDPLoss", "missing weights", lambda: task(weights="/nowhere/w.pth"), "`weights`", by=FileNotFoundError),
    wrong("options.TDPLoss", "weights of another network", lambda: task(weights=str(weights_of(restorer()))), "`weights`"),
    wrong("options.TDPLoss", "a file that holds no weights", lambda: task(weights=str(file())), "weights.pth"),
    *(wrong("options.WeightedSum", f"objectives={k}", partial(summed, objectives=v), "objective") for k, v in {"None": None, "a list": [L1], "nothing": {}, "text": "l1", "a loss within": {"a": nn.L1Loss()}, "text within": {"a": "L1Loss"}, "without a type": {"a": {}}, "weights 0": {"a": {**L1, "loss_weight": 0.0}}}.items()),
    wrong("options.WeightedSum", "an unknown option within", lambda: summed(objectives={"a": {**L1, "weight": 1.0}}), "'weight'"),
    wrong("options.Pixel", "an unknown reduction", lambda: options.criterion({**L1, "reduction": "none"}), "`reduction`"),
    wrong("options.Pixel", "exchanged images within a sum", lambda: summed(objectives={"a": made()})(clean(), restored()), "type"),
    wrong("options.DiffLoss", "exchanged images", lambda: made()(clean(), restored()), "`restored`", "exchanged"),
    wrong("options.DiffLoss", "by place", lambda: options.registrable("DiffLoss")("small"), "positional", by=TypeError),
    # --- task networks
    *(wrong("task_network", f"name={v!r}", partial(task_network, v, weights="random"), "`name`") for v in ("resnet18", "keras/resnet18", "torchvision/", "torchvision/resnet", "timm/nothing", None, 3, "", Path("torchvision/resnet18"))),
    wrong("task_network", "no weights", lambda: task_network("torchvision/resnet18"), "weights", by=TypeError),
    *(wrong("task_network", f"weights={v!r}", partial(task_network, "torchvision/resnet18", weights=v), "`weights`", by=FileNotFoundError) for v in ("imagenet", "/nowhere/w.pth")),
    *(wrong("task_network", f"weights={v!r}", partial(task_network, "torchvision/resnet18", weights=v), "`weights`") for v in (None, True, 3)),
    *(wrong("task_network", f"num_classes={v!r}", partial(task_network, "torchvision/resnet18", weights="random", num_classes=v), "`num_classes`") for v in ("10", 0, -1, 1.5, True)),
    *(wrong("task_network", f"image_size={v!r}", partial(task_network, "timm/vit_tiny_patch16_224", weights="random", image_size=v), "`image_size`") for v in ("64", 0, 1.5)),
    wrong("task_network", "an image size of torchvision's", lambda: task_network("torchvision/resnet18", weights="random", image_size=64), "`image_size`"),
    wrong("task_network", "weights of another network", lambda: task_network("torchvision/resnet18", weights=weights_of(restorer())), "`weights`"),
    wrong("task_network", "a text file", lambda: task_network("torchvision/resnet18", weights=file()), "weights.pth"),
    wrong("task_network", "an empty safetensors file", lambda: task_network("torchvision/resnet18", weights=file("", "w.safetensors")), "w.safetensors"),
    wrong("task_network", "a folder without a config", lambda: task_network(f"transformers/{tempfile.mkdtemp()}", weights="random"), "`name`"),
    *(wrong("task_networks.normalization", f"{v!r}", partial(normalization, v), "`name`") for v in (None, 3, "resnet18", "keras/x")),
    # --- files and registries
    *(wrong("drop_in.Framework", f".write({k})", partial(Framework("neosr", "neosr", "neosr").write, v), "repository") for k, v in {"a missing folder": "/nowhere", "another folder": tempfile.mkdtemp(), "a file": __file__}.items()),
    wrong("drop_in.Framework", ".write(None)", lambda: Framework("neosr", "neosr", "neosr").write(None), "repository"),
    *(wrong(f"{n}.main", "a missing folder", partial(m.FRAMEWORK.main, ["/nowhere"]), "repository", by=SystemExit) for n, m in {"neosr": neosr, "trainner": trainner}.items()),
    *(wrong(f"{n}.main", "nothing", partial(m.FRAMEWORK.main, []), "repository", by=SystemExit) for n, m in {"neosr": neosr, "trainner": trainner}.items()),
    *(wrong(f"{n}.register", k, partial(m.register, v), "registry") for n, m in {"neosr": neosr, "trainner": trainner}.items() for k, v in {"None": None, "a list": [], "a mapping": {}}.items()),
    *(wrong(f"{n}.register", "a name that is taken", partial(m.register, Registry(DiffLoss=Other)), "DiffLoss") for n, m in {"neosr": neosr, "trainner": trainner}.items()),
    wrong("trainner.WeightedSum", "a negative weight", lambda: options.registrable("WeightedSum", base=trainner.ByTerm)(objectives={"a": {**L1, "loss_weight": -1.0}}), "weight of 'a'"),
    *(wrong("basicsr.register", k, partial(basicsr.register, v), "`registry`") for k, v in {"a class": nn.L1Loss, "text": "basicsr.models.losses", "a list": []}.items()),
    wrong("basicsr.register", "another module", lambda: basicsr.register(torch), "`where`"),
    wrong("basicsr.register", "a name that is taken", lambda: basicsr.register(_fork(DiffLoss=Other)), "DiffLoss"),
    *(wrong("basicsr.read_labels", k, partial(labels, v), "labels.txt") for k, v in {"nothing": "", "words": "a.png dog", "no label": "a.png", "twice": "a.png 1\na.png 2", "negative": "a.png -1", "a fraction": "a.png 1.5"}.items()),
    wrong("basicsr.read_labels", "a missing file", lambda: read_labels("/nowhere/labels.txt"), "/nowhere/labels.txt", by=FileNotFoundError),
    # --- counts and sizes
    # --- accelerate
    *(wrong("accelerate.prepare", k, partial(accelerate.prepare, v, restorer()), "`accelerator`") for k, v in {"None": None, "a network": restorer(), "one of our own": Accelerator(), "text": "cuda"}.items()),
    wrong("accelerate.prepare", "nothing", lambda: accelerate.prepare(accelerator()), "`objects`"),
    *(wrong("accelerate.register", f"parts={k}", partial(lambda v: accelerate.register(accelerator(), v), v), "`parts`") for k, v in {"None": None, "nothing": {}, "a list": [measured()], "a module": measured(), "None within": {"a": None}, "text within": {"a": "x"}, "a class within": {"a": 3}}.items()),
    *(wrong("accelerate.project", f"{o}={k}", partial(projected, **{o: v}), f"`{o}`") for o, vs in {"accelerator": {"None": None, "text": "cuda"}, "orthogonality": {"None": None, "parameters": [1]}, "network": {"None": None, "a class": nn.Conv2d}, "generation": {"a loss": clean().mean(), "None": None, "a float": lambda: 0.5, "of one": lambda batch: batch}, "reconstruction": {"a loss": clean().mean(), "None": lambda: None, "an image": lambda: clean().requires_grad_(), "no graph": lambda: clean().mean()}, "weight": {"text": "1", "negative": -1.0}, "policy": {"unknown": "always"}, "others": {"a network": restorer()}}.items() for k, v in vs.items()),
    # --- Lightning
    *(wrong("lightning.ImportanceCallback", k, partial(lightning.ImportanceCallback, v), "`importance`") for k, v in {"None": None, "a network": restorer(), "a class": ParameterImportance, "text": "x"}.items()),
    *(wrong("lightning.ImportanceCallback", f"name={v!r}", partial(lambda v: lightning.ImportanceCallback(measured(), name=v), v), "`name`") for v in (None, 3, "")),
    wrong("lightning.ObjectivesCallback", "by place", lambda: lightning.ObjectivesCallback(True), "positional", by=TypeError),
    wrong("lightning.ObjectivesCallback", "check_batches as text", lambda: lightning.ObjectivesCallback(check_batches="false"), "`check_batches`"),
    *(wrong("lightning.LightningAlternation", f"module={k}", partial(lambda v: lightning.LightningAlternation(v, []), v), "`module`") for k, v in {"None": None, "a network": restorer(), "a class": nn.Module}.items()),
    wrong("lightning.LightningAlternation", "automatic optimization", lambda: lightning.LightningAlternation(_module(), []), "automatic_optimization"),
    *(wrong("lightning.log_terms", f"terms={k}", partial(lambda v: lightning.log_terms(Logged(), v), v), "`terms`") for k, v in {"None": None, "a tensor": clean().mean(), "floats": {"a": 0.5}, "nothing": {}, "images": {"a": clean()}, "a list": [clean().mean()]}.items()),
    wrong("lightning.log_terms", "exchanged", lambda: lightning.log_terms({"a": clean().mean()}, Logged()), "`terms`"),
    wrong("lightning.log_terms", "no module", lambda: lightning.log_terms(None, {"a": clean().mean()}), "`module`"),
    wrong("lightning.log_terms", "a prefix that is no text", lambda: lightning.log_terms(Logged(), {"a": clean().mean()}, prefix=None), "`prefix`"),
    # --- TorchJD
    *(wrong("torchjd.aggregate", f"losses={k}", partial(aggregated, v), "`losses`") for k, v in {"a list": [clean().mean()], "nothing": {}, "a loss": clean().mean(), "floats": {"a": 0.5}, "no graph": {"a": clean().mean()}, "images": {"a": clean().requires_grad_()}}.items()),
    *(wrong("torchjd.aggregate", f"parameters={k}", partial(aggregated, None, v), "`parameters`") for k, v in {"a network": restorer(), "nothing": [], "names": ["a"], "one": restorer().weight, "frozen": list(restorer().requires_grad_(False).parameters())}.items()),
    *(wrong("torchjd.aggregate", f"aggregator={k}", partial(aggregated, None, None, v), "`aggregator`") for k, v in {"a class": torchjd.Projection, "text": "UPGrad", "a module": restorer()}.items()),
    *(wrong("torchjd.aggregate", f"own={k}", partial(aggregated, own=v), "own") for k, v in {"a list": [1], "an unknown loss": {"c": restorer().parameters()}, "a network": {"a": restorer()}, "names": {"a": ["x"]}}.items()),
    wrong("torchjd.aggregate", "parameters of another network", lambda: aggregated(None, restorer().parameters()), "`losses['a']`", "parameters"),
    *(wrong("torchjd.Projection", f"policy={v!r}", partial(torchjd.Projection, policy=v), "`policy`") for v in ("always", None, ["full"])),
    *(wrong("torchjd.Projection", f"weight={k}", partial(torchjd.Projection, weight=v), "`weight`") for k, v in NOT_NUMBERS.items()),
    wrong("torchjd.Projection", "three rows", lambda: torchjd.Projection()(torch.rand(3, 5)), "`matrix`"),
    wrong("torchjd.ProjectionWeighting", "a Gramian of three", lambda: torchjd.ProjectionWeighting()(torch.rand(3, 3)), "two rows"),
    *(wrong("torchjd.ProjectionWeighting", f"weight={k}", partial(torchjd.ProjectionWeighting, weight=v), "`weight`") for k, v in NOT_NUMBERS.items()),
]  # fmt: skip


def _fork(**names: Any) -> ModuleType:
    module = ModuleType("basicsr.models.losses")
    vars(module).update({"L1Loss": nn.L1Loss, **names})
    return module


def _module() -> Any:
    from lightning.pytorch import LightningModule

    return LightningModule()


# wrong uses that are not told yet
