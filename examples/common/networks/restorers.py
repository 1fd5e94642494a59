"""The restoration networks that the recipes train: those of the papers, any of spandrel, and small ones."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from examples.common.networks.edsr import EDSR
from examples.common.networks.own import own_network
from examples.common.networks.restormer import Restormer
from examples.common.networks.weights import load_weights
from restoreloss.sizes import pad_to
from restoreloss.weights import read_weights

logger = logging.getLogger(__name__)


def restorer(name: str, scale: int, weights: Path | None = None, *, option: str = "restorer") -> nn.Module:
    """A restoration network that enlarges by ``scale``.

    Args:
        name: "edsr" | "edsr-small" | "swinir" | "swinir-light" | "swinir-small"; of scale 1 also "swinir-unshuffle" |
            "nafnet" | "nafnet-small" | "restormer" | "restormer-small" | "spandrel/NAME", an architecture of spandrel
            as it is by default; "file" for whatever spandrel finds in ``weights``; "module:Class", called without
            arguments.
        scale: of the super-resolution.
        weights: a state dict, or for "file" any checkpoint that spandrel reads.
        option: that the name was given as, for messages.

    Raises:
        ValueError: For an unknown name, and weights of another scale.
    """
    if name == "file":
        from spandrel import ImageModelDescriptor, ModelLoader

        if weights is None or not weights.is_file():
            raise ValueError(f"The restorer 'file' should be given a file of weights, found {weights}.")
        state = read_weights(weights)
        try:
            described = ModelLoader(device="cpu").load_from_state_dict(state)
        except Exception as error:  # each architecture has errors of its own
            cause = " ".join(str(error).split())[:300]
            raise ValueError(
                f"{weights} should hold a network that spandrel knows, found one that begins with {list(state)[:3]}: "
                f"{type(error).__name__}: {cause}"
            ) from error
        if not isinstance(described, ImageModelDescriptor) or described.scale != scale:
            raise ValueError(f"{weights} should hold a network of scale {scale}, found {described}.")
        model: nn.Module = described.model
        return fit_sizes(model.requires_grad_(True), described.size_requirements, scale)
    if scale != 1 and (name in SAME_SIZE or name.startswith("spandrel/")):
        raise ValueError(f"`scale` should be 1 for {name!r}, which keeps the size, found {scale}.")
    if name.startswith("spandrel/"):
        network = _of_spandrel(name.removeprefix("spandrel/"))
    elif ":" in name:
        network = own_network(name, option)
    elif name in SAME_SIZE:
        network = SAME_SIZE[name]()
    elif name in _ENLARGING:
        network = _ENLARGING[name](scale)
    else:
        known = (*_ENLARGING, *SAME_SIZE, "file", "spandrel/NAME", "module:Class")
        raise ValueError(f"`{option}` should be one of {known}, found {name!r}.")
    if weights is not None:
        load_weights(network, weights)
    return network


def _swinir(scale: int, **size: Any) -> nn.Module:
    from spandrel.architectures.SwinIR import SwinIR

    if scale == 1:  # nothing to enlarge: as in the paper's denoiser
        size["upsampler"] = ""
    network: nn.Module = SwinIR(upscale=scale, window_size=8, mlp_ratio=2, img_size=64, **size)
    return network


def _swinir_unshuffled() -> nn.Module:
    """SwinIR on an eighth of the sides, as EDTR has it after DiffBIR: a thirtieth of the work."""
    from spandrel import SizeRequirements
    from spandrel.architectures.SwinIR import SwinIR

    network: nn.Module = SwinIR(
        upscale=8, start_unshuffle=8, window_size=8, mlp_ratio=2, img_size=64, embed_dim=180, depths=[6] * 8,
        num_heads=[6] * 8, upsampler="nearest+conv",
    )  # fmt: skip
    return fit_sizes(network, SizeRequirements(multiple_of=64))


def _of_spandrel(name: str) -> nn.Module:
    """An architecture of spandrel by its name, with the sizes that it has there by default."""
    from importlib import import_module

    try:
        network: nn.Module = getattr(import_module(f"spandrel.architectures.{name}"), name)()
    except (ModuleNotFoundError, AttributeError, TypeError) as error:
        raise ValueError(
            "The restoration network should be an architecture of spandrel that needs no options, found "
            f"{name!r}: {error}."
        ) from error
    return fit_sizes(network, _requirements(network))


def _requirements(network: nn.Module) -> Any:
    """The sizes that a network takes, as spandrel says; None where spandrel does not recognize it."""
    from spandrel import MAIN_REGISTRY

    try:
        return MAIN_REGISTRY.load(network.state_dict()).size_requirements
    except Exception as error:  # each architecture has errors of its own
        logger.info("spandrel does not say which sizes %s takes (%s)", type(network).__name__, error)
        return None


def fit_sizes(network: nn.Module, requirements: Any, scale: int = 1) -> nn.Module:
    """Let a network take images of any size: they are continued to a size that it takes, and its output is cut back.

    Its weights and their names stay as they are.

    Args:
        network: images (N, C, H, W) to images (N, C, scale H, scale W).
        requirements: spandrel's ``size_requirements`` of it, or None for a network that takes any size.
        scale: of the super-resolution.
    """
    if requirements is None or requirements.none:
        return network
    given: list[tuple[int, int]] = []

    def pad(_: nn.Module, arguments: tuple[Tensor]) -> tuple[Tensor]:
        image = arguments[0]
        height, width = image.shape[2:]
        right, below = requirements.get_padding(width, height)
        given[:] = [(height, width)]
        return (pad_to(image, (height + below, width + right)) if right or below else image,)

    def cut(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        ((height, width),) = given
        return output[..., : height * scale, : width * scale]

    network.register_forward_pre_hook(pad)
    network.register_forward_hook(cut)
    return network


class LayerNorm2d(nn.Module):
    """NAFNet's norm over the channels, by torch: the authors' function has a wrong second derivative (L_orth has two).

    Args:
        norm: theirs, whose parameters are shared.
    """

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same."""
        normed = F.layer_norm(x.permute(0, 2, 3, 1), self.weight.shape, self.weight, self.bias, self.eps)
        return normed.permute(0, 3, 1, 2).contiguous()


def nafnet(width: int, encoders: tuple[int, ...], middle: int, decoders: tuple[int, ...]) -> nn.Module:
    """NAFNet (Chen et al. 2022)."""
    from spandrel.architectures.NAFNet import NAFNet

    network: nn.Module = NAFNet(
        img_channel=3, width=width, enc_blk_nums=list(encoders), middle_blk_num=middle, dec_blk_nums=list(decoders)
    )
    norms = [name for name, module in network.named_modules() if type(module).__name__ == "LayerNorm2d"]
    for name in norms:
        network.set_submodule(name, LayerNorm2d(network.get_submodule(name)))
    return network


_ENLARGING: dict[str, Callable[[int], nn.Module]] = {
    "edsr": EDSR,
    "edsr-small": lambda scale: EDSR(scale, features=24, blocks=4, light=True),
    "swinir": lambda scale: _swinir(scale, embed_dim=180, depths=[6] * 6, num_heads=[6] * 6, upsampler="pixelshuffle"),
    "swinir-light": lambda scale: _swinir(
        scale, embed_dim=60, depths=[6] * 4, num_heads=[6] * 4, upsampler="pixelshuffledirect"
    ),
    "swinir-small": lambda scale: _swinir(
        scale, embed_dim=32, depths=[2] * 2, num_heads=[2] * 2, upsampler="pixelshuffledirect"
    ),
}
"""By their scale, which may be 1."""
SAME_SIZE: dict[str, Callable[[], nn.Module]] = {
    "swinir-unshuffle": _swinir_unshuffled,
    "nafnet": lambda: nafnet(64, (1, 1, 1, 28), 1, (1, 1, 1, 1)),
    "nafnet-small": lambda: nafnet(16, (1, 1), 1, (1, 1)),
    "restormer": lambda: Restormer(48, (4, 6, 6, 8), (1, 2, 4, 8)),
    "restormer-small": lambda: Restormer(12),
}
