"""What two readers read in restored lines, and how near the images are to the clean ones: scores, intervals, table."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from examples.common.engine.reading import character_errors, words_read
from examples.common.networks.text_readers import Read

METHODS = {"l1": "L1", "tdp": "L1 + TDP"}
READING = {"words_read": "words read (%)", "character_error_rate": "character error rate (%)"}
FIDELITY = {"psnr": "PSNR (dB)", "ssim": "SSIM"}


@dataclass(frozen=True)
class Scores:
    """What was measured on each test image, (N,), what the readers read by their names."""

    read: dict[str, list[str]]
    words_read: dict[str, Tensor]
    character_error_rate: dict[str, Tensor]
    psnr: Tensor
    ssim: Tensor

    def by_metric(self) -> dict[str, Tensor]:
        """Each metric by the name that the table has for it."""
        rows = {
            f"{reader} reader: {title}": getattr(self, metric)[reader]
            for reader in self.read
            for metric, title in READING.items()
        }
        return rows | {title: getattr(self, metric) for metric, title in FIDELITY.items()}

    def means(self) -> dict[str, Any]:
        """The mean of each metric over the test images, those of reading by reader."""
        reading = {
            metric: {reader: float(values.mean()) for reader, values in getattr(self, metric).items()}
            for metric in READING
        }
        return reading | {metric: float(getattr(self, metric).mean()) for metric in FIDELITY}


def measure(images: Tensor, clean: Tensor, texts: Sequence[str], readers: Mapping[str, Read]) -> Scores:
    """The scores of images in [0, 1]."""
    read = {name: reader(images) for name, reader in readers.items()}
    psnr = peak_signal_noise_ratio(images, clean, data_range=1.0, reduction="none", dim=(1, 2, 3))
    ssim = structural_similarity_index_measure(images[:, :1], clean[:, :1], data_range=1.0, reduction="none")
    return Scores(
        read,
        {name: words_read(said, texts) for name, said in read.items()},
        {name: character_errors(said, texts) for name, said in read.items()},
        torch.as_tensor(psnr),
        torch.as_tensor(ssim),
    )


def interval(values: Tensor) -> tuple[float, float]:
    """The 95 % bootstrap interval of the mean of (images,) or (seeds, images): seeds are drawn anew, and images."""
    generator = torch.Generator().manual_seed(0)
    rows = values if values.ndim == 2 else values[None]
    seeds, images = rows.shape
    means = []
    for _ in range(2000):
        chosen = rows[torch.randint(seeds, (seeds,), generator=generator)]
        means.append(chosen[:, torch.randint(images, (images,), generator=generator)].mean())
    low, high = torch.stack(means).quantile(torch.tensor([0.025, 0.975]))
    return float(low), float(high)


def table(scores: Mapping[str, Scores], seconds: Mapping[str, float]) -> str:
    """Means over the test images, and the paired difference that the TDP loss makes, with its 95 % interval."""
    columns = {name: scores[name].by_metric() for name in ("degraded", *METHODS)}
    rows = [f"{'':<42}{'degraded':>10}{'L1':>10}{'L1 + TDP':>10}   difference to L1 [95 %]"]
    for metric in columns["l1"]:
        digits = 3 if metric == "SSIM" else 2
        means = "".join(f"{float(column[metric].mean()):>10.{digits}f}" for column in columns.values())
        difference = columns["tdp"][metric] - columns["l1"][metric]
        low, high = interval(difference)
        rows.append(
            f"{metric:<42}{means}   {float(difference.mean()):+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"
        )
    times = "".join(f"{1000 * seconds[name]:>10.0f}" for name in METHODS)
    rows.append(f"{'time of a step (ms)':<42}{'-':>10}{times}")
    return "\n".join(rows)


def results(scores: Mapping[str, Scores]) -> dict[str, Any]:
    """The means by metric, reader and method, those of the degraded and the clean images, and the differences."""

    def means(names: Sequence[str]) -> dict[str, Any]:
        by_name = {name: scores[name].means() for name in names}
        reading = {
            metric: {
                reader: {name: found[metric][reader] for name, found in by_name.items()} for reader in scores["l1"].read
            }
            for metric in READING
        }
        return reading | {metric: {name: found[metric] for name, found in by_name.items()} for metric in FIDELITY}

    rows = {name: scores[name].by_metric() for name in METHODS}
    difference = {metric: interval(rows["tdp"][metric] - rows["l1"][metric]) for metric in rows["l1"]}
    return means(list(METHODS)) | {"references": means(["degraded", "clean"]), "difference": difference}
