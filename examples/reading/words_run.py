"""The quickstart on words: a restoration network with and without TDPLoss, for a reader that nobody may retrain.

    python -m examples.quickstart --on words

Rendered words are reduced by four and made noisy. A small EDSR learns to restore them with the L1 loss until that has
little more to give. From there it goes on twice: with L1 + ``TDPLoss`` through EasyOCR's recognition network, which
stays as it is, and with L1 alone for the same time. Both are compared on words and fonts that neither was trained on,
by that reader and by an independent judge, PP-OCRv4, that takes part in no training.
"""

import argparse
import copy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from examples.common.data.folder import check_folder
from examples.common.data.tasks import ENGLISH_G2_CHARACTERS
from examples.common.data.words import TEST_SEED, Degradation, lines
from examples.common.engine.reading import words_read
from examples.common.engine.run_directory import to_json
from examples.common.engine.training import by_turns, check_options, restore
from examples.common.networks.restorers import restorer
from examples.common.networks.text_readers import PPOCR, english_g2
from examples.reading.figure import save_comparison
from examples.reading.own_lines import own_lines
from examples.reading.scores import METHODS, measure, results, table
from examples.reading.training import (
    BATCH,
    FURTHER_LR,
    LEAST,
    LR,
    TDP_BATCH,
    Lines,
    enlarged,
    tdp_loss,
)
from restoreloss import audit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this run alone."""
    parser.add_argument(
        "--words", type=Path, metavar="DIR",
        help="your own lines: a folder of images with labels.csv (filename,words) or labels.txt (by tabs)",
    )  # fmt: skip
    parser.add_argument("--blur", type=float, default=0.0, help="sigma in pixels (default: %(default)s)")
    parser.add_argument("--noise", type=float, default=40.0, help="sigma in 1/255 (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=600, help="with L1, shared by both (default: %(default)s)")
    parser.add_argument("--tdp-steps", type=int, default=400, help="with L1 + TDP (default: %(default)s)")
    parser.add_argument(
        "--l1-steps", type=int, help="further steps with L1 (default: as many as take the time of --tdp-steps)"
    )
    parser.add_argument(
        "--share", type=float, default=0.97, help="the TDP loss's share of the gradient (default: %(default)s)"
    )
    parser.add_argument("--pool", type=int, default=3000, help="rendered training words (default: %(default)s)")
    parser.add_argument("--test-words", type=int, default=300, help="at most, of your own (default: %(default)s)")


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Train without and with the TDP loss, and write what came out.

    Raises:
        ValueError: For options that cannot be, and where weights or fonts are missing; nothing has been written then.
        FloatingPointError: If a training becomes NaN or infinite.
    """
    check_options(vars(args), LEAST)
    check_folder(args.out, "--out")
    degrade = Degradation(noise=args.noise, blur=args.blur)
    # before the weights: what is wrong with own lines is told also where a package is missing
    own = None if args.words is None else own_lines(args.words, ENGLISH_G2_CHARACTERS, multiple=degrade.scale)
    network = english_g2().to(args.device)
    readers = {"fixed": network.read, "judge": PPOCR().read}
    if own is None:
        pool, (clean, texts) = lines(args.pool, "train", args.seed)[0], lines(args.test_words, "test", TEST_SEED)
    else:
        pool, (clean, texts) = own["train"][0], own["test"]
        clean, texts = clean[: args.test_words], texts[: args.test_words]
    training = Lines(device=args.device, pool=pool, degrade=degrade)
    degraded = degrade(clean, TEST_SEED)
    torch.manual_seed(args.seed)
    net = restorer("edsr-small", degrade.scale).to(args.device)
    print(f"EDSR, {sum(p.numel() for p in net.parameters()):,} parameters; {len(pool)} lines to learn from, ", end="")
    print(f"{len(texts)} others for the test\ndegradation: {degrade}")

    pixel = nn.L1Loss()
    training.run(net, pixel, steps=args.steps, size=BATCH, lr=LR, seed=args.seed, title="L1, shared")
    start = words_read(readers["fixed"](restore(net, degraded, args.device)), texts)

    objective = training.with_share(net, tdp_loss(network), share=args.share, seed=args.seed + 1)
    given = training.batch(BATCH, torch.Generator().manual_seed(args.seed + 1))
    with torch.no_grad():
        restored = net(given[1])
    report = audit(objective, restored, given[0], dominates=0.99)
    print(f"\nweight of the TDP loss: {objective.weights['tdp']:.3g}\n{report}\n")

    seconds = by_turns(
        {
            "tdp": partial(training.seconds, net, objective, size=TDP_BATCH),
            "l1": partial(training.seconds, net, pixel, size=BATCH),
        }
    )
    l1_steps = args.l1_steps or max(1, round(args.tdp_steps * seconds["tdp"] / seconds["l1"]))
    nets = {"l1": net, "tdp": copy.deepcopy(net)}
    go_on = partial(training.run, lr=FURTHER_LR, seed=args.seed + 2)
    go_on(nets["tdp"], objective, steps=args.tdp_steps, size=TDP_BATCH, title="L1 + TDP")
    go_on(nets["l1"], pixel, steps=l1_steps, size=BATCH, title="L1, same time")

    images = {"degraded": enlarged(degraded, degrade.scale)}
    images |= {name: restore(nets[name], degraded, args.device) for name in METHODS} | {"clean": clean}
    scores = {name: measure(image, clean, texts, readers) for name, image in images.items()}
    written = results(scores) | {
        "arguments": {k: str(v) if isinstance(v, Path | torch.device) else v for k, v in vars(args).items()},
        "weight": objective.weights["tdp"],
        "l1_steps": l1_steps,
        "seconds_per_step": seconds,
        "audit": report.to_dict(),
        "words_read_at_the_shared_start": float(start.mean()),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "results.json").write_text(to_json(written, indent=1))
    (args.out / "audit.txt").write_text(f"{report}\n")
    read = {name: score.read for name, score in scores.items()}
    psnr = {name: float(score.psnr.mean()) for name, score in scores.items()}
    save_comparison(args.out / "comparison.png", images, read, psnr, texts)
    print(f"\n{table(scores, seconds)}\n")
    clean_read = " and ".join(f"{v.mean():.1f} % ({reader})" for reader, v in scores["clean"].words_read.items())
    print(f"words read: clean {clean_read}; where both began {start.mean():.1f} % (fixed)")
    print("One seed: repeat with --seed before you believe a small difference.\n")
    for name in ("comparison.png", "audit.txt", "results.json"):
        print(args.out.resolve() / name)
    return written
