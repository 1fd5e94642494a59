"""What the experiments on words have in common: the options of the recipes there, and a check of the command line."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

OPTIONS: Mapping[str, Any] = {"data": "words", "train_count": 3000, "max_norm": 5.0}
"""Of every recipe."""
H_LR = 3e-4
"""A recognizer that is trained already learns slowly."""
RECOGNIZER: Mapping[str, Any] = {"recognizer": "english_g2", "fixed_hr": Path("english_g2"), "tdp_weight": 0.5}
JUDGE = Path("pp_ocr")
"""Of another make, and trained by nobody here."""


def refuse(parser: argparse.ArgumentParser, arguments: argparse.Namespace, study: str, *options: str) -> None:
    """Ends the program with a usage error where an option was given that the study would not look at."""
    for name in options:
        if getattr(arguments, name) != parser.get_default(name):
            parser.error(f"--{name} should not be given with {study}, which does not use it.")
