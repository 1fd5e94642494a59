"""The losses of restoreloss, registered where neosr looks for its own."""

from neosr.utils.registry import LOSS_REGISTRY

from restoreloss.integrations.neosr import register

register(LOSS_REGISTRY)
