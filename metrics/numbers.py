"""How a number and its standard error are written, everywhere on screens and in tables.

2.75 ± 0.08
"""

import math

TWO_DIGITS = 3.5  # first digits of an error up to which it has two


def measured(value: float | None, error: float | None = None) -> str:
    """A number as far as its error lets it be known; the digits of files are all there.

    The error has one digit, or two up to 35, as the Particle Data Group rounds, and the
    number as many decimals. A number without an error has five digits. None is a dash.

    Args:
        value: The number.
        error: Its standard error; None, NaN or 0 if there is none.
    """
    if value is None:
        return "-"
    if not error or not math.isfinite(error) or not math.isfinite(value):
        return f"{value:.5g}"
    digits, _, exponent = f"{abs(error):.1e}".partition("e")
    has_two = float(digits) <= TWO_DIGITS
    decimals = min(max(has_two - int(exponent), 0), 12)
    return f"{value:.{decimals}f} ± {abs(error):.{decimals}f}"
