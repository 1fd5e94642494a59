"""Rendered lines of text, clean and degraded: English words or codes in fonts of packages, a pure function of the seed.

Words and fonts of training, validation and test are disjoint. The words are those of the definitions of ImageNet's
classes, which timm ships; the fonts are those of matplotlib and of the ``font-*`` packages of the extra
``reading``.
"""

import hashlib
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources, util
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from examples.common.data.degrade import blurred
from examples.common.data.tasks import ENGLISH_G2_CHARACTERS, InMemory
from restoreloss._optional import extra

Split = Literal["train", "validation", "test"]
Kind = Literal["words", "codes"]

HEIGHT, WIDTH = 64, 160
TEST_SEED = 2000
"""Of the words that results are about, and of their noise."""
CODE_CHARACTERS = "ABCDEFGHJKLMNPRSTUVWXYZ23456789"
"""Without those that look like another: 0 and O, 1 and I, Q."""

FONTS: dict[Split, dict[str, str]] = {
    "train": {
        "matplotlib": "DejaVuSans DejaVuSans-Bold DejaVuSans-Oblique DejaVuSansMono DejaVuSansMono-Bold",
        "font_roboto": "Roboto-Light Roboto-Regular Roboto-Medium Roboto-Bold Roboto-Italic",
        "font_source_sans_pro": "SourceSansPro-Light SourceSansPro-Regular SourceSansPro-Semibold SourceSansPro-Bold "
        "SourceSansPro-It",
        "font_source_serif_pro": "SourceSerifPro-Light SourceSerifPro-Regular SourceSerifPro-Semibold "
        "SourceSerifPro-Bold SourceSerifPro-It",
    },
    "validation": {
        "matplotlib": "STIXGeneral STIXGeneralBol STIXGeneralItalic STIXGeneralBolIta",
        "font_hanken_grotesk": "HankenGrotesk-Light HankenGrotesk-Regular HankenGrotesk-Bold HankenGrotesk-Italic",
    },
    "test": {
        "matplotlib": "DejaVuSerif DejaVuSerif-Bold DejaVuSerif-Italic",
        "font_lato": "Lato-Light Lato-Regular Lato-Bold Lato-Italic Lato-BoldItalic",
        "font_caladea": "Caladea-Regular Caladea-Bold Caladea-Italic Caladea-BoldItalic",
        "font_manrope": "Manrope-Light Manrope-Regular Manrope-SemiBold Manrope-Bold",
    },
}
"""Files by package. No family is in two splits."""


@dataclass(frozen=True)
class Degradation:
    """Gaussian blur, bicubic reduction, Gaussian noise, 8 bits."""

    scale: int = 4
    noise: float = 10.0
    blur: float = 0.0

    def __post_init__(self) -> None:
        if self.scale < 1 or HEIGHT % self.scale or WIDTH % self.scale:
            raise ValueError(f"`scale` should divide {HEIGHT} and {WIDTH}, found {self.scale}.")
        if not 0 <= self.noise <= 255:
            raise ValueError(f"`noise` should be in [0, 255], found {self.noise:g}.")
        if not 0 <= self.blur <= 10:  # beyond, the kernel would be wider than the line is high
            raise ValueError(f"`blur` should be in [0, 10], found {self.blur:g}.")

    def __call__(self, clean: Tensor, seed: int) -> Tensor:
        """Gray images (N, 3, H, W) in [0, 1] to (N, 3, H / scale, W / scale); the noise is gray too."""
        size = (clean.shape[2] // self.scale, clean.shape[3] // self.scale)
        small = F.interpolate(
            blurred(clean[:, :1], self.blur), size=size, mode="bicubic", antialias=True, align_corners=False
        )
        noise = torch.randn(small.shape, generator=torch.Generator().manual_seed(seed))
        noisy = (255 * small + self.noise * noise.to(small)).round().clamp(0, 255) / 255
        return noisy.expand(-1, 3, -1, -1).contiguous()

    def __str__(self) -> str:
        blur = f"Gaussian blur of {self.blur:g} pixels, " if self.blur else ""
        return f"{blur}bicubic reduction by {self.scale}, Gaussian noise of {self.noise:g}/255, 8 bits"


@cache
def vocabulary(split: Split) -> tuple[str, ...]:
    """English words of 4 to 7 letters; a hash of the word says to which split it belongs: 3/5, 1/5 and 1/5."""
    text = (resources.files("timm.data") / "_info" / "imagenet_synset_to_definition.txt").read_text(encoding="utf-8")
    words = sorted(set(re.findall(r"(?<![\w'-])[a-z]{4,7}(?![\w'-])", text)))
    splits: dict[int, Split] = {0: "test", 1: "validation"}
    return tuple(word for word in words if splits.get(hashlib.md5(word.encode()).digest()[0] % 5, "train") == split)


@cache
def fonts(split: Split) -> tuple[Path, ...]:
    """The files of a split, in a fixed order.

    Raises:
        ValueError: If a package that has some of them is not installed, or does not have one that it should have.
    """
    found = []
    for package, names in FONTS[split].items():
        folder = _package(package)
        for name in names.split():
            files = sorted(path for path in folder.rglob(f"{name}.*") if path.suffix in (".ttf", ".otf"))
            if not files:
                raise ValueError(f"The package `{package}` should have the font {name}, found none below {folder}.")
            found.append(files[-1])
    return tuple(found)


def _package(name: str) -> Path:
    spec = util.find_spec(name)
    if spec is None or spec.origin is None:
        raise ValueError(
            f"Fonts of the package `{name.replace('_', '-')}` are needed, found it is not installed: "
            f"pip install {extra('reading')}."
        )
    return Path(spec.origin).parent


def draw_texts(count: int, split: Split, seed: int, kind: Kind = "words") -> list[str]:
    """``count`` words of a split, or codes of 4 to 6 letters and digits, of which the first is a letter."""
    generator = random.Random(f"{kind} {split} {seed}")
    if kind == "words":
        return generator.choices(vocabulary(split), k=count)
    letters = CODE_CHARACTERS.rstrip("23456789")
    return [
        generator.choice(letters) + "".join(generator.choices(CODE_CHARACTERS, k=generator.randint(3, 5)))
        for _ in range(count)
    ]


def render(texts: Sequence[str], split: Split, seed: int) -> Tensor:
    """Gray images (N, 3, 64, 160) in [0, 1] of texts, each in a random font and in random shades, cropped tightly.

    Raises:
        ValueError: For a text that is empty, or has a character that the font drawn for it does not have.
    """
    generator = random.Random(f"render {split} {seed}")
    gray = torch.stack([_line(text, generator.choice(fonts(split)), generator) for text in texts])
    return gray[:, None].expand(-1, 3, -1, -1)


def lines(count: int, split: Split, seed: int, kind: Kind = "words") -> tuple[Tensor, list[str]]:
    """Images and their texts, a pure function of the arguments."""
    texts = draw_texts(count, split, seed, kind)
    return render(texts, split, seed), texts


def word_data(split: Literal["train", "test"], count: int, seed: int) -> InMemory:
    """Lines as data of the task "reading", for readers that know the characters of english_g2."""
    images, texts = lines(count, split, seed)
    return InMemory("reading", ("", *ENGLISH_G2_CHARACTERS), images, encoded(texts, ENGLISH_G2_CHARACTERS))


def encoded(texts: Sequence[str], characters: str) -> Tensor:
    """Texts as classes from 1 in the order of the characters, (N, longest), filled up with 0.

    Raises:
        ValueError: For a letter that is none of the characters.
    """
    for text in texts:
        if unknown := set(text) - set(characters):
            raise ValueError(f"Texts should have letters that the reader knows, found {sorted(unknown)} in {text!r}.")
    rows = [torch.tensor([1 + characters.index(letter) for letter in text]) for text in texts]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def _line(text: str, path: Path, generator: random.Random) -> Tensor:
    if not text.strip():
        raise ValueError(f"A text should have at least one letter, found {text!r}.")
    font = _font(path)
    if missing := [letter for letter in text if not _has(path, letter)]:
        raise ValueError(f"The font {path.name} should have all letters of {text!r}, found none for {missing}.")
    left, top, right, bottom = font.getbbox(text)
    mask = Image.new("L", (round(right - left), round(bottom - top)))
    ImageDraw.Draw(mask).text((-left, -top), text, font=font, fill=255)
    # a margin of 2 to 5 pixels on the side that touches; the other way anywhere
    margin = generator.randint(2, 5)
    factor = min((WIDTH - 2 * margin) / mask.width, (HEIGHT - 2 * margin) / mask.height)
    mask = mask.resize((max(1, round(mask.width * factor)), max(1, round(mask.height * factor))), Image.Resampling.BOX)
    canvas = Image.new("L", (WIDTH, HEIGHT))
    corner = [
        generator.randint(margin, max(margin, full - part - margin))
        for full, part in zip(canvas.size, mask.size, strict=True)
    ]
    canvas.paste(mask, (corner[0], corner[1]))
    cover = torch.from_numpy(np.array(canvas, dtype=np.float32)) / 255
    dark, light = generator.uniform(0, 0.35), generator.uniform(0.6, 1)
    ground, ink = (light, dark) if generator.random() < 0.5 else (dark, light)
    return ((ground + (ink - ground) * cover) * 255).round() / 255


@cache
def _font(path: Path) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(path), 96, layout_engine=ImageFont.Layout.BASIC)


@cache
def _has(path: Path, letter: str) -> bool:
    """Whether a font draws a letter other than as it draws a character that no font has."""
    font = _font(path)
    drawn, unknown = font.getmask(letter), font.getmask("\uffff")
    return letter == " " or (drawn.size, bytes(drawn)) != (unknown.size, bytes(unknown))
