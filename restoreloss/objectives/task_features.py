"""Does the restored image look like the target to the network that will read it?"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from restoreloss.features import FeatureExtractor, Images, Normalize
from restoreloss.frozen import bare, frozen
from restoreloss.images import check_pair, warn_if_out_of_range
from restoreloss.objectives.base import Objective, total
from restoreloss.objectives.distances import Distance, Reduction, check_choice, distance_per_sample, reduce_samples


class TDPLoss(Objective):
    r"""Task-driven perceptual loss: distance of two images in the features of a task network.

    .. math:: L = \sum_k w_k\, d\big(H_k(z), H_k(x)\big) \quad\text{(Eq. 2)}

    where z is the restored and x the target image, :math:`H_k` the output of the k-th layer and d the ``distance``.
    The gradient reaches z through H, and nothing else: the target's features carry no graph, and H is frozen and in
    eval mode while it is looked through.

    H is the task network itself, in the middle of its own training, and is only borrowed: it is neither copied nor
    registered (it appears in no ``parameters()`` or ``state_dict()`` of the loss, and does not follow its ``.to()``),
    and its ``requires_grad`` flags, mode and batch-norm statistics are after the call what they were before, also when
    the call raises. Train it in a phase of its own: trained jointly with this loss it learns to see nothing.

    Args:
        task: the task network (any module), or a :class:`FeatureExtractor` that several losses share.
        layers: which features, as for :class:`FeatureExtractor`. Default: the last before the head
            (:func:`default_layers`), as in the paper; of a shared extractor, all of its layers.
        normalize: "imagenet" | "model" | torchvision weights | ((mean, ...), (std, ...)) | None, as for
            :class:`FeatureExtractor`.
        distance: "l1" | "mse" | "rms" | "l2", per sample (:func:`distance_per_sample`).
        layer_weights: by layer name; a layer of several tensors shares its weight evenly. Default: 1 in all, evenly.
        reduction: over samples: "mean" | "sum" | "none" (returns (N,)).
        input_range: what YOUR images span.

    Raises:
        ValueError: At construction for a layer that does not exist or options that contradict each other, at a call
            for images that do not fit, a network on another device, and features of unequal shape.

    Example:
        >>> from torchvision.models import resnet18
        >>> classifier = resnet18(num_classes=10).train()
        >>> loss = TDPLoss(classifier)
        >>> restored, clean = torch.rand(2, 3, 40, 40, requires_grad=True), torch.rand(2, 3, 40, 40)
        >>> (nn.functional.l1_loss(restored, clean) + loss(restored, clean)).backward()
        >>> classifier.training, classifier.conv1.weight.grad, list(loss.terms(restored, clean))
        (True, None, ['layer4'])

    Source: Kim et al., "Beyond Image Super-Resolution for Image Recognition with Task-Driven Perceptual Loss", Eq. 2;
    mean-reduced as in the authors' code, which has a copy of every task network that returns its features, and runs it
    to its end.
    """

    def __init__(
        self,
        task: nn.Module | FeatureExtractor,
        layers: Sequence[str] | None = None,
        *,
        normalize: Normalize = "imagenet",
        distance: Distance = "l1",
        layer_weights: Mapping[str, float] | None = None,
        reduction: Reduction = "mean",
        input_range: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        super().__init__()
        check_choice("distance", distance, Distance)
        check_choice("reduction", reduction, Reduction)
        self.distance: Distance = distance
        self.reduction: Reduction = reduction
        if isinstance(task, FeatureExtractor):
            self.features = task
            self.layers = tuple(task.layers if layers is None else layers)
            unknown = [layer for layer in self.layers if layer not in task.layers]
            if normalize != "imagenet" or tuple(input_range) != (0.0, 1.0):
                name = "normalize" if normalize != "imagenet" else "input_range"
                raise ValueError(f"`{name}` should be given to the shared extractor, found it given to the loss.")
            if unknown or not self.layers:
                raise ValueError(f"`layers` should be of the shared extractor, {list(task.layers)}, found {unknown}.")
        else:
            self.features = FeatureExtractor(task, layers, normalize=normalize, input_range=input_range)
            self.layers = self.features.layers
        self.layer_weights = _layer_weights(self.layers, layer_weights)
        self._range_checked = False

    def terms(self, restored: Images, target: Images) -> dict[str, Tensor]:
        """The weighted distance at each layer, by its name. Arguments as in :meth:`forward`."""
        pairs = _pairs(restored, target)
        if not (self._range_checked or torch.compiler.is_compiling() or pairs[0][1].is_meta):
            warn_if_out_of_range(pairs[0][1], self.features.input_range)
            self._range_checked = True
        seen_in_restored, seen_in_target = self._look(restored, target)
        terms = {}
        for layer in self.layers:
            names = [name for name in seen_in_target if name == layer or name.startswith(f"{layer}/")]
            for name in names:
                values = distance_per_sample(seen_in_restored[name], seen_in_target[name], self.distance)
                weight = self.layer_weights[layer] / len(names)
                terms[name] = weight * reduce_samples(values, self.reduction)
        return terms

    def forward(self, restored: Images, target: Images) -> Tensor:
        """The loss.

        Args:
            restored: output of the restoration network, float (N, C, H, W) in ``input_range``, or a list of (C, H, W)
                for networks that take lists (torchvision's detectors, which pad them to one size).
            target: the same shape or shapes.

        Returns:
            A scalar, or (N,) with ``reduction="none"``, in float32 or higher.
        """
        return total(self.terms(restored, target))

    # flags and modes of a live network are no business of a graph
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _look(self, restored: Images, target: Images) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        with frozen(bare(self.features.network)):
            with torch.no_grad():
                seen_in_target = self.features(target)
            seen_in_restored = self.features(restored)
        images = [restored] if isinstance(restored, Tensor) else restored
        needs_gradient = torch.is_grad_enabled() and any(image.requires_grad for image in images)
        for name, reference in seen_in_target.items():
            found = seen_in_restored.get(name, reference[:0])
            if found.shape != reference.shape:
                raise ValueError(
                    f"Layer {name!r} should return one shape for both images, found {tuple(found.shape)} for "
                    f"`restored` and {tuple(reference.shape)} for `target`."
                )
            if needs_gradient and not found.requires_grad:
                raise ValueError(
                    f"Layer {name!r} should pass a gradient to `restored`, found none: it is detached, or within "
                    "reentrant activation checkpointing (use `use_reentrant=False`)."
                )
        return seen_in_restored, seen_in_target

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        weights = ", ".join(f"{weight:g} * {layer}" for layer, weight in self.layer_weights.items())
        return f"{type(bare(self.features.network)).__name__}: {weights}, distance={self.distance!r}"


def _layer_weights(layers: Sequence[str], given: Mapping[str, float] | None) -> dict[str, float]:
    if given is None:
        return {layer: 1 / len(layers) for layer in layers}
    if not isinstance(given, Mapping) or set(given) != set(layers):
        found = sorted(given) if isinstance(given, Mapping) else type(given).__name__
        raise ValueError(f"`layer_weights` should be a mapping of the layers {list(layers)}, found {found}.")
    weights = {layer: float(given[layer]) for layer in layers}
    if not all(0 <= weight < float("inf") for weight in weights.values()) or not any(weights.values()):
        raise ValueError(f"`layer_weights` should be at least 0, finite and not all 0, found {weights}.")
    return weights


def _pairs(restored: Images, target: Images) -> list[tuple[Tensor, Tensor]]:
    """The images as batches to be checked: one of (N, C, H, W), or N of (1, C, H, W)."""
    if isinstance(restored, Tensor) or isinstance(target, Tensor):
        check_pair(restored, target)  # type: ignore[arg-type]
        return [(restored, target)]  # type: ignore[list-item]
    if len(restored) != len(target) or not restored:
        raise ValueError(
            f"`target` should be as many images as `restored`, at least 1, found {len(target)} and {len(restored)}."
        )
    pairs = [(z[None], x[None]) for z, x in zip(restored, target, strict=True)]
    for z, x in pairs:
        check_pair(z, x)
    return pairs
