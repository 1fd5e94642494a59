"""The claims of UniRestore that two cores can test: all runs of docs/recipes/unirestore.md.

    python -m examples.experiments.unirestore table --out runs/unirestore        # Tables 1 to 5
    python -m examples.experiments.unirestore new_task --out runs/unirestore     # Table 6: detection by a prompt alone
    python -m examples.experiments.unirestore tables --out runs/unirestore
    python -m examples.experiments.unirestore sheet --out runs/unirestore        # images of the first seed
    python -m examples.experiments.unirestore latents --out runs/unirestore      # how far from clean, of stage 1

Finished runs are not done again: the same command goes on after a stop.
"""

import argparse
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from examples.common.data.degrade import degradation
from examples.common.data.folder import read_image
from examples.common.data.task_data import TEST_SEED
from examples.common.data.tasks import collate
from examples.common.engine.options import shared
from examples.common.engine.run_directory import read_json
from examples.experiments.report import Sample, markdown
from examples.unirestore.config import TASKS, Config
from examples.unirestore.data import data_of
from examples.unirestore.prepare import Config as PrepareConfig
from examples.unirestore.prepare import prepare, train_prior_of_all
from examples.unirestore.restore import load_run
from examples.unirestore.train import Trainer
from restoreloss.generators import standard_normal

logger = logging.getLogger(__name__)

PRIOR_SEED = 100
FIRST: Mapping[str, dict[str, Any]] = {"no_tfa": {}, "controller": {"cfrm": False}}
"""Runs of stage 1, which are rows of Table 4 as they are."""
SECOND: Mapping[str, tuple[str, dict[str, Any]]] = {
    "unirestore": ("no_tfa", {}),
    "no_cfrm": ("controller", {"cfrm": False}),  # Table 4
    "convolutions": ("no_tfa", {"adapter": "convolutions"}),  # Table 5
    "several": ("no_tfa", {"adapter": "several"}),
    "one_prompt": ("no_tfa", {"adapter": "one_prompt"}),
    "sigmoid": ("no_tfa", {"gate": "sigmoid"}),  # ours
}
"""Runs of stage 2, the run of stage 1 that they begin with, and what they change."""
PLAIN: Mapping[str, list[str]] = {
    "pir": ["restoration"], "tir": ["classification", "segmentation"],
    "pir_tir": ["restoration", "classification", "segmentation"],
}  # fmt: skip
"""A plain network in UniRestore's place, by what it trains on."""
READ: Mapping[str, Any] = {"lq": lambda _, lq: lq, "hq": lambda hq, _: hq}
COLUMNS: Mapping[str, tuple[str, int]] = {
    "restoration_psnr": ("PSNR", 2),
    "restoration_unseen_psnr": ("unseen", 2),
    "classification_score": ("accuracy", 1),
    "classification_judge": ("another network", 1),
    "classification_unseen_score": ("unseen", 1),
    "segmentation_score": ("mIoU", 1),
    "segmentation_judge": ("another network", 1),
    "segmentation_unseen_score": ("unseen", 1),
}
SHEET: Mapping[str, tuple[str, int]] = {
    "degraded": ("unirestore", 0), "w/o TFA": ("no_tfa", 1), "UniRestore": ("unirestore", 1),
    "plain, for all": ("pir_tir", 1), "plain, for people": ("pir", 1), "plain, for machines": ("tir", 1),
    "clean": ("unirestore", 2),
}  # fmt: skip
"""Rows of the sheet: the run, and which row of its grid."""
DETECTION: Mapping[str, tuple[str, int]] = {
    "detection_score": ("mAP", 1),
    "detection_judge": ("another network", 1),
    "detection_unseen_score": ("unseen", 1),
    "detection_psnr": ("PSNR", 2),
}


@dataclass(frozen=True)
class Experiment:
    """Runs below one folder that share their images and their prior."""

    out: Path
    base: Config
    prior_steps: int = 5000
    prior_images: int = 16000
    prepare_steps: int = 500
    _prepared: set[Path] = field(default_factory=set, repr=False)

    def config(self, study: str, name: str, seed: int, /, **changes: Any) -> Config:
        """The options of a run by the name of its folder."""
        out = self.out / study / name / f"seed{seed}"
        return replace(self.base, seed=seed, out=out, prior=self.prior(), prepared=self.prepared(seed), **changes)

    def prior(self) -> Path:
        """One diffusion model for all seeds, of images of its own, as a hub's would be."""
        out = self.out / "prior"
        options = {**shared(self.base), "seed": PRIOR_SEED, "train_count": self.prior_images, "batch": 16}
        train_prior_of_all(PrepareConfig(**{**options, "out": out}, prior_steps=self.prior_steps), out)
        return out

    def prepared(self, seed: int) -> Path:
        """Task networks on clean images."""
        folder = self.out / "prepared" / f"seed{seed}"
        if folder not in self._prepared:
            options = {**shared(self.base), "out": folder, "seed": seed, "steps": self.prepare_steps, "batch": 16}
            prepare(PrepareConfig(**options, train_prior=False))
            self._prepared.add(folder)
        return folder

    def run(self, name: str, seed: int) -> dict[str, Any]:
        """A row of the table, and the rows that it begins with."""
        if name in READ:
            return self._read("table", name, seed, {"stage": "stage2", "network": "edsr-small"})
        if name in PLAIN:
            # as many steps as both stages of UniRestore together
            steps = 2 * self.base.steps
            changes: dict[str, Any] = {
                "stage": "stage2", "network": "edsr-small", "train_tasks": PLAIN[name], "steps": steps
            }  # fmt: skip
        elif name in FIRST:
            changes = {"stage": "stage1", **FIRST[name]}
        else:
            start, options = SECOND[name]
            self.run(start, seed)
            changes = {"stage": "stage2", "after": self.out / "table" / start / f"seed{seed}", **options}
        return self._train("table", name, seed, changes)

    def new_task(self, seed: int) -> None:
        """Detection: as it is, as the other prompts restore it, and by a prompt of its own."""
        self.run("unirestore", seed)
        start = self.out / "table" / "unirestore" / f"seed{seed}"
        changes = {"stage": "add-task", "name": "detection", "after": start}
        for name in READ:
            self._read("new_task", name, seed, {"stage": "stage2", "network": "edsr-small", "tasks": ["detection"]})
        plain = {"stage": "stage2", "network": "edsr-small", "tasks": ["detection"], "steps": 2 * self.base.steps}
        self._train("new_task", "tir", seed, plain)
        self._train("new_task", "prompt", seed, changes)
        for name in ("restoration", "classification", "segmentation"):
            config = self.config("new_task", f"prompt_of_{name}", seed, **changes)
            trainer = Trainer(config)
            if trainer.run_directory.results is None:
                figures, _ = trainer.figures(lambda _, name=name, trainer=trainer: trainer.restores(name))  # type: ignore[misc]
                trainer.run_directory.finish(figures)

    def _train(self, study: str, name: str, seed: int, changes: Mapping[str, Any]) -> dict[str, Any]:
        trainer = Trainer(self.config(study, name, seed, **changes))
        fresh = trainer.run_directory.results is None
        results = trainer.run()
        if fresh:
            trained = sum(weight.numel() for weight in trainer.model.parameters() if weight.requires_grad)
            (trainer.config.out / "parameters.json").write_text(str(trained), encoding="utf-8")
            logger.info("%s seed %d: %s", name, seed, {key: round(value, 2) for key, value in results.items()})
        return results

    def _read(self, study: str, name: str, seed: int, changes: Mapping[str, Any]) -> dict[str, Any]:
        trainer = Trainer(self.config(study, name, seed, **changes))
        if trainer.run_directory.results is None:
            trainer.run_directory.finish(trainer.figures(lambda _: READ[name])[0])
        return trainer.run_directory.results or {}

    def tables(self) -> str:
        """Means, spreads and paired differences of all that is finished."""
        parts = []
        for study, columns, reference in (("table", COLUMNS, "unirestore"), ("new_task", DETECTION, "prompt")):
            folders = sorted((self.out / study).glob("*"))
            runs = {
                folder.name: {run.parent.name: read_json(run.read_text()) for run in folder.glob("seed*/results.json")}
                for folder in folders
            }
            runs = {name: seeds for name, seeds in runs.items() if seeds}
            if reference in runs:
                parts.append(f"### {study}\n\n{_tables(runs, columns, reference)}")
        return "\n\n".join(parts)

    @torch.no_grad()
    def latents(self) -> str:
        """Mean squared error to the clean latents, of those of degraded test photographs and of restored ones."""
        rows = []
        for task in ("restoration", "classification"):
            errors: dict[str, list[float]] = {"degraded": [], "restored": []}
            for run in sorted((self.out / "table" / "no_tfa").glob("seed*")):
                config = replace(self.base, seed=int(run.name.removeprefix("seed")))
                model, _ = load_run(run)
                read = collate([data_of(task, config)[1][number] for number in range(min(50, config.test_count))])
                assert read is not None
                degrade = degradation(config, config.seed, TEST_SEED, TASKS.index(task))
                degraded, _ = model.encode(degrade(read[0], 0))
                clean, _ = model.encode(read[0], restored=False)
                noise = standard_normal(clean, torch.Generator().manual_seed(config.seed))
                for name, found in (("degraded", degraded), ("restored", model.denoise(degraded, noise))):
                    errors[name].append(float((found - clean).square().mean()))
            rows.append([task, *(Sample.of(values).spread(2) for values in errors.values())])
        return markdown(["", "degraded", "restored"], rows)

    def sheet(self, seed: int = 1) -> Path:
        """Images of the rows of the table: photographs for people, textures for the classifier."""
        from matplotlib.figure import Figure

        tasks = ("restoration", "classification")
        figure = Figure(figsize=(14, 0.9 * len(SHEET)))
        axes = figure.subplots(len(SHEET), len(tasks))
        for row, (title, (name, part)) in enumerate(SHEET.items()):
            for column, task in enumerate(tasks):
                grid = read_image(self.out / "table" / name / f"seed{seed}" / "samples" / f"{task}.png")
                side = (grid.shape[1] - 2) // 3  # degraded, restored, clean
                axis = axes[row, column]
                axis.imshow(grid[:, part * side + 2 : (part + 1) * side].permute(1, 2, 0), interpolation="nearest")
                axis.set(xticks=[], yticks=[])
                if column == 0:
                    axis.set_ylabel(title, rotation=0, ha="right", va="center")
                if row == 0:
                    axis.set_title(task)
        figure.tight_layout(pad=0.3)
        figure.savefig(self.out / "sheet.png", dpi=80)
        return self.out / "sheet.png"


def _tables(runs: Mapping[str, Any], columns: Mapping[str, tuple[str, int]], reference: str) -> str:
    """Means, then paired differences to the reference."""
    header = ["", *(title for title, _ in columns.values())]
    known = runs[reference]
    means, gaps = [], []
    for name, seeds in runs.items():
        mean, gap = [f"`{name}`"], [f"`{name}` - `{reference}`"]
        for key, (_, digits) in columns.items():
            # None is infinite: an image that was left as it is
            found = {seed: run[key] for seed, run in seeds.items() if run.get(key) is not None}
            mean.append(Sample.of(found.values()).spread(digits))
            paired = [found[seed] - known[seed][key] for seed in found if known.get(seed, {}).get(key) is not None]
            gap.append(Sample.of(paired).change(digits))
        means.append(mean)
        if name != reference:
            gaps.append(gap)
    return markdown(header, means) + "\n\n" + markdown(header, gaps)


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=["table", "new_task", "tables", "sheet", "latents"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", default="generated", choices=["generated", "photos"])
    parser.add_argument("--contrast", type=float, nargs=2, default=[0.07, 0.18], help="of the generated textures")
    parser.add_argument("--severities", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--test_count", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--names", nargs="+", help="folders of the table; the default is all")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # runs side by side, and figures that do not depend on the number of cores
    base = Config(
        out=arguments.out, data=arguments.data, contrast=tuple(arguments.contrast), severities=arguments.severities,
        steps=arguments.steps, test_count=arguments.test_count, control_channels=16, lr=1e-3, cpu=True,
    )  # fmt: skip
    experiment = Experiment(arguments.out, base)
    if arguments.study == "tables":
        print(experiment.tables())
        return
    if arguments.study == "latents":
        print(experiment.latents())
        return
    if arguments.study == "sheet":
        print(experiment.sheet(arguments.seeds[0]))
        return
    names = [*READ, *PLAIN, *FIRST, *SECOND]
    if unknown := sorted(set(arguments.names or ()) - set(names)):
        parser.error(f"`names` should be of {', '.join(names)}, found {unknown[0]}.")
    for seed in arguments.seeds:
        if arguments.study == "new_task":
            experiment.new_task(seed)
            continue
        for name in arguments.names or names:
            experiment.run(name, seed)


if __name__ == "__main__":
    main()
