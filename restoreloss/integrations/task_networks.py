"""Task networks of torchvision, timm and transformers by their names, for an options file.

Python code does not need this: ``TDPLoss(torchvision.models.resnet50(weights="DEFAULT"))``.
"""

from pathlib import Path
from typing import Any

from torch import nn

from restoreloss._optional import extra, require
from restoreloss.checks import check_integer, describe
from restoreloss.normalization import IMAGENET
from restoreloss.weights import load_state, read_weights

LIBRARIES = ("torchvision", "timm", "transformers")


def task_network(
    name: str, *, weights: str | Path, num_classes: int | None = None, image_size: int | None = None
) -> nn.Module:
    """A network by "library/name", e.g. "torchvision/resnet50", "timm/vit_small_patch16_224", "transformers/FOLDER".

    Args:
        name: of transformers, a folder or a name on the hub with a ``config.json``.
        weights: "pretrained" for what the library downloads (of transformers: what lies in the folder), "random", or a
            file of weights (:func:`restoreloss.weights.read_weights`: safetensors or ``torch.save``, in the usual
            containers). There is no default: a perceptual loss in random features is rarely what is meant.
        num_classes: where the head is not that of the pretrained network.
        image_size: of the images, for timm's transformers that read one size (ViT, Swin), which are then made for it.

    Returns:
        The network in eval mode, on the CPU.

    Raises:
        ValueError: For an unknown library or network, and weights that do not fit.
        FileNotFoundError: For a file that is not there.
        ImportError: If the library is not installed.

    Example:
        >>> network = task_network("torchvision/resnet18", weights="random", num_classes=10)
        >>> loss = TDPLoss(network)
    """
    library, model = _parts(name)
    if not isinstance(weights, str | Path):
        raise ValueError(f"`weights` should be 'pretrained', 'random' or a file, found {describe(weights)}.")
    for option, value in (("num_classes", num_classes), ("image_size", image_size)):
        if value is not None:
            check_integer(option, value)
    if str(weights) not in ("pretrained", "random") and not Path(weights).expanduser().is_file():
        raise FileNotFoundError(f"`weights` should be 'pretrained', 'random' or a file, found none at {weights}.")
    pretrained = str(weights) == "pretrained"
    if image_size is not None and library != "timm":
        raise ValueError(f"`image_size` should be left out for {library}: only timm makes its transformers for a size.")
    if library == "torchvision":
        network = _torchvision(model, pretrained, num_classes)
    elif library == "timm":
        network = _timm(model, pretrained, num_classes, image_size)
    else:
        network = _transformers(model, pretrained, num_classes)
    if not pretrained and str(weights) != "random":
        file = Path(weights).expanduser()
        found = read_weights(file)
        try:
            load_state(network, found, file)
        except ValueError as error:
            raise ValueError(f"`weights` should fit {name!r} (is `num_classes` right?): {error}") from error
    return network.eval()


def normalization(name: str) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """(mean, std) that a network of :func:`task_network` wants; None where it normalizes its own input.

    Example:
        >>> normalization("timm/vit_tiny_patch16_224")
        ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    """
    library, model = _parts(name)
    if library == "timm":
        timm = _timm_with(model)
        config = timm.get_pretrained_cfg(model)
        if config is not None:
            return tuple(config.mean), tuple(config.std)
    if library == "torchvision":
        models = _torchvision_with(model)
        if model in models.list_models(module=models.detection):
            return None
        preset = models.get_model_weights(model).DEFAULT.transforms()
        return (tuple(preset.mean), tuple(preset.std)) if hasattr(preset, "mean") else IMAGENET
    if library == "transformers":
        transformers = require("transformers", purpose=f"{name!r}", install=extra("examples"))
        try:
            found: dict[str, Any] = transformers.ImageProcessingMixin.get_image_processor_dict(model)[0]
        except OSError:  # The folder holds a network and nothing else.
            return IMAGENET
        if "image_mean" in found and found.get("do_normalize", True):
            return tuple(found["image_mean"]), tuple(found["image_std"])
    return IMAGENET


def _parts(name: str) -> tuple[str, str]:
    """The library and what it calls the network."""
    library, _, model = name.partition("/") if isinstance(name, str) else ("", "", "")
    if library not in LIBRARIES or not model:
        raise ValueError(f"`name` should be 'library/name' with a library of {LIBRARIES}, found {describe(name)}.")
    return library, model


def _torchvision(name: str, pretrained: bool, num_classes: int | None) -> nn.Module:
    models = _torchvision_with(name)
    options: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    if not pretrained and any(module in models.get_model_builder(name).__module__ for module in _WITH_BACKBONE):
        options["weights_backbone"] = None  # Otherwise it would be downloaded.
    network: nn.Module = models.get_model(name, weights="DEFAULT" if pretrained else None, **options)
    return network


_WITH_BACKBONE = ("detection", "segmentation")


def _torchvision_with(name: str) -> Any:
    """``torchvision.models``, if it has a network of this name."""
    models = require("torchvision.models", purpose=f"'torchvision/{name}'", install="torchvision")
    if name not in models.list_models():
        raise ValueError(f"`name` should be one of `torchvision.models.list_models()`, found {name!r}.")
    return models


def _timm_with(name: str) -> Any:
    """``timm``, if it has a network of this name."""
    timm = require("timm", purpose=f"'timm/{name}'", install="timm")
    if not timm.is_model(name):
        raise ValueError(f"`name` should be one of `timm.list_models()`, found {name!r}.")
    return timm


def _timm(name: str, pretrained: bool, num_classes: int | None, image_size: int | None) -> nn.Module:
    timm = _timm_with(name)
    size = {} if image_size is None else {"img_size": image_size}
    try:
        network: nn.Module = timm.create_model(name, pretrained=pretrained, num_classes=num_classes, **size)
    except TypeError as error:
        if image_size is None:
            raise
        raise ValueError(f"`image_size` should be left out for {name!r}, which reads any size.") from error
    return network


def _transformers(name: str, pretrained: bool, num_classes: int | None) -> nn.Module:
    transformers = require("transformers", purpose=f"'transformers/{name}'", install=extra("examples"))
    try:
        config = transformers.AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"`name` should be a folder with a config.json or a name on the hub, found {name!r}: {reason}"
        ) from error
    if num_classes is not None:
        config.num_labels = num_classes
    # This is the class that the folder was saved from: a head is a part of the task network.
    kind = getattr(transformers, (config.architectures or [""])[0], None)
    if kind is None:
        raise ValueError(
            f"`name` should be a folder whose config.json names its class in `architectures`, found "
            f"{config.architectures} in {name!r}."
        )
    network: nn.Module = kind.from_pretrained(name, config=config) if pretrained else kind(config)
    return network
