"""Wrong uses of phases, of what freezes, and of what measures a loss."""

import dataclasses
from functools import partial
from typing import Any

import torch
from torch import nn

from restoreloss import (
    Alternation,
    AuditReport,
    DiffLoss,
    Phase,
    TermAudit,
    TimestepAudit,
    TimestepReport,
    WeightedSum,
    audit,
    audit_timesteps,
    calibrate,
    frozen,
)
from tests.contract.wrong_uses.table import wrong
from tests.contract.wrong_uses.things import NOT_IMAGES, NOT_TENSORS, NOT_WHOLE, clean, restored, restorer, unet


def phase(**changes: Any) -> Phase[Any]:
    network = restorer()
    given: dict[str, Any] = {
        "name": "fit", "trains": [network], "objective": lambda batch: network(batch).square().mean(),
        "optimizers": torch.optim.SGD(network.parameters(), lr=0.1), **changes,
    }  # fmt: skip
    return Phase(**{k: v(network) if getattr(v, "__name__", "") == "of" else v for k, v in given.items()})


def of(function: Any) -> Any:
    """What depends on the network of the phase."""

    def of(network: nn.Module) -> Any:
        return function(network)

    return of


def training(**changes: Any) -> Alternation[Any]:
    return Alternation([phase(**changes)])


def step(**changes: Any) -> Any:
    return training(**changes).step(clean())


PAIR: dict[str, Any] = {"pixel": nn.L1Loss(), "other": nn.MSELoss()}


def audited(objectives: Any = None, **options: Any) -> AuditReport:
    return audit(PAIR if objectives is None else objectives, restored(), clean(), **options)


def diff_loss() -> DiffLoss:
    return DiffLoss(lambda x, t: x, h_space_weight=0)


def calibrated(**options: Any) -> Any:
    return calibrate(PAIR, restored(), clean(), **{"shares": {"other": 0.5}, **options})


def weighing_nothing() -> WeightedSum:
    total = WeightedSum({"pixel": nn.L1Loss()})
    total.weights["pixel"] = 0.0  # type: ignore[index]
    return total


WRONG = [
    *(wrong("Phase", f"trains={k}", partial(phase, trains=v), "`trains`") for k, v in {"a network": restorer(), "None": None, "text": "restorer", "parameters": restorer().parameters(), "a class": [nn.Conv2d], "names": ["restorer"], "a function": [lambda x: x], "an optimizer": [torch.optim.SGD(restorer().parameters(), lr=0.1)]}.items()),
    *(wrong("Phase", f"objective={k}", partial(phase, objective=v), "`objective`") for k, v in {"None": None, "a loss": nn.L1Loss(), "a class": nn.L1Loss, "text": "l1", "of two": lambda a, b: a, "of none": lambda: 1, "a value": clean().mean(), "a mapping": {"pixel": nn.L1Loss()}}.items()),
    *(wrong("Phase", f"optimizers={k}", partial(phase, optimizers=v), "`optimizers`") for k, v in {"None": None, "a class": torch.optim.Adam, "text": "adam", "parameters": list(restorer().parameters()), "nothing": [], "a mapping": {"lr": 0.1}, "a scheduler": torch.optim.lr_scheduler.ConstantLR(torch.optim.SGD(restorer().parameters(), lr=0.1)), "LBFGS": torch.optim.LBFGS(restorer().parameters())}.items() if k not in ("nothing", "None")),
    *(wrong("Alternation", f"optimizers={k}", partial(training, optimizers=v), "`optimizers`") for k, v in {"None": None, "nothing": [], "of another network": torch.optim.SGD(restorer().parameters(), lr=0.1)}.items()),
    wrong("Alternation", "an optimizer of a part", lambda: training(optimizers=of(lambda n: torch.optim.SGD([n.weight], lr=0.1))), "`optimizers`"),
    *(wrong("Phase", f"schedulers={k}", partial(phase, schedulers=v), "`schedulers`") for k, v in {"a class": torch.optim.lr_scheduler.StepLR, "text": "cosine", "an optimizer": torch.optim.SGD(restorer().parameters(), lr=0.1), "numbers": [0.1], "a plateau": torch.optim.lr_scheduler.ReduceLROnPlateau(torch.optim.SGD(restorer().parameters(), lr=0.1))}.items()),
    *(wrong("Phase", f"frozen={k}", partial(phase, frozen=v), "`frozen`") for k, v in {"a network": restorer(), "None": None, "text": "task", "names": ["task"], "True": True, "a class": [nn.Conv2d]}.items()),
    *(wrong("Phase", f"modes={k}", partial(phase, modes=v), "`modes`") for k, v in {"a list": [restorer()], "text": "train", "names": {"restorer": "train"}, "None": None}.items()),
    *(wrong("Phase", f"max_norm={v!r}", partial(phase, max_norm=v), "`max_norm`") for v in (0, -1.0, "1.0", float("nan"), True, [1.0])),
    *(wrong("Phase", f"name={v!r}", partial(phase, name=v), "`name`") for v in (None, 3, "", restorer())),
    wrong("Phase", "an unknown option", lambda: phase(clip=1.0), "clip", by=TypeError),
    wrong("Phase", "nothing", lambda: Phase(), "name", by=TypeError),
    *(wrong("Alternation", f"phases={k}", partial(Alternation, v), "`phases`") for k, v in {"None": None, "nothing": [], "one phase": phase(), "a class": [Phase], "a mapping": {"fit": phase()}, "networks": [restorer()], "a name twice": [phase(), phase()], "text": "fit", "a generator": (p for p in [phase()])}.items()),
    *(wrong("Alternation", f"precision={v!r}", partial(lambda v: Alternation([phase()], precision=v), v), "`precision`") for v in ("bf16", torch.int8, 16, True, float)),
    *(wrong("Alternation", f"scaler={k}", partial(lambda v: Alternation([phase()], scaler=v), v), "`scaler`") for k, v in {"True": True, "a number": 1024.0, "a class": torch.amp.GradScaler, "text": "fp16"}.items()),
    *(wrong("Alternation", f"accelerator={k}", partial(lambda v: Alternation([phase()], accelerator=v), v), "`accelerator`") for k, v in {"text": "cuda", "True": True, "a device": torch.device("cpu")}.items()),
    wrong("Alternation", "an unknown on_non_finite", lambda: Alternation([phase()], on_non_finite="skip"), "`on_non_finite`"),
    wrong("Alternation", "no network", lambda: training(trains=[]), "`trains`"),
    wrong("Alternation", "trained and frozen", lambda: training(frozen=of(lambda n: [n])), "`frozen`"),
    wrong("Alternation", "an unknown mode", lambda: training(modes=of(lambda n: {n: "test"})), "`modes`"),
    wrong("Alternation", "a bool for a mode", lambda: training(modes=of(lambda n: {n: True})), "`modes`"),
    wrong("Alternation", ".step without a batch", lambda: training().step(), "`micro_batches`"),
    wrong("Alternation", ".step of two tensors", lambda: training().step(clean(), clean()), "accumulate"),
    wrong("Alternation", ".step of a tensor and labels", lambda: training().step(clean(), [1, 2]), "micro_batches"),
    wrong("Alternation", ".step of a mapping and a tensor", lambda: training().step({"a": clean()}, clean()), "micro_batches"),
    *(wrong("Alternation", f".step of an objective that returns {k}", partial(lambda v: step(objective=of(v)), v), "objective", "fit") for k, v in {"a float": lambda n: lambda b: 0.5, "None": lambda n: lambda b: None, "an image": lambda n: lambda b: n(b), "nothing": lambda n: lambda b: {}, "floats": lambda n: lambda b: {"a": 0.5}, "a tuple": lambda n: lambda b: (n(b).mean(), n(b).mean()), "no graph": lambda n: lambda b: b.mean(), "(N,)": lambda n: lambda b: n(b).mean(dim=(1, 2, 3)), "grad_norm": lambda n: lambda b: {"grad_norm": n(b).mean()}, "(1,)": lambda n: lambda b: n(b).mean().view(1), "images by name": lambda n: lambda b: {"a": n(b)}}.items()),
    *(wrong("Alternation", f".step of {k}", partial(lambda v: step(objective=of(v)), v), "fit", by=FloatingPointError) for k, v in {"NaN": lambda n: lambda b: n(b).mean() * float("nan"), "infinity": lambda n: lambda b: {"bad": n(b).mean() * float("inf")}, "a gradient of NaN": lambda n: lambda b: (n(b) * 0).sqrt().mean()}.items()),
    *(wrong("Alternation", f".load_state_dict({k})", partial(lambda v: training().load_state_dict(v), v), "`state`") for k, v in {"of other phases": training(name="other").state_dict(), "nothing": {}, "None": None, "an optimizer's": torch.optim.SGD(restorer().parameters(), lr=0.1).state_dict(), "text": "state.pt", "a list": []}.items()),
    # --- frozen
    *(wrong("frozen", k, partial(lambda v: frozen(v).__enter__(), v), "`networks`") for k, v in {"None": None, "a list": [restorer()], "a class": nn.Conv2d, "text": "restorer", "parameters": restorer().parameters(), "an image": clean()}.items()),
    # --- audit
    *(wrong("audit", f"objectives={k}", partial(lambda v: audit(v, restored(), clean()), v), "`objectives") for k, v in {"None": None, "nothing": {}, "a list": [nn.L1Loss()], "a class": nn.L1Loss, "a class within": {"a": nn.L1Loss}, "text": "l1", "None within": {"a": None}, "a number": {"a": 0.5}, "weights 0": weighing_nothing(), "an image": clean()}.items()),
    wrong("audit", "images first", lambda: audit(restored(), clean(), PAIR), "`objectives`"),
    wrong("audit", "exchanged images", lambda: audit(PAIR, clean(), restored()), "`restored`", "exchanged"),
    *(wrong("audit", f"{k} for restored", partial(lambda v: audit(PAIR, v, clean()), v), "`restored`") for k, v in NOT_TENSORS.items()),
    *(wrong("audit", f"{k} for target", partial(lambda v: audit(PAIR, restored(), v), v), "`target`") for k, v in NOT_TENSORS.items()),
    *(wrong("audit", f"{k} for both", partial(lambda v: audit(PAIR, v(), v()), v), "`restored`") for k, v in NOT_IMAGES.items()),
    wrong("audit", "images of two sizes", lambda: audit(PAIR, restored(), clean(size=9)), "`target`"),
    *(wrong("audit", f"draws={k}", partial(audited, draws=v), "`draws`") for k, v in NOT_WHOLE.items()),
    *(wrong("audit", f"seed={v!r}", partial(audited, seed=v), "`seed`") for v in ("0", None, 1.5, True, torch.Generator())),
    *(wrong("audit", f"{o}={v!r}", partial(audited, **{o: v}), f"`{o}`") for o in ("dominates", "opposes") for v in ("0.9", None, float("nan"), True)),
    *(wrong("audit", f"an objective that returns {k}", partial(lambda v: audited({"mine": v}), v), "mine") for k, v in {"a float": lambda a, b: 0.5, "None": lambda a, b: None, "an image": lambda a, b: a - b, "a tuple": lambda a, b: (a.mean(), b.mean()), "(N,)": lambda a, b: (a - b).mean(dim=(1, 2, 3)), "a mapping": lambda a, b: {"x": a.mean()}}.items()),
    wrong("audit", "an objective of one image", lambda: audited({"mine": lambda a: a.mean()}), "mine"),
    wrong("audit", "a prior for an objective", lambda: audited({"mine": unet()}), "size of tensor", by=RuntimeError, obscure="a U-Net takes two arguments as well, and fails on the second"),
    wrong("audit", "an unknown option", lambda: audited(flags=True), "flags", by=TypeError),
    wrong("audit_timesteps", "no DiffLoss", lambda: audit_timesteps(nn.L1Loss(), restored(), clean()), "`loss`", "L1Loss"),
    wrong("audit_timesteps", "exchanged", lambda: audit_timesteps(restored(), clean(), nn.L1Loss()), "`loss`"),
    wrong("audit_timesteps", "no timestep", lambda: audit_timesteps(diff_loss(), restored(), clean(), timesteps=[]), "`timesteps`"),
    wrong("audit_timesteps", "a timestep beyond", lambda: audit_timesteps(diff_loss(), restored(), clean(), timesteps=[1000]), "1000"),
    wrong("audit_timesteps", "no bands", lambda: audit_timesteps(diff_loss(), restored(), clean(), bands=0), "`bands`"),
    wrong("audit_timesteps", "no draws", lambda: audit_timesteps(diff_loss(), restored(), clean(), draws=0), "`draws`"),
    wrong("TimestepReport", "made of nothing", lambda: TimestepReport(), "rows", by=TypeError),
    wrong("TimestepAudit", "made of nothing", lambda: TimestepAudit(), "timestep", by=TypeError),
    wrong("AuditReport", ".flagged an unknown flag", lambda: audited().flagged("dead"), "`flag`", "DEAD"),
    wrong("AuditReport", ".flagged a list", lambda: audited().flagged(["DEAD"]), "`flag`"),
    wrong("AuditReport", "an unknown term", lambda: audited()["pixl"], "pixel", "pixl", by=KeyError),
    wrong("AuditReport", "a term by number", lambda: audited()[0], "pixel", by=KeyError),
    wrong("AuditReport", ".plot in a missing folder", lambda: audited().plot("/nowhere/plot.png"), "/nowhere", by=FileNotFoundError),
    wrong("AuditReport", ".plot of an unknown kind", lambda: audited().plot("plot.xyz"), "`path`", "png"),
    wrong("AuditReport", "made of nothing", lambda: AuditReport(), "terms", by=TypeError),
    wrong("AuditReport", "changed", lambda: setattr(audited(), "notes", ()), "notes", by=dataclasses.FrozenInstanceError),
    wrong("TermAudit", "made of nothing", lambda: TermAudit(), "name", by=TypeError),
    wrong("TermAudit", "changed", lambda: setattr(audited()["pixel"], "share", 1.0), "share", by=dataclasses.FrozenInstanceError),
    # --- calibrate
    *(wrong("calibrate", f"objectives={k}", partial(lambda v: calibrate(v, restored(), clean(), shares={"other": 0.5}), v), "`objectives") for k, v in {"None": None, "nothing": {}, "a list": [nn.L1Loss()], "one loss": nn.L1Loss(), "a class within": {"pixel": nn.L1Loss(), "other": nn.MSELoss}, "text": "l1", "an image": clean()}.items()),
    *(wrong("calibrate", f"shares={v!r}", partial(calibrated, shares=v), "shares") for v in ({}, {"othr": 0.5}, {"other": 0}, {"other": 1.0}, {"other": "0.5"}, {"other": None}, {"other": -0.5}, {"other": float("nan")}, {"other": True}, [0.5], 0.5, None, {"pixel": 0.5, "other": 0.5})),
    wrong("calibrate", "no shares", lambda: calibrate(PAIR, restored(), clean()), "shares", by=TypeError),
    wrong("calibrate", "exchanged images", lambda: calibrate(PAIR, clean(), restored(), shares={"other": 0.5}), "`restored`"),
    *(wrong("calibrate", f"{k} for restored", partial(lambda v: calibrate(PAIR, v, clean(), shares={"other": 0.5}), v), "`restored`") for k, v in NOT_TENSORS.items()),
    *(wrong("calibrate", f"draws={k}", partial(calibrated, draws=v), "`draws`") for k, v in NOT_WHOLE.items()),
    wrong("calibrate", "a dead objective", lambda: calibrate({"pixel": nn.L1Loss(), "other": torch.no_grad()(lambda a, b: (a - b).mean())}, restored(), clean(), shares={"other": 0.5}), "other", "DEAD"),
    wrong("calibrate", "a broken objective", lambda: calibrate({"pixel": nn.L1Loss(), "other": lambda a, b: a.mean() * float("nan")}, restored(), clean(), shares={"other": 0.5}), "other", "NON-FINITE"),
]  # fmt: skip
