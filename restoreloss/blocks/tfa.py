"""TFA: one decoder writes images for people and for several task networks, and a vector says for whom."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from restoreloss.checks import check_choice, check_integer, check_map, describe, named

Gate = Literal["softmax", "sigmoid"]


class TFA(nn.Module):
    r"""Task feature adapters, one for each decoder level: they mix an encoder's features into a decoder's.

    All tasks share the adapters. A task is a prompt, a vector that enters at the first level and is rewritten from
    level to level by what the encoder saw, like the cell of an LSTM (Eq. 1):

    .. math::
        f, i &= \mathrm{softmax}\,\vartheta_f(F_{enc}),\ \mathrm{softmax}\,\vartheta_i(F_{enc}) \\
        C &\leftarrow f \cdot C + i \cdot \tanh \vartheta_c(F_{enc}) \\
        F_{enc} &\leftarrow F_{enc} + W_2\bigl(o \cdot W_1 F_{enc}\bigr), \quad o = \tanh(W_o C) \\
        F_{dec} &\leftarrow F_{dec} + W_l\,[F_{dec}; F_{enc}]

    :math:`\vartheta` is instance normalization, a 3x3 convolution, GELU, a 3x3 convolution and the average over the
    image. On the way to the next level the prompt passes a linear layer and GELU. :math:`W_l` is zero at the start:
    beside a trained decoder the adapters change nothing until they have learned to.

    The loop over ``levels`` is yours, in your decoder's forward pass: DDP wraps the whole network. A ``state_dict``
    fits a TFA with the same tasks; :meth:`load_prompts` takes prompts of any.

    Args:
        skips: channels of the encoder's features, in the order in which the decoder uses them: the deepest first.
        channels: of the decoder's features there; one number where all are alike.
        tasks: names to begin with. More come by :meth:`add_task`.
        gate: of f and i. A softmax over C channels is 1 / C on average, so that a prompt's gradient is C / 2 times
            smaller than under "sigmoid", the gate of an LSTM: with 512 channels prompts want a learning rate that is
            some hundred times that of the rest.

    Raises:
        ValueError: For levels that are not as many, ``tasks`` that are one string, and an unknown gate.

    Example:
        >>> tfa = TFA([32, 16], [32, 32], tasks=["look", "classify"])
        >>> encoded, decoded = [torch.rand(2, 32, 4, 4), torch.rand(2, 16, 8, 8)], torch.rand(2, 32, 4, 4)
        >>> prompt = tfa.prompt(["look", "classify"])  # one for each image of the batch
        >>> for adapter, skip in zip(tfa.levels, encoded):
        ...     decoded, prompt = adapter(decoded, skip, prompt)
        ...     decoded = nn.functional.interpolate(decoded, scale_factor=2.0)  # the decoder's own block
        >>> decoded.shape
        torch.Size([2, 32, 16, 16])

    Source: Chen et al., "UniRestore: Unified Perceptual and Task-Oriented Image Restoration Model Using Diffusion
    Prior", Section 3.3 and Fig. 3b. As in the authors' code prompts begin at zero; there :math:`W_l` begins at random.
    """

    def __init__(
        self,
        skips: Sequence[int] = (512, 256, 128),
        channels: int | Sequence[int] = 512,
        *,
        tasks: Iterable[str] = (),
        gate: Gate = "softmax",
    ) -> None:
        super().__init__()
        for name, given in (("skips", skips), ("channels", [channels] if isinstance(channels, int) else channels)):
            if not isinstance(given, Sequence) or isinstance(given, str):
                raise ValueError(f"`{name}` should be whole numbers, one for each level, found {describe(given)}.")
            for width in given:
                check_integer(name, width)
        widths = [channels] * len(skips) if isinstance(channels, int) else list(channels)
        if not skips or len(widths) != len(skips):
            raise ValueError(f"`channels` should be one number for each of `skips` {tuple(skips)}, found {channels}.")
        if isinstance(tasks, str):
            raise ValueError(f"`tasks` should be a list of names, found the string {tasks!r}.")
        if not isinstance(tasks, Iterable):
            raise ValueError(f"`tasks` should be a list of names, found {describe(tasks)}.")
        check_choice("gate", gate, Gate)
        following = [*skips[1:], None]
        self.levels = nn.ModuleList(
            TFALevel(skip, width, after, gate=gate) for skip, width, after in zip(skips, widths, following, strict=True)
        )
        self.prompts = nn.ParameterDict()
        self.width = skips[0]
        for task in tasks:
            with named("name", "tasks"):
                self.add_task(task)

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names that :meth:`prompt` knows."""
        return tuple(self.prompts)

    def add_task(self, name: str, *, like: str | None = None) -> nn.Parameter:
        """A prompt for a new task. Nothing else changes: all other tasks go on to the bit as before.

        Args:
            name: of the task.
            like: a task whose prompt it begins as; else it begins at zero.

        Returns:
            The prompt, (C,): what to train.

        Raises:
            ValueError: For a name that is taken, empty, has a dot or is that of a method of ``nn.ParameterDict``
                ("keys", "train"), and an unknown ``like``.
        """
        if not isinstance(name, str):
            raise ValueError(f"`name` should be text, found {describe(name)}.")
        if name in self.prompts:
            raise ValueError(f"`name` should be a new task, found {name!r}, which is one of {', '.join(self.tasks)}.")
        if not name or "." in name or hasattr(self.prompts, name):
            raise ValueError(f"`name` should be without a dot, and no attribute of a module's own, found {name!r}.")
        at = next(self.parameters())
        value = (
            torch.zeros(self.width, device=at.device, dtype=at.dtype)
            if like is None
            else self._of(like, "like").detach()
        )
        prompt = nn.Parameter(value.clone())
        self.prompts[name] = prompt
        return prompt

    def prompt(self, tasks: str | Sequence[str], count: int | None = None) -> Tensor:
        """What enters the first level, (N, C).

        Args:
            tasks: one for each image, or one for all ``count``.
            count: N, where ``tasks`` is one name.

        Raises:
            ValueError: For an unknown task.
        """
        if count is not None:
            check_integer("count", count)
        if isinstance(tasks, str):
            return self._of(tasks, "tasks").expand(1 if count is None else count, -1)
        if not isinstance(tasks, Sequence):
            raise ValueError(f"`tasks` should be a name, or one for each image, found {describe(tasks)}.")
        if not tasks or count not in (None, len(tasks)):
            raise ValueError(f"`tasks` should name one for each of {count or 'the'} images, found {len(tasks)}.")
        return torch.stack([self._of(task, "tasks") for task in tasks])

    def load_prompts(self, prompts: Mapping[str, Tensor] | nn.ParameterDict) -> None:
        """Prompts that were trained elsewhere with these adapters; new tasks are added.

        Raises:
            ValueError: For prompts of another width; nothing is loaded then.
        """
        if not isinstance(prompts, Mapping | nn.ParameterDict):
            raise ValueError(f"`prompts` should be a mapping of names to tensors, found {describe(prompts)}.")
        for name, value in prompts.items():
            if not isinstance(value, Tensor):
                raise ValueError(f"`prompts[{name!r}]` should be a tensor ({self.width},), found {describe(value)}.")
            if tuple(value.shape) != (self.width,):
                raise ValueError(f"`prompts[{name!r}]` should be ({self.width},), found {tuple(value.shape)}.")
        for name, value in prompts.items():
            held = self.prompts[name] if name in self.prompts else self.add_task(name)
            with torch.no_grad():
                held.copy_(value)

    def _of(self, task: str, argument: str) -> nn.Parameter:
        if not isinstance(task, str) or task not in self.prompts:
            known = ", ".join(self.tasks) or "none yet"
            raise ValueError(f"`{argument}` should be one of {known}, found {describe(task)}.")
        prompt: nn.Parameter = self.prompts[task]
        return prompt


class TFALevel(nn.Module):
    """The adapter of one decoder level: Eq. (1).

    Args:
        skip: channels of the encoder's features, and the width of the prompt.
        channels: of the decoder's features.
        following: width of the next level's prompt; None for the last level.
        gate: "softmax" or "sigmoid".

    Raises:
        ValueError: For numbers that are not whole or below 1, and an unknown gate.
    """

    def __init__(self, skip: int, channels: int, following: int | None, *, gate: Gate = "softmax") -> None:
        super().__init__()
        check_choice("gate", gate, Gate)
        self.gate = gate
        self.skip, self.channels = check_integer("skip", skip), check_integer("channels", channels)
        if following is not None:
            check_integer("following", following)
        # These are theta of f, i and c, side by side.
        self.norm = nn.InstanceNorm2d(skip)
        self.see = nn.Conv2d(skip, 3 * skip, 3, padding=1)
        self.tell = nn.Conv2d(3 * skip, 3 * skip, 3, padding=1, groups=3)
        self.out_gate = nn.Linear(skip, skip)
        self.squeeze, self.unsqueeze = nn.Conv2d(skip, skip, 1), nn.Conv2d(skip, skip, 1)
        self.merge = nn.Conv2d(channels + skip, channels, 1)
        nn.init.zeros_(self.merge.weight)
        nn.init.zeros_(self.merge.bias)  # type: ignore[arg-type]
        self.to_next = None if following is None else nn.Linear(skip, following)

    def forward(self, decoded: Tensor, skip: Tensor, prompt: Tensor) -> tuple[Tensor, Tensor]:
        """The decoder's features with what the task wants of the encoder's, and the prompt of the next level.

        Args:
            decoded: (N, D, H, W).
            skip: (N, C, H, W).
            prompt: (N, C).

        Raises:
            ValueError: For features of other channels or that differ in size, and a prompt of another width.
        """
        check_map("decoded", decoded, self.channels)
        check_map("skip", skip, self.skip)
        if not isinstance(prompt, Tensor):
            raise ValueError(f"`prompt` should be (N, {self.skip}), as of `TFA.prompt`, found {describe(prompt)}.")
        count, channels = skip.shape[:2]
        if decoded.shape[2:] != skip.shape[2:] or tuple(prompt.shape) != (count, channels):
            raise ValueError(
                f"`decoded` and `prompt` should be (N, D, H, W) and (N, C) for `skip` {tuple(skip.shape)}, found "
                f"{tuple(decoded.shape)} and {tuple(prompt.shape)}."
            )
        seen = _pooled_conv(F.gelu(self.see(self.norm(skip))), self.tell)
        forget, take, content = seen.chunk(3, dim=1)
        cell = self._gate(forget) * prompt + self._gate(take) * content.tanh()
        out = self.out_gate(cell).tanh()[:, :, None, None]
        adapted = skip + self.unsqueeze(out * self.squeeze(skip))
        decoded = decoded + self.merge(torch.cat([decoded, adapted], dim=1))
        return decoded, cell if self.to_next is None else F.gelu(self.to_next(cell))

    def _gate(self, value: Tensor) -> Tensor:
        return value.softmax(dim=1) if self.gate == "softmax" else value.sigmoid()


def _pooled_conv(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """The average over the image of a 3x3 convolution with padding, (N, C).

    Both are linear, so that the convolution itself is never computed: the average of what each tap sees is enough. A
    tap above the center sees all rows but the last, and one below it all but the first; columns likewise.
    """
    height, width = x.shape[2:]
    columns = x.sum(dim=3, dtype=torch.promote_types(x.dtype, torch.float32))
    columns = torch.stack([columns - x[..., -1], columns, columns - x[..., 0]], dim=3)
    total = columns.sum(dim=2)
    seen = torch.stack([total - columns[:, :, -1], total, total - columns[:, :, 0]], dim=2)
    taps = (seen / (height * width)).to(x.dtype)
    return F.conv2d(taps, conv.weight, conv.bias, groups=conv.groups).flatten(1)
