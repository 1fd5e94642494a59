"""The options of UniRestore, in a YAML file and on the command line."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from examples.common.data.options import DataOptions, Degradation
from examples.common.engine.options import TrainerOptions
from examples.unirestore.adapters import AdapterName

StageName = Literal["stage1", "stage2", "add-task"]
TASKS = ("restoration", "classification", "segmentation", "detection", "reading")
FILE = "unirestore"
"""The name of the file of a run's weights."""
WEIGHTS = {"restoration": 10.0, "classification": 0.1, "segmentation": 0.1, "detection": 0.1, "reading": 0.1}
"""Beta of Eq. (6), those of the authors' code."""


@dataclass(frozen=True, kw_only=True)
class Config(DataOptions, TrainerOptions):
    """One stage of UniRestore. Of ``batch`` images of each task a step is made.

    Attributes:
        stage: "stage1" trains CFRM, Controller and SC-Tuner on clean images, "stage2" the adapters and prompts of
            ``tasks``, "add-task" a prompt for the task ``name`` and nothing else.
        name: name of the task to add.
        after: run directory of the stage before.
        prepared: folder that examples.unirestore.prepare wrote: prior, references and judges.
        prior: latent diffusion model, a folder in the layout of Stable Diffusion or a name on the hub; the default is
            that of ``prepared``.
        images: folder of clean images for restoration, of which a tenth is for the test, or DIV2K as it is handed
            out; the default are the photographs that come with scikit-image and scikit-learn.
        images_lq: folder of degraded images, of those in ``images`` as ``lq`` of those in ``root``.
        paired_tests: pairs of degraded and clean images to test the restoration on as well, as LAYOUT:ROOT by a name;
            layouts are in examples/common/data/pair_folders.py.
        tasks: tasks of restoration, classification, segmentation, detection, reading; all are tested.
        train_tasks: those of them to train on; the default is all, and in stage 1 restoration.
        task_weights: beta of Eq. (6) by task; the default is 10 for restoration and 0.1 for the others.
        restored_too: weight of an L1 loss that restores the images of the other tasks for people, as in the authors'
            code; none in the paper.
        cfrm: restore the features of the encoder.
        cfrm_blocks: number of NAFBlocks of each level; the default is 1, ..., 1, 9.
        cfrm_weights: lambda of Eq. (2); the default is 0.1, ..., 0.1, 0.01.
        adapter: kind of adapter, one of examples/unirestore/adapters.py.
        gate: gate of the TFA.
        network: restoration network in UniRestore's place, to compare it to; one of
            examples/common/networks/restorers.py.
        control_channels: channels of the Controller; the default is the authors' 256.
        steps_of_diffusion: number of denoising steps, 1 to 4; 0 leaves the diffusion model out.
        lr: learning rate of all but prompts (AdamW).
        prompt_lr: learning rate of prompts.
        weight_decay: weight decay of all but prompts.
        smallest: side that smaller images are enlarged to before they are restored; 512 in the paper.
        tile: side of the tiles that larger test images are restored in; 0 restores them whole.
        unseen: test on corruptions that were not trained on as well.
        every_prompt: test the images of each task as every prompt restores them, the same images for all.
    """

    stage: StageName = field(default="stage1", metadata={"positional": True})
    name: str | None = field(default=None, metadata={"positional": True})
    after: Path | None = None
    prepared: Path | None = None
    prior: Path | None = None
    images: Path | None = None
    images_lq: Path | None = None
    paired_tests: dict[str, str] = field(default_factory=dict)
    tasks: list[str] = field(default_factory=lambda: ["restoration", "classification", "segmentation"])
    train_tasks: list[str] | None = None
    task_weights: dict[str, float] = field(default_factory=dict)
    restored_too: float = 0.0
    cfrm: bool = True
    cfrm_blocks: list[int] | None = None
    cfrm_weights: list[float] | None = None
    adapter: AdapterName = "prompts"
    gate: Literal["softmax", "sigmoid"] = "softmax"
    network: str | None = None
    control_channels: int = 256
    steps_of_diffusion: int = 1
    lr: float = 1e-4
    prompt_lr: float = 1e-2
    weight_decay: float = 1e-2
    smallest: int = 0
    tile: int = 512
    unseen: bool = True
    every_prompt: bool = False
    degradation: Degradation = "corruptions"
    scale: int = 1
    batch: int = 8

    def looked_at(self) -> dict[str, bool]:
        """Whether this run looks at an option, of those that only some look at."""
        ours, later = self.network is None, self.stage != "stage1"
        return {
            **dict.fromkeys(("prior", "cfrm", "adapter", "control_channels", "steps_of_diffusion"), ours),
            **dict.fromkeys(("cfrm_blocks", "cfrm_weights"), ours and self.cfrm),
            **dict.fromkeys(("gate", "prompt_lr"), ours and self.adapter not in (None, "convolutions")),
            "after": ours and later,
            "every_prompt": ours and later and self.adapter is not None,
        }
