"""The task "reading": lines of text as data, what their readers are trained and scored with, and a run of SR4IR."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from examples.common.data.degrade import degradation, low_resolution
from examples.common.data.options import DataOptions
from examples.common.data.task_data import dataset
from examples.common.data.tasks import ENGLISH_G2_CHARACTERS
from examples.common.data.words import encoded, lines
from examples.common.engine.evaluation import load_recognizer
from examples.common.engine.recognition import Recognition, features_of
from examples.common.networks.recognizers import recognizer
from examples.common.networks.text_readers import TDP_LAYERS, EnglishG2
from examples.sr4ir.config import Config
from examples.sr4ir.train import Trainer
from examples.unirestore import prepare as unirestore_prepare
from examples.unirestore.config import Config as UniRestoreConfig
from examples.unirestore.train import Trainer as UniRestore
from tests.recipes.test_reading import needs_reading

NAMES = ("", *ENGLISH_G2_CHARACTERS)
WORDS: dict[str, Any] = {
    "task": "reading", "data": "words", "recognizer": "english_g2", "noise": 40.0, "train_count": 8, "test_count": 8,
    "batch": 4, "steps": 1, "cpu": True, "fixed_hr": Path("english_g2"), "judge": Path("pp_ocr"),
}  # fmt: skip


def test_the_score_is_words_and_errors_in_percent() -> None:
    reading = Recognition("reading", NAMES)
    metric = reading.metric()
    metric.update(["Word", "ward"], encoded(["word", "word"], ENGLISH_G2_CHARACTERS))
    metric.update(["ab"], encoded(["abcd"], ENGLISH_G2_CHARACTERS))
    assert reading.score(metric) == pytest.approx({"": 100 / 3, "_errors": (0 + 25 + 50) / 3})
    assert reading.describe("said") == "said"
    assert reading.describe(encoded(["word", "longer"], ENGLISH_G2_CHARACTERS)[0]) == "word"


def test_labels_outside_of_the_alphabet_and_empty_lines_are_named() -> None:
    reading = Recognition("reading", NAMES)
    with pytest.raises(ValueError, match="Labels should be from 0 to 96, found 0 to 97"):
        reading.check(torch.tensor([[1, 97, 0]]))
    with pytest.raises(ValueError, match="should have a letter each"):
        reading.check(torch.tensor([[1, 2], [0, 0]]))


def test_the_loss_of_a_live_reader_reaches_all_of_it_but_its_batch_statistics() -> None:
    network = EnglishG2().train()
    assert network.training
    assert not any(module.training for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d))
    targets = encoded(["ab", "word"], ENGLISH_G2_CHARACTERS)
    before = {name: value.clone() for name, value in network.named_buffers()}
    Recognition("reading", NAMES).loss(network, torch.rand(2, 3, 64, 160), targets).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())
    assert all(torch.equal(value, before[name]) for name, value in network.named_buffers())


def test_readers_have_their_own_layers_and_nothing_else_reads_text() -> None:
    found = features_of(EnglishG2().eval())(torch.rand(1, 3, 64, 160))
    assert tuple(found) == TDP_LAYERS
    for name, task in (("small", "reading"), ("english_g2", "classification")):
        with pytest.raises(ValueError, match="`recognizer` should be 'english_g2' for reading and for nothing else"):
            recognizer(name, task, 97)  # type: ignore[arg-type]
    for options in ({"task": "reading"}, {"data": "words"}):
        with pytest.raises(ValueError, match="`data` should be 'words' for the task 'reading' alone"):
            dataset(DataOptions(**options), "train", 0)


def test_noise_and_jpeg_come_after_the_reduction() -> None:
    images = torch.full((3, 3, 32, 32), 0.5)
    images[:, :, 8:24, 8:24] = torch.rand(3, 1, 1, 1)
    reduced = low_resolution(images, 4)
    assert torch.equal(degradation(DataOptions(), 1)(images, 5), reduced)
    noisy = degradation(DataOptions(noise=20), 1)
    found = noisy(images, 5)
    assert torch.equal(found, noisy(images, 5))
    assert torch.equal(found[1:], noisy(images[1:], 6))  # decided by the number of each image
    assert torch.equal(found[:, 0], found[:, 2])  # gray stays gray
    assert torch.equal(found, (found * 255).round() / 255)
    assert float((found - reduced)[:, 0].std() * 255) == pytest.approx(20, rel=0.2)
    colored = images * torch.tensor([1.0, 0.5, 0.2]).view(3, 1, 1)
    assert not torch.equal(noisy(colored, 5)[:, 0], noisy(colored, 5)[:, 2])
    compressed = degradation(DataOptions(scale=1, jpeg=10), 1)(images, 5)
    file = io.BytesIO()
    Image.fromarray((images[0].permute(1, 2, 0) * 255).round().byte().numpy()).save(file, "jpeg", quality=10)
    by_pillow = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) / 255
    assert float((compressed[0] - by_pillow).abs().max()) <= 2 / 255
    with pytest.raises(ValueError, match="`noise` should be at least 0, found -1"):
        degradation(DataOptions(noise=-1), 1)
    with pytest.raises(ValueError, match="`jpeg` should be from 1 to 100, found 0"):
        degradation(DataOptions(jpeg=0), 1)


@needs_reading
def test_words_are_data_whose_texts_are_those_that_are_rendered() -> None:
    data = dataset(DataOptions(task="reading", data="words", train_count=5), "train", 3)
    images, texts = lines(5, "train", 3)
    assert len(data) == 5
    for number, text in enumerate(texts):
        image, target = data[number]  # type: ignore[misc]
        assert torch.equal(image, images[number])
        assert Recognition("reading", data.class_names).describe(target) == text


@needs_reading
@pytest.mark.parametrize("method", ["sr4ir", "h_fixed"])
def test_sr4ir_trains_on_words(tmp_path: Path, method: Any) -> None:
    trainer = Trainer(Config(out=tmp_path / "run", method=method, **WORDS))
    before = {name: value.clone() for name, value in trainer.h.state_dict().items()}
    results = trainer.run()
    fixed = method == "h_fixed"
    names = {"fixed_hr", "fixed_hr_errors", "judge", "judge_errors", "psnr", "ssim"}
    assert names | (set() if fixed else {"score", "score_errors", "score_on_hr"}) <= set(results)
    assert all(0 <= results[name] <= 100 for name in names if "hr" in name or "judge" in name)
    same = [torch.equal(value, before[name]) for name, value in trainer.h.state_dict().items()]
    assert all(same) if fixed else not all(same)
    if not fixed:
        learned = load_recognizer(tmp_path / "run")
        assert torch.equal(learned.Prediction.weight, trainer.h.state_dict()["Prediction.weight"])  # type: ignore[union-attr, operator]


@needs_reading
@pytest.mark.slow
def test_unirestore_restores_the_same_words_for_people_and_for_a_reader(tmp_path: Path) -> None:
    words: dict[str, Any] = {
        "data": "words", "train_count": 8, "test_count": 4, "batch": 2, "cpu": True, "degradation": "mixture_b",
        "mixture_extent": 0.5,
    }  # fmt: skip
    unirestore_prepare.prepare(
        unirestore_prepare.Config(out=tmp_path / "prepared", tasks=["reading"], steps=1, prior_steps=1, **words)
    )
    assert not list((tmp_path / "prepared").glob("reading*"))  # nothing had to be trained to read
    tasks = {"tasks": ["restoration", "reading"], "prepared": tmp_path / "prepared", "unseen": False}
    small = {"steps": 1, "control_channels": 8, "cfrm_blocks": [1, 1]}
    first = UniRestore(UniRestoreConfig(out=tmp_path / "stage1", **tasks, **small, **words))
    assert torch.equal(
        first.readers["restoration"].test_data[0][0],  # type: ignore[index]
        first.readers["reading"].test_data[0][0],  # type: ignore[index]
    )
    first.run()
    second = UniRestoreConfig(
        out=tmp_path / "stage2", stage="stage2", after=tmp_path / "stage1", **tasks, **small, **words
    )
    results = UniRestore(second).run()
    assert {"restoration_psnr", "reading_psnr", "reading_score", "reading_score_errors", "reading_judge"} <= set(
        results
    )
