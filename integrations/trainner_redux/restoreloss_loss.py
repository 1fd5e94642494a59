"""The losses of restoreloss, registered where traiNNer-redux looks for its own."""

from traiNNer.utils.registry import LOSS_REGISTRY

from restoreloss.integrations.trainner import register

register(LOSS_REGISTRY)
