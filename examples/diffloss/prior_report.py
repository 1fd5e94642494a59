"""The error of a prior by timestep, next to that of the best linear filter.

    python -m examples.diffloss.prior_report                       # the prior that ships
    python -m examples.diffloss.prior_report --prior runs/prior    # yours

On crops of the held-out photographs it measures how well the noise is predicted at several timesteps, against the same
network untrained and against the best linear denoiser, and draws what the prior removes and what it dreams.
"""

import argparse
import csv
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from diffusers import DDIMScheduler, UNet2DModel
from matplotlib.figure import Figure
from scipy.fft import dctn
from torch import Tensor
from tqdm import tqdm

from examples.common.data.folder import check_folder
from examples.common.data.photos import grid_crops, photographs
from restoreloss import NoiseSchedule, as_denoiser, small_prior

TIMESTEPS = (10, 25, 50, 100, 200, 400, 600, 800)
CROP, CROPS_EACH = 64, 16


def crops_of(photos: Iterable[Tensor], each: int) -> Tensor:
    """Crops spread over each photograph, in [-1, 1]: (each * photographs, 3, 64, 64)."""
    return torch.cat([grid_crops(photo, CROP, each) for photo in photos]) * 2 - 1


@torch.no_grad()
def noise_errors(
    predict: Callable[[Tensor, int], Tensor],
    schedule: NoiseSchedule,
    crops: Tensor,
    timesteps: Sequence[int] = TIMESTEPS,
) -> list[float]:
    """Mean squared error of the predicted noise at each timestep, with the same noise for every model."""
    errors = []
    for t in timesteps:
        noise = torch.randn(crops.shape, generator=torch.Generator().manual_seed(t))
        x_t = schedule.add_noise(crops, noise, t)
        predicted = torch.cat([predict(part, t) for part in x_t.split(16)])
        errors.append(float((predicted - noise).square().mean()))
    return errors


def linear_errors(
    schedule: NoiseSchedule, crops: Tensor, fitted_to: Tensor, timesteps: Sequence[int] = TIMESTEPS
) -> list[float]:
    r"""Expected error on ``crops`` of the best linear denoiser for the statistics of ``fitted_to``.

    In the DCT domain, where photographs are nearly uncorrelated, each coefficient of the three channels has a mean m
    and a covariance S (3x3). With :math:`\sigma^2 = 1 - \bar\alpha` and :math:`M = (\bar\alpha S + \sigma^2 I)^{-1}`
    the Wiener estimate of the noise is :math:`\sigma M (x_t - \sqrt{\bar\alpha} m)`; its squared error, averaged over
    the noise, is :math:`\|I - \sigma^2 M\|_F^2 + \sigma^2 \bar\alpha \|M (x - m)\|^2` for an image x.
    """

    def transform(images: Tensor) -> Tensor:
        return torch.from_numpy(dctn(images.double().numpy(), axes=(2, 3), norm="ortho"))

    known = transform(fitted_to)
    mean = known.mean(dim=0)
    covariance = torch.einsum("nchw,ndhw->hwcd", known - mean, known - mean) / len(known)
    power, basis = torch.linalg.eigh(covariance)
    squares = torch.einsum("hwcd,nchw->nhwd", basis, transform(crops) - mean).square().mean(dim=0)
    errors = []
    for abar in (float(schedule.alphas_cumprod[t]) for t in timesteps):
        variance = 1 - abar
        inverse = 1 / (abar * power.clamp(min=0) + variance)
        errors.append(float(((1 - variance * inverse) ** 2 + variance * abar * inverse**2 * squares).mean()))
    return errors


def report_kept(folders: Mapping[int, Path], held_out: Mapping[str, Tensor], path: Path) -> None:
    """Write the held-out error at each timestep of the states that a training kept, by their steps, as CSV.

    The last row, "small", is the prior that ships.
    """
    schedule, crops = NoiseSchedule.linear(), crops_of(held_out.values(), CROPS_EACH)
    priors = {
        f"{step}": as_denoiser(UNet2DModel.from_pretrained(folder, variant="fp16").float().eval())
        for step, folder in sorted(folders.items())
    }
    priors["small"] = as_denoiser(small_prior())
    rows = []
    for name, prior in priors.items():
        rows.append([name, *(f"{error:.6f}" for error in noise_errors(prior, schedule, crops))])
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["step", *TIMESTEPS], *rows])


def report(prior: UNet2DModel, train: Mapping[str, Tensor], held_out: Mapping[str, Tensor], folder: Path) -> str:
    """Write ``errors.csv`` and ``samples.png`` to ``folder``; return the table."""
    schedule, crops = NoiseSchedule.linear(), crops_of(held_out.values(), CROPS_EACH)
    torch.manual_seed(0)
    untrained = UNet2DModel.from_config(prior.config).eval()
    columns = {
        "prior": noise_errors(as_denoiser(prior), schedule, crops),
        "untrained": noise_errors(as_denoiser(untrained), schedule, crops),
        "linear": linear_errors(schedule, crops, crops_of(train.values(), 64)),
        "linear, told": linear_errors(schedule, crops, crops),
    }
    with (folder / "errors.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["timestep", *columns])
        writer.writerows([t, *(f"{e:.6f}" for e in row)] for t, *row in zip(TIMESTEPS, *columns.values(), strict=True))
    save_samples(prior, schedule, crops[3 :: CROPS_EACH // 2], folder / "samples.png")
    lines = [f"{'t':>5}" + "".join(f"{name:>14}" for name in columns) + f"{'prior/linear':>14}"]
    for t, *row in zip(TIMESTEPS, *columns.values(), strict=True):
        lines.append(f"{t:>5}" + "".join(f"{error:>14.4f}" for error in row) + f"{row[0] / row[2]:>14.2f}")
    lines.append("linear: Wiener filter fitted to the training photographs; told: to these very crops")
    for name, photo in held_out.items():
        errors = noise_errors(as_denoiser(prior), schedule, crops_of([photo], CROPS_EACH), (10, 100, 200, 400))
        lines.append(f"{name + ' at t = 10, 100, 200, 400':<40}" + "".join(f"{error:>9.4f}" for error in errors))
    return "\n".join(lines)


@torch.no_grad()
def save_samples(prior: UNet2DModel, schedule: NoiseSchedule, crops: Tensor, path: Path) -> None:
    """Held-out crops, noisy at three timesteps, denoised in one step; and images drawn from noise alone."""
    denoiser, generator = as_denoiser(prior), torch.Generator().manual_seed(0)
    rows = {"held-out photographs": crops}
    for t in (50, 200, 400):
        noise = torch.randn(crops.shape, generator=generator)
        x_t = schedule.add_noise(crops, noise, t)
        rows[f"noisy, t = {t}"] = x_t / x_t.abs().amax().clamp(max=2)
        rows[f"denoised in one step, t = {t}"] = schedule.predict_x0(x_t, denoiser(x_t, t), t)
    ddim = DDIMScheduler(num_train_timesteps=schedule.num_timesteps, beta_start=1e-4, beta_end=0.02, clip_sample=True)
    ddim.set_timesteps(50)
    image = torch.randn(crops.shape, generator=generator)
    for t in tqdm(ddim.timesteps, desc="samples", unit="step", leave=False):
        image = ddim.step(denoiser(image, int(t)), int(t), image).prev_sample
    rows["drawn from noise alone (DDIM, 50 steps)"] = image

    figure = Figure(figsize=(1.1 * len(crops), 1.35 * len(rows)), layout="constrained")
    for axes, (title, images) in zip(figure.subplots(len(rows), 1), rows.items(), strict=True):
        strip = torch.cat(list(images), dim=2)
        axes.imshow((strip / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).numpy(), interpolation="nearest")
        axes.set_title(title, fontsize=8, loc="left", pad=2)
        axes.set_axis_off()
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--prior", type=Path, metavar="DIR", help="a folder train_prior wrote (default: the one that ships)"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/prior_report"), help="(default: %(default)s)")
    parser.add_argument(
        "--images", type=Path, metavar="DIR", help="your own images instead of the built-in photographs"
    )
    args = parser.parse_args()
    try:
        check_folder(args.out, "--out")
        train, held_out = photographs(args.images, smallest=96)
        if args.prior is not None and not (args.prior / "config.json").is_file():
            raise ValueError(
                f"`--prior` should be a folder that train_prior wrote, found no config.json in {args.prior}."
            )
        prior = small_prior() if args.prior is None else UNet2DModel.from_pretrained(args.prior, variant="fp16").float()
    except (ValueError, OSError) as error:
        parser.error(str(error))
    args.out.mkdir(parents=True, exist_ok=True)
    print(report(prior.eval(), train, held_out, args.out))
    print(f"\n{args.out / 'errors.csv'}\n{args.out / 'samples.png'}")


if __name__ == "__main__":
    main()
