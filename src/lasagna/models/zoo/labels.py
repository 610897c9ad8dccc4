"""The names of ImageNet's 1000 classes, in the order in which classifiers answer.

The list, ``imagenet_labels.txt``, is torchvision's (BSD 3-clause, ``imagenet_labels.txt.license``
beside it), because its names are unique: WordNet's own has two classes called "crane", the bird
and the machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lasagna.errors import UsageError


@dataclass(frozen=True, slots=True)
class Guess:
    """One class and how likely the model finds it, from 0 to 1."""

    label: str
    probability: float


@cache
def imagenet_labels() -> tuple[str, ...]:
    """The 1000 class names, each once; the index is the class number."""
    return tuple(files(__package__).joinpath("imagenet_labels.txt").read_text("utf-8").splitlines())


def best_guesses(probabilities: NDArray[Any], count: int = 5) -> tuple[Guess, ...]:
    """The likeliest classes, best first.

    Args:
        probabilities: one row of a classifier's output: 1000 numbers in any shape, for example
            [1, 1000].
        count: how many to give.

    Raises:
        UsageError: the array has another number of elements.
    """
    labels = imagenet_labels()
    if probabilities.size != len(labels):
        raise UsageError(
            f"an ImageNet classifier answers with {len(labels)} numbers, not {probabilities.size}"
        )
    row = probabilities.reshape(-1)
    order = np.argsort(-row, kind="stable")[:count]
    return tuple(Guess(labels[index], float(row[index])) for index in order)
