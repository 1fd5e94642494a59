"""How well lines of text are read: words and characters, as scores, as a metric, and as the loss of a live reader."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric


def as_compared(text: str) -> str:
    """Upper and lower case are one, and spaces do not count, as is usual for readers of single words."""
    return "".join(text.split()).lower()


def words_read(read: Sequence[str], texts: Sequence[str]) -> Tensor:
    """100 for each text that was read without a fault, else 0, (N,)."""
    _check(read, texts)
    return torch.tensor([100.0 * (as_compared(a) == as_compared(b)) for a, b in zip(read, texts, strict=True)])


def character_errors(read: Sequence[str], texts: Sequence[str]) -> Tensor:
    """Edit distance of each text in percent of its length, (N,)."""
    _check(read, texts)
    return torch.tensor(
        [
            100 * edit_distance(as_compared(a), as_compared(b)) / len(as_compared(b))
            for a, b in zip(read, texts, strict=True)
        ]
    )


def edit_distance(a: str, b: str) -> int:
    """How many letters have to be put in, left out or exchanged (Levenshtein)."""
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, right in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (left != right))
    return row[-1]


def _check(read: Sequence[str], texts: Sequence[str]) -> None:
    if not texts or len(read) != len(texts):
        raise ValueError(f"`read` and `texts` should have as many, at least one, found {len(read)} and {len(texts)}.")
    if empty := [i for i, text in enumerate(texts) if not as_compared(text)]:
        raise ValueError(f"`texts` should have a letter each, found none in number {empty[0]}.")


class WordsRead(Metric):  # type: ignore[misc]
    """Words read and character error rate of all that it has seen, both in percent."""

    words: Tensor
    errors: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__(sync_on_compute=False)
        for name in ("words", "errors", "count"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, read: Sequence[str], texts: Sequence[str]) -> None:
        """Add what was read, and what is written."""
        self.words += words_read(read, texts).sum()
        self.errors += character_errors(read, texts).sum()
        self.count += len(texts)

    def compute(self) -> dict[str, Tensor]:
        """The means over the texts."""
        return {"words": self.words / self.count, "character_errors": self.errors / self.count}


def ctc(scores: Tensor, targets: Tensor) -> Tensor:
    """CTC loss of scores (N, T, classes) for texts (N, L) of classes from 1, filled up with 0, which is the blank.

    Raises:
        ValueError: For a text that does not fit into T time steps: each letter needs one, and so does the blank
            between two equal ones.
    """
    lengths = (targets > 0).sum(dim=1)
    twice = ((targets[:, 1:] == targets[:, :-1]) & (targets[:, 1:] > 0)).sum(dim=1)
    steps = torch.full((len(scores),), scores.shape[1])
    if int((lengths + twice).max()) > scores.shape[1]:
        raise ValueError(
            f"Texts should fit into {scores.shape[1]} time steps, found one that needs {int((lengths + twice).max())}."
        )
    log_probabilities = scores.to(torch.promote_types(scores.dtype, torch.float32)).log_softmax(dim=2).transpose(0, 1)
    return F.ctc_loss(log_probabilities, targets, steps, lengths.cpu())
