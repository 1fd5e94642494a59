"""Gradients of single samples: all at once by torch.func, or one by one where a network does not allow that."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import allow_mutation_on_saved_tensors
from torch.func import functional_call, grad, vmap
from torch.utils._pytree import tree_leaves, tree_map

from restoreloss.checks import describe

logger = logging.getLogger(__name__)

Estimator = Literal["taylor2", "fisher", "mas", "gn", "l2sp"]


class PerSample:
    """Gradients of single samples of what an estimator asks for.

    Args:
        model: the network.
        loss_fn: ``loss_fn(model, batch)``.
        estimator: see :class:`ParameterImportance`.
        one_by_one: whether it is known that the network does not allow all at once.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Any, Any], Tensor],
        estimator: Estimator,
        *,
        one_by_one: bool = False,
    ) -> None:
        self.model, self.loss_fn, self.estimator = model, loss_fn, estimator
        self.one_by_one = one_by_one
        self.mutates = False
        self.runner = _Runner(model, self._value)

    def add_moments(
        self,
        sums: dict[str, Tensor],
        parameters: Mapping[str, nn.Parameter],
        batch: Any,
        *,
        chunk: int,
        generator: torch.Generator | None,
    ) -> int:
        """Add the absolute gradients of all samples, or their squares, to ``sums``, and return how many samples.

        Args:
            sums: by the name of the parameter.
            parameters: by name.
            batch: of N samples.
            chunk: samples whose gradients are held at once.
            generator: of the signs of "gn".

        Raises:
            ValueError: For a batch without samples in common, and a gradient that is not finite.
        """
        size = batch_size(batch)
        power = 2 if self.estimator in ("fisher", "gn") else 1
        for start in range(0, size, chunk):
            samples = rows(batch, start, start + chunk)
            for gradients in self._gradients(parameters, samples, self.signs(samples, generator)):
                moments = {name: g.to(sums[name].dtype).abs().pow(power).sum(0) for name, g in gradients.items()}
                wrong = [name for name, moment in moments.items() if not bool(moment.isfinite().all())]
                if wrong:
                    raise ValueError(f"Gradients of single samples should be finite, found NaN or infinity in {wrong}.")
                for name, moment in moments.items():
                    sums[name] += moment
        return size

    def _gradients(
        self, parameters: Mapping[str, nn.Parameter], chunk: Any, signs: Tensor | None
    ) -> Iterator[dict[str, Tensor]]:
        """(n, ...) for each parameter, of all samples or of one after the other where that does not work."""
        if not self.one_by_one:
            try:
                yield self._at_once(parameters, chunk, signs)
                return
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
                logger.info("Gradients are taken one by one: %s", str(error).partition("\n")[0])
        for found in self._in_turn(parameters, chunk, signs):
            # It is known to work only now: what fails both ways is the mistake of the caller, and is raised.
            self.one_by_one = True
            yield found

    def signs(self, chunk: Any, generator: torch.Generator | None) -> Tensor | None:
        """Random +-1 for each number of the output."""
        if self.estimator != "gn":
            return None
        with torch.no_grad():
            output = self._output(self.loss_fn(self.model, chunk), batch_size(chunk))
        device = output.device if generator is None else generator.device
        bits = torch.randint(0, 2, output.shape, generator=generator, device=device)
        return (2 * bits - 1).to(output)

    def _at_once(self, parameters: Mapping[str, nn.Parameter], chunk: Any, signs: Tensor | None) -> dict[str, Tensor]:
        """(n, ...) for each parameter, of a chunk of n samples."""
        tensors = [leaf for leaf in tree_leaves((chunk, signs)) if isinstance(leaf, Tensor)]

        def value(parameters: dict[str, Tensor], samples: list[Tensor]) -> Tensor:
            rest = iter(samples)
            one, sign = tree_map(lambda leaf: next(rest)[None] if isinstance(leaf, Tensor) else leaf, (chunk, signs))
            result: Tensor = functional_call(
                self.runner, {f"model.{name}": p for name, p in parameters.items()}, (one, sign)
            )
            return result

        weights = {name: p.detach() for name, p in parameters.items()}
        found: dict[str, Tensor] = vmap(grad(value), in_dims=(None, 0), randomness="different")(weights, tensors)
        return found

    def _in_turn(
        self, parameters: Mapping[str, nn.Parameter], chunk: Any, signs: Tensor | None
    ) -> Iterator[dict[str, Tensor]]:
        """(1, ...) for each parameter, of one sample after the other."""
        for number in range(batch_size(chunk)):
            one, sign = rows((chunk, signs), number, number + 1)
            try:
                row = self._row(list(parameters.values()), one, sign)
            except RuntimeError as error:
                if "modified by an inplace operation" not in str(error):
                    raise
                self.mutates = True  # PLKSR in eval mode writes over the input of a convolution.
                row = self._row(list(parameters.values()), one, sign)
            yield {name: gradient[None] for name, gradient in zip(parameters, row, strict=True)}

    def _row(self, parameters: list[nn.Parameter], sample: Any, sign: Tensor | None) -> tuple[Tensor, ...]:
        with torch.enable_grad(), allow_mutation_on_saved_tensors() if self.mutates else nullcontext():
            value = self._value(sample, sign)
            if not value.requires_grad:
                raise ValueError("`loss_fn` should return what depends on the parameters of `model`, found no graph.")
            return torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True)

    def _value(self, sample: Any, signs: Tensor | None) -> Tensor:
        """A scalar of a batch of one."""
        result = self.loss_fn(self.model, sample)
        if self.estimator in ("taylor2", "fisher"):
            if not isinstance(result, Tensor) or result.ndim != 0:
                raise ValueError(f"`loss_fn` should return a scalar, found {describe(result)}.")
            return result
        output = self._output(result, 1)
        return (output * signs).sum() if signs is not None else output.square().sum()

    def _output(self, result: Any, size: int) -> Tensor:
        if not isinstance(result, Tensor) or result.ndim == 0 or len(result) != size:
            raise ValueError(
                f"`loss_fn` should return the output of the network, ({size}, ...), for the estimator "
                f"{self.estimator!r}, found {describe(result)}."
            )
        return result


class _Runner(nn.Module):
    """The network as a submodule of what is called, so that ``functional_call`` can swap its parameters."""

    def __init__(self, model: nn.Module, function: Callable[[Any, Any], Tensor]) -> None:
        super().__init__()
        self.model, self.function = model, function

    def forward(self, sample: Any, signs: Tensor | None) -> Tensor:
        return self.function(sample, signs)


def rows(batch: Any, first: int, last: int) -> Any:
    """The samples first to last - 1 of a batch, whatever holds its tensors."""
    return tree_map(lambda leaf: leaf[first:last] if isinstance(leaf, Tensor) else leaf, batch)


def batch_size(batch: Any) -> int:
    """How many samples a batch holds, or ``ValueError`` where its tensors do not agree."""
    leaves = tree_leaves(batch)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    arrays = [leaf for leaf in leaves if type(leaf).__name__ == "ndarray"]
    sizes = {len(leaf) if leaf.ndim else None for leaf in tensors}
    if arrays or len(sizes) != 1 or None in sizes or 0 in sizes:
        shapes = sorted(tuple(leaf.shape) for leaf in tensors)
        found = describe(arrays[0]) if arrays else shapes if tensors else describe(batch)
        raise ValueError(f"`batches` should hold tensors of N samples each along the first dimension, found {found}.")
    (size,) = sizes
    assert size is not None
    return size
