import copy
import itertools
import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch

from examples.common.data import words
from examples.common.engine.reading import ctc
from examples.common.engine.training import by_turns
from examples.common.networks import text_readers as readers
from examples.experiments import few_pairs, reading
from examples.reading import retraining, scores
from examples.reading.training import Training
from tests.recipes.test_reading import needs_reading

SMALL = ["--steps=1", "--tdp-steps=1", "--test-words=8", "--pool=16"]


def test_image_gradients_are_those_of_a_loop() -> None:
    restored, target = torch.rand(2, 2, 3, 4, 5, dtype=torch.float64)
    across, down = [], []
    for n, c, y, x in torch.cartesian_prod(*map(torch.arange, restored.shape)).tolist():
        here = restored[n, c, y, x] - target[n, c, y, x]
        if x + 1 < 5:
            across.append((restored[n, c, y, x + 1] - target[n, c, y, x + 1] - here) ** 2)
        if y + 1 < 4:
            down.append((restored[n, c, y + 1, x] - target[n, c, y + 1, x] - here) ** 2)
    expected = sum(across) / len(across) + sum(down) / len(down)
    torch.testing.assert_close(reading.ImageGradients()(restored, target), expected)


def test_the_interval_is_over_seeds_and_images() -> None:
    generator = torch.Generator().manual_seed(0)
    seeds = torch.randn(5, 1, generator=generator).expand(5, 1000)
    low, high = scores.interval(seeds)
    expected = 2 * 1.96 * float(seeds[:, 0].std(correction=0)) / 5**0.5
    assert high - low == pytest.approx(expected, rel=0.1)
    images = torch.randn(1, 400, generator=generator).expand(5, 400)
    low, high = scores.interval(images)
    assert high - low == pytest.approx(2 * 1.96 / 20, rel=0.15)
    assert low < float(images.mean()) < high


def test_a_word_that_looks_like_a_number_stays_a_word(tmp_path: Path) -> None:
    (tmp_path / "seed0").mkdir()
    (tmp_path / "seed0" / "clean.json").write_text('{"read": {"fixed": ["inf", "nan"]}, "psnr": ["inf", 20.5]}')
    found = reading.load(tmp_path)["seed0"]["clean"]
    assert found["read"]["fixed"] == ["inf", "nan"]
    assert reading.values(found, "psnr").tolist() == [math.inf, 20.5]


@needs_reading
@pytest.mark.slow
def test_finished_runs_are_not_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    monkeypatch.setattr(reading, "by_turns", partial(by_turns, rounds=1))
    out = tmp_path / "out"
    arguments = [f"--out={out}", "--seeds", "0", *SMALL, "--methods"]
    reading.main([*arguments, "l1", "tdp", "gradients"])
    first = capsys.readouterr().out
    found = json.loads((out / "seed0" / "tdp.json").read_text())
    assert found["steps"] == 1
    assert len(found["words_read"]["judge"]) == len(found["psnr"]) == len(found["read"]["fixed"]) == 8
    monkeypatch.setattr(Training, "run", None)
    reading.main([*arguments, "tdp", "l1", f"--picture={tmp_path / 'picture.png'}"])
    assert (tmp_path / "picture.png").stat().st_size > 1000
    assert capsys.readouterr().out == first
    rows = [line.split(" | ") for line in first.splitlines()]
    assert len({len(row) for row in rows}) == 1
    assert sum("L1 + TDP" in row[0] for row in rows) == 1
    assert sum("[" in row[3] for row in rows) == 2
    reading.main([*arguments, "l1", "--reference", "tdp"])
    other = [line.split(" | ") for line in capsys.readouterr().out.splitlines()]
    after = [other[number + 1] for number, row in enumerate(other) if row[0] == "| L1"]
    before = [rows[number + 1] for number, row in enumerate(rows) if row[0] == "| L1 + TDP"]
    assert float(after[0][3].split()[0]) == -float(before[0][3].split()[0])
    with pytest.raises(SystemExit, match="2"):
        reading.main([*arguments, "tdp", "--noise=20"])
    assert "`out` should be a folder of runs with these settings" in capsys.readouterr().err


@needs_reading
@pytest.mark.slow
@pytest.mark.parametrize("degradation", [[], ["--extent=0.5"]])
def test_few_pairs_are_restored_with_each_kind_of_prior(
    tmp_path: Path, degradation: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    monkeypatch.setattr(few_pairs, "PRIOR_WORDS", 16)
    names = ["l1", "gradients", "words", "untrained"]
    arguments = ["--seeds", "0", "--pairs", "2", "--steps=1", "--test-words=4", "--prior-steps=1", *degradation]
    few_pairs.main([f"--out={tmp_path}", *arguments, "--methods", *names])
    rows = capsys.readouterr().out.splitlines()[2:]
    assert [row.split(" | ")[1] for row in rows] == [
        few_pairs.TITLES[name] for name in few_pairs.TITLES if name in names
    ]
    assert sum("[" in row for row in rows) == 3
    found = {name: json.loads((tmp_path / "pairs2/seed0" / f"{name}.json").read_text()) for name in names}
    assert len({tuple(one["psnr"]) for one in found.values()}) == 4  # each loss took another step


@needs_reading
@pytest.mark.parametrize(("extent", "reduction"), [(0.5, 1), (None, 4)])
def test_few_pairs_are_blurred_or_reduced(tmp_path: Path, extent: float | None, reduction: int) -> None:
    clean, _, degraded = few_pairs.Experiment(tmp_path, 4, 20.0, extent, 1, 0.5, 1).test
    assert list(degraded.shape[2:]) == [side // reduction for side in clean.shape[2:]]


def test_ctc_is_the_sum_over_all_alignments() -> None:
    scores = torch.randn(2, 4, 97, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    losses = []
    for row, text in zip(scores.softmax(dim=2), ("ab", "B"), strict=True):
        letters = [1 + readers.ENGLISH_G2_CHARACTERS.index(letter) for letter in text]
        right = [
            math.prod(float(row[step, place]) for step, place in enumerate(path))
            for path in itertools.product([0, *letters], repeat=4)
            if readers.decode(torch.tensor([path]), readers.ENGLISH_G2_CHARACTERS) == [text]
        ]
        losses.append(-math.log(sum(right)) / len(text))
    assert float(ctc(scores, words.encoded(["ab", "B"], readers.ENGLISH_G2_CHARACTERS))) == pytest.approx(
        sum(losses) / 2
    )


def test_the_reader_that_learns_is_a_copy() -> None:
    reader = readers.EnglishG2().eval().requires_grad_(False)
    before = copy.deepcopy(reader.state_dict())
    lines = torch.rand(4, 1, 64, 160).expand(-1, 3, -1, -1), ["abc", "def", "ghi", "jkl"]
    learned, seconds = retraining.retrained(reader, lines, words.Degradation(), steps=2, seed=0)
    assert seconds > 0
    after = learned.state_dict()
    assert all(torch.equal(value, before[name]) for name, value in reader.state_dict().items())
    assert not torch.equal(after["Prediction.weight"], before["Prediction.weight"])
    assert all(torch.equal(after[name], before[name]) for name in before if "running" in name)
    assert not any(parameter.requires_grad for parameter in learned.parameters())


def test_ctc_refuses_texts_that_do_not_fit() -> None:
    scores = torch.randn(1, 4, 97)
    characters = readers.ENGLISH_G2_CHARACTERS
    assert math.isfinite(float(ctc(scores, words.encoded(["abab"], characters))))
    with pytest.raises(ValueError, match="should fit into 4 time steps, found one that needs 5"):
        ctc(scores, words.encoded(["abaa"], characters))
    with pytest.raises(ValueError, match=r"letters that the reader knows, found \['ß'\] in 'aß'"):
        words.encoded(["aß"], characters)
