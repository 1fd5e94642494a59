"""Losses for neosr: each one tensor with its own weight, in one of its slots.

``python -m restoreloss.integrations.neosr PATH_TO_REPOSITORY`` writes the file that registers them;
docs/integrations/trainner-neosr.md has the TOML. neosr itself is not imported: doing so reads the command line.
"""

from typing import Any

from restoreloss.integrations.drop_in import Framework, register_all
from restoreloss.integrations.options import OPTIONS, registrable

FRAMEWORK = Framework("neosr", "neosr", "neosr")


def register(registry: Any) -> None:
    """Add ``DiffLoss``, ``TDPLoss``, ``HLFLoss`` and ``WeightedSum`` to ``neosr.utils.registry.LOSS_REGISTRY``.

    Raises:
        ValueError: If one of the names is taken.
    """
    register_all(registry, [registrable(kind, own=registry) for kind in OPTIONS])


if __name__ == "__main__":
    FRAMEWORK.main()
