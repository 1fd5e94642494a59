"""What runs have learned from, by their settings and those of the runs that they began with."""

from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped, unused-ignore]

from examples.common.engine.learned import has_learned_from


def run(folder: Path, **settings: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return folder


@pytest.mark.parametrize(
    "settings",
    [
        {"root": "{}"}, {"images": "{}"}, {"gt": "{}"}, {"of": ["restoration", "{}"]}, {"clean": "div2k:{}"},
        {"data_sets": {"classification": "class_folders:{}", "detection": "generated"}}, {"pairs": {"rainy": "lol:{}"}},
    ],
)  # fmt: skip
def test_every_option_that_names_images_tells(settings: dict[str, Any], tmp_path: Path) -> None:
    named = yaml.safe_load(yaml.safe_dump(settings).replace("{}", str(tmp_path / "mine")))
    assert has_learned_from(tmp_path / "mine", {"root": None}, named)
    assert not has_learned_from(tmp_path / "other", named) and not has_learned_from(tmp_path / "mine2", named)


@pytest.mark.parametrize(
    "name", ["after", "prior", "autoencoder", "pre", "s_weights", "foreign", "judge", "pretrained"]
)
def test_runs_that_a_run_began_with_tell(name: str, tmp_path: Path) -> None:
    begun = run(tmp_path / "begun", root=str(tmp_path / "mine"))
    middle = run(tmp_path / "middle", root=str(tmp_path / "other"), **{name: str(begun)})
    assert has_learned_from(tmp_path / "mine", {"root": None, "references": ["english_g2", str(middle)]})
    (tmp_path / "prepared").mkdir()
    middle.rename(tmp_path / "prepared" / "classification_hq")
    assert has_learned_from(tmp_path / "mine", {"prepared": str(tmp_path / "prepared")})
    assert not has_learned_from(tmp_path / "mine", {"prepared": str(tmp_path)})  # whose parts are called otherwise
    middle = tmp_path / "prepared" / "classification_hq"
    assert not has_learned_from(tmp_path / "third", {"references": [str(middle)], "prior": "stabilityai/sd"})


def test_runs_that_name_each_other_come_to_an_end(tmp_path: Path) -> None:
    one = run(tmp_path / "a_hq", root=str(tmp_path / "mine"), prepared=str(tmp_path), judge=str(tmp_path / "b_hq"))
    run(tmp_path / "b_hq", judge=str(one))
    assert not has_learned_from(tmp_path / "other", {"prepared": str(tmp_path), "fixed_hr": str(one)})
    assert has_learned_from(tmp_path / "mine", {"judge": str(tmp_path / "b_hq")})


def test_a_stage_that_has_moved_may_have_learned_from_anything(tmp_path: Path) -> None:
    assert has_learned_from(tmp_path / "mine", {"after": str(tmp_path / "gone")})
    assert not has_learned_from(tmp_path / "mine", {"s_weights": str(tmp_path / "weights.pth"), "prior": "a/name"})


@pytest.mark.parametrize("place", ["mine/cats", "."])
def test_images_above_and_below_are_told(place: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert has_learned_from(tmp_path / place, {"root": str(tmp_path / "mine")})
    assert f"may hold images that were trained on: {tmp_path / 'mine'} was learned from" in caplog.text
