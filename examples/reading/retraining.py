"""What a restorer competes with: the recognizer itself, trained on degraded lines with CTC."""

import copy
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from examples.common.data.tasks import ENGLISH_G2_CHARACTERS
from examples.common.data.words import Degradation, encoded
from examples.common.engine.reading import ctc
from examples.common.networks.text_readers import EnglishG2, to_english_g2
from examples.reading.training import enlarged

BATCH, LR = 8, 3e-4


def retrained(
    reader: EnglishG2,
    lines: tuple[Tensor, Sequence[str]],
    degrade: Degradation,
    *,
    steps: int,
    seed: int,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[EnglishG2, float]:
    """A copy of the reader that has learned to read lines degraded and enlarged, and the seconds of a step.

    Its batch-norm statistics stay what they are. The learning rate falls to 0.
    """
    reader = copy.deepcopy(reader).requires_grad_(True)
    optimizer = torch.optim.AdamW(reader.parameters(), lr=LR)
    generator = torch.Generator().manual_seed(seed)
    clean, texts = lines
    targets = encoded(texts, ENGLISH_G2_CHARACTERS)
    seconds = []
    for step in tqdm(range(steps), desc="retraining", unit="step"):
        started = clock()
        for group in optimizer.param_groups:
            group["lr"] = LR * (1 - step / steps)
        chosen = torch.randint(len(texts), (BATCH,), generator=generator)
        degraded = degrade(clean[chosen], int(torch.randint(2**31, (), generator=generator)))
        loss = ctc(reader(to_english_g2(enlarged(degraded, degrade.scale))), targets[chosen])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(reader.parameters(), 5.0)
        optimizer.step()
        seconds.append(clock() - started)
    return reader.requires_grad_(False), statistics.median(seconds)
