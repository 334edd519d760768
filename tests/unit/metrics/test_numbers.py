"""Numbers with their errors, in one style."""

import math

import pytest

from metrics.numbers import measured


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (2.7512, 0.0812, "2.75 ± 0.08"),
        (5.5543, 0.1476, "5.55 ± 0.15"),
        (258.3478, 38.1362, "258 ± 38"),
        (25.2, 0.0999, "25.20 ± 0.10"),
        (0.9062, 0.0118, "0.906 ± 0.012"),
        (-1.25, 0.03, "-1.250 ± 0.030"),
        (8.0132, 0.213, "8.01 ± 0.21"),
        (1.5, 0.25, "1.50 ± 0.25"),
        (1.5, 0.4, "1.5 ± 0.4"),
        (1.0, 0.0, "1"),
        (4.0, None, "4"),
        (202.3286, None, "202.33"),
        (3.3358, math.nan, "3.3358"),
        (math.nan, math.nan, "nan"),
        (None, None, "-"),
        (None, 0.1, "-"),
        (12345.6, 700.0, "12346 ± 700"),
    ],
)
def test_an_error_limits_the_digits(value, error, text):
    assert measured(value, error) == text
