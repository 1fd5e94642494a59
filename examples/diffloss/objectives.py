"""The loss of a run: the pixels, DiffLoss, and what it is compared to, with their weights."""

from dataclasses import fields
from typing import Any

import torch
from torch import nn

from examples.diffloss.comparisons import AdversarialLoss, constrained, filter_loss, perceptual_loss
from examples.diffloss.config import Adversarial, Config, Diff, Perceptual
from restoreloss import DiffLoss, Subsampled, WeightedSum, load_prior, small_prior


def terms_of(config: Config) -> list[str]:
    """The terms that a run has: those with a weight or a share.

    Raises:
        ValueError: For a weight or share out of its range, where no term has a weight, and for options of a term that
            has none.
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
    shares = shares_of(config)
    named = " and ".join(f"`{name}.share`" for name in shares)
    if sum(shares.values()) >= 1:
        raise ValueError(f"{named} should be below 1 in sum, found {sum(shares.values()):g}.")
    weights = {
        "pixel": config.pixel.weight, "filter": config.filter.share,
        **{name: option.share or option.weight for name, option in options.items()},
    }  # fmt: skip
    if not any(weight for name, weight in weights.items() if name not in shares):
        beside = f" beside {named}" if shares else ""
        raise ValueError(
            f"`pixel`, `diff`, `perceptual` or `adversarial` should have a weight above 0{beside}, found none."
        )
    groups = {**options, "filter": config.filter}
    for name in [name for name in groups if not weights[name] and config.evaluate is None]:
        for one in fields(groups[name]):
            if (value := getattr(groups[name], one.name)) != one.default:
                raise ValueError(f"`{name}.share` should be given with `{name}.{one.name}`, found {value} alone.")
    return [name for name, weight in weights.items() if weight]


def shares_of(config: Config) -> dict[str, float]:
    """The shares of the gradient that are kept, of the terms that have one."""
    shares = {
        "filter": config.filter.share, "perceptual": config.perceptual.share, "diff": config.diff.share,
        "adversarial": config.adversarial.share,
    }  # fmt: skip
    return {name: share for name, share in shares.items() if share}


def objectives_of(config: Config, device: torch.device, adversarial: AdversarialLoss | None = None) -> WeightedSum:
    """The weighted sum of all terms; DiffLoss is ``sum["diff"]``.

    Raises:
        ValueError: For options of the prior that are wrong.
    """
    terms = terms_of(config)
    objectives: dict[str, Any] = {}
    weights: dict[str, float] = {}
    if config.pixel.weight:
        objectives["pixel"] = nn.L1Loss() if config.pixel.distance == "l1" else nn.MSELoss()
        weights["pixel"] = config.pixel.weight
    if config.filter.share:
        objectives["filter"] = filter_loss(config.filter)
    if "perceptual" in terms:
        objectives["perceptual"] = perceptual_loss(config.perceptual, device)
        weights["perceptual"] = config.perceptual.weight
    if "diff" in terms:
        try:
            objectives["diff"], weights["diff"] = diff_loss(config.diff), config.diff.weight
        except ValueError as error:  # which names the argument without its group
            raise ValueError(str(error) if "`diff." in str(error) else f"`diff`: {error}") from error
    if adversarial is not None:
        objectives["adversarial"], weights["adversarial"] = adversarial, config.adversarial.weight
    shares = shares_of(config)
    weights = {name: weight for name, weight in weights.items() if name not in shares}
    return WeightedSum(objectives, weights, shares=shares).to(device)  # the norms behind the shares too


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
            raise ValueError(f"`diff.prior` should be small, untrained, or what can be read: {error}") from error
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
