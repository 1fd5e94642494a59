"""CQMix: images of which random cells are restored and the others are the target's own.

A task network that is trained on them does not learn to lean on one sharp detail.
"""

import math
import warnings
from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor, nn

from restoreloss.checks import caller_level, check_integer, check_number, describe
from restoreloss.generators import Generators, check_generators, draw_per_sample, uniform


class CQMix(nn.Module):
    r"""Cross-quality patch mix: every cell of a grid shows the restored or the target image, at random.

    .. math:: \text{mix}_n = M_n \odot z_n + (1 - M_n) \odot x_n, \qquad M_n(\text{cell}) \sim \text{Bernoulli}(p)

    independently for each sample and cell, one mask for all channels. Labels stay what they are. The cells are as equal
    as the pixels allow: pixel i of H belongs to row ``i * rows // H``. Both images should be of one range: the first,
    hundredth and thousandth call warn where they clearly are not.

    Args:
        grid: (rows, columns) of cells. The paper takes 16 cells for classification, 64 for segmentation and detection.
        p: probability that a cell shows ``restored``.

    Raises:
        ValueError: At construction for a grid below 1 or p outside [0, 1], at a call for images that do not fit or have
            fewer pixels on a side than the grid has cells.

    Example:
        >>> mix = CQMix(grid=(2, 2))
        >>> generator = torch.Generator().manual_seed(0)
        >>> mixed, mask = mix(restored, clean, generator=generator, return_mask=True)
        >>> torch.equal(mixed, torch.where(mask.bool(), restored, clean))
        True
        >>> [mixed.shape for mixed in mix([torch.rand(3, 8, 9), torch.rand(3, 5, 5)], [torch.rand(3, 8, 9)] * 2)]
        Traceback (most recent call last):
        ValueError: `target[1]` should have the shape of `restored[1]` (3, 5, 5), found (3, 8, 9).

    Source: Kim et al., "Beyond Image Super-Resolution for Image Recognition with Task-Driven Perceptual Loss", Section
    3.2. The authors' code enlarges the grid by a fixed factor, which fits the training sizes of the paper only.
    """

    _calls = 0

    def __init__(self, grid: tuple[int, int] = (4, 4), *, p: float = 0.5) -> None:
        super().__init__()
        if not isinstance(grid, Sequence) or isinstance(grid, str) or len(grid) != 2:
            raise ValueError(f"`grid` should be (rows, columns), both at least 1, found {describe(grid)}.")
        self.grid = (check_integer("grid[0]", grid[0]), check_integer("grid[1]", grid[1]))
        self.p = check_number("p", p, low=0, high=1)

    @overload
    def forward(self, restored: Tensor, target: Tensor, *, generator: Generators = None) -> Tensor: ...
    @overload
    def forward(
        self, restored: Sequence[Tensor], target: Sequence[Tensor], *, generator: Generators = None
    ) -> list[Tensor]: ...
    @overload
    def forward(
        self, restored: Tensor, target: Tensor, *, generator: Generators = None, return_mask: bool
    ) -> tuple[Tensor, Tensor]: ...
    @overload
    def forward(
        self,
        restored: Sequence[Tensor],
        target: Sequence[Tensor],
        *,
        generator: Generators = None,
        return_mask: bool,
    ) -> tuple[list[Tensor], list[Tensor]]: ...

    def forward(self, restored: Any, target: Any, *, generator: Generators = None, return_mask: bool = False) -> Any:
        """The mixed images.

        Args:
            restored: (N, C, H, W) of any dtype, or a list of (C, H, W) of any sizes. Its gradient passes through:
                detach it where the restoration network is not trained.
            target: the same shape or shapes and device, of the same dtype or another floating-point one.
            generator: for the cells, on its own device; one, or one for each sample, whose cells then do not depend on
                the batch that it is in.
            return_mask: also return the mask.

        Returns:
            The mixed images; with ``return_mask`` also a mask (N, 1, H, W) (or a list of (1, H, W)) in the dtype of the
            images, 1 where ``restored`` was taken.
        """
        if isinstance(restored, Tensor) or isinstance(target, Tensor):
            mixed, mask = self._mix("", 4, restored, target, generator)
            self._look([restored], [target])
            return (mixed, mask.to(mixed.dtype)) if return_mask else mixed
        if not (isinstance(restored, Sequence) and isinstance(target, Sequence)):
            found = f"{describe(restored)} and {describe(target)}"
            raise ValueError(f"`restored` and `target` should be tensors, or lists of tensors, found {found}.")
        if len(restored) != len(target):
            raise ValueError(f"`target` should be as many images as `restored` ({len(restored)}), found {len(target)}.")
        check_generators(generator, len(restored))
        generators = generator if isinstance(generator, Sequence) else [generator] * len(restored)
        samples = enumerate(zip(restored, target, generators, strict=True))
        pairs = [self._mix(f"[{i}]", 3, z, x, one) for i, (z, x, one) in samples]
        self._look(restored, target)
        images = [image for image, _ in pairs]
        return (images, [mask.to(image.dtype) for image, mask in pairs]) if return_mask else images

    def _mix(
        self, index: str, ndim: int, restored: Tensor, target: Tensor, generator: Generators
    ) -> tuple[Tensor, Tensor]:
        for name, image in (("restored", restored), ("target", target)):
            if not isinstance(image, Tensor) or image.ndim != ndim:
                shape = tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__
                wanted = "(N, C, H, W)" if ndim == 4 else "(C, H, W)"
                raise ValueError(f"`{name}{index}` should have shape {wanted}, found {shape}.")
        facts: dict[str, list[Any]] = {
            "shape": [tuple(image.shape) for image in (restored, target)],
            "device": [image.device for image in (restored, target)],
            # Half and single precision may meet: under autocast the output of the network is half.
            "dtype": [image.dtype if not image.is_floating_point() else "floating" for image in (restored, target)],
        }
        for fact, (expected, found) in facts.items():
            if expected != found:
                raise ValueError(
                    f"`target{index}` should have the {fact} of `restored{index}` {expected}, found {found}."
                )
        *samples, _, height, width = restored.shape
        rows, columns = self.grid
        if height < rows or width < columns:
            raise ValueError(
                f"`grid` should have no more cells than `restored{index}` has pixels, {height}x{width}, found "
                f"{rows}x{columns}."
            )
        if ndim == 4:
            check_generators(generator, len(restored))
        # One uniform number a cell: n cells drawn at once are the same as n drawn one after the other.
        cells = torch.empty(*samples, 1, rows, columns, device=restored.device)
        drawn = draw_per_sample(lambda count, one: uniform(cells[:count], one), len(cells), generator)
        chosen = drawn.to(restored.device) < self.p
        row = torch.arange(height, device=restored.device) * rows // height
        column = torch.arange(width, device=restored.device) * columns // width
        mask = chosen[..., row, :][..., column]
        return torch.where(mask, restored, target), mask

    def _look(self, restored: Sequence[Tensor], target: Sequence[Tensor]) -> None:
        """Warn once, in the first, hundredth or thousandth call, of images of two ranges. At first a network may make
        anything, and reading values waits for the device.
        """
        if torch.compiler.is_compiling() or self._calls >= 1000:
            return
        self._calls += 1
        if self._calls not in (1, 100, 1000) or sum(x.numel() for x in target) < 192:
            return
        try:
            (darkest, brightest), (low, high) = (_ends(images) for images in (restored, target))
        except RuntimeError:  # meta images, and those within a transform of torch.func, have no values to read
            return
        span, settled = high - low, self._calls > 1
        slack = max(span, 1.0) * (0.75 if settled else 50)
        outside = darkest < low - slack or brightest > high + slack
        dark = span > 2 and brightest - low <= span / 100
        inside = settled and span > 0.5 and (dark or low < -0.4 * span < 0 <= darkest)
        if span < math.inf and (outside or inside):
            self._calls = 1000
            warnings.warn(
                f"`restored` spans [{darkest:.4g}, {brightest:.4g}], and `target` [{low:.4g}, {high:.4g}]: CQMix mixes "
                "their pixels, which should be of one range. This is said once.",
                stacklevel=caller_level(),
            )

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        return f"grid={self.grid}, p={self.p:g}"


def _ends(images: Sequence[Tensor]) -> tuple[float, float]:
    """The lowest and the highest value."""
    ends = [image.detach().aminmax() for image in images]
    return min(float(low) for low, _ in ends), max(float(high) for _, high in ends)
