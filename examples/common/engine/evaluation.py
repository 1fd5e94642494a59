"""Figures of restored images: how well networks read them, and how similar they are to the HR images."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from examples.common.data.datasets import FolderData
from examples.common.data.degrade import Degrade
from examples.common.data.folder import image_size
from examples.common.data.task_data import crop_to_multiple, pad_to_multiple
from examples.common.data.tasks import IGNORED, InMemory, Task, TaskData, clean_of, collate, to_device
from examples.common.engine.perceptual import lite0_distance
from examples.common.engine.recipe import as_value_error
from examples.common.engine.recognition import Recognition, features_of
from examples.common.engine.run_directory import class_names_of, finished_run
from examples.common.networks.recognizers import recognizer
from examples.common.networks.text_readers import PPOCR, english_g2
from examples.common.networks.weights import load_weights
from restoreloss import frozen
from restoreloss.restorers.tiling import crop_to

BATCH, SAMPLES = 50, 8
TEXT_READERS: dict[str, Callable[[], nn.Module]] = {"english_g2": english_g2, "pp_ocr": PPOCR}
GAINS = {
    "gain_below_15": (-math.inf, 15.0), "gain_15_to_20": (15.0, 20.0), "gain_20_to_25": (20.0, 25.0),
    "gain_above_25": (25.0, math.inf),
}  # fmt: skip
"""Figures by the PSNR of the degraded image, from and below."""
ReaderName = Literal["score", "fixed_hr", "judge"]
"""The recognizer of a run, and two that were trained on HR images in runs of their own."""


def usable(data: TaskData, task: Task, name: str = "the test data", *, labels: bool = True, most: int = 8) -> TaskData:
    """A few images that can be read and have a label to compare with, as data of their own: of files the first of each
    size, of others the first.

    Args:
        data: in which they are looked for.
        task: of the labels. Without any box the mAP is -100 %, without any pixel with a class the mean IoU is NaN.
        name: of the data, in the error.
        labels: False where no network reads the images.
        most: sizes.

    Raises:
        ValueError: If there is none.
    """
    read, found = 0, dict[Any, tuple[Tensor, Any]]()
    for index in range(len(data)):
        size = image_size(data.samples[index][0]) if isinstance(data, FolderData) else None
        if size in found:
            continue
        sample = data[index]
        if sample is None:
            continue
        read += 1
        if labels and task == "detection" and not len(sample[1]["boxes"]):
            continue
        if labels and task == "segmentation" and bool((sample[1] == IGNORED).all()):
            continue
        found[size] = sample
        if len(found) == most or size is None:
            break
    if found:
        return _Few(data, [*found.values()])
    if not read:
        raise ValueError(f"{name} should hold an image that can be read, found none of {len(data)}.")
    what = "box" if task == "detection" else "pixel with a class"
    raise ValueError(f"{name} should hold a {what}, found none in {read} images: the score could not be computed.")


class _Few:
    """Data of a few samples."""

    def __init__(self, data: TaskData, samples: list[tuple[Tensor, Any]]) -> None:
        self.task, self.class_names, self.samples = data.task, data.class_names, samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        return self.samples[index]


def load_recognizer(run: Path, data: TaskData | None = None) -> nn.Module:
    """The recognizer of a finished run, frozen, in eval mode; "english_g2" and "pp_ocr" are those of their packages.

    Args:
        run: its directory.
        data: what it is to read.

    Raises:
        ValueError: If there is no finished run, or it has another task or other classes than the data.
    """
    if str(run) in TEXT_READERS:
        return TEXT_READERS[str(run)]()
    settings, results = finished_run(run, "examples.sr4ir.train", "recognizer.safetensors")
    task, known = settings["task"], int(results["num_classes"])
    if "score" not in results:
        raise ValueError(f"{run} should have trained a recognizer, found a run of {settings['method']!r}.")
    if data is not None and (task, known) != (data.task, len(data.class_names)):
        raise ValueError(
            f"{run} should be a network for {data.task} with {len(data.class_names)} classes, as the data have them, "
            f"found one for {task} with {known}."
        )
    if data is not None and (names := class_names_of(run, task)) not in (None, [*data.class_names]):
        raise ValueError(
            f"{run} should be a network for the classes {data.class_names[:3]} ..., found {names[:3]} ...."
        )
    network = recognizer(
        settings["recognizer"], task, known, pretrained=False,
        aux=settings["aux_weight"] > 0,
    )  # fmt: skip
    load_weights(network, run / "recognizer.safetensors")
    return network.eval().requires_grad_(False)


@torch.no_grad()
def evaluate(
    data: TaskData,
    recognition: Recognition,
    *,
    degrade: Degrade,
    restore: Callable[[Any, Any], Any],
    trained: list[nn.Module],
    readers: Mapping[ReaderName, nn.Module | None],
    multiple: int = 1,
    pad: bool = False,
    lite0: bool = False,
    workers: int = 0,
) -> tuple[dict[str, float], dict[str, Any]]:
    """All figures of one run on the test images.

    Args:
        data: test images.
        recognition: the task.
        degrade: (hr, number of the first) -> lr.
        restore: (hr, lr) -> the images that are read.
        trained: the networks of the run, in eval mode meanwhile.
        readers: the networks that read them, by the figure; None where there is none.
        multiple: of the sides; what is beyond is cut away.
        pad: continue the images by their edges to the multiple instead, and cut what is read back.
        lite0: compare by :func:`examples.common.engine.perceptual.lite0_distance` as well.
        workers: processes that read images.

    Returns:
        The figures: those of the readers in percent, and "score_on_hr", where the first reads HR images;
        "judge_distance", L1 between the judge's features of what was read and of HR, relative to HR's. For what is not
        HR itself "psnr" in dB, "ssim" and "lite0", means over images, and "psnr_of_mse", that of the mean squared
        error, which a few flat images with a PSNR above 40 do not dominate. Where the degraded images have the size of
        HR, the PSNRs of them as "lq_psnr" and "lq_psnr_of_mse", and "gain_below_15", "gain_15_to_20",
        "gain_20_to_25", "gain_above_25": what was gained in PSNR, over the images whose degraded PSNR lies there.
        And some images: "lr", "restored", "hr", "predictions", "truth".
    """
    present: dict[str, nn.Module] = {name: network for name, network in readers.items() if network is not None}
    if "score" in present:
        present["score_on_hr"] = present["score"]
    metrics = {name: recognition.metric() for name in present}
    device = next(p.device for network in trained for p in network.parameters())
    fidelity, sheet = _Fidelity(present.get("judge"), lite0_distance(device) if lite0 else None), _Sheet()
    # segmentation images on disk differ in size, and are not cropped for a test
    batch = BATCH if isinstance(data, InMemory) else 1 if data.task == "segmentation" else 16
    batches: DataLoader[Any] = DataLoader(data, batch, collate_fn=collate, num_workers=workers)  # type: ignore[arg-type]
    count = 0
    with frozen(*trained):
        for images_and_targets in batches:
            if images_and_targets is None:  # none could be read
                continue
            images, targets = images_and_targets
            recognition.check(targets)
            hr, targets = (images, targets) if pad else crop_to_multiple(images, targets, multiple)
            hr = to_device(hr, device)
            whole = pad_to_multiple(hr, multiple) if pad else hr
            lr = degrade(whole, count)
            count += len(hr)
            hr, whole = (clean_of(hr), clean_of(whole)) if pad else [clean_of(hr)] * 2
            sizes = " or ".join(sorted({f"{image.shape[1]}x{image.shape[2]}" for image in whole}))
            with as_value_error(f"The networks should take test images of {sizes} pixels"):
                seen = restore(whole, lr)
            seen = hr if seen is whole else crop_to(seen, hr) if pad else seen
            found = {
                name: to_device(recognition.predict(network, hr if name == "score_on_hr" else seen), "cpu")
                for name, network in present.items()
            }
            for name, predictions in found.items():
                metrics[name].update(predictions, targets)
            fidelity.update(seen, hr, lr)
            first = next(iter(found.values()), None)
            truth = [recognition.describe(target) for target in targets[:SAMPLES]]
            captions = [""] * len(truth) if first is None else [recognition.describe(one) for one in first[:SAMPLES]]
            sheet.update(lr, seen, hr, captions, truth)
    scores = {name: recognition.score(metric) for name, metric in metrics.items()}
    figures = {name + part: value for name, parts in scores.items() for part, value in parts.items()}
    return figures | fidelity.figures(), sheet.samples()


def _decibels(error: Tensor) -> Tensor:
    """PSNR of a squared error; of none at all, 100."""
    return -10 * error.clamp(min=1e-10).log10()


class _Fidelity:
    """The similarity of restored images to HR: means over images."""

    def __init__(self, judge: nn.Module | None, distance: Callable[[Tensor, Tensor], Tensor] | None = None) -> None:
        self.distance = distance
        self.features = None if judge is None or isinstance(judge, PPOCR) else features_of(judge)
        self.values: dict[str, list[Tensor]] = {}

    def update(self, seen: Any, hr: Any, lr: Any) -> None:
        stacked = isinstance(hr, Tensor)
        for z, x, y in [(seen, hr, lr)] if stacked else zip(seen, hr, lr, strict=True):
            if self.features is not None:
                found, wanted = (self.features(images if stacked else [images]) for images in (z, x))
                gaps = torch.stack([(found[name] - wanted[name]).abs().flatten(1).mean(1) for name in found])
                sizes = torch.stack([wanted[name].abs().flatten(1).mean(1) for name in found])
                self._keep("judge_distance", gaps.sum(0) / sizes.sum(0))
            if seen is not hr:
                z, x, y = (images if stacked else images[None] for images in (z, x, y))
                psnr = peak_signal_noise_ratio(z, x, data_range=1.0, reduction="none", dim=(1, 2, 3))
                self._keep("psnr", psnr)
                self._keep("ssim", structural_similarity_index_measure(z, x, data_range=1.0, reduction="none"))
                if self.distance is not None:
                    self._keep("lite0", self.distance(z, x))
                self._keep("mse", (z - x).square().flatten(1).mean(1))
                if y.shape == x.shape:
                    self._keep("lq_mse", (y - x).square().flatten(1).mean(1))

    def figures(self) -> dict[str, float]:
        every = {name: torch.cat(values).cpu() for name, values in self.values.items()}
        errors = {name: every.pop(name).double() for name in ("mse", "lq_mse") if name in every}
        figures = {name: float(values.mean()) for name, values in every.items()}
        if "mse" in errors:
            figures["psnr_of_mse"] = float(_decibels(errors["mse"].mean()))
        if "lq_mse" in errors:
            before = _decibels(errors["lq_mse"])
            figures["lq_psnr"] = float(before.mean())
            figures["lq_psnr_of_mse"] = float(_decibels(errors["lq_mse"].mean()))
            gained = _decibels(errors["mse"]) - before
            for name, (low, high) in GAINS.items():
                there = (low <= before) & (before < high)
                figures |= {name: float(gained[there].mean())} if there.any() else {}
        return figures

    def _keep(self, name: str, values: Any) -> None:
        self.values.setdefault(name, []).append(values.reshape(-1))


class _Sheet:
    """The first images, of one size, to be looked at."""

    def __init__(self) -> None:
        self.images: list[tuple[Tensor, Tensor, Tensor]] = []
        self.words: list[tuple[str, str]] = []

    def update(self, lr: Any, seen: Any, hr: Any, captions: list[str], truth: list[str]) -> None:
        for number, words in enumerate(zip(captions, truth, strict=True)):
            image = tuple(images[number].cpu() for images in (lr, seen, hr))
            same = not self.images or image[2].shape == self.images[0][2].shape
            if same and len(self.images) < SAMPLES:
                self.images.append(image)
                self.words.append(words)

    def samples(self) -> dict[str, Any]:
        lr, seen, hr = (torch.stack(images) for images in zip(*self.images, strict=True))
        predictions, truth = (list(words) for words in zip(*self.words, strict=True))
        return {"lr": lr, "restored": seen, "hr": hr, "predictions": predictions, "truth": truth}
