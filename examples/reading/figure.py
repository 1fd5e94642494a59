"""The comparison of the quickstart: words degraded, restored and clean, with what two recognizers read in each."""

from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from torch import Tensor

from examples.common.engine.reading import as_compared, words_read

TITLES = {"degraded": "degraded", "l1": "L1", "squared": "L1 + squared error", "tdp": "L1 + TDP", "clean": "clean"}
READERS = {"fixed": "EasyOCR", "judge": "PP-OCRv4"}
RIGHT, WRONG = "#118a2e", "#d4111b"


def save_comparison(
    path: Path,
    images: Mapping[str, Tensor],
    read: Mapping[str, Mapping[str, Sequence[str]]],
    psnr: Mapping[str, float],
    texts: Sequence[str],
    *,
    rows: int = 6,
) -> None:
    """A row for each word: its images, and under each what every recognizer reads in it.

    The words are the first that the fixed one reads after L1 or after L1 + TDP and not after the other, whichever it
    is: the title says how many there are of each kind, and the head of a column how many of all words are read. Others
    follow where there are too few.

    Args:
        path: of the PNG.
        images: (N, 3, H, W), named as in ``TITLES``; "squared" may be missing.
        read: by image, then by recognizer, the texts.
        psnr: by image, the mean in dB.
        texts: what should be read.
        rows: how many words.
    """
    right = {
        name: [as_compared(a) == as_compared(b) for a, b in zip(read[name]["fixed"], texts, strict=True)]
        for name in ("l1", "tdp")
    }
    won = [i for i in range(len(texts)) if right["tdp"][i] and not right["l1"][i]]
    lost = [i for i in range(len(texts)) if right["l1"][i] and not right["tdp"][i]]
    differing = sorted([*won, *lost])
    chosen = (differing + [i for i in range(len(texts)) if i not in differing])[:rows]
    titles = {name: title for name, title in TITLES.items() if name in images}
    size = (3.25 * len(titles), 1.4 + 1.75 * len(chosen))
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    figure.suptitle(
        f"Of {len(texts)} unseen words EasyOCR gains {len(won)} and loses {len(lost)} by L1 + TDP in the place of L1",
        fontsize=15,
    )
    panels = figure.subplots(len(chosen), len(titles), squeeze=False)
    for row, index in enumerate(chosen):
        for column, (name, title) in enumerate(titles.items()):
            panel = panels[row][column]
            pixels = images[name][index].clamp(0, 1).permute(1, 2, 0).numpy()
            panel.imshow(pixels, interpolation="nearest", aspect="auto")
            panel.set_xticks([])
            panel.set_yticks([])
            if row == 0:
                totals = [f"{READERS[key]} reads {_percent(said, texts):.0f} %" for key, said in read[name].items()]
                if name != "clean":
                    totals.append(f"{psnr[name]:.1f} dB")
                weight = "bold" if name == "tdp" else "normal"
                panel.set_title("\n".join([title, *totals]), fontsize=14, fontweight=weight)
            for line, (key, said) in enumerate(read[name].items()):
                _write(panel, READERS[key], said[index], texts[index], -0.17 - 0.21 * line)
    figure.savefig(path, dpi=90)


def _percent(said: Sequence[str], texts: Sequence[str]) -> float:
    return float(words_read(said, texts).mean())


def _write(panel: Any, reader: str, said: str, text: str, height: float) -> None:
    """What a recognizer reads, letter for letter in its color, below a panel."""
    panel.text(0.0, height, reader, transform=panel.transAxes, fontsize=11, color="0.35", va="center")
    letters = said or "(nothing)"
    good = right_letters(said, text) if said else [False] * len(letters)
    size = min(1.0, 12 / len(letters))  # of a line that is too long for its panel
    style = {"family": "DejaVu Sans Mono", "fontsize": 16 * size, "fontweight": "bold", "va": "center"}
    for place, (letter, is_right) in enumerate(zip(letters, good, strict=True)):
        left, color = 0.26 + 0.057 * size * place, RIGHT if is_right else WRONG
        panel.text(left, height, letter, transform=panel.transAxes, color=color, **style)
    complete = as_compared(said) == as_compared(text)
    panel.text(
        1.0, height, "\N{HEAVY CHECK MARK}" if complete else "\N{BALLOT X}", transform=panel.transAxes,
        fontsize=16, color=RIGHT if complete else WRONG, va="center", ha="right", family="DejaVu Sans",
    )  # fmt: skip


def right_letters(said: str, text: str) -> list[bool]:
    """For each letter that was read whether it is one of the text's, in its order; upper and lower case are one."""
    right = [False] * len(said)
    matcher = SequenceMatcher(None, said.lower(), text.lower(), autojunk=False)
    for block in matcher.get_matching_blocks():
        right[block.a : block.a + block.size] = [True] * block.size
    return right
