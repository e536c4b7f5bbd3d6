"""How KL falls with training tokens, and how many would reach a given KL."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stillhouse.errors import DataError

RESAMPLES = 2000
INTERVAL = (5.0, 95.0)
"""Percentiles of the resampled fits."""
LEAST_POINTS = 4


@dataclass(frozen=True)
class Reach:
    """Tokens that reach a KL, with a 90 % interval of the fit. extrapolated: how many times
    further than was measured; 1 or less lies within."""

    tokens: float
    low: float
    high: float
    extrapolated: float


@dataclass(frozen=True, eq=False)
class PowerLaw:
    """kl = scale · tokens^(-exponent), fitted to measured points.

    No floor: with one, which a short run cannot show, every KL would take more tokens, or never be
    reached. slopes_B, intercepts_B: of fits to resampled residuals, in logarithms.
    """

    exponent: float
    scale: float
    points: tuple[tuple[int, float], ...]
    slopes_B: NDArray[np.float64]
    intercepts_B: NDArray[np.float64]

    def at(self, tokens: float) -> float:
        return float(self.scale * tokens**-self.exponent)

    def reach(self, kl: float) -> Reach:
        measured = self.points[-1][0]
        tokens = float(np.exp((np.log(self.scale) - np.log(kl)) / self.exponent))
        falling = self.slopes_B < 0
        logs_B = (np.log(kl) - self.intercepts_B[falling]) / self.slopes_B[falling]
        low, high = np.exp(np.percentile(logs_B, INTERVAL))
        return Reach(tokens, float(low), float(high), tokens / measured)


def fit_power_law(points: Sequence[tuple[int, float]], *, seed: int = 0) -> PowerLaw:
    """Least squares in logarithms over the later half of the points (the first ones are warmup).

    points: (tokens, KL), tokens ascending. Raises DataError: too few of them, or a KL that does not
    fall.
    """
    later = tuple(points[min(len(points) // 2, max(0, len(points) - LEAST_POINTS)) :])
    if len(later) < LEAST_POINTS:
        raise DataError(
            f"{len(points)} measurements are too few to fit a curve: {LEAST_POINTS} are needed",
            fix="raise cascade.from_scratch.tokens",
        )
    x_P = np.log([tokens for tokens, _ in later])
    y_P = np.log([kl for _, kl in later])
    slope, intercept = np.polyfit(x_P, y_P, 1)
    if slope >= 0:
        raise DataError(
            "the KL of training from random weights does not fall: no curve can be fitted",
            fix="raise cascade.from_scratch.tokens, or change its learning_rate",
        )
    # Residuals of a fit with two free parameters are too small by this factor.
    residuals_P = (y_P - (slope * x_P + intercept)) * np.sqrt(len(x_P) / (len(x_P) - 2))
    generator = np.random.default_rng(seed)
    drawn_BP = y_P - residuals_P + generator.choice(residuals_P, (RESAMPLES, len(x_P)))
    slopes_B, intercepts_B = np.polyfit(x_P, drawn_BP.T, 1)
    return PowerLaw(-slope, float(np.exp(intercept)), tuple(points), slopes_B, intercepts_B)
