"""Wrong uses of the parts of networks."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from restoreloss import CFRM, TFA, Controller, FiLM, SCTuner, TimeConditioned, TimeMoE
from tests.contract.wrong_uses.table import wrong
from tests.contract.wrong_uses.things import ARRAY, NOT_TENSORS, NOT_WHOLE, clean, restorer

NOT_MAPS: dict[str, Any] = {
    **NOT_TENSORS, "(C, H, W)": clean(4, 8, 8), "channels last": clean(2, 8, 8, 4), "other channels": clean(2, 5, 8, 8),
    "uint8": (255 * clean(2, 4, 8, 8)).byte(), "tokens": clean(2, 64, 4),
}  # fmt: skip
COUNTS = {k: v for k, v in NOT_WHOLE.items() if k != "None"}


def cfrm(**options: Any) -> CFRM:
    return CFRM(4, **{"blocks": 0, "groups": 2, **options})


def controller(**options: Any) -> Controller:
    small = {"channels": 8, "multipliers": (1, 2), "control_channels": 8, "heads": 2, "groups": 4, "layers": 1}
    return Controller(4, **{**small, **options})


def tfa(**options: Any) -> TFA:
    return TFA((4,), 4, **{"tasks": ("people", "reader"), **options})


def conditioned(blocks: Any = None, **options: Any) -> TimeConditioned:
    return TimeConditioned(
        nn.Sequential(restorer(), restorer()), {"0": FiLM(3)} if blocks is None else blocks, **options
    )


WRONG = [
    *(wrong("CFRM", f"{o}={k}", partial(CFRM, **{"channels": 4, "blocks": 0, "groups": 2, o: v}), f"`{o}`") for o in ("channels", "groups", "expansion") for k, v in NOT_WHOLE.items()),
    *(wrong("CFRM", f"blocks={v!r}", partial(cfrm, blocks=v), "`blocks`") for v in (-1, "1", 1.5, None, nn.Conv2d, [1], True)),
    wrong("CFRM", "groups that do not divide", lambda: CFRM(4, blocks=0, groups=3), "`groups`"),
    wrong("CFRM", "an unknown option", lambda: CFRM(4, block=0), "block", by=TypeError),
    wrong("CFRM", "blocks that change the shape", lambda: cfrm(blocks=nn.Conv2d(4, 8, 1))(clean(2, 4, 8, 8)), "`blocks`"),
    wrong("CFRM", "blocks that return a float", lambda: cfrm(blocks=_Floats())(clean(2, 4, 8, 8)), "`blocks`"),
    *(wrong("CFRM", f"{k} for the features", partial(lambda v: cfrm()(v), v), "`features`") for k, v in NOT_MAPS.items()),
    *(wrong("Controller", f"{o}={k}", partial(lambda o, v: controller(**{o: v}) if o != "in_channels" else Controller(v), o, v), f"`{o}`") for o in ("in_channels", "channels", "control_channels", "layers", "heads", "groups") for k, v in NOT_WHOLE.items()),
    *(wrong("Controller", f"multipliers={v!r}", partial(controller, multipliers=v), "`multipliers`") for v in (2, [], "12", None, [0], [1.5], ["1"])),
    *(wrong("Controller", f"attention={v!r}", partial(controller, attention=v), "`attention`") for v in (True, [True], "tt", [True] * 3, 1, ["true", "false"])),
    wrong("Controller", "groups that do not divide", lambda: controller(groups=3), "`groups`"),
    *(wrong("Controller", f"{k} for the latents", partial(lambda v: controller()(v, 5), v), "`latents`") for k, v in NOT_MAPS.items()),
    *(wrong("Controller", f"timestep={v!r}", partial(lambda v: controller()(clean(2, 4, 8, 8), v), v), "`timestep`") for v in (-1, "5", None, float("nan"), [1, 2], True)),
    wrong("Controller", "timesteps for another batch", lambda: controller()(clean(2, 4, 8, 8), torch.ones(3)), "`timestep`"),
    wrong("Controller", "exchanged", lambda: controller()(torch.ones(2), clean(2, 4, 8, 8)), "`latents`"),
    *(wrong("SCTuner", f"{n}={k}", partial(SCTuner, **{"channels": 4, "control_channels": 4, n: v}), f"`{n}`") for n in ("channels", "control_channels") for k, v in NOT_WHOLE.items()),
    *(wrong("SCTuner", f"hidden={k}", partial(SCTuner, 4, 4, hidden=v), "`hidden`") for k, v in COUNTS.items()),
    *(wrong("SCTuner", f"{k} for the skip", partial(lambda v: SCTuner(4, 4)(v, clean(2, 4, 8, 8)), v), "`skip`") for k, v in NOT_MAPS.items()),
    *(wrong("SCTuner", f"{k} for the control", partial(lambda v: SCTuner(4, 4)(clean(2, 4, 8, 8), v), v), "`control`") for k, v in NOT_MAPS.items()),
    wrong("SCTuner", "exchanged", lambda: SCTuner(4, 5)(clean(2, 5, 8, 8), clean(2, 4, 8, 8)), "`skip`"),
    wrong("SCTuner", "a control of another size", lambda: SCTuner(4, 4)(clean(2, 4, 8, 8), clean(2, 4, 4, 4)), "`control`"),
    wrong("SCTuner", "a control of another batch", lambda: SCTuner(4, 4)(clean(2, 4, 8, 8), clean(3, 4, 8, 8)), "`control`"),
    wrong("SCTuner", "no control", lambda: SCTuner(4, 4)(clean(2, 4, 8, 8)), "control", by=TypeError),
    *(wrong("TFA", f"skips={v!r}", partial(TFA, v), "`skips`") for v in (4, [], "4", None, [0], [1.5], ["4"])),
    *(wrong("TFA", f"channels={v!r}", partial(TFA, (4,), v), "`channels`") for v in (0, "4", None, 1.5, [4, 4], [0])),
    *(wrong("TFA", f"tasks={v!r}", partial(TFA, (4,), 4, tasks=v), "`tasks`") for v in ("people", None, 3, [1], ["a", "a"], [""], ["a.b"])),
    wrong("TFA", "an unknown gate", lambda: tfa(gate="tanh"), "`gate`"),
    *(wrong("TFA", f".add_task({v!r})", partial(lambda v: tfa().add_task(v), v), "`name`") for v in ("people", "", 1, None, "a.b")),
    wrong("TFA", ".add_task like one that is not there", lambda: tfa().add_task("new", like="rader"), "`like`"),
    *(wrong("TFA", f".prompt({v!r})", partial(lambda v: tfa().prompt(v, 2), v), "`tasks`") for v in ("rader", ["people"], [], None, 3, ["people", "rader"], [1, 2])),
    *(wrong("TFA", f".prompt(count={v!r})", partial(lambda v: tfa().prompt("people", v), v), "`count`") for v in (0, -1, "2", 1.5)),
    *(wrong("TFA", f".load_prompts({k})", partial(lambda v: tfa().load_prompts(v), v), "`prompts") for k, v in {"None": None, "a list": [1], "text": "people.pth", "floats": {"people": 0.5}, "another length": {"people": torch.ones(5)}, "an array": {"people": ARRAY}}.items()),
    *(wrong("FiLM", f"channels={k}", partial(FiLM, v), "`channels`") for k, v in NOT_WHOLE.items()),
    *(wrong("FiLM", f"time_dim={k}", partial(FiLM, 4, v), "`time_dim`") for k, v in NOT_WHOLE.items()),
    *(wrong("FiLM", f"{k} for h", partial(lambda v: FiLM(4, 8)(v, torch.rand(2, 8)), v), "`h`") for k, v in NOT_MAPS.items()),
    *(wrong("FiLM", f"{k} for the embedding", partial(lambda v: FiLM(4, 8)(clean(2, 4, 8, 8), v), v), "`embedding`") for k, v in {**NOT_TENSORS, "another width": torch.rand(2, 9), "another batch": torch.rand(3, 8), "a timestep": torch.tensor(5)}.items()),
    *(wrong("TimeMoE", f"{n}={k}", partial(TimeMoE, **{"channels": 4, "time_dim": 8, "experts": 2, n: v}), f"`{n}`") for n in ("channels", "time_dim", "experts") for k, v in NOT_WHOLE.items()),
    *(wrong("TimeMoE", f"top_k={v!r}", partial(TimeMoE, 4, 8, experts=2, top_k=v), "`top_k`") for v in (0, 3, "1", 1.5, -1, True)),
    *(wrong("TimeMoE", f"{k} for h", partial(lambda v: TimeMoE(4, 8, experts=2)(v, torch.rand(2, 8)), v), "`h`") for k, v in NOT_MAPS.items()),
    *(wrong("TimeMoE", f"{k} for the embedding", partial(lambda v: TimeMoE(4, 8, experts=2)(clean(2, 4, 8, 8), v), v), "`embedding`") for k, v in {**NOT_TENSORS, "another width": torch.rand(2, 9), "another batch": torch.rand(3, 8)}.items()),
    *(wrong("TimeConditioned", f"{k} for the network", partial(TimeConditioned, v), "`network`") for k, v in {"None": None, "a class": nn.Conv2d, "text": "restormer", "a function": lambda x: x, "a list": [restorer()]}.items()),
    *(wrong("TimeConditioned", f"blocks={k}", partial(conditioned, v), "`blocks") for k, v in {"an unknown layer": {"5": FiLM(3)}, "a list": [FiLM(3)], "one block": FiLM(3), "a class": {"0": FiLM}, "None within": {"0": None}, "text": "0", "other channels": None}.items() if k != "other channels"),
    *(wrong("TimeConditioned", f"{n}={k}", partial(conditioned, **{n: v}), f"`{n}`") for n in ("num_timesteps", "time_dim") for k, v in NOT_WHOLE.items()),
    *(wrong("TimeConditioned", f"passes_time={v!r}", partial(conditioned, passes_time=v), "`passes_time`") for v in ("false", None, 2)),
    *(wrong("TimeConditioned", f"t={v!r}", partial(lambda v: conditioned()(clean(), v), v), "`t`") for v in (60, -5, "5", None, float("nan"), [1, 2], True)),
    wrong("TimeConditioned", "timesteps for another batch", lambda: conditioned()(clean(), torch.tensor([1, 2, 3])), "`t`"),
    wrong("TimeConditioned", "no timestep", lambda: conditioned()(clean()), "t", by=TypeError),
    wrong("TimeConditioned", "exchanged", lambda: conditioned()(torch.tensor([1, 2]), clean()), "`t`"),
    wrong("TimeConditioned", "an array", lambda: conditioned()(ARRAY, 5), "`image`"),
    wrong("TimeConditioned", "a block of other channels", lambda: conditioned({"0": FiLM(4)})(clean(), 5), "`blocks['0']`", "channels"),
    wrong("TimeConditioned", ".at a timestep beyond", lambda: conditioned().at(60), "`t`"),
    wrong("TimeConditioned", ".at text", lambda: conditioned().at("5"), "`t`"),
    wrong("TimeConditioned", ".detach what is not there", lambda: conditioned().detach("7"), "`layers`"),
    wrong("TimeConditioned", ".attach an unknown layer", lambda: conditioned().attach({"9": FiLM(3)}), "`blocks`"),
    wrong("TimeConditioned", ".balance_loss before a call", lambda: conditioned({"0": TimeMoE(3, 64, experts=2)}).balance_loss(), "balance_loss"),
]  # fmt: skip


class _Floats(nn.Module):
    def forward(self, x: Tensor) -> float:
        return 0.5
