"""The claims of EDTR that two cores can test: all runs of docs/results/edtr.md.

    python -m examples.experiments.edtr prior --out runs/edtr
    python -m examples.experiments.edtr table --out runs/edtr --seeds 1 2 3
    python -m examples.experiments.edtr ablations --out runs/edtr --seeds 1 2 3
    python -m examples.experiments.report runs/edtr/table --by folder --reference edtr_1
    python -m examples.experiments.edtr cells --out runs/edtr --seeds 1 2 3     # noise without prior, prior at t = 1
    python -m examples.experiments.edtr t_p --out runs/edtr --seeds 1 2 3      # how noisy the latents are made
    python -m examples.experiments.edtr steps --out runs/edtr        # of trained networks: n, and the noise (S4)
    python -m examples.experiments.edtr across --out runs/edtr --seeds 1 2 3   # one restorer for three tasks (Table 4)
    python -m examples.experiments.edtr unseen --out runs/edtr --seeds 1 2 3   # classes of photographs (Table 5)
    python -m examples.experiments.edtr table --out runs/edtr --task reading --extent 0.5   # rendered words

Finished runs are not done again: the same command goes on after a stop.
"""

import argparse
import json
import logging
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from examples.common.engine.options import shared_options
from examples.common.engine.train_prior import PriorConfig, train_prior
from examples.common.networks.weights import load_saved
from examples.edtr.config import Config
from examples.edtr.prepare import Config as PrepareConfig
from examples.edtr.prepare import prepare, prepare_readers
from examples.edtr.readers import TASKS
from examples.edtr.train import Trainer
from examples.experiments.report import METRICS, Sample, markdown
from examples.experiments.words import H_LR, JUDGE, OPTIONS, RECOGNIZER, refuse
from examples.sr4ir.config import Config as TaskConfig
from examples.sr4ir.train import Trainer as TaskTrainer

logger = logging.getLogger(__name__)

PRIOR_SEED = 100
BASELINES: Mapping[str, Any] = {
    "no_restoration": "l_to_t", "pre_restoration": "s_to_t", "tdsr": "tdsr", "rsrssn": "rsrssn", "sr4ir": "sr4ir",
}  # fmt: skip
OF_WORDS: Mapping[str, Any] = {name: name for name in ("pretrain", "squared", "h_fixed", "l_to_t_3x")}
"""More baselines for words: L1 that goes on, L1 + squared error, L1 + TDP for a reader that never changes, and H alone
for as many images as SR4IR's.
"""
MAIN: Mapping[str, dict[str, Any]] = {"edtr_1": {"n": 1}, "edtr_4": {"n": 4}}
ABLATIONS: Mapping[str, dict[str, Any]] = {
    name: {"method": name}
    for name in (
        "no_pre", "hlf_from_noise", "no_hlf", "no_fm", "no_prior", "only_task", "only_reference", "frozen_decoder",
        "no_color_fix", "conventional", "hlf_long",
    )
} | {"whole_batch": {"whole_batch": True}}  # fmt: skip
CELLS: Mapping[str, dict[str, Any]] = {
    "prior_t1": {"t_p": 1}, "no_prior": {"method": "no_prior"}, "no_prior_noise": {"method": "no_prior_noise"},
}  # fmt: skip
"""With ``edtr_1`` the four cells of prior and noise; a prior at t = 1 has next to none."""
T_P: Mapping[str, dict[str, Any]] = {f"t_p_{t_p}": {"t_p": t_p} for t_p in (20, 50, 100)}
"""``edtr_1`` is the one at 200."""
UNSEEN = ("no_restoration", "pre_restoration", "sr4ir", "edtr_1", "no_prior")
"""Runs of the table that restore images of classes which nothing was trained on, by default."""
ACROSS = [f"{task}_{figure}" for task in TASKS for figure in ("score", "fixed_hr", "judge", "psnr")]


@dataclass(frozen=True)
class Experiment:
    """Runs below one folder that share their images, their prior and what else they begin with."""

    out: Path
    base: Config
    prior_steps: int = 1000
    prior_images: int = 4000
    prepare_steps: int = 500

    @cached_property
    def prior(self) -> Path:
        """One diffusion model for all seeds, of images of its own, as a hub's would be."""
        out = self.out / f"prior_{self.base.task}_{self.base.data}"
        settings = {
            name: getattr(self.base, name) for name in ("task", "data", "size", "contrast", "batch", "precision", "cpu")
        }
        settings |= {"steps": self.prior_steps, "seed": PRIOR_SEED, "train_count": self.prior_images, "out": out}
        train_prior(PriorConfig(**settings))
        return out

    def preparation(self, seed: int) -> PrepareConfig:
        """The options of what a seed begins with: task networks on HQ images, a pre-restoration network."""
        settings = {name: value for name, value in shared_options(self.base).items() if name != "task"}
        folder = self.out / "prepared" / setting(self.base) / f"seed{seed}"
        settings |= {"out": folder, "seed": seed, "steps": self.prepare_steps}
        if self.base.task == "reading":
            settings["recognizer"] = RECOGNIZER["recognizer"]
        tasks = [*TASKS] if self.base.all_in_one else [self.base.task]
        return PrepareConfig(**settings, tasks=tasks, train_prior=False)

    def prepared(self, seed: int) -> Path:
        """The folder with all of it."""
        options = self.preparation(seed)
        prepare(options)
        return options.out

    def run(self, name: str, seed: int) -> None:
        """One run by the name of its folder."""
        base = replace(self.base, seed=seed, prepared=self.prepared(seed))
        out = self.out / "table" / setting(base) / name / f"seed{seed}"
        if name in (baselines := {**BASELINES, **OF_WORDS}):
            results = TaskTrainer(self._baseline(replace(base, out=out), baselines[name])).run()
        else:
            changes = {**MAIN, **ABLATIONS, **CELLS, **T_P}[name]
            results = Trainer(replace(base, out=out, prior=self.prior, **changes)).run()
        logger.info("%s seed %d: %s", name, seed, {key: round(value, 2) for key, value in results.items()})

    def unseen(self, name: str, seed: int) -> None:
        """How networks of other classes, textures of photographs, read what a run of the table restores (Table 5)."""
        other = replace(self.base, data="photos", seed=seed)
        readers = replace(self, base=other).preparation(seed)
        prepare_readers(readers)
        reference, judge = (readers.out / f"{other.task}_{kind}" for kind in ("hq", "judge"))
        run = self.out / "table" / setting(self.base) / name / f"seed{seed}"
        ready = self.out / "prepared" / setting(self.base) / f"seed{seed}"
        options = replace(other, prepared=ready, evaluate=run)
        options = replace(options, out=self.out / "unseen" / setting(self.base) / name / f"seed{seed}")
        if name in BASELINES:
            config = self._baseline(options, BASELINES[name])
            results = TaskTrainer(replace(config, fixed_hr=reference, judge=judge)).run()
        else:
            changes = {**MAIN, **ABLATIONS, **CELLS, **T_P}[name]
            options = replace(options, prior=self.prior, references=[reference], judges=[judge], **changes)
            results = Trainer(options).run()
        logger.info("%s seed %d: %s", name, seed, {key: round(value, 2) for key, value in results.items()})

    @staticmethod
    def _baseline(config: Config, method: Any) -> TaskConfig:
        """Options of examples.sr4ir.train, which shares the networks that EDTR begins with."""
        ready: Any = config.prepared
        settings = {**shared_options(config), "out": config.out, "method": method, "h_lr": config.h_lr}
        if config.task == "reading":  # whose networks are trained already
            settings |= {**RECOGNIZER, "judge": JUDGE}
        else:
            reference, judge = ready / f"{config.task}_hq", ready / f"{config.task}_judge"
            settings |= {"start": "hr", "h_weights": reference, "fixed_hr": reference, "judge": judge}
        return TaskConfig(**settings, s_weights=ready / "pre", evaluate=config.evaluate)

    def steps(self, seed: int, numbers: list[int], noises: int) -> dict[str, Any]:
        """The scores of trained networks by denoising steps (Table 3), and over several draws of noise (Table S4)."""
        found: dict[str, Any] = {}
        for name, changes in MAIN.items():
            out = self.out / "table" / setting(self.base) / name / f"seed{seed}"
            config = replace(self.base, seed=seed, out=out, prior=self.prior, prepared=self.prepared(seed), **changes)
            trainer = Trainer(config)
            trainer.load_finished()
            for n in numbers:
                found[f"{name}, {n} steps"] = trainer.evaluate_task(config.task, n=n)[0]
            draws = [trainer.evaluate_task(config.task, seed=number)[0] for number in range(noises)]
            found[f"{name}, deviation over noise"] = {
                key: statistics.stdev(draw[key] for draw in draws) for key in ("score", "psnr", "judge_distance")
            }
        return found

    def across(self, seed: int) -> dict[str, dict[str, float]]:
        """How three tasks read what a restorer of each and one of all restore (Table 4), and L1 as a control.

        One of all takes as many steps as the three together. Prior and pre-restoration are those of the first task,
        whose images the others share where they are drawn. The control goes on with pre-restoration by L1, for each
        task in a run of its own, in whole batches. Networks of HQ images and judges read what every restorer makes; H,
        which learned with a restorer, only what that one makes for its task.
        """
        folder = self.out / "across" / setting(self.base)
        file = folder / f"seed{seed}.json"
        if file.exists():
            done: dict[str, dict[str, float]] = json.loads(file.read_text())
            return done
        base = replace(self.base, seed=seed, prior=self.prior, prepared=self.prepared(seed))
        every = replace(base, steps=len(TASKS) * base.steps, out=folder / "all_in_one" / f"seed{seed}")
        found = {"all_in_one": Trainer(every).run(), "l1_of_each": {}}
        readers = Trainer(every)
        for task in TASKS:
            own = replace(base, task=task, all_in_one=False, out=folder / f"edtr_{task}" / f"seed{seed}")
            results = Trainer(own).run()
            load_saved(readers.restorer, own.out / "edtr.safetensors")
            figures, _ = readers.evaluate()
            found[f"edtr_{task}"] = {name: value for name, value in figures.items() if "_score" not in name}
            found[f"edtr_{task}"][f"{task}_score"] = results["score"]
            l1 = self._baseline(replace(own, out=folder / f"l1_{task}" / f"seed{seed}"), "pretrain")
            pixels = TaskTrainer(l1).run()
            found["l1_of_each"] |= {f"{task}_{name}": value for name, value in pixels.items()}
        rows = {name: {key: row[key] for key in ACROSS if key in row} for name, row in found.items()}
        file.write_text(json.dumps(rows, indent=1))
        return rows


def setting(config: Config) -> str:
    """The name of a folder of runs that are compared."""
    task = "three_tasks" if config.all_in_one else config.task
    return f"{task}_{config.data}_{config.degradation}_extent{config.mixture_extent:g}"


def across_table(found: list[dict[str, dict[str, float]]]) -> str:
    """The rows of every seed as one table: means, and one restorer of all minus that of each task."""
    samples = {
        name: {key: Sample.of(seed[name][key] for seed in found) for key in ACROSS if key in found[0][name]}
        for name in found[0]
    }
    rows = [
        [name, *(row[key].spread(METRICS[key.partition("_")[2]]) if key in row else "" for key in ACROSS)]
        for name, row in samples.items()
    ]
    changes = [
        Sample.of(seed["all_in_one"][key] - seed["edtr_" + key.partition("_")[0]][key] for seed in found).change(
            METRICS[key.partition("_")[2]]
        )
        for key in ACROSS
    ]
    return markdown(["", *ACROSS], [*rows, ["all in one minus that of the task", *changes]])


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=["prior", "table", "ablations", "cells", "t_p", "steps", "across", "unseen"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--task", default="classification", choices=["classification", "segmentation", "detection", "reading"]
    )
    parser.add_argument("--data", default="generated", choices=["generated", "photos"])
    parser.add_argument("--degradation", default="mixture_b", choices=["mixture_a", "mixture_b"])
    parser.add_argument("--extent", type=float, default=0.25, help="of blur and reduction; 1 is the paper's, at 512")
    parser.add_argument("--contrast", type=float, nargs=2, default=[0.07, 0.18], help="of the generated textures")
    parser.add_argument("--prior_steps", type=int, default=1000, help="of the autoencoder; twice as many of diffusion")
    parser.add_argument("--prior_images", type=int, default=4000)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--long_steps", type=int, default=20, help="where the paper takes 50")
    parser.add_argument("--test_count", type=int, default=500)
    parser.add_argument("--t_p", type=int, default=200, help="timestep up to which the latents are made noisy")
    parser.add_argument("--draws", type=int, default=4, help="of the noise, for each score")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--names", nargs="+", help="folders of the table; the default is all")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # runs side by side, and figures that do not depend on the number of cores
    base = Config(
        out=arguments.out, task=arguments.task, data=arguments.data, degradation=arguments.degradation,
        mixture_extent=arguments.extent, contrast=tuple(arguments.contrast), steps=arguments.steps,
        long_steps=arguments.long_steps, test_count=arguments.test_count, t_p=arguments.t_p, draws=arguments.draws,
        all_in_one=arguments.study == "across", cpu=True,
    )  # fmt: skip
    if arguments.task == "reading":
        refuse(parser, arguments, "--task reading", "data", "contrast")
        base = replace(base, **OPTIONS, h_lr=H_LR, batch=8, precision="bf16")
    baselines = [*BASELINES, *(OF_WORDS if arguments.task == "reading" else ())]
    known = [*baselines, *MAIN, *ABLATIONS, *CELLS, *T_P]
    unknown = [name for name in arguments.names or () if name not in known]
    if unknown:
        parser.error(f"`names` should be among {', '.join(known)}, found {', '.join(unknown)}.")
    experiment = Experiment(arguments.out, base, prior_steps=arguments.prior_steps, prior_images=arguments.prior_images)
    if arguments.study == "prior":
        logger.info("The prior is in %s", experiment.prior)
        return
    studies = {
        "table": [*baselines, *MAIN], "ablations": [*ABLATIONS], "cells": [*CELLS], "t_p": [*T_P], "unseen": [*UNSEEN]
    }  # fmt: skip
    if arguments.study == "across":
        refuse(parser, arguments, "across", "task", "names")
        print(across_table([experiment.across(seed) for seed in arguments.seeds]))
        return
    if arguments.study == "unseen":
        refuse(parser, arguments, "unseen", "data")
        if arguments.task == "reading":
            parser.error("`task` should be one of textures for unseen, found 'reading'.")
    for seed in arguments.seeds:
        if arguments.study == "steps":
            found = experiment.steps(seed, [1, 4, 20, 50], 10)
            print(json.dumps(found, indent=1))
            (arguments.out / f"steps_{setting(base)}_seed{seed}.json").write_text(json.dumps(found, indent=1))
            continue
        for name in arguments.names or studies[arguments.study]:
            (experiment.unseen if arguments.study == "unseen" else experiment.run)(name, seed)


if __name__ == "__main__":
    main()
