"""The quickstart: what a restoration network gains from a loss of this library, in five minutes on two cores.

python -m examples.quickstart                # words, with and without TDPLoss, for a reader that stays as it is
python -m examples.quickstart --loss diff    # photographs, with and without DiffLoss
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser("quickstart", add_help=False)
    parser.add_argument("--loss", choices=("tdp", "diff"), default="tdp")
    args, others = parser.parse_known_args(sys.argv[1:] if arguments is None else arguments)
    if args.loss == "diff":
        from examples.diffloss.photos_run import main as run
    else:
        from examples.reading.words_run import main as run
    return run(others)


if __name__ == "__main__":
    main()
