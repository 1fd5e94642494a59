"""The loss, the predictions and the score of a task network, whatever its task."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex
from torchvision.transforms.v2.functional import normalize

from examples.common.data.tasks import IGNORED, Task
from examples.common.engine.reading import WordsRead, ctc
from examples.common.networks.text_readers import TDP_LAYERS, EnglishG2, to_english_g2
from restoreloss.features import FeatureExtractor
from restoreloss.frozen import unwrap
from restoreloss.normalization import IMAGENET, stated_by


def features_of(network: nn.Module, layers: Sequence[str] | None = None) -> FeatureExtractor:
    """The features of a network of images in [0, 1], normalized as it is trained here."""
    if isinstance(unwrap(network), EnglishG2):
        return FeatureExtractor(network, layers or TDP_LAYERS, normalize=to_english_g2)
    return FeatureExtractor(network, layers, normalize=stated_by(unwrap(network)) or "imagenet")


class Recognition:
    """A task: the loss, the predictions and the score in percent of its network.

    Images are float in [0, 1], (N, 3, H, W), or a list of (3, H, W) for detection; they are normalized here, unless the
    network does it (torchvision's detectors).

    Args:
        task: what is read.
        class_names: by label.
        aux_weight: weight of the loss of an auxiliary head, where the network returns "aux".
    """

    def __init__(self, task: Task, class_names: Sequence[str], *, aux_weight: float = 0.0) -> None:
        self.task: Task = task
        self.aux_weight = aux_weight
        self.class_names = tuple(class_names)

    def check(self, targets: Any) -> None:
        """Raise ``ValueError`` for a label that is no class."""
        labels = [target["labels"] for target in targets] if self.task == "detection" else [targets]
        if self.task == "reading" and not bool((targets > 0).any(dim=1).all()):
            raise ValueError("Lines of text should have a letter each, found one without.")
        lowest = 1 if self.task == "detection" else 0
        for values in labels:
            known = values[values != IGNORED] if self.task == "segmentation" else values
            if known.numel() and not (lowest <= int(known.min()) and int(known.max()) < len(self.class_names)):
                raise ValueError(
                    f"Labels should be from {lowest} to {len(self.class_names) - 1}, found {int(known.min())} to "
                    f"{int(known.max())}."
                )

    def loss(self, network: nn.Module, images: Any, targets: Any) -> Tensor:
        """The task loss; torchvision's detectors give theirs in train mode only."""
        if len(images) != len(targets):
            raise ValueError(f"`targets` should be as many as `images` ({len(images)}), found {len(targets)}.")
        if self.task == "detection":
            losses = network(list(images), targets)
            if not isinstance(losses, dict):
                raise ValueError("A detector should be in train mode to give its losses, found eval mode.")
            return torch.stack(list(losses.values())).sum()
        if self.task == "reading":
            return ctc(network(to_english_g2(images)), targets)
        ignored = IGNORED if self.task == "segmentation" else -100
        output = self._output(network, images)
        loss = F.cross_entropy(_main(output).float(), targets, ignore_index=ignored)
        if self.aux_weight and isinstance(output, dict) and "aux" in output:
            loss = loss + self.aux_weight * F.cross_entropy(output["aux"].float(), targets, ignore_index=ignored)
        return loss

    @torch.no_grad()
    def predict(self, network: nn.Module, images: Any) -> Any:
        """Classes (N,) or (N, H, W), a list of {"boxes", "labels", "scores"}, or texts, by a network in eval mode."""
        if self.task == "detection":
            return network(list(images))
        if self.task == "reading":
            return network.read(images)  # type: ignore[operator]
        return _main(self._output(network, images)).argmax(dim=1)

    def metric(self) -> Metric:
        """An empty metric of torchmetrics: accuracy, mean IoU, the mAP of COCO or words, of this process alone."""
        if self.task == "classification":
            return MulticlassAccuracy(len(self.class_names), average="micro", sync_on_compute=False)
        if self.task == "segmentation":
            return MulticlassJaccardIndex(len(self.class_names), ignore_index=IGNORED, sync_on_compute=False)
        if self.task == "reading":
            return _Texts(self.class_names)
        from torchmetrics.detection import MeanAveragePrecision

        return MeanAveragePrecision(sync_on_compute=False)

    @staticmethod
    def score(metric: Metric) -> dict[str, float]:
        """The score of all that the metric has seen, in percent, as ""; of texts, "_errors" of characters as well."""
        value = metric.compute()
        if isinstance(metric, WordsRead):
            return {"": float(value["words"]), "_errors": float(value["character_errors"])}
        return {"": 100 * float(value["map"] if isinstance(value, dict) else value)}

    def describe(self, prediction: Any) -> str:
        """A few words for a caption: the class, the classes of a map, the surest box, or the text."""
        if self.task == "reading":
            return prediction if isinstance(prediction, str) else _text(prediction, self.class_names)
        if self.task == "classification":
            return self.class_names[int(prediction)]
        if self.task == "segmentation":
            present = [int(label) for label in prediction.unique() if 0 < label < len(self.class_names)]
            return ", ".join(self.class_names[label] for label in present[:2]) or self.class_names[0]
        if not len(prediction["labels"]):
            return "nothing"
        best = int(prediction["scores"].argmax()) if "scores" in prediction else 0
        return self.class_names[int(prediction["labels"][best])]

    def _output(self, network: nn.Module, images: Tensor) -> Any:
        mean, std = stated_by(unwrap(network)) or IMAGENET
        return network(normalize(images, list(mean), list(std)))


def _main(output: Any) -> Tensor:
    logits: Tensor = output["out"] if isinstance(output, dict) else output
    return logits


class _Texts(WordsRead):
    """:class:`WordsRead` whose targets are classes of characters."""

    def __init__(self, class_names: Sequence[str]) -> None:
        super().__init__()
        self.class_names = tuple(class_names)

    def update(self, read: Sequence[str], targets: Tensor) -> None:  # type: ignore[override]
        super().update(read, [_text(target, self.class_names) for target in targets])


def _text(target: Tensor, class_names: Sequence[str]) -> str:
    return "".join(class_names[number] for number in target.tolist())
