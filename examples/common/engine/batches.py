"""The samples of each step and their randomness: functions of the seed and the step alone, so that a run resumes."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from examples.common.data.tasks import InMemory, TaskData, collate
from examples.common.seeds import derive_seed, seeded


class Batches(Sampler[list[tuple[int, int]]]):
    """Batches of (index, seed of the sample) for steps ``first`` to ``last``; every epoch in an order of its own.

    Of several processes each takes its part of the same batch, so that they see together what one would see alone.
    """

    def __init__(
        self, length: int, batch: int, *, seed: int, first: int, last: int, rank: int = 0, processes: int = 1
    ) -> None:
        if not 1 <= batch <= length:
            raise ValueError(f"`batch` should be between 1 and the {length} training samples, found {batch}.")
        if batch % processes:
            raise ValueError(f"`batch` should be a multiple of the {processes} processes, found {batch}.")
        self.length, self.batch, self.seed, self.first, self.last = length, batch, seed, first, last
        self.part = slice(rank * batch // processes, (rank + 1) * batch // processes)

    def __len__(self) -> int:
        return self.last - self.first

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order, shuffled = torch.empty(0, dtype=torch.long), -1
        for step in range(self.first, self.last):
            epoch, place = divmod(step, self.length // self.batch)
            if epoch != shuffled:
                generator = seeded(self.seed, epoch)
                order = torch.randperm(self.length, generator=generator)
                shuffled = epoch
            samples = order[place * self.batch : (place + 1) * self.batch].tolist()
            drawn = [(sample, derive_seed(self.seed, step, number)) for number, sample in enumerate(samples)]
            yield drawn[self.part]


class _Seeded(Dataset[Any]):
    """Each sample with torch's global generator seeded for it, in whichever worker it is read.

    Images in memory have no randomness, and are spared the millisecond that seeding takes.
    """

    def __init__(self, data: TaskData) -> None:
        self.data = data

    def __getitem__(self, key: tuple[int, int]) -> Any:
        index, seed = key
        if isinstance(self.data, InMemory):
            return self.data[index]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.data[index]


def loader(data: TaskData, batches: Batches, *, workers: int = 0) -> DataLoader[Any]:
    """The batches as (images, targets), read by ``workers`` processes."""
    return DataLoader(_Seeded(data), batch_sampler=batches, collate_fn=collate, num_workers=workers)
