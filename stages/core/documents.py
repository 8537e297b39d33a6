"""Where documents stand among packed tokens: one behind the other, what several begin with perhaps only once."""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor


class Document(NamedTuple):
    """Where the tokens of a document stand among the packed ones.

    The first `borrowed` of them are those of another document, from `home` on; its own follow one another from `start`.
    """

    length: int
    start: int
    borrowed: int = 0
    home: int = 0

    @property
    def own(self) -> int:
        """How many tokens stand there for this document alone."""
        return self.length - self.borrowed

    def places(self) -> Tensor:
        """The place of each token, in their order."""
        own = torch.arange(self.own) + self.start
        return torch.cat([torch.arange(self.borrowed) + self.home, own]) if self.borrowed else own


def one_by_one(lengths: Sequence[int]) -> list[Document]:
    """Documents of these lengths, one behind the other."""
    return [Document(length, end - length) for length, end in zip(lengths, accumulate(lengths), strict=True)]
