"""Is nothing that is said of the pairs, or to a method of DTP, ignored without a word?"""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.utils import save_image

from examples.common.data.folder import read_image
from examples.common.data.pair_folders import degraded_files, own_pairs
from examples.common.data.pairs import (
    FolderPairs,
    check_pair_options,
    evaluated_whole,
    own_pairs_of,
    pairs_to_test,
    pairs_to_try,
)
from examples.common.data.photos import photographs
from examples.common.engine.options import check_numbers
from examples.diffloss.train import Trainer as DiffLossTrainer
from examples.dtp.config import Config
from examples.dtp.data import clean_images, held_out_images
from examples.dtp.train import trainer
from tests.recipes import cases


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty pairs of three sizes: gt and noisy lq; in ``wrong`` every lq is that of another."""
    root = tmp_path_factory.mktemp("mine")
    generator = torch.Generator().manual_seed(0)
    for name in ("lq", "gt", "wrong"):
        (root / name).mkdir()
    coarse = torch.rand(20, 3, 4, 4, generator=generator)
    sides = [32 + 8 * (number % 3) for number in range(20)]

    def image(number: int, side: int) -> Tensor:
        return nn.functional.interpolate(coarse[number % 20, None], (side, side), mode="bilinear")[0]

    for number, side in enumerate(sides):
        noise = 0.02 * torch.randn(3, side, side, generator=generator)
        save_image(image(number, side), root / "gt" / f"{number:02}.png")
        save_image((image(number, side) + noise).clamp(0, 1), root / "lq" / f"{number:02}.png")
        save_image(image(number + 7, side), root / "wrong" / f"{number:02}.png")
    return root


def options(mine: Path, **changes: Any) -> Config:
    given = {
        "lq": mine / "lq",
        "gt": mine / "gt",
        "degradations": ["mine"],
        "patch": 24,
        "test_count": None,
        "steps": 1,
    }
    return replace(cases.DTP, **{**given, "timesteps": "matched", **changes})


def test_generation_trains_on_no_image_of_the_test(mine: Path) -> None:
    config = options(mine)
    tested = {clean for _, clean in pairs_to_test(config, "mine", shifted=False).data.files[0]}  # type: ignore[attr-defined]
    pool = {source for source in clean_images(config).sources if isinstance(source, Path)}
    assert len(tested) == 2 and len(pool) == 18 and not tested & pool


def test_a_prior_trains_on_no_image_of_the_test(mine: Path) -> None:
    tested = {clean.name for _, clean in own_pairs_of(options(mine), "test")}
    train, held_out = photographs(mine / "gt", smallest=16)
    assert len(train) == 16 and len(held_out) == 4 and tested < set(held_out)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"pairs": {"rainy": "universal:DATA"}}, "`data` should be 'folders' for `pairs`, found 'photos'"),
    ({"shifted_pairs": {"rainy": "lol:DATA"}}, "`data` should be 'folders' for `shifted_pairs`, found 'photos'"),
    ({"gt": Path("gt")}, "`lq` should be given with `gt`, found None"),
    ({"test_lq": Path("lq")}, "`lq` should be given with `test_lq`, found None"),
    ({"lq": Path("lq"), "pairs": {"rainy": "lol:DATA"}}, "`pairs` should be left out beside `lq`"),
    ({"data": "folders", "shifted_pairs": {"rany": "lol:DATA"}}, "`shifted_pairs` should be by names of .*'rany'"),
    ({"degradations": ["rainy", "rainy"]}, r"each once, found \['rainy', 'rainy'\]"),
    ({"degradations": []}, r"each once, found \[\]"),
    ({"degradations": ["mine"]}, r"`degradations` should be of .*, found \['mine'\]"),
]


@pytest.mark.parametrize("recipe", ["dtp", "diffloss"])
@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_options_that_would_do_nothing_are_refused(
    changes: dict[str, Any], message: str, recipe: str, tmp_path: Path
) -> None:
    config: Any = cases.DTP if recipe == "dtp" else cases.DIFFLOSS
    build: Any = trainer if recipe == "dtp" else DiffLossTrainer
    with pytest.raises(ValueError, match=message):
        build(replace(config, out=tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_clean_images_of_folders_are_refused_beside_photographs() -> None:
    with pytest.raises(ValueError, match="`data` should be 'folders' for `clean`, found 'photos'"):
        check_pair_options(replace(cases.DTP, clean="div2k:DATA"))


def test_pairs_of_all_degradations_may_be_named_where_some_are_learned() -> None:
    pairs = {"rainy": "lol:DATA", "snowy": "lol:DATA"}
    check_pair_options(replace(cases.DTP, data="folders", pairs=pairs, shifted_pairs=pairs))


def test_what_has_no_degraded_images_cannot_be_of_an_own_name(mine: Path) -> None:
    with pytest.raises(ValueError, match="The data of 'mine' should have degraded images, found clean ones alone"):
        FolderPairs.of({"mine": [(None, mine / "gt" / "00.png")]}, "test", 16)


def test_noise_of_folders_is_that_of_the_paper_in_training_too(mine: Path) -> None:
    gray = torch.full((3, 96, 96), 0.5)
    save_image(gray, mine / "gray.png")
    data = FolderPairs.of({"noisy": [(None, mine / "gray.png")]}, "train", 96)
    degraded = torch.stack([data[0][0][0] for _ in range(4)])  # type: ignore[index]
    assert 255 * float((degraded - read_image(mine / "gray.png")).std()) == pytest.approx(50, rel=0.04)


def test_an_evaluation_tests_all_pairs_of_other_folders(mine: Path) -> None:
    config = options(mine)
    trained = {"lq": str(mine / "lq")}
    assert evaluated_whole(config, trained) is config
    other = evaluated_whole(replace(config, lq=mine / "wrong"), trained)
    assert len(pairs_to_test(other, "mine", shifted=False)) == 20
    assert len(pairs_to_test(replace(other, test_count=5), "mine", shifted=False)) == 5
    own = replace(config, lq=mine / "wrong", test_lq=mine / "lq", test_gt=mine / "gt")
    assert evaluated_whole(own, trained) is own


def test_clean_images_that_were_trained_on_are_not_tested_beside_other_degraded_ones(mine: Path) -> None:
    config = options(mine, lq=mine / "wrong")
    assert evaluated_whole(config, {"lq": str(mine / "lq"), "gt": str(mine / "gt")}) is config
    before = mine / "pretrained"
    before.mkdir()
    (before / "config.yaml").write_text(f"gt: {mine / 'gt'}")
    assert evaluated_whole(config, {"lq": "", "pretrained": str(before)}) is config


def test_the_division_is_that_of_the_clean_images(mine: Path, tmp_path: Path) -> None:
    for path in sorted((mine / "lq").iterdir())[:15]:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    every, some = (pairs_to_test(options(mine, lq=lq), "mine", shifted=False) for lq in (mine / "lq", tmp_path))
    tested = [{clean for _, clean in found.data.files[0]} for found in (every, some)]  # type: ignore[attr-defined]
    assert tested[1] <= tested[0]


def test_own_pairs_may_be_tested_on_shifted_ones(mine: Path, tmp_path: Path) -> None:
    for name in ("low", "high"):
        (tmp_path / "eval15" / name).mkdir(parents=True)
        (tmp_path / "eval15" / name / "1.png").write_bytes((mine / "gt" / "00.png").read_bytes())
    config = options(mine, shifted_pairs={"mine": f"lol:{tmp_path}"})
    assert [len(pairs_to_test(config, "mine", shifted=shifted)) for shifted in (False, True)] == [2, 1]


def test_a_test_pair_of_each_size_is_tried_and_what_is_unlike_is_told(
    mine: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = options(mine, test_lq=mine / "lq", test_gt=mine / "gt")
    tried = pairs_to_try("mine", pairs_to_test(config, "mine", shifted=False))
    assert sorted(clean.shape[-1] for _, clean in tried) == [32, 40, 48] and not caplog.text
    pairs_to_try("mine", pairs_to_test(replace(config, test_lq=mine / "wrong"), "mine", shifted=False))
    assert "The pairs of 'mine' look unlike each other" in caplog.text


@pytest.mark.parametrize("own", [True, False])
def test_folders_whose_names_say_that_they_are_exchanged_are_refused(mine: Path, own: bool) -> None:
    clean = sorted((mine / "lq").iterdir())
    with pytest.raises(ValueError, match=r"The degraded images should be the first of a pair, found .*gt.*00.png for"):
        own_pairs(mine / "gt", mine / "lq") if own else degraded_files(clean, mine / "lq", mine / "gt")
    assert len(own_pairs(mine / "lq", mine / "gt")) == 20


def test_large_clean_images_are_read_one_by_one_and_cut(mine: Path) -> None:
    images = held_out_images(options(mine, test_lq=mine / "lq", test_gt=mine / "gt", tile=32))
    assert next(images).shape == next(images).shape == (1, 3, 32, 32)
    second = read_image(mine / "gt" / "02.png")[None]
    torch.testing.assert_close(next(images), second[..., 8:40, 8:40])


def test_scratch_takes_pairs_of_an_own_name(mine: Path, tmp_path: Path) -> None:
    run: Any = trainer(options(mine, out=tmp_path / "run", method="scratch"))
    assert run.t_star == {"mine": 1} and run._source("mine") == "first"
    assert math.isfinite(run.run()["psnr"])


def test_rates_that_would_rise_and_shares_of_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match=r"`lr_min` should be at most `lr`, 1e-07, found 1e-06"):
        check_numbers(replace(cases.DTP, lr=1e-7))
    with pytest.raises(ValueError, match=r"`shallow` should be at least 0.01, found 0.0"):
        check_numbers(replace(cases.DTP, shallow=0.0))
    check_numbers(replace(cases.SR4IR, s_lr=0.0))


def test_a_batch_smaller_than_its_replay_has_an_orthogonality(tmp_path: Path, prepared: cases.Prepared) -> None:
    config = replace(cases.DTP, out=tmp_path / "run", method="orthogonality", pretrained=prepared.pretrained)
    run: Any = trainer(config)
    batch = run.batch(*next(run.read(0, 1)), 0, 3)
    few = replace(batch, degraded=batch.degraded[:1], clean=batch.clean[:1], t=batch.t[:1])
    assert math.isfinite(run.stages[0].alternation._penalty(few, batch.replay).item())


def test_a_pretraining_is_evaluated_on_pairs(mine: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    trainer(replace(cases.DTP, out=run, method="pretrain", steps=1)).run()
    for split in ("train", "val"):
        for side, name in (("LQ", "lq"), ("GT", "gt")):
            (tmp_path / split / "rainy" / side).mkdir(parents=True)
            (tmp_path / split / "rainy" / side / "1.png").write_bytes((mine / name / "00.png").read_bytes())
    pairs = {"rainy": f"universal:{tmp_path}"}
    config = replace(
        cases.DTP, out=tmp_path / "other", method="pretrain", evaluate=run, data="folders", pairs=pairs, steps=1
    )
    assert math.isfinite(trainer(config).run()["generative"])
