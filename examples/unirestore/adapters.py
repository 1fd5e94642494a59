"""The adapters that the paper compares its TFA to (Table 5)."""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from restoreloss import TFA
from restoreloss.blocks.tfa import Gate

AdapterName = Literal["prompts", "one_prompt", "several", "convolutions"]


def build_adapters(
    name: AdapterName, skips: Sequence[int], channels: Sequence[int], tasks: Sequence[str], gate: Gate
) -> Any:
    """Modules with the interface of :class:`~restoreloss.TFA`, to be the ``tfa`` of a model.

    Args:
        name: "prompts": one TFA, a prompt for each task. "one_prompt": one TFA and one prompt ("UniRestore-SP").
            "several": a TFA for each task ("Multiple TFAs"). "convolutions": for each task as many convolutions as a
            TFA has, without a prompt ("Multiple Adapters").
        skips: channels of the encoder's features, the deepest first.
        channels: of the decoder's features.
        tasks: their names.
        gate: of a TFA.

    Raises:
        ValueError: For an unknown name.
    """
    if name == "prompts":
        return TFA(skips, channels, tasks=tasks, gate=gate)
    if name == "one_prompt":
        return OnePrompt(skips, channels, tasks, gate)
    if name == "several":
        return PerTask({task: TFA(skips, channels, tasks=[task], gate=gate) for task in tasks}, len(skips))
    if name == "convolutions":
        return PerTask({task: Convolutions(skips, channels) for task in tasks}, len(skips))
    raise ValueError(f"`adapter` should be one of {get_args(AdapterName)}, found {name!r}.")


class OnePrompt(TFA):
    """A TFA that does not ask what an image is for."""

    def __init__(self, skips: Sequence[int], channels: Sequence[int], tasks: Sequence[str], gate: Gate) -> None:
        super().__init__(skips, channels, tasks=["any"], gate=gate)
        self._names = tuple(tasks)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Their names."""
        return self._names

    def prompt(self, tasks: str | Sequence[str], count: int | None = None) -> Tensor:
        """The same for all images."""
        _check(tasks, count, self._names)
        return super().prompt("any", len(tasks) if count is None else count)


class PerTask(nn.Module):
    """Adapters of its own for each task; each sees the images of its task alone."""

    def __init__(self, by_task: dict[str, nn.Module], levels: int) -> None:
        super().__init__()
        self.by_task = nn.ModuleDict(by_task)
        self.levels = [_Level(self, level) for level in range(levels)]

    @property
    def tasks(self) -> tuple[str, ...]:
        """Their names."""
        return tuple(self.by_task)

    def prompt(self, tasks: str | Sequence[str], count: int) -> list[tuple[str, Tensor, Any]]:
        """Of each task that is there: its images, and what enters the first level."""
        _check(tasks, count, self.tasks)
        names = [tasks] * count if isinstance(tasks, str) else list(tasks)
        rows = {task: [row for row, name in enumerate(names) if name == task] for task in dict.fromkeys(names)}
        return [
            (task, torch.tensor(numbers), self._of(task).prompt(task, len(numbers))) for task, numbers in rows.items()
        ]

    def _of(self, task: str) -> Any:
        return self.by_task[task]


class _Level:
    """One level of all tasks' adapters. No module: the adapters are registered by task."""

    def __init__(self, owner: PerTask, level: int) -> None:
        self.owner, self.level = owner, level

    def __call__(self, decoded: Tensor, skip: Tensor, state: list[tuple[str, Tensor, Any]]) -> tuple[Tensor, Any]:
        adapted, following = decoded.clone(), []
        for task, rows, prompt in state:
            rows = rows.to(decoded.device)
            adapter = self.owner._of(task).levels[self.level]
            found, prompt = adapter(decoded[rows], skip[rows], prompt)
            adapted = adapted.index_copy(0, rows, found.to(adapted.dtype))
            following.append((task, rows, prompt))
        return adapted, following


class Convolutions(nn.Module):
    """Convolutions on both features together, as many as a TFA has; the last is zero at the start."""

    def __init__(self, skips: Sequence[int], channels: Sequence[int]) -> None:
        super().__init__()
        self.levels = nn.ModuleList(_ConvolutionLevel(skip, width) for skip, width in zip(skips, channels, strict=True))

    def prompt(self, tasks: str | Sequence[str], count: int) -> None:
        """There is none."""


class _ConvolutionLevel(nn.Module):
    def __init__(self, skip: int, channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(channels + skip, skip, 1), nn.GELU()]
        for _ in range(6):
            layers += [nn.Conv2d(skip, skip, 3, padding=1), nn.GELU()]
        last = nn.Conv2d(skip, channels, 1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)  # type: ignore[arg-type]
        self.layers = nn.Sequential(*layers, last)

    def forward(self, decoded: Tensor, skip: Tensor, prompt: None) -> tuple[Tensor, None]:
        return decoded + self.layers(torch.cat([decoded, skip], dim=1)), prompt


def _check(tasks: str | Sequence[str], count: int | None, known: Sequence[str]) -> None:
    names = {tasks} if isinstance(tasks, str) else set(tasks)
    if not isinstance(tasks, str) and count not in (None, len(tasks)):
        raise ValueError(f"`tasks` should name one for each of {count} images, found {len(tasks)}.")
    if unknown := sorted(names - set(known)):
        raise ValueError(f"A task should be one of {', '.join(known)}, found {unknown[0]!r}.")
