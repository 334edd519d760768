"""Further numbers of samples, beside those of `samples.py`: those of plug-ins, which
`duo.metric` enters (docs/extending.md).
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Protocol

from utils import ConfigError

if TYPE_CHECKING:  # names can be entered without torch
    from torch import Tensor


class Metric(Protocol):
    """A number of each sample."""

    def __call__(self, tokens: "Tensor", texts: Sequence[str]) -> Iterable[float]:
        """One number a sample; their mean and its standard error are reported.

        Args:
            tokens: Ids on the CPU, (N, L).
            texts: The same, decoded, N of them.
        """


# By the name in the JSON and in tables; of the training log that is val/sample_NAME.
METRICS: dict[str, Metric] = {}


def measure(tokens: "Tensor", texts: Sequence[str]) -> dict[str, list[float]]:
    """Every metric of the table at every sample.

    Args:
        tokens: Ids, (N, L).
        texts: The same, decoded.

    Raises:
        ConfigError: If a metric gives anything but a number for each.
    """
    measured = {}
    for name, metric in METRICS.items():
        try:
            values = [float(x) for x in metric(tokens.cpu(), texts)]
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"metric {name!r} of a plug-in: {error}; it gives a number a sample."
            ) from error
        if len(values) != len(texts):
            raise ConfigError(
                f"metric {name!r} of a plug-in gives {len(values)} numbers for "
                f"{len(texts)} samples; it gives one a sample."
            )
        measured[name] = values
    return measured
