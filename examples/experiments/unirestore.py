"""The claims of UniRestore that two cores can test: all runs of docs/results/unirestore.md, and words.

    python -m examples.experiments.unirestore prior --out runs/unirestore        # epsilon, velocity, no diffusion
    python -m examples.experiments.unirestore one_step --out runs/unirestore     # of priors alone, one for each seed
    python -m examples.experiments.unirestore table --out runs/unirestore        # Tables 1 to 5
    python -m examples.experiments.unirestore new_task --out runs/unirestore     # Table 6: detection by a prompt alone
    python -m examples.experiments.unirestore words --out runs/unirestore_words   # people and a reader, same words
    python -m examples.experiments.unirestore tables --out runs/unirestore          # or runs/unirestore_words
    python -m examples.experiments.unirestore sheet --out runs/unirestore        # held-out images of 96 pixels
    python -m examples.experiments.unirestore latents --out runs/unirestore      # how far from clean, of stage 1

Finished runs are not done again: the same command goes on after a stop.
"""

import argparse
import itertools
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from examples.common.data.degrade import degradation
from examples.common.data.task_data import TEST_SEED
from examples.common.data.tasks import collate
from examples.common.engine.evaluation import GAINS
from examples.common.engine.options import shared_options
from examples.common.engine.run_directory import read_json
from examples.common.networks.latent_diffusion import Prediction, load_latent_diffusion
from examples.experiments.report import Sample, markdown
from examples.experiments.words import OPTIONS, refuse
from examples.unirestore.config import TASKS, Config
from examples.unirestore.data import data_of
from examples.unirestore.prepare import Config as PrepareConfig
from examples.unirestore.prepare import prepare, train_prior_of_all
from examples.unirestore.restore import load_run
from examples.unirestore.train import Trainer
from restoreloss import LatentPrior, corrupt
from restoreloss.diffusion.sampling import denoise
from restoreloss.generators import standard_normal

logger = logging.getLogger(__name__)

PRIOR_SEED = 100
READ_BY = ("classification", "segmentation")
"""The tasks that UniRestore is trained for, beside restoration; detection comes later."""
FIRST: Mapping[str, dict[str, Any]] = {"no_tfa": {}, "no_tfa_epsilon": {}, "controller": {"cfrm": False}}
"""Runs of stage 1, rows of Table 4 as they are. What ends in "epsilon" has a prior that predicts the noise."""
WITHOUT = {"no_tfa_no_diffusion": "no_tfa"}
"""Runs of stage 1 that are evaluated without their diffusion model."""
SECOND: Mapping[str, tuple[str, dict[str, Any]]] = {
    "unirestore": ("no_tfa", {"every_prompt": True}),
    "epsilon": ("no_tfa_epsilon", {}),  # ours
    "no_diffusion": ("no_tfa", {"steps_of_diffusion": 0}),  # ours
    "no_cfrm": ("controller", {"cfrm": False}),  # Table 4
    "convolutions": ("no_tfa", {"adapter": "convolutions"}),  # Table 5
    "several": ("no_tfa", {"adapter": "several"}),
    "one_prompt": ("no_tfa", {"adapter": "one_prompt"}),
    "sigmoid": ("no_tfa", {"gate": "sigmoid"}),  # ours
}
"""Runs of stage 2, the run of stage 1 that they begin with, and what they change."""
PLAIN: Mapping[str, list[str]] = {
    "pir": ["restoration"], "tir": ["classification", "segmentation", "reading"],
    "pir_tir": ["restoration", "classification", "segmentation", "reading"],
}  # fmt: skip
"""A plain network in UniRestore's place, by what it trains on."""
PRIOR = (
    "lq",
    "pir_tir",
    "no_tfa_epsilon",
    "no_tfa",
    "no_tfa_no_diffusion",
    "epsilon",
    "unirestore",
    "no_diffusion",
    "hq",
)
"""The rows of the study of the prior."""
WORDS = ("lq", "pir", "tir", "pir_tir", "unirestore", "no_diffusion", "one_prompt", "hq")
"""Rows where one network restores words for people and for a reader."""
READ: Mapping[str, Any] = {"lq": lambda _, lq: lq, "hq": lambda hq, _: hq}
COLUMNS: Mapping[str, tuple[str, int]] = {
    "restoration_psnr_of_mse": ("PSNR of the mean error", 2),
    "restoration_psnr": ("mean of PSNR", 2),
    "restoration_unseen_psnr_of_mse": ("unseen", 2),
    "classification_score": ("accuracy", 1),
    "classification_judge": ("another network", 1),
    "classification_unseen_score": ("unseen", 1),
    "segmentation_score": ("mIoU", 1),
    "segmentation_judge": ("another network", 1),
    "segmentation_unseen_score": ("unseen", 1),
    "reading_score": ("words read (%)", 1),
    "reading_judge": ("by another (%)", 1),
    "reading_psnr": ("PSNR for the reader", 2),
}
GAINED: Mapping[str, tuple[str, int]] = {
    f"{task}_{name}": (f"{task}, {name.removeprefix('gain_').replace('_', ' ')}", 2)
    for task in ("restoration", "classification") for name in GAINS
}  # fmt: skip
"""PSNR that is gained, by the PSNR of the degraded image."""
SHEET: Mapping[str, tuple[str, int]] = {
    "epsilon": ("epsilon", 1), "velocity": ("unirestore", 1), "no diffusion": ("no_diffusion", 0),
}  # fmt: skip
"""Rows of the sheet between degraded and clean: the run, and its denoising steps."""
STUDIES = ("prior", "table", "new_task", "words", "tables", "sheet", "latents", "one_step")
ONE_STEP_TIMESTEPS = (999, 749, 499, 249)
SHOWN = ("gaussian_noise", "defocus_blur", "fog", "contrast", "snow", "jpeg_compression")
"""Corruptions of the sheet."""
DETECTION: Mapping[str, tuple[str, int]] = {
    "detection_score": ("mAP", 1),
    "detection_judge": ("another network", 1),
    "detection_unseen_score": ("unseen", 1),
    "detection_psnr_of_mse": ("PSNR of the mean error", 2),
}


@dataclass(frozen=True)
class Experiment:
    """Runs below one folder that share their images and their priors."""

    out: Path
    base: Config
    prior_steps: int = 5000
    prior_images: int = 16000
    prior_batch: int = 16
    prepare_steps: int = 500
    tasks: list[str] = field(default_factory=lambda: [*READ_BY])
    _prepared: set[Path] = field(default_factory=set, repr=False)

    def config(self, study: str, name: str, seed: int, /, **changes: Any) -> Config:
        """The options of a run by the name of its folder."""
        out = self.out / study / name / f"seed{seed}"
        prior = self.prior("epsilon" if name.endswith("epsilon") else "v_prediction")
        return replace(self.base, seed=seed, out=out, prior=prior, prepared=self.prepared(seed), **changes)

    def prior(self, prediction: Prediction = "v_prediction", number: int = 0) -> Path:
        """A diffusion model of images of its own, as a hub's would be, the first for all seeds; whatever it predicts,
        the autoencoder is the same.
        """
        out = self.out / (f"one_step/{prediction}/seed{number}" if number else f"prior_{prediction}")
        if out in self._prepared:
            return out
        first = None if prediction == "v_prediction" else self.prior(number=number)
        options = {**shared_options(self.base), "out": out, "seed": PRIOR_SEED + number}
        options["train_count"] = self.prior_images
        options["batch"] = self.prior_batch
        config = PrepareConfig(
            **options, prior_steps=self.prior_steps, tasks=self.base.tasks[1:], prediction=prediction, autoencoder=first
        )
        train_prior_of_all(config, out)
        self._prepared.add(out)
        return out

    def prepared(self, seed: int) -> Path:
        """Task networks on clean images."""
        folder = self.out / "prepared" / f"seed{seed}"
        if folder not in self._prepared:
            options = {**shared_options(self.base), "out": folder, "seed": seed, "batch": 16}
            for task in self.tasks:  # boxes are learned more slowly
                options["steps"] = self.prepare_steps * (3 if task == "detection" else 1)
                prepare(PrepareConfig(**options, tasks=[task], train_prior=False))
            self._prepared.add(folder)
        return folder

    def run(self, name: str, seed: int) -> dict[str, Any]:
        """A row of the table, and the rows that it begins with."""
        if name in READ:
            return self._read("table", name, seed, {"stage": "stage2", "network": "edsr-small"})
        if name in PLAIN:
            # as many steps as both stages of UniRestore together
            steps = 2 * self.base.steps
            tasks = [task for task in PLAIN[name] if task in self.base.tasks]
            changes: dict[str, Any] = {
                "stage": "stage2", "network": "edsr-small", "train_tasks": tasks, "steps": steps
            }  # fmt: skip
        elif name in WITHOUT:
            self.run(WITHOUT[name], seed)
            changes = {"evaluate": self.out / "table" / WITHOUT[name] / f"seed{seed}", "steps_of_diffusion": 0}
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
        prompts = {f"{task}_by_{prompt}_{key}": (f"{task}: {key} by {prompt}", 2) for task in TASKS
                   for prompt in TASKS for key in ("psnr_of_mse", "score")}  # fmt: skip
        studies = (
            ("table", "", COLUMNS, "unirestore"), ("table", ", gain in PSNR", GAINED, "unirestore"),
            ("table", ", prompts on the same images", prompts, "unirestore"), ("new_task", "", DETECTION, "prompt"),
        )  # fmt: skip
        for study, title, columns, reference in studies:
            folders = sorted((self.out / study).glob("*"))
            runs = {
                folder.name: {run.parent.name: read_json(run.read_text()) for run in folder.glob("seed*/results.json")}
                for folder in folders
            }
            runs = {name: seeds for name, seeds in runs.items() if seeds}
            known = {key: column for key, column in columns.items() if key in str(runs.get(reference))}
            if known:
                parts.append(f"### {study}{title}\n\n{_tables(runs, known, reference)}")
        return "\n\n".join(parts)

    @torch.no_grad()
    def latents(self) -> str:
        """Mean squared error to the clean latents: of degraded images read by the encoder itself and with its CFRM
        (where no diffusion follows), and of restored ones.
        """
        rows = []
        for task, name in itertools.product(("restoration", "classification"), ("no_tfa_epsilon", "no_tfa")):
            errors: dict[str, list[float]] = {"degraded": [], "with CFRM": [], "restored": []}
            for run in sorted((self.out / "table" / name).glob("seed*/results.json")):
                config = replace(self.base, seed=int(run.parent.name.removeprefix("seed")))
                model, _ = load_run(run.parent)
                read = collate([data_of(task, config)[1][number] for number in range(min(50, config.test_count))])
                assert read is not None
                degrade = degradation(replace(config, clean_too=False), config.seed, TEST_SEED, TASKS.index(task))
                lq = degrade(read[0], 0)
                clean, _ = model.encode(read[0], restored=False)
                degraded, _ = model.encode(lq, restored=False)
                mended, _ = model.encode(lq)
                noise = standard_normal(clean, torch.Generator().manual_seed(config.seed))
                found = (degraded, mended, model.denoise(mended, noise))
                for values, latents in zip(errors.values(), found, strict=True):
                    values.append(float((latents - clean).square().mean()))
            rows.append([task, f"`{name}`", *(Sample.of(values).spread(3) for values in errors.values())])
        return markdown(["images", "run", "degraded", "with CFRM", "restored"], rows)

    def one_step(self, seeds: Sequence[int]) -> str:
        """Mean squared error to clean latents, relative to their variance, of what priors make of them in one step,
        noisy up to t. Each seed has an autoencoder, and a diffusion model for each prediction.
        """
        _, data = data_of("restoration", replace(self.base, test_count=100))
        read = collate([data[number] for number in range(100)])
        assert read is not None
        predictions: tuple[Prediction, ...] = ("epsilon", "v_prediction")
        errors: dict[str, dict[int, dict[str, float]]] = {prediction: {} for prediction in predictions}
        for seed, prediction in itertools.product(seeds, predictions):
            prior = load_latent_diffusion(self.prior(prediction, seed))
            with torch.no_grad():
                errors[prediction][seed] = _one_step_errors(prior, read[0])
        return _tables(errors, {str(t): (f"t = {t}", 3) for t in ONE_STEP_TIMESTEPS}, "epsilon")

    @torch.no_grad()
    def sheet(self, seed: int = 1) -> Path:
        """Held-out photographs of 96 pixels, each with a corruption, restored for people by the runs of a seed."""
        from matplotlib.figure import Figure

        _, data = data_of("restoration", replace(self.base, size=96, test_count=4 * len(SHOWN)))
        clean = torch.stack([data[4 * number + number % 4][0] for number in range(len(SHOWN))])  # type: ignore[index]
        generators = [torch.Generator().manual_seed(number) for number in range(len(SHOWN))]
        lq = corrupt(clean, list(SHOWN), 2, extent=96 / 224, generator=generators)
        rows = {"degraded": lq}
        for title, (name, steps) in SHEET.items():
            model, _ = load_run(self.out / "table" / name / f"seed{seed}")
            rows[title] = model.restore(lq, "restoration", steps=steps, generator=torch.Generator().manual_seed(seed))
        rows["clean"] = clean
        figure = Figure(figsize=(1.6 * len(SHOWN) + 1, 1.65 * len(rows)))
        for place, (title, images) in enumerate(rows.items()):
            for column, (name, image) in enumerate(zip(SHOWN, images, strict=True)):
                axis = figure.add_subplot(len(rows), len(SHOWN), place * len(SHOWN) + column + 1)
                axis.imshow(image.permute(1, 2, 0))
                axis.set(xticks=[], yticks=[])
                error = float((image - clean[column]).square().mean())
                axis.set_xlabel("" if error == 0 else f"{-10 * math.log10(error):.1f} dB", fontsize=8, labelpad=1)
                if column == 0:
                    axis.set_ylabel(title, rotation=0, ha="right", va="center")
                if place == 0:
                    axis.set_title(name.replace("_", " "), fontsize=9)
        figure.tight_layout(pad=0.3)
        figure.savefig(self.out / "sheet.png", dpi=100)
        return self.out / "sheet.png"


def _one_step_errors(prior: LatentPrior, images: Tensor) -> dict[str, float]:
    clean = prior.encoder(2 * images - 1)
    noise = standard_normal(clean, torch.Generator().manual_seed(0))
    schedule, errors = prior.denoiser.schedule, {}
    for t in ONE_STEP_TIMESTEPS:
        found = denoise(prior.denoiser, schedule.add_noise(clean, noise, t), t, schedule)
        errors[str(t)] = float((found - clean).square().mean() / clean.var())
    return errors


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
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", default="generated", choices=["generated", "photos"])
    parser.add_argument("--contrast", type=float, nargs=2, default=[0.07, 0.18], help="of the generated textures")
    parser.add_argument("--size", type=int, default=48, help="side of all images")
    parser.add_argument("--batch", type=int, default=16, help="of each task")
    parser.add_argument("--prior_steps", type=int, default=5000, help="of the autoencoder; half of those of diffusion")
    parser.add_argument("--prior_images", type=int, default=16000)
    parser.add_argument("--prepare_steps", type=int, default=500)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--test_count", type=int, default=300)
    parser.add_argument("--extent", type=float, default=0.5, help="of the Mixture-B that degrades words")
    parser.add_argument("--precision", default="no", choices=["no", "bf16"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--names", nargs="+", help="folders of the table; the default is all")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # runs side by side, and figures that do not depend on the number of cores
    base = Config(
        out=arguments.out, data=arguments.data, contrast=tuple(arguments.contrast), size=arguments.size,
        severity_weights=[5, 25, 40, 25, 5], clean_too=True, corruption_extent=arguments.size / 224,
        steps=arguments.steps, batch=arguments.batch, test_count=arguments.test_count, control_channels=16, lr=1e-3,
        unseen=arguments.study != "prior", precision=arguments.precision, cpu=True,
    )  # fmt: skip
    tasks = [*READ_BY, "detection"] if arguments.study == "new_task" else [*READ_BY]
    if arguments.study == "words":
        refuse(parser, arguments, "words", "data", "contrast", "size")
        tasks = ["reading"]
        base = replace(
            base, **OPTIONS, size=None, tasks=["restoration", *tasks], degradation="mixture_b", unseen=False,
            mixture_extent=arguments.extent,
        )  # fmt: skip
    else:
        refuse(parser, arguments, arguments.study, "extent")
    experiment = Experiment(
        arguments.out, base, prior_steps=arguments.prior_steps, prior_images=arguments.prior_images,
        prior_batch=8 if arguments.study == "words" else 16, prepare_steps=arguments.prepare_steps, tasks=tasks,
    )  # fmt: skip
    if arguments.study == "tables":
        print(experiment.tables())
        return
    if arguments.study == "latents":
        print(experiment.latents())
        return
    if arguments.study == "one_step":
        print(experiment.one_step(arguments.seeds))
        return
    if arguments.study == "sheet":
        print(experiment.sheet(arguments.seeds[0]))
        return
    names = [*READ, *PLAIN, *FIRST, *WITHOUT, *SECOND]
    if unknown := sorted(set(arguments.names or ()) - set(names)):
        parser.error(f"`names` should be of {', '.join(names)}, found {unknown[0]}.")
    for seed in arguments.seeds:
        if arguments.study == "new_task":
            experiment.new_task(seed)
            continue
        for name in arguments.names or {"prior": PRIOR, "words": WORDS}.get(arguments.study, names):
            experiment.run(name, seed)


if __name__ == "__main__":
    main()
