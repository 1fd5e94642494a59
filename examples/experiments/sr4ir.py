"""The claims of SR4IR that two cores can test: all runs of docs/results/sr4ir.md.

    python -m examples.experiments.sr4ir table --out runs/sr4ir --data generated --seeds 1 2 3 4 5
    python -m examples.experiments.sr4ir table --out runs/sr4ir --task reading --seeds 1 2 3
    python -m examples.experiments.report runs/sr4ir/table

Every run is one of ``examples.sr4ir.train``. Finished ones are not done again: the same command goes on after a stop.
"""

import argparse
import itertools
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from examples.experiments.words import H_LR, JUDGE, OPTIONS, RECOGNIZER, refuse
from examples.sr4ir.config import Config, MethodName
from examples.sr4ir.train import Trainer

ALL: tuple[MethodName, ...] = (
    "oracle", "l_to_t", "s_to_t", "joint", "no_tdp", "sr4ir", "tdp_joint", "tdp_detached", "no_cqmix", "sr_only",
    "hr_only", "fixed_task", "t_to_s", "tdsr", "l_to_t_3x", "s_to_t_3x", "fixed_foreign",
)  # fmt: skip
MAIN: tuple[MethodName, ...] = ("oracle", "l_to_t", "s_to_t", "joint", "no_tdp", "no_cqmix", "sr4ir")
READING: tuple[MethodName, ...] = (
    "l_to_t", "pretrain", "h_fixed", "squared_tdp", "s_to_t", "joint", "sr4ir", "sr4ir_squared", "no_tdp", "no_cqmix",
    "sr_only", "hr_only", "t_to_s", "fixed_task", "tdp_joint", "l_to_t_3x", "s_to_t_3x",
)  # fmt: skip
AS_LONG: dict[str, tuple[MethodName, dict[str, Any]]] = {
    "pretrain_as_long": ("pretrain", {"steps": 900, "batch": 16}),
    "squared_as_long": ("squared", {"steps": 900, "batch": 16}),
}
"""Controls of h_fixed, which sees more words in the same time."""
WARM: tuple[MethodName, ...] = (*MAIN, "t_to_s", "l_to_t_3x", "s_to_t_3x")
OTHER = {"generated": "photos", "photos": "generated"}


@dataclass(frozen=True)
class Experiment:
    """Runs below one folder that share the networks to start from and the judges."""

    out: Path
    base: Config

    def prepare(self, seed: int, method: MethodName) -> dict[str, Path]:
        """The networks that a run needs: S trained on pixels, H on HR, a judge of another seed, one of other data."""
        if self.base.task == "reading":
            return self._prepare_reading(seed)
        base = replace(self.base, steps=Config(out=self.out).steps)
        plan = {
            "pretrained": replace(base, method="pretrain", seed=seed),
            "hr": replace(base, method="oracle", seed=seed),
            "judge": replace(base, method="oracle", seed=seed + 1000, steps=2 * base.steps),
        }
        if method == "fixed_foreign":
            plan["foreign"] = replace(base, method="oracle", seed=seed, data=OTHER[base.data])  # type: ignore[arg-type]
        folder = self.out / "prepared" / _setting(base) / f"seed{seed}"
        for name, config in plan.items():
            Trainer(replace(config, out=folder / name)).run()
        return {name: folder / name for name in plan}

    def _prepare_reading(self, seed: int) -> dict[str, Path]:
        """S trained on the pixels of words; H is what EasyOCR has, and the judge is of another make."""
        out = self.out / "prepared" / _setting(self.base) / f"seed{seed}" / "pretrained"
        pixels = replace(
            self.base,
            method="pretrain",
            seed=seed,
            steps=800,
            batch=16,
            s_lr=2e-3,
            out=out,
        )
        Trainer(pixels).run()
        return {"pretrained": out, "hr": RECOGNIZER["fixed_hr"], "judge": JUDGE}

    def run(self, name: str, seed: int, method: MethodName, **changes: Any) -> None:
        """One run, from the prepared networks."""
        ready = self.prepare(seed, method)
        config = replace(
            self.base, method=method, seed=seed, out=self.out / name / f"seed{seed}", s_weights=ready["pretrained"],
            h_weights=ready["hr"] if changes["start"] == "hr" else None, fixed_hr=ready["hr"], judge=ready["judge"],
            foreign=ready.get("foreign"), **changes,
        )  # fmt: skip
        results = Trainer(config).run()
        logging.info("%s seed %d: %s", name, seed, {key: round(value, 2) for key, value in results.items()})


def _setting(config: Config) -> str:
    """Names what is compared with what: a folder of runs."""
    plain = Config(out=Path())
    contrast = "" if config.contrast == plain.contrast else "_contrast{:g}-{:g}".format(*config.contrast)
    blur = f"_blur{config.blur:g}" if config.blur else ""
    steps = "" if config.steps == plain.steps else f"_{config.steps}steps"
    noise = f"_noise{config.noise:g}" if config.noise else ""
    restorer = "" if config.restorer == plain.restorer else f"_{config.restorer}"
    return f"{config.task}_{config.data}_x{config.scale}{contrast}{blur}{noise}{restorer}{steps}"


def table(out: Path, base: Config, seeds: list[int], starts: list[str], methods: list[Any] | None) -> None:
    """The methods of the paper's tables on one data set."""
    experiment = Experiment(out, base)
    for seed, start in itertools.product(seeds, starts):
        usual = MAIN if base.task != "classification" else ALL if start == "scratch" else WARM
        usual = READING if base.task == "reading" else usual
        for name in methods or [*usual, *(AS_LONG if base.task == "reading" else ())]:
            method, changes = AS_LONG.get(name, (name, {}))
            experiment.run(f"table/{_setting(base)}_{start}/{name}", seed, method, start=start, **changes)


def cqmix(out: Path, base: Config, seeds: list[int], starts: list[str], names: list[str] | None) -> None:
    """CQMix by length of the training, cells of the grid, and share of the loss."""
    experiment = Experiment(out, base)
    for seed, start in itertools.product(seeds, starts):
        for name, method, changes in _cqmix_grid():
            if names and name not in names:
                continue
            experiment.run(f"cqmix/{_setting(base)}_{start}/{name}", seed, method, start=start, **changes)


def _cqmix_grid() -> Iterator[tuple[str, MethodName, dict[str, Any]]]:
    for steps in (250, 500, 1500):
        yield f"no_cqmix_{steps}", "no_cqmix", {"steps": steps}
        yield f"sr4ir_{steps}", "sr4ir", {"steps": steps}
    for cells in (2, 8, 16):
        yield f"grid_{cells}", "sr4ir", {"grid": cells}
    yield "more_cqmix", "more_cqmix", {}
    yield "no_tdp_no_cqmix", "no_tdp_no_cqmix", {}
    yield "no_tdp", "no_tdp", {}


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("study", choices=["table", "cqmix"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--task", default="classification", choices=["classification", "segmentation", "detection", "reading"]
    )
    parser.add_argument("--data", default="generated", choices=list(OTHER))
    parser.add_argument("--scale", type=int, default=4)
    parser.add_argument("--noise", type=float, default=40.0, help="of words, after the reduction, in 1/255")
    parser.add_argument("--blur", type=float, default=0.0, help="before the reduction, in pixels")
    parser.add_argument("--restorer", default="edsr-small", help="S: edsr-small, swinir-small, swinir-light, ...")
    parser.add_argument("--contrast", type=float, nargs=2, default=[0.035, 0.1], help="of the generated textures")
    parser.add_argument("--steps", type=int, default=500, help="of the methods that are compared")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--starts", nargs="+", default=["scratch", "hr"], choices=["scratch", "hr"])
    parser.add_argument("--methods", nargs="+", help="of the table, or names of the runs of cqmix; the default is all")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # runs side by side, and figures that do not depend on the number of cores
    base = Config(
        out=arguments.out, task=arguments.task, data=arguments.data, scale=arguments.scale, blur=arguments.blur,
        contrast=tuple(arguments.contrast), steps=arguments.steps, restorer=arguments.restorer, cpu=True,
    )  # fmt: skip
    if arguments.task == "reading":
        refuse(parser, arguments, "--task reading", "data", "contrast", "starts")
        arguments.starts = ["scratch"]  # H is trained already
        base = replace(
            base, **OPTIONS, **RECOGNIZER, h_lr=H_LR, noise=arguments.noise, test_count=300, data_seed=None, batch=4,
            precision="bf16",
        )  # fmt: skip
    else:
        refuse(parser, arguments, f"--task {arguments.task}", "noise")
    study = table if arguments.study == "table" else cqmix
    study(arguments.out, base, arguments.seeds, arguments.starts, arguments.methods)


if __name__ == "__main__":
    main()
