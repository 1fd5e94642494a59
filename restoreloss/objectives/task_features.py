"""Losses on the features of task networks: TDPLoss, HLFLoss and FeatureMatchingLoss.

:class:`TDPLoss` compares images in one network, in the middle of its training; :class:`HLFLoss` also in the network
that it was before. :class:`FeatureMatchingLoss` keeps the one near the other, and trains the network, not the image.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from restoreloss.checks import check_choice, check_number, describe
from restoreloss.distances import Distance, Reduction, distance_per_sample, reduce_samples
from restoreloss.features import FeatureExtractor
from restoreloss.frozen import (
    FrozenNetwork,
    averages_gradients,
    frozen,
    serving,
    statistics_at_rest,
    unwrap,
    warn_before_freezing,
    warn_if_untrained,
    without_checkpointing,
)
from restoreloss.images import RangeWatch, checked_pairs
from restoreloss.normalization import Images, Normalize, normalizes_itself
from restoreloss.objectives.base import Objective, total


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
        layers: which features, a name or several, as for :class:`FeatureExtractor`. Default: the last map before the
            head (:func:`~restoreloss.default_layers.default_layers`), as in the paper; of a shared extractor, all of
            its layers.
        normalize: "auto" | "imagenet" | "model" | torchvision weights | ((mean, ...), (std, ...)) | a callable, from
            images in [0, 1] to the network's input, of which a tuple is its positional arguments | None, as for
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
        layers: str | Sequence[str] | None = None,
        *,
        normalize: Normalize = "auto",
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
        self.features, self.layers = _extractor("task", task, layers, normalize, input_range)
        self.layer_weights = _layer_weights(self.layers, layer_weights)
        self._range = RangeWatch(self.features.input_range)
        self._is_first = True

    def terms(self, restored: Images, target: Images) -> dict[str, Tensor]:
        """The weighted distance at each layer, by its name. Arguments as in :meth:`forward`."""
        pairs = checked_pairs(restored, target)
        self._range.look({"restored": pairs[0][0], "target": pairs[0][1]})
        return self.compare(*self._look(restored, target), count=len(target))

    def compare(
        self, seen: Mapping[str, Tensor], wanted: Mapping[str, Tensor], *, count: int | None = None
    ) -> dict[str, Tensor]:
        """The weighted distance of features that were taken elsewhere, at each layer, with their own gradient.

        Args:
            seen: by the name of the layer, as ``features(images)`` of this loss or ``recording()`` of its extractor
                gives them.
            wanted: likewise.
            count: how many images they are of. Default: the first dimension of the features.

        Returns:
            The terms of :meth:`terms`.
        """
        _check_shapes(seen, wanted, "seen", "wanted")
        count = len(next(iter(wanted.values()))) if count is None else count
        return _distances(seen, wanted, self.layer_weights, self.distance, self.reduction, count)

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

    # The flags and modes of a live network change here, which cannot be part of a graph.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _look(self, restored: Images, target: Images) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        network = unwrap(self.features.network)
        if self._is_first:
            warn_if_untrained(network, "task")
            self._is_first = False
        with frozen(network), without_checkpointing(network):
            with torch.no_grad():
                seen_in_target = self.features(target)
            seen_in_restored = self.features(restored)
        images = [restored] if isinstance(restored, Tensor) else restored
        needs_gradient = torch.is_grad_enabled() and any(image.requires_grad for image in images)
        _check_shapes(seen_in_restored, seen_in_target, "restored", "target")
        for name, found in seen_in_restored.items():
            if needs_gradient and not found.requires_grad:
                raise ValueError(
                    f"Layer {name!r} should pass a gradient to `restored`, found none: it is detached, or within "
                    "reentrant activation checkpointing (use `use_reentrant=False`)."
                )
        return seen_in_restored, seen_in_target

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        return f"{_seen_by(self.features, self.layer_weights)}, distance={self.distance!r}"


class HLFLoss(Objective):
    r"""High-level feature loss: the TDP loss in the task network and in the one it began as.

    .. math:: L = \tfrac12 \big( d(H(z), H(x)) + d(H_{HQ}(z), H_{HQ}(x)) \big) \quad\text{(Eq. 7)}

    where z is the restored and x the target image, H the task network in training and :math:`H_{HQ}` the same network
    trained on high-quality images, both at their ``layers`` and weighed as in :class:`TDPLoss`. The gradient reaches z
    and nothing else.

    H is borrowed, as in :class:`TDPLoss`. :math:`H_{HQ}` is frozen for good, follows ``.to()`` and appears in no
    ``parameters()`` or ``state_dict()`` of the loss.

    Args:
        task: H, or a :class:`FeatureExtractor` of it.
        reference: :math:`H_{HQ}`, another network than H (``copy.deepcopy(task)`` before training), or a
            :class:`FeatureExtractor` of it. What it sees in the targets is computed once for all losses within
            ``extractor.shared()``.
        layers: of both networks, as for :class:`TDPLoss`.
        normalize: of both networks, as for :class:`TDPLoss`.
        distance: "l1" | "mse" | "rms" | "l2", per sample.
        layer_weights: by layer name, as for :class:`TDPLoss`.
        reduction: over samples: "mean" | "sum" | "none" (returns (N,)).
        input_range: what YOUR images span.

    Raises:
        ValueError: As :class:`TDPLoss`, and at construction where both networks are one.

    Example:
        >>> import copy
        >>> from torchvision.models import resnet18
        >>> classifier = resnet18(num_classes=10)
        >>> loss = HLFLoss(classifier, copy.deepcopy(classifier))
        >>> list(loss.terms(torch.rand(2, 3, 40, 40), torch.rand(2, 3, 40, 40)))
        ['task/layer4', 'reference/layer4']

    Source: Kim et al., "Exploiting Diffusion Prior for Task-driven Image Restoration", Eq. 7. The authors' code has
    the features of the targets with a graph.
    """

    def __init__(
        self,
        task: nn.Module | FeatureExtractor,
        reference: nn.Module | FeatureExtractor,
        layers: str | Sequence[str] | None = None,
        *,
        normalize: Normalize = "auto",
        distance: Distance = "l1",
        layer_weights: Mapping[str, float] | None = None,
        reduction: Reduction = "mean",
        input_range: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        super().__init__()
        _check_two(task, reference, "task", "reference")
        self.task, self.reference = (
            TDPLoss(
                network, layers, normalize=normalize, distance=distance, layer_weights=layer_weights,
                reduction=reduction, input_range=input_range,
            )
            for network in (task, reference)
        )  # fmt: skip
        self.reduction: Reduction = reduction
        self.reference._range.warned, self.reference._is_first = True, False  # The task warns of the same images.
        learning = [_learns(loss.features.network) for loss in (self.task, self.reference)]
        if learning == [False, True]:
            warnings.warn(
                "`reference` is frozen from now on, and its parameters require a gradient, while those of `task` do "
                "not: were the two exchanged?",
                stacklevel=2,
            )
        else:
            warn_before_freezing(self.reference.features.network, "reference")
        self._reference = FrozenNetwork(self.reference.features.network)

    def terms(self, restored: Images, target: Images) -> dict[str, Tensor]:
        """Half the weighted distance at each layer, as "task/layer" and "reference/layer"."""
        _ = self._reference.network  # This puts it at rest.
        with serving(self._reference):
            return {
                f"{name}/{layer}": value / 2
                for name, loss in (("task", self.task), ("reference", self.reference))
                for layer, value in loss.terms(restored, target).items()
            }

    def forward(self, restored: Images, target: Images) -> Tensor:
        """The loss; arguments and result as in :meth:`TDPLoss.forward`."""
        return total(self.terms(restored, target))


class FeatureMatchingLoss(Objective):
    r"""Keep what a task network sees in restored images near what its teacher sees in the high-quality ones.

    .. math:: L = \sum_k w_k\, d\big(H_k(z), H_{HQ,k}(x)\big) \quad\text{(Eq. 9)}

    The gradient reaches the weights of the student H, and neither the images nor the teacher :math:`H_{HQ}`, which is
    frozen for good, follows ``.to()`` and appears in no ``parameters()`` or ``state_dict()`` of the loss. The student
    is borrowed: it runs in the mode it is in, and its batch-norm statistics stay what they are.

    The student usually reads the same images for its task loss. One pass then does for both (detach the images: what a
    recorded pass may reach is the caller's business)::

        with matching.student.recording() as seen:
            logits = student(normalize(images))
        loss = cross_entropy(logits, labels) + alpha * matching(seen, clean)

    Args:
        student: H, the network in training, or a :class:`FeatureExtractor` of it.
        teacher: :math:`H_{HQ}`, another network, or a :class:`FeatureExtractor` of it.
        layers: of both networks, as for :class:`TDPLoss`.
        normalize: of both networks, as for :class:`TDPLoss`.
        distance: "l1" | "mse" | "rms" | "l2", per sample.
        layer_weights: by layer name, as for :class:`TDPLoss`.
        reduction: over samples: "mean" | "sum" | "none" (returns (N,)).
        input_range: what YOUR images span.

    Raises:
        ValueError: As :class:`TDPLoss`, and at construction where both networks are one.

    Example:
        >>> from torchvision.models import resnet18
        >>> student, teacher = resnet18(num_classes=10), resnet18(num_classes=10)
        >>> matching = FeatureMatchingLoss(student, teacher)
        >>> matching(torch.rand(2, 3, 40, 40), torch.rand(2, 3, 40, 40)).backward()
        >>> student.conv1.weight.grad is not None, teacher.conv1.weight.grad
        (True, None)

    Source: Kim et al., "Exploiting Diffusion Prior for Task-driven Image Restoration", Eq. 9.
    """

    def __init__(
        self,
        student: nn.Module | FeatureExtractor,
        teacher: nn.Module | FeatureExtractor,
        layers: str | Sequence[str] | None = None,
        *,
        normalize: Normalize = "auto",
        distance: Distance = "l1",
        layer_weights: Mapping[str, float] | None = None,
        reduction: Reduction = "mean",
        input_range: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        super().__init__()
        _check_two(student, teacher, "student", "teacher")
        check_choice("distance", distance, Distance)
        check_choice("reduction", reduction, Reduction)
        self.distance: Distance = distance
        self.reduction: Reduction = reduction
        self.student, self.layers = _extractor("student", student, layers, normalize, input_range)
        self.teacher, _ = _extractor("teacher", teacher, self.layers, normalize, input_range)
        self.layer_weights = _layer_weights(self.layers, layer_weights)
        self._range = RangeWatch(self.teacher.input_range)
        if not _learns(self.student.network) and _learns(self.teacher.network):
            raise ValueError(
                "`student` should have parameters that require a gradient, found none, while `teacher` has some: were "
                "the two exchanged?"
            )
        warn_before_freezing(self.teacher.network, "teacher")
        self._teacher = FrozenNetwork(self.teacher.network)

    def terms(self, student_images: Images | Mapping[str, Tensor], teacher_images: Images) -> dict[str, Tensor]:
        """The weighted distance at each layer, by its name. Arguments as in :meth:`forward`."""
        with serving(self._teacher):
            seen, wanted = self._look(student_images, teacher_images)
        return _distances(seen, wanted, self.layer_weights, self.distance, self.reduction, len(teacher_images))

    def forward(self, student_images: Images | Mapping[str, Tensor], teacher_images: Images) -> Tensor:
        """The loss.

        Args:
            student_images: what the student reads, float (N, C, H, W) in ``input_range`` or a list of (C, H, W); or
                what it has seen in them, from ``student.recording()``.
            teacher_images: the high-quality images of the same samples, in the same order.

        Returns:
            A scalar, or (N,) with ``reduction="none"``, in float32 or higher.
        """
        return total(self.terms(student_images, teacher_images))

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _look(
        self, student_images: Images | Mapping[str, Tensor], teacher_images: Images
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        _ = self._teacher.network  # This puts it at rest.
        seen = student_images if isinstance(student_images, Mapping) else self._see(student_images, teacher_images)
        with torch.no_grad():
            found = self.teacher(teacher_images)
        images = {"teacher_images": teacher_images}
        if not isinstance(student_images, Mapping):
            images["student_images"] = student_images
        self._range.look({name: image if isinstance(image, Tensor) else image[0] for name, image in images.items()})
        # A shared extractor may watch more layers.
        wanted = {
            name: value
            for name, value in found.items()
            if any(name == layer or name.startswith(f"{layer}/") for layer in self.layers)
        }
        missing = [name for name in wanted if name not in seen]
        if missing:
            raise ValueError(
                f"`student_images` should hold features of {list(wanted)}, found {list(seen)}: they are "
                "there at the end of the block of `recording()`."
            )
        seen = {name: seen[name] for name in wanted}
        _check_shapes(seen, wanted, "student_images", "teacher_images")
        trains = any(weight.requires_grad for weight in unwrap(self.student.network).parameters())
        if trains and torch.is_grad_enabled() and not any(value.requires_grad for value in seen.values()):
            raise ValueError(
                f"The student's features {list(seen)} have no graph, so that this loss would train nothing: was the "
                "pass recorded under `no_grad`, or by reentrant activation checkpointing (use_reentrant=False helps)?"
            )
        return seen, wanted

    def _see(self, student_images: Images, teacher_images: Images) -> dict[str, Tensor]:
        pairs = checked_pairs(student_images, teacher_images, ("student_images", "teacher_images"))
        network = unwrap(self.student.network)
        if torch.is_grad_enabled() and _learns(network) and averages_gradients(self.student.network):
            raise ValueError(
                "`student_images` should be what a student in DistributedDataParallel has seen in a pass of its own, "
                "from `student.recording()`, found images: gradients of the network inside are not averaged."
            )
        if network.training and normalizes_itself(network):
            raise ValueError(
                f"{type(network).__name__} in train mode asks for boxes: `student_images` should be what it has "
                "seen in its training pass, from `student.recording()`, found images."
            )
        unwatched = pairs[0][0].detach() if isinstance(student_images, Tensor) else [z[0].detach() for z, _ in pairs]
        with statistics_at_rest(network), without_checkpointing(network):
            seen: dict[str, Tensor] = self.student(unwatched)
        return seen

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        return f"{_seen_by(self.student, self.layer_weights)}, distance={self.distance!r}"


def _check_two(one: Any, other: Any, name: str, other_name: str) -> None:
    """Raise unless these are two networks that share no weights."""
    _check_network(one, name)
    _check_network(other, other_name)
    networks = [unwrap(x.network if isinstance(x, FeatureExtractor) else x) for x in (one, other)]
    if set(networks[0].parameters()) & set(networks[1].parameters()) or networks[0] is networks[1]:
        raise ValueError(
            f"`{other_name}` should be another network than `{name}`, found one that shares its weights: it is frozen, "
            f"give `copy.deepcopy({name})`."
        )


def _learns(network: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in network.parameters())


def _check_network(network: Any, name: str) -> None:
    if not isinstance(network, nn.Module | FeatureExtractor):
        raise ValueError(f"`{name}` should be a network or a FeatureExtractor, found {describe(network)}.")


def _extractor(
    argument: str,
    network: nn.Module | FeatureExtractor,
    layers: str | Sequence[str] | None,
    normalize: Normalize,
    input_range: tuple[float, float],
) -> tuple[FeatureExtractor, tuple[str, ...]]:
    """The extractor and which of its layers are meant."""
    _check_network(network, argument)
    if not isinstance(network, FeatureExtractor):
        extractor = FeatureExtractor(network, layers, normalize=normalize, input_range=input_range)
        return extractor, extractor.layers
    chosen = network.layers if layers is None else (layers,) if isinstance(layers, str) else tuple(layers)
    unknown = [layer for layer in chosen if layer not in network.layers]
    given = not (isinstance(normalize, str) and normalize == "auto")
    if given or tuple(input_range) != (0.0, 1.0):
        name = "normalize" if given else "input_range"
        raise ValueError(f"`{name}` should be given to the shared extractor, found it given to the loss.")
    if unknown or not chosen:
        raise ValueError(f"`layers` should be of the shared extractor, {list(network.layers)}, found {unknown}.")
    return network, chosen


def _distances(
    seen: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    layer_weights: Mapping[str, float],
    distance: Distance,
    reduction: Reduction,
    count: int,
) -> dict[str, Tensor]:
    """The weighted distance of each tensor; the tensors of one layer share its weight."""
    terms = {}
    for layer, layer_weight in layer_weights.items():
        names = [name for name in wanted if name == layer or name.startswith(f"{layer}/")]
        for name in names:
            values = distance_per_sample(seen[name], wanted[name], distance)
            if (reduction != "mean" or distance in ("rms", "l2")) and len(values) != count:
                raise ValueError(
                    f"Layer {name!r} should have the {count} images as its first dimension for `reduction` "
                    f"{reduction!r} and `distance` {distance!r}, found {tuple(wanted[name].shape)}."
                )
            terms[name] = layer_weight / len(names) * reduce_samples(values, reduction)
    return terms


def _check_shapes(seen: Mapping[str, Tensor], wanted: Mapping[str, Tensor], name: str, other_name: str) -> None:
    for layer, reference in wanted.items():
        found = seen.get(layer, reference[:0])
        if found.shape != reference.shape:
            raise ValueError(
                f"Layer {layer!r} should return one shape for both images, found {tuple(found.shape)} for `{name}` and "
                f"{tuple(reference.shape)} for `{other_name}`."
            )


def _seen_by(features: FeatureExtractor, layer_weights: Mapping[str, float]) -> str:
    weights = ", ".join(f"{weight:g} * {layer}" for layer, weight in layer_weights.items())
    return f"{type(unwrap(features.network)).__name__}: {weights}"


def _layer_weights(layers: Sequence[str], given: Mapping[str, float] | None) -> dict[str, float]:
    if given is None:
        return {layer: 1 / len(layers) for layer in layers}
    if not isinstance(given, Mapping) or set(given) != set(layers):
        found = sorted(given) if isinstance(given, Mapping) else type(given).__name__
        raise ValueError(f"`layer_weights` should be a mapping of the layers {list(layers)}, found {found}.")
    weights = {layer: check_number(f"layer_weights[{layer!r}]", given[layer], low=0) for layer in layers}
    if not any(weights.values()):
        raise ValueError(f"`layer_weights` should be not all 0, found {weights}.")
    return weights
