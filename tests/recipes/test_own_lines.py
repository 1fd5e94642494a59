import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from examples.reading.own_lines import own_lines, read_labels

LETTERS = "abcdefghijklmnopqrstuvwxyz "


def folder_of(path: Path, labels: dict[str, str], *, width: int = 120, height: int = 32) -> Path:
    """Gray ramps from black to white, and their labels."""
    path.mkdir(parents=True, exist_ok=True)
    ramp = np.linspace(0, 255, width).astype(np.uint8)[None].repeat(height, axis=0)
    for name in labels:
        Image.fromarray(ramp).save(path / name)
    write_labels(path, labels)
    return path


def write_labels(path: Path, labels: dict[str, str]) -> None:
    (path / "labels.txt").write_text("".join(f"{name}\t{text}\n" for name, text in labels.items()))


MANY = {f"{i}.png": word for i, word in enumerate(f"{a}{b}" for a in LETTERS[:12] for b in LETTERS[:8])}


def test_own_lines_are_gray_of_one_width_and_split_by_their_texts(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, {**MANY, **{f"again {name}": text for name, text in MANY.items()}})
    Image.fromarray(np.full((64, 301), 40, dtype=np.uint8)).save(folder / "0.png")
    found = own_lines(folder, LETTERS)
    (train, train_texts), (test, test_texts) = found["train"], found["test"]
    assert not set(train_texts) & set(test_texts)
    assert sorted([*train_texts, *test_texts]) == sorted([*MANY.values(), *MANY.values()])
    assert len(test_texts) < len(train_texts)
    assert train.shape[1:] == test.shape[1:] == (3, 64, 304)
    assert torch.equal(train[:, 0], train[:, 2])
    for line in (train[0, 0], test[-1, 0]):  # 120x32 pixels are 240x64, and the last column goes on
        assert float(line[:, 0].max()) < 0.02
        assert torch.equal(line[:, 240:], line[:, 239:240].expand(-1, 64))
        assert float(line[:, -1].min()) > 0.98


def test_labels_of_easyocr_are_read_too(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, {})
    (folder / "labels.txt").unlink()
    (folder / "labels.csv").write_text('filename,words\n1.png,one\n2.png,"two"\n', encoding="utf-8-sig")
    assert read_labels(folder, LETTERS) == {"1.png": "one", "2.png": "two"}


def test_lines_that_cannot_be_used_are_named_and_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = folder_of(tmp_path, MANY)
    folder_of(folder, {"wide.png": "wide"}, width=700, height=64)
    folder_of(folder, {"full.png": "aabb", "short.png": "abcd"}, width=20, height=64)  # four time steps
    (folder / "broken.png").write_bytes(b"\x89PNG")
    bad = {"wide.png": "wide", "full.png": "aabb", "broken.png": "broken", "missing.png": "missing"}
    write_labels(folder, {**MANY, "short.png": "abcd", **bad})
    with caplog.at_level(logging.WARNING):
        found = own_lines(folder, LETTERS)
    texts = [text for _, part in found.values() for text in part]
    assert "abcd" in texts
    assert not set(bad.values()) & set(texts)
    assert found["train"][0].shape[3] == 240
    for name in bad:
        assert any(record.getMessage().startswith(f"{name} skipped: ") for record in caplog.records), name
    assert "700 pixels wide at a height of 64, at most 640 wanted" in caplog.text
    assert "'aabb' wants 6 time steps of the reader, its width has 4" in caplog.text


def test_folders_of_lines_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a file labels.csv or labels.txt .* found none in nowhere"):
        own_lines(Path("nowhere"), LETTERS)
    folder = folder_of(tmp_path, MANY)
    for content, message in (
        ("", "a line for each image, found none"),
        ("1.png\n", r"a file name and a text in each line, found \['1.png'\]"),
        ("1.png\t \n", "a file name and a text in each line"),
        ("1.png\tstraße\n", r"that the reader can read, found \['ß'\] in 'straße', 1.png"),
    ):
        (folder / "labels.txt").write_text(content, encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            own_lines(folder, LETTERS)
    write_labels(folder, {"1.png": "ab"})
    with pytest.raises(ValueError, match=r"at least 16 lines for the train .* found"):
        own_lines(folder, LETTERS)
