"""Train a small prior: the one that ships, or one on your own photographs.

    python -m examples.diffloss.train_prior --out runs/prior
    python -m examples.diffloss.train_prior --out runs/prior --keep 0 300 1000 10000

A plain DDPM on small crops: draw t and noise, predict the noise. It stops and resumes at any time (the checkpoint is
written every ``--save-every`` steps), and at the end writes the prior as a diffusers folder, the held-out error by
timestep against an untrained network and against the best linear denoiser, a loss curve and samples.

With ``--keep`` the network as it was after so many steps, before any average, is written to ``kept/STEP``, a diffusers
folder each, and the held-out errors of all of them to ``kept.csv``.
"""

import argparse
import csv
import math
import os
import time
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DModel
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

from examples.common.data.folder import Images, check_folder
from examples.common.data.photos import levels, photographs, random_crops
from examples.common.engine.run_directory import lock_folder
from examples.diffloss.prior_report import report, report_kept
from restoreloss import NoiseSchedule

# No attention: convolutions alone carry over to images larger than the training crops.
ARCHITECTURE: dict[str, Any] = {
    "sample_size": 48,
    "in_channels": 3,
    "out_channels": 3,
    "layers_per_block": 2,
    "block_out_channels": (32, 48, 64, 96),
    "down_block_types": ("DownBlock2D",) * 4,
    "up_block_types": ("UpBlock2D",) * 4,
    "norm_num_groups": 8,
    "add_attention": False,
}
LAST_OF_A_PRIOR = "scheduler_config.json"
"""The file that is written last."""


@dataclass(frozen=True)
class Recipe:
    """The options that decide the result. A checkpoint of others is refused."""

    steps: int = 10_000
    batch: int = 16
    crop: int = 48
    lr: float = 1e-3
    ema: float = 0.999
    seed: int = 0
    jitter: bool = True


class Trainer:
    """The network, its moving average, the optimizer and the random stream: all that a resumed run needs."""

    def __init__(self, recipe: Recipe) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe = recipe
        self.net = UNet2DModel(**ARCHITECTURE)
        self.average = torch.optim.swa_utils.AveragedModel(
            self.net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(recipe.ema)
        )
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=recipe.lr, betas=(0.9, 0.99), weight_decay=0.0)
        warmup = 200
        self.lr_schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer,
            lambda step: min(
                (step + 1) / warmup, 0.5 + 0.5 * torch.cos(torch.tensor(torch.pi * step / recipe.steps)).item()
            ),
        )
        self.generator = torch.Generator().manual_seed(recipe.seed)
        self.schedule = NoiseSchedule.linear()
        # The error of a perfect denoiser falls from 1 to 1e-3 along t. Dividing by the square root of what a white
        # signal of variance 0.02 would give stands halfway between equal absolute and equal relative error.
        abar = self.schedule.alphas_cumprod
        white = 0.02 * abar / (0.02 * abar + 1 - abar)
        self.weight = white.rsqrt() / white.rsqrt().mean()
        self.step = 0

    def train_step(self, photos: Sequence[Tensor]) -> float:
        recipe, generator = self.recipe, self.generator
        x = random_crops(photos, recipe.batch, recipe.crop, generator)
        x = (jitter(x, generator) if recipe.jitter else x) * 2 - 1
        # one timestep from each of `batch` equal bins: far less spread between steps than independent draws
        bins = torch.arange(recipe.batch) + torch.rand(recipe.batch, generator=generator)
        t = (bins * self.schedule.num_timesteps / recipe.batch).long().clamp(max=self.schedule.num_timesteps - 1)
        noise = torch.randn(x.shape, generator=generator)
        x_t = self.schedule.add_noise(x, noise, t)
        error = (self.net(x_t, t).sample - noise).square().mean(dim=(1, 2, 3))
        loss = (self.weight[t] * error).mean()
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        self.optimizer.step()
        self.lr_schedule.step()
        self.average.update_parameters(self.net)
        self.step += 1
        found = float(error.detach().mean())
        if not math.isfinite(found):
            raise FloatingPointError(f"Step {self.step}: the error of the noise is {found}.")
        return found

    def save(self, path: Path, photos: list[str]) -> None:
        state = {
            "recipe": asdict(self.recipe),
            "photos": photos,
            "step": self.step,
            "net": self.net.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "lr_schedule": self.lr_schedule.state_dict(),
            "generator": self.generator.get_state(),
        }
        for name, weight in self.net.named_parameters():
            if not weight.isfinite().all():
                raise FloatingPointError(f"Step {self.step}: {name} is not finite. Nothing was saved of this step.")
        partial = path.with_suffix(f".{os.getpid()}.partial")
        torch.save(state, partial)
        partial.replace(path)

    def resume(self, path: Path, photos: list[str]) -> None:
        state = torch.load(path, weights_only=True)
        for name, now in (("recipe", asdict(self.recipe)), ("photos", photos)):
            if state[name] != now:
                raise SystemExit(f"{path} was made with {name} {state[name]}, not {now}: choose another --out.")
        self.net.load_state_dict(state["net"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.lr_schedule.load_state_dict(state["lr_schedule"])
        self.generator.set_state(state["generator"])
        self.step = state["step"]


def jitter(x: Tensor, generator: torch.Generator) -> Tensor:
    """Give half of the crops another white balance, exposure and gamma: fourteen photographs have few colors."""
    shape = (len(x), 3, 1, 1)
    gain = 0.8 + 0.4 * torch.rand(shape, generator=generator)
    gamma = torch.exp2(torch.rand((len(x), 1, 1, 1), generator=generator) - 0.5)
    chosen = torch.rand((len(x), 1, 1, 1), generator=generator) < 0.5
    return torch.where(chosen, (gain * x**gamma).clamp(0, 1), x)


def export(network: nn.Module, folder: Path) -> UNet2DModel:
    """Write a network in half precision as a diffusers folder, and return it as it will be read."""
    half = UNet2DModel(**ARCHITECTURE)
    half.load_state_dict(network.state_dict())
    half.half().save_pretrained(folder, variant="fp16")
    DDPMScheduler(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear").save_pretrained(
        folder
    )
    return half.float().eval()


def read_log(log: Path, step: int) -> list[list[str]]:
    """The lines up to ``step``; what a killed run wrote beyond its last checkpoint will be written again."""
    rows = list(csv.reader(log.read_text().splitlines())) if log.exists() else []
    return [["step", "noise_mse", "seconds_per_step"]] + [
        row for row in rows[1:] if len(row) == 3 and int(row[0]) <= step
    ]


def save_loss_curve(log: Path, path: Path) -> None:
    with log.open() as file:
        rows = list(csv.DictReader(file))
    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axes = figure.subplots()
    axes.semilogy([int(row["step"]) for row in rows], [float(row["noise_mse"]) for row in rows])
    axes.set(xlabel="step", ylabel="noise error while training")
    axes.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=130)


def train_on(trainer: Trainer, train: Images, out: Path, *, save_every: int, keep: Collection[int] = ()) -> Path:
    """Take the steps that are left; returns the log. The network after the steps to ``keep`` goes to ``out/kept``."""
    checkpoint, log, steps = out / "checkpoint.pt", out / "training_log.csv", trainer.recipe.steps
    if checkpoint.exists():
        trainer.resume(checkpoint, sorted(train))
    kept = {step: out / "kept" / f"{step}" for step in keep}
    missing = {step: folder for step, folder in kept.items() if not (folder / LAST_OF_A_PRIOR).exists()}
    if passed := [step for step in missing if step < trainer.step]:
        raise ValueError(f"`--keep` should be steps to come, found {passed[0]} where {trainer.step} are done.")
    rows = read_log(log, trainer.step)
    with log.open("w", newline="") as file:
        csv.writer(file).writerows(rows)

    photos = levels(train, smallest=96)
    with tqdm(total=steps, initial=trainer.step, desc="prior", unit="step") as progress:
        while True:
            if trainer.step in missing:
                export(trainer.net, missing.pop(trainer.step))
            if trainer.step >= steps:
                break
            started, errors = time.perf_counter(), []
            stop = min([steps, trainer.step + save_every, *missing])
            for _ in range(stop - trainer.step):
                errors.append(trainer.train_step(photos))
                progress.update()
                progress.set_postfix(noise_mse=f"{sum(errors) / len(errors):.4f}")
            seconds = (time.perf_counter() - started) / len(errors)
            trainer.save(checkpoint, sorted(train))
            with log.open("a", newline="") as file:
                csv.writer(file).writerow([trainer.step, f"{sum(errors) / len(errors):.6f}", f"{seconds:.3f}"])
    return log


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/prior"), help="run directory (default: %(default)s)")
    parser.add_argument(
        "--images", type=Path, metavar="DIR", help="your own images instead of the built-in photographs"
    )
    parser.add_argument("--steps", type=int, default=Recipe.steps, help="training steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--save-every", type=int, default=250, metavar="STEPS")
    parser.add_argument("--keep", type=int, nargs="+", default=[], metavar="STEP", help="write the network of each")
    args = parser.parse_args()
    for name, least in (("steps", 1), ("save_every", 1), ("seed", 0)):
        if getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')} should be at least {least}, found {getattr(args, name)}")
    try:
        if wrong := [step for step in args.keep if not 0 <= step <= args.steps]:
            raise ValueError(f"`--keep` should be steps from 0 to the {args.steps} of `--steps`, found {wrong[0]}.")
        check_folder(args.out, "--out")
        train, held_out = photographs(args.images, smallest=96)
        owner = lock_folder(args.out)
        trainer = Trainer(Recipe(steps=args.steps, seed=args.seed))
        log = train_on(trainer, train, args.out, save_every=args.save_every, keep=args.keep)
    except ValueError as error:
        parser.error(str(error))
    except FloatingPointError as error:
        parser.exit(1, f"train_prior: {error}\n")
    save_loss_curve(log, args.out / "loss.png")
    print(report(export(trainer.average.module, args.out), train, held_out, args.out))
    if args.keep:
        report_kept({step: args.out / "kept" / f"{step}" for step in args.keep}, held_out, args.out / "kept.csv")
    print(f"\nprior, training_log.csv, errors.csv, loss.png and samples.png are in {args.out}")
    del owner


if __name__ == "__main__":
    main()
