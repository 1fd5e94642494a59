"""The layers of a task network that are looked at where the caller names none: the last map before the head."""

from collections.abc import Mapping
from typing import Any

from torch import nn


def default_layers(network: nn.Module) -> tuple[str, ...]:
    """The last spatial features before the head: what a task is decided on.

    ===================================== =======================================
    torchvision and timm classifiers      the last stage before pooling ("layer4")
    torchvision DeepLabV3, FCN, LRASPP    the backbone's deepest output
    torchvision detectors                 the backbone's maps, "pool" excepted
    transformers                          the last hidden state below the head; of DETR, of its encoder
    segmentation_models_pytorch           the encoder's deepest output
    ===================================== =======================================

    Raises:
        ValueError: For any other network.
    """
    children = dict(network.named_children())
    if "backbone" in children:
        backbone = children["backbone"]
        pyramid = getattr(getattr(backbone, "fpn", None), "inner_blocks", None)
        if isinstance(pyramid, nn.ModuleList):
            return tuple(f"backbone/{level}" for level in range(len(pyramid)))
        names = getattr(backbone, "return_layers", None)  # An IntermediateLayerGetter of torchvision has it.
        if names is not None:
            return (f"backbone/{'out' if 'out' in names.values() else list(names.values())[-1]}",)
        return ("backbone",)
    stages = getattr(network, "feature_info", None)  # Networks of timm have it.
    if stages and hasattr(network, "pretrained_cfg"):
        return (stages[-1]["module"],)
    if hasattr(network, "base_model_prefix"):
        return (_of_transformers(network.base_model_prefix, children),)
    for name in _LAST_STAGES:
        if name in children:
            return (_last_of(name, children[name]),)
    raise ValueError(
        f"`layers` should name the layers of {type(network).__name__}, which has no known default, found None; its "
        f"children are {list(children)}."
    )


_LAST_STAGES = (
    "layer4", "trunk_output", "Mixed_7c", "inception5b", "conv5", "features", "encoder", "blocks", "layers",
)  # fmt: skip
"""Names of the last stage before pooling in torchvision, the most specific ones first."""


def _of_transformers(prefix: Any, children: Mapping[str, nn.Module]) -> str:
    """The last hidden state below a head; of a model without a head, its own."""
    body = str(prefix) if prefix in children else ""
    parts = dict(children[body].named_children()) if body else children
    if "decoder" in parts and "encoder" in parts:
        body = f"{body}.encoder".removeprefix(".")
    return f"{body}/last_hidden_state"


def _last_of(name: str, child: nn.Module) -> str:
    """The part of a stage that gives its last output: stages may be lists, and an encoder gives a list of maps."""
    if isinstance(child, nn.ModuleList):  # A list is looped over, and never called itself.
        return f"{name}.{len(child) - 1}"
    depths = getattr(child, "out_channels", None)
    if name == "encoder" and isinstance(depths, list | tuple):
        # In segmentation_models_pytorch there is one output for each of these, the first being the input itself.
        return f"{name}/{len(depths) - 1}"
    return name
