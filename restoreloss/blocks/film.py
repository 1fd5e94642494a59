"""FiLM: channels scaled and shifted by the timestep."""

from torch import Tensor, nn

from restoreloss.checks import check_embedding, check_integer, check_map


class FiLM(nn.Module):
    r"""Scale and shift channels by the timestep.

    .. math:: h \leftarrow h\,(1 + s(t)) + b(t)

    Zero at the start, so that h passes as it is.

    Args:
        channels: of h.
        time_dim: of the time embedding.

    Raises:
        ValueError: For numbers that are not whole or below 1; at a call for features or an embedding of another shape.

    Example:
        >>> h = torch.rand(2, 8, 4, 4)
        >>> torch.equal(FiLM(8, 16)(h, torch.rand(2, 16)), h)
        True

    Source: Perez et al. 2018; as in the residual blocks of Dhariwal & Nichol 2021.
    """

    def __init__(self, channels: int, time_dim: int = 64) -> None:
        super().__init__()
        self.channels, self.time_dim = check_integer("channels", channels), check_integer("time_dim", time_dim)
        self.to_scale_shift = nn.Linear(time_dim, 2 * channels)
        nn.init.zeros_(self.to_scale_shift.weight)
        nn.init.zeros_(self.to_scale_shift.bias)

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        """(N, C, H, W) and the embedding (N, time_dim) to (N, C, H, W)."""
        check_map("h", h, self.channels)
        check_embedding(embedding, len(h), self.time_dim)
        scale, shift = self.to_scale_shift(embedding)[:, :, None, None].chunk(2, dim=1)
        result: Tensor = h * (1 + scale) + shift
        return result
