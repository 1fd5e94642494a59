"""The restorer that the options of a run describe: what is trained is what restores afterwards."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from examples.common.engine.run_directory import file_in
from examples.common.networks.latent_diffusion import load_latent_diffusion
from examples.common.networks.restorers import restorer
from examples.edtr.methods import METHODS
from examples.edtr.no_prior import NoPrior
from restoreloss.restorers.edtr import EDTR


def build_edtr(options: Mapping[str, Any]) -> EDTR:
    """EDTR or one of its ablations, not yet trained.

    Args:
        options: of :class:`examples.edtr.config.Config`, by name, with ``prior``, ``pre`` and ``color_levels``.
    """
    method = METHODS[options["method"]]
    pre: nn.Module = nn.Identity()
    if method.pre:
        pre = restorer(options["restorer"], 1, file_in(options["pre"], "restorer.safetensors"))
    prior = load_latent_diffusion(options["prior"])
    given: dict[str, Any] = {
        "t_p": options["t_p"] if method.partial else None, "n": options["long_steps"] if method.long else options["n"],
        "color_fix": method.color_fix, "color_levels": options["color_levels"],
    }  # fmt: skip
    return EDTR(pre, prior, **given) if method.prior else NoPrior(pre, prior, noisy=method.noise, **given)
