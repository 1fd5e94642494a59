"""Randomness: one generator for a batch, or one for each sample, so that a sample's draws do not depend on its batch.

Every function draws on the generator's own device and returns on the device that is asked for. Without a generator the
keyword is left out rather than None: torch.compile cannot trace it beside sizes that vary.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TypeAlias

import torch
from torch import Tensor

from restoreloss.checks import describe

Generators: TypeAlias = torch.Generator | Sequence[torch.Generator] | None
"""One generator, on any device; one for each sample; or None, the global one."""


def check_generators(generator: object, count: int | None) -> None:
    """Raise ``ValueError`` unless this is a generator, None, or one generator for each of ``count`` samples.

    Where ``count`` is None, one generator for each sample is not offered.
    """
    several = isinstance(generator, Sequence) and not isinstance(generator, str) and count is not None
    found: Sequence[object] = generator if several else [generator]  # type: ignore[assignment]
    for one in found:
        if not isinstance(one, torch.Generator) and (several or one is not None):
            more = ", or one for each sample" if count is not None else ""
            raise ValueError(
                f"`generator` should be a torch.Generator{more}, found {describe(one)}: "
                "torch.Generator().manual_seed(0) makes one."
            )
    if several and len(found) != count:
        raise ValueError(f"`generator` should be one, or one for each of {count}, found {len(found)}.")


def forked(device: torch.device) -> AbstractContextManager[None]:
    """A block after which the global generators of the CPU and of ``device`` are what they were.

    Those of other devices are not looked at, which would start CUDA on each of them.
    """
    on_cpu = device.type == "cpu"
    return torch.random.fork_rng([] if on_cpu else [device], device_type="cuda" if on_cpu else device.type)


def draw_per_sample(draw: Callable[[int, torch.Generator | None], Tensor], count: int, generator: Generators) -> Tensor:
    """What ``draw(count, generator)`` draws, or one by one where each sample has a generator of its own."""
    if isinstance(generator, Sequence):
        return torch.cat([draw(1, one) for one in generator])
    return draw(count, generator)


def standard_normal(like: Tensor, generator: Generators = None) -> Tensor:
    """Noise in the shape, dtype and device of ``like``, which has N rows."""
    check_generators(generator, len(like))

    def draw(count: int, one: torch.Generator | None) -> Tensor:
        shape = (count, *like.shape[1:])
        if one is None:
            return torch.randn(shape, device=like.device, dtype=like.dtype)
        return torch.randn(shape, generator=one, device=one.device, dtype=like.dtype)

    return draw_per_sample(draw, len(like), generator).to(like.device)


def uniform(like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Numbers from [0, 1) in the shape, dtype and device of ``like``."""
    if generator is None:
        return torch.rand(like.shape, device=like.device, dtype=like.dtype)
    return torch.rand(like.shape, generator=generator, device=generator.device, dtype=like.dtype).to(like.device)


def integers(low: int, high: int, count: int, generator: Generators, device: torch.device) -> Tensor:
    """(N,) integers from ``low`` to ``high - 1``, on the generator's device, or on ``device`` without one."""

    def draw(number: int, one: torch.Generator | None) -> Tensor:
        if one is None:
            return torch.randint(low, high, (number,), device=device)
        return torch.randint(low, high, (number,), generator=one, device=one.device)

    return draw_per_sample(draw, count, generator)


def stratified(low: int, high: int, count: int, generator: Generators, device: torch.device) -> Tensor:
    """(N,) integers like :func:`integers`, one from each of N equal parts of the range, in random order.

    Each by itself is uniform over the whole range, and their mean over a batch varies less than that of independent
    ones. Where each sample has a generator of its own they are independent, as no sample may know of the others.
    """
    if isinstance(generator, Sequence):
        return integers(low, high, count, generator, device)
    order = permutation(count, generator, device)
    within = uniform(torch.empty(count, device=order.device), generator)
    return (low + (order + within) * ((high - low) / count)).long().clamp(max=high - 1)


def permutation(count: int, generator: Generators, device: torch.device) -> Tensor:
    """The numbers 0 to ``count - 1`` in random order, on the generator's device, or on ``device`` without one."""
    if isinstance(generator, Sequence):  # Each sample draws a number, and these are sorted.
        return torch.cat([torch.rand(1, generator=one, device=one.device) for one in generator]).argsort()
    if generator is None:
        return torch.randperm(count, device=device)
    return torch.randperm(count, generator=generator, device=generator.device)
