"""Wrong uses of the commands: command lines that are refused before anything is trained."""

import contextlib
import importlib
import os
import sys
import tempfile
from functools import partial
from pathlib import Path
from unittest import mock

from tests.contract.wrong_uses.table import Wrong, wrong

TRAINERS = {
    "examples.diffloss.train": [], "examples.dtp.train": ["--method=scratch"], "examples.sr4ir.train": [],
    "examples.edtr.train": [], "examples.unirestore.train": ["stage1"], "examples.edtr.prepare": [],
    "examples.unirestore.prepare": [],
}  # fmt: skip
EVERYWHERE = {
    "--stepz=1": "stepz", "--steps=many": "steps", "--steps=-1": "`steps`", "--steps=1.5": "steps", "--steps=0": "`steps`", "--steps=": "steps",
    "--batch=0": "`batch`", "--batch=none": "batch", "--seed=-1": "`seed`", "--seed=x": "seed", "--workers=-1": "`workers`", "--save_every=0": "`save_every`",
    "--eval_every=-1": "`eval_every`", "--max_norm=-1": "`max_norm`", "--max_norm=big": "max_norm", "--precision=fp8": "precision", "--cpu=maybe": "cpu",
    "--config=nowhere.yaml": "nowhere.yaml", "--test_count=0": "`test_count`", "--train_count=-5": "`train_count`", "word": "word",
}  # fmt: skip
OWN = {
    "examples.diffloss.train": {
        "--patch=0": "`patch`", "--lr=0": "`lr`", "--lr=nan": "lr", "--lr=fast": "lr", "--ema=1": "`ema`", "--ema=-1": "`ema`",
        "--degradations=[foggy]": "`degradations`", "--degradations=[]": "`degradations`", "--data=folder": "data", "--network=nafnett": "`network`",
        "--weights=nowhere.pth": "nowhere.pth", "--diff.weight=-1": "`diff.weight`", "--diff.weight=x": "diff.weight", "--diff.distance=L1": "diff.distance",
        "--diff.wieght=1": "wieght", "--pixel.distance=l2": "pixel.distance", "--accumulate=0": "`accumulate`", "--accumulate=3": "`accumulate`",
        "--diff.compare=x0": "diff.compare", "--diff.timesteps=[5,1] --diff.weight=1": "`timesteps`", "--perceptual.layers=[a] --perceptual.weight=-1": "`perceptual.weight`",
        "--adversarial.width=0 --adversarial.weight=1": "`adversarial.width`", "--pairs={rainy: lol} --data=folders": "`pairs`",
    },
    "examples.dtp.train": {
        "--method=gef2": "method", "--order=up": "order", "--timesteps=best": "timesteps", "--num_timesteps=0": "`num_timesteps`", "--experts=0": "`experts`",
        "--penalty_weight=-1": "`penalty_weight`", "--replay_share=x": "replay_share", "--shallow=2": "`shallow`", "--decay=-1": "`decay`", "--network=unet": "`network`",
        "--aggregator=Sum": "aggregator", "--normalize=max": "normalize", "--orthogonality_every=0": "`orthogonality_every`", "--pretrained=nowhere --method=gef": "`pretrained`",
    },
    "examples.sr4ir.train": {
        "--method=sr": "method", "--task=depth": "task", "--restorer=unet --train_count=20 --test_count=4": "`restorer`", "--recognizer=huge --train_count=20 --test_count=4": "`recognizer`", "--grid=0": "`grid`", "--mix=2": "`mix`",
        "--start=cold": "start", "--tdp_weight=-1": "`tdp_weight`", "--h_optimizer=lion": "h_optimizer", "--severities=[6]": "`severities`", "--severities=[]": "`severities`",
        "--scale=0": "`scale`", "--degradation=rain": "degradation", "--data=imagenet": "data", "--data=cub200": "`root`", "--size=0": "`size`", "--contrast=[1]": "contrast",
        "--restart=-1": "`restart`", "--layers=[nothing] --train_count=20 --test_count=4": "`layers`", "--s_weights=nowhere.pth --train_count=20 --test_count=4": "nowhere.pth",
    },
    "examples.edtr.train": {
        "--method=edrt": "method", "--n=0": "`n`", "--n=x": "n", "--t_p=-1": "`t_p`", "--alpha=-1": "`alpha`", "--prepared=nowhere": "`prepared`", "--lr=-1": "`lr`",
        "--smallest=-1": "`smallest`", "--references=3": "references", "--long_steps=0": "`long_steps`",
    },
    "examples.unirestore.train": {
        "--gate=tanh": "gate", "--adapter=lora": "adapter", "--tasks=[]": "`tasks`", "--tasks=[depth]": "`tasks`",
        "--train_tasks=[depth]": "`train_tasks`", "--task_weights={depth: 1}": "`task_weights`", "--cfrm_blocks=[x]": "cfrm_blocks", "--control_channels=0": "`control_channels`",
        "--prompt_lr=-1": "`prompt_lr`", "--restored_too=-1": "`restored_too`", "--cfrm=perhaps": "cfrm",
    },
    "examples.edtr.prepare": {"--tasks=[]": "`tasks`", "--pre_lr=-1": "`pre_lr`"},
    "examples.unirestore.prepare": {"--images=nowhere": "`images`"},
}  # fmt: skip
RESTORING = {
    "": "images", "run in": "out", "nowhere in out": "`run`", "run in out --tile=x": "tile", "run in out --tile=1": "`tile`", "run in out --tile=-1": "`tile`",
    "run in out --seed=-1": "`seed`", "run in out --seed=x": "seed", "run in out --overlap=x": "overlap", "run in out --overlap=300": "`overlap`", "run in out --device=abacus": "device",
}  # fmt: skip
SCRIPTS = {
    "examples.quickstart --on=textures": {
        "--steps=0": "--steps", "--tdp-steps=0": "--tdp-steps", "--classifier-steps=0": "--classifier-steps", "--judge-steps=0": "--judge-steps", "--pool=0": "--pool", "--seed=-1": "--seed",
        "--test-patches=10": "--test-patches", "--share=1": "--share", "--share=nan": "--share", "--device=abacus": "device", "--words=x": "words",
    },
    "examples.quickstart --on=photographs": {
        "--steps=0": "steps", "--steps=x": "steps", "--blur=99": "blur", "--blur=-1": "blur", "--noise=-1": "noise", "--noise=nan": "noise", "--share=0": "share", "--share=2": "share",
        "--weight=-1": "weight", "--weight=nan": "weight", "--device=cuda": "device", "--device=abacus": "device", "--timesteps 5": "timesteps", "--timesteps 600 100": "timesteps",
        "--timesteps a b": "timesteps", "--imags=x": "imags", "--images=nowhere": "images", "--seed=x": "seed", "--h-space-weight=-1": "h_space_weight",
    },
    "examples.quickstart --on=words": {
        "--steps=0": "--steps", "--tdp-steps=0": "--tdp-steps", "--l1-steps=0": "--l1-steps", "--pool=0": "--pool", "--test-words=7": "--test-words", "--seed=-1": "--seed",
        "--share=1": "--share", "--share=nan": "--share", "--noise=-1": "`noise`", "--noise=nan": "`noise`", "--device=abacus": "device", "--words=nowhere": "nowhere", "--images=x": "images",
    },
    "examples.experiments.reading": {
        "": "out", "--out=run --seeds": "seeds", "--out=run --seeds -1": "--seed", "--out=run --methods nothing": "methods", "--out=run --split=train": "split", "--out=run --noise=-1": "`noise`",
        "--out=run --steps=0": "--steps", "--out=run --tdp-steps=0": "--tdp-steps", "--out=run --pool=0": "--pool", "--out=run --test-words=0": "--test-words", "--out=run --share=0": "--share",
    },
    "examples.diffloss.train_prior": {"--steps=x": "steps", "--steps=0": "steps", "--images=nowhere": "images", "--keep=10001": "keep", "--save-every=0": "save-every", "--sed=1": "sed", "--seed=x": "seed"},
    "examples.diffloss.prior_report": {"--prior=nowhere": "prior", "--images=nowhere": "images", "--prio=x --out": "out"},
    "examples.experiments.diffloss": {"": "study", "dose --out=x": "prior", "dose --out=x --prior=x": "prior", "nothing --out=x": "study", "gamma": "out", "gamma --out=x --steps=x": "steps", "gamma --out=x --seeds": "seeds"},
    "examples.experiments.report": {"": "RUNS", "nowhere": "nowhere", "nowhere --by=size": "by"},
    "examples.experiments.gallery": {"--photo=dog": "photo", "--seed=x": "seed", "--steps=0": "steps"},
    "examples.sr4ir.restore": RESTORING,
    "examples.dtp.restore": {**RESTORING, "run in out --degradation": "degradation"},
    "examples.diffloss.restore": {**RESTORING, "run in out --weights=first": "weights"},
    "examples.edtr.restore": {**RESTORING, "run in out --n=x": "n", "run in out --smallest=-1": "`smallest`"},
    "examples.unirestore.restore": {**RESTORING, "run in out --steps=x": "steps", "run in out --smallest=-1": "`smallest`"},
    "examples.experiments.sr4ir": {
        "nothing": "nothing", "table --out=x --task=reading --data=photos": "--data", "table --out=x --task=reading --starts hr": "--starts", "table --out=x --noise=20": "--noise",
    },
    "examples.experiments.edtr": {"nothing --out=x": "nothing", "table --out=x --task=reading --contrast 0.1 0.2": "--contrast", "across --out=x --task=detection": "--task"},
    "examples.experiments.dtp": {"nothing --out=x": "nothing"},
    "examples.experiments.unirestore": {"nothing --out=x": "nothing", "words --out=x --size=64": "--size", "table --out=x --extent=1": "--extent"},
}  # fmt: skip


def command(module: str, *arguments: str) -> None:
    """Run a command in this process, in an empty folder."""
    main = importlib.import_module(module).main
    before = Path.cwd()
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(sys, "argv", [module, *arguments]),
        contextlib.ExitStack() as stack,
    ):
        os.chdir(folder)
        stack.callback(os.chdir, before)
        main()


def _words(line: str) -> list[str]:
    """The arguments of a line; what is between braces or brackets stays together."""
    first, *others = line.split(" --")
    return [first, *(f"--{part}" for part in others)] if line.startswith("--") else line.split()


def _entry(module: str, line: str, told: str, *given: str) -> Wrong:
    arguments = [*given, *_arguments(line)]
    return wrong(
        module, line or "nothing", partial(command, module, *arguments), *([told] if told else []), by=SystemExit
    )


def _arguments(line: str) -> list[str]:
    found: list[str] = []
    for part in _words(line):
        option, separator, rest = part.partition(" ")
        # "--timesteps 5 1" are several arguments, "--pairs={rainy: lol}" is one
        found += [option, *rest.split()] if separator and "=" not in option else [part]
    return found


WRONG = [
    *(
        _entry(module, line, told, *given, "--cpu=true", "--out=run")
        for module, given in TRAINERS.items()
        for line, told in EVERYWHERE.items()
    ),
    *(
        _entry(module, line, told, *TRAINERS[module], "--cpu=true", "--out=run")
        for module, lines in OWN.items()
        for line, told in lines.items()
    ),
    *(
        _entry(module, " ".join([*given, line]), told)
        for (module, *given), lines in ((script.split(), lines) for script, lines in SCRIPTS.items())
        for line, told in lines.items()
    ),
]

# wrong uses that are not told yet
