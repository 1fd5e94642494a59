"""The loss of a run: the pixels, DiffLoss, and what it is compared to, with their weights."""

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from examples.common.data.tasks import TaskData
from examples.common.seeds import derive_seed
from examples.diffloss.comparisons import AdversarialLoss, constrained, filter_loss, perceptual_loss
from examples.diffloss.config import Adversarial, Config, Diff, Perceptual
from restoreloss import DiffLoss, Subsampled, WeightedSum, calibrate, load_prior, small_prior

logger = logging.getLogger(__name__)


def terms_of(config: Config) -> list[str]:
    """The terms that a run has: those with a weight.

    Raises:
        ValueError: For a weight or share out of its range.
    """
    options: dict[str, Diff | Perceptual | Adversarial] = {
        "diff": config.diff, "perceptual": config.perceptual, "adversarial": config.adversarial,
    }  # fmt: skip
    for name, option in options.items():
        if option.share is not None and (option.weight or not 0 < option.share < 1):
            raise ValueError(
                f"`{name}.share` should be above 0 and below 1, without `{name}.weight`, found {option.share} and "
                f"{option.weight}."
            )
    if not 0 <= config.filter.share < 1:
        raise ValueError(f"`filter.share` should be at least 0 and below 1, found {config.filter.share}.")
    weights = {
        "pixel": config.pixel.weight, "filter": config.filter.share,
        **{name: option.share or option.weight for name, option in options.items()},
    }  # fmt: skip
    if wrong := [name for name, weight in weights.items() if not 0 <= weight < math.inf]:
        raise ValueError(f"`{wrong[0]}` should have a weight of at least 0, found {weights[wrong[0]]}.")
    return [name for name, weight in weights.items() if weight]


def objectives_of(
    config: Config, train_data: TaskData, device: torch.device, adversarial: AdversarialLoss | None = None
) -> WeightedSum:
    """The weighted sum of all terms; DiffLoss is ``sum["diff"]``.

    Raises:
        ValueError: If there is no term, and for options of the prior that are wrong.
    """
    terms = terms_of(config)
    objectives: dict[str, Any] = {}
    weights: dict[str, float] = {}
    if config.pixel.weight:
        objectives["pixel"] = nn.L1Loss() if config.pixel.distance == "l1" else nn.MSELoss()
        weights["pixel"] = config.pixel.weight
    if config.filter.share:
        objectives["filter"], weights["filter"] = filter_loss(config.filter), 1.0
    if "perceptual" in terms:
        objectives["perceptual"] = perceptual_loss(config.perceptual, device)
        weights["perceptual"] = config.perceptual.weight
    if "diff" in terms:
        try:
            objectives["diff"], weights["diff"] = diff_loss(config.diff), config.diff.weight
        except ValueError as error:  # which names the argument without its group
            raise ValueError(str(error) if "`diff." in str(error) else f"`diff`: {error}") from error
    if not objectives:
        raise ValueError("`pixel`, `diff` or `perceptual` should have a weight above 0, found none.")
    for objective in objectives.values():
        objective.to(device)
    if adversarial is not None:
        objectives["adversarial"], weights["adversarial"] = adversarial, config.adversarial.weight
    shares = {
        "filter": config.filter.share, "perceptual": config.perceptual.share, "diff": config.diff.share,
        "adversarial": config.adversarial.share,
    }  # fmt: skip
    if wanted := {name: share for name, share in shares.items() if share}:
        weights = _calibrated(config, wanted, objectives, train_data, device)
    return WeightedSum(objectives, weights)


def diff_loss(options: Diff) -> Subsampled:
    """DiffLoss as its options say.

    Raises:
        ValueError: For a prior that cannot be read, and options that do not go together.
    """
    prior: Any
    if options.prior in ("small", "untrained"):
        for name in ("head_channels", "grouped_heads"):
            if (value := getattr(options, name)) is not None:
                raise ValueError(f"`diff.{name}` should be left out for the {options.prior} prior, found {value}.")
        prior = small_prior()
        if options.prior == "untrained":
            for module in prior.modules():
                if hasattr(module, "reset_parameters"):
                    module.reset_parameters()
    else:
        try:
            prior = load_prior(options.prior, head_channels=options.head_channels, grouped_heads=options.grouped_heads)
        except (OSError, ValueError) as error:
            raise ValueError(f"`diff.prior`: {error}") from error
    if options.constrain != "noise":
        prior = constrained(prior, options)
    if options.bf16:
        prior.to(torch.bfloat16)
    loss = DiffLoss(
        prior, noise_weight=options.noise_weight, h_space_weight=options.h_space_weight, timesteps=options.timesteps,
        distance=options.distance, compare=options.compare, snr_power=options.snr_power, crop=options.crop,
        jacobian=options.jacobian, checkpointing=options.checkpointing,
    )  # fmt: skip
    return Subsampled(loss, every=options.every, subset=options.subset)


def _calibrated(
    config: Config, shares: Mapping[str, float], objectives: dict[str, Any], train_data: TaskData, device: torch.device
) -> dict[str, float]:
    """The weights with which terms have their shares of the gradient on the first training images."""
    if list(objectives) != ["pixel", *shares]:
        others = [name for name in objectives if name not in shares]
        raise ValueError(f"`{list(shares)[-1]}.share` should stand beside the pixel loss alone, found {others}.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(config.seed, 2))
        read = [train_data[number] for number in range(min(8, len(train_data)))]
    pairs = [sample[0] for sample in read if sample is not None]
    if not pairs:
        raise ValueError("A share needs training images, of the first ones none could be read.")
    degraded, clean = torch.stack(pairs).to(device).unbind(1)
    found = calibrate(objectives, degraded, clean, shares=shares, draws=8)
    weights = {name: config.pixel.weight * weight for name, weight in found.items()}
    for name, share in shares.items():
        logger.info("%s: a share of %g is a weight of %.3g", name, share, weights[name])
    return weights
