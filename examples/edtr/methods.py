"""The methods: EDTR, and EDTR without each of its parts (Tables 2, S2 and S7 of the paper)."""

from dataclasses import dataclass
from typing import Literal

Features = Literal["both", "task", "reference"]


@dataclass(frozen=True)
class Method:
    """The parts that a run has.

    Attributes:
        hlf: in whose features the restorer is trained; None trains it to predict the noise in HQ latents (Eq. 2), as
            diffusion models usually are.
        matching: the FM loss for the task network.
        pre: pre-restoration; else the diffusion is conditioned on the degraded image itself.
        partial: begin from the hint made noisy; else from pure noise.
        long: many denoising steps (``long_steps``) instead of ``n``.
        prior: the diffusion model; else the ControlNet alone.
        decoder: train the decoder.
        color_fix: take the low frequencies from the hint.
        noise: make the latents noisy up to t_p; matters without a diffusion model, which is never without noise.
    """

    hlf: Features | None = "both"
    matching: bool = True
    pre: bool = True
    partial: bool = True
    long: bool = False
    prior: bool = True
    decoder: bool = True
    color_fix: bool = True
    noise: bool = True


METHODS: dict[str, Method] = {
    "edtr": Method(),
    # Table 2; its numbers in the comments
    "conventional": Method(hlf=None, pre=False, partial=False, long=True),  # 1, as DiffBIR
    "hlf_long": Method(pre=False, partial=False, long=True),  # 2
    "hlf_from_noise": Method(pre=False, partial=False),  # 3
    "no_pre": Method(pre=False),  # 4
    "no_hlf": Method(hlf=None),  # 5
    "no_fm": Method(matching=False),  # 6
    "no_prior": Method(prior=False, noise=False),  # 7
    "no_prior_noise": Method(prior=False),  # ours: what the noise of t_p alone costs
    # Table S2: one feature space
    "only_task": Method(hlf="task"),
    "only_reference": Method(hlf="reference"),
    # Table S7
    "frozen_decoder": Method(decoder=False),
    "no_color_fix": Method(color_fix=False),
}
