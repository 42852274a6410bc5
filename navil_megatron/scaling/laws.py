"""The forms of loss as a function of LLM size N, encoder size V and data D.

Inside, every axis is divided by its geometric mean, so that the parameters of a fit are of one size: ``p`` are they,
``x`` the scaled axes, ``[points, axes]``.
"""

import numpy as np

Array = np.ndarray
Parameters = dict[str, float]
LARGEST_EXPONENT = 5.0


class LogLinear:
    """L = a + b ln N + c ln V + d ln D."""

    name = "log-linear"
    formula = "L = constant + sum of slope ln axis"

    def num_parameters(self, axes: int) -> int:
        """Of so many axes; of one axis it is also the number of different values that each must take."""
        return 1 + axes

    def predict(self, p: Array, x: Array) -> Array:
        """Losses, ``[points]``."""
        return np.asarray(_design(x) @ p)

    def jacobian(self, p: Array, x: Array) -> Array:
        """Of the losses, ``[points, parameters]``."""
        return _design(x)

    def weights(self, losses: Array) -> Array:
        """What residuals are parts of, ``[points]``."""
        return np.full(len(losses), np.median(losses))

    def starts(self, x: Array, losses: Array) -> list[Array]:
        """Where fits start."""
        return [np.linalg.lstsq(_design(x), losses, rcond=None)[0]]

    def bounds(self, axes: int) -> tuple[Array, Array]:
        """Of the parameters, lower and upper."""
        return np.full(1 + axes, -np.inf), np.full(1 + axes, np.inf)

    def report(self, p: Array, means: Array, letters: list[str]) -> Parameters:
        """Parameters by name, in the units of the axes, whose means and letters are given."""
        slopes = {f"slope_{letter}": float(slope) for letter, slope in zip(letters, p[1:], strict=True)}
        return {"constant": float(p[0] - p[1:] @ np.log(means)), **slopes}


class _Power(LogLinear):
    """L = A N^-a V^-b D^-c: log-linear in ln L."""

    name = "power"
    formula = "L = factor * product of axis^-exponent"

    def predict(self, p: Array, x: Array) -> Array:
        return np.asarray(np.exp(_design(x) @ p))

    def jacobian(self, p: Array, x: Array) -> Array:
        return np.asarray(self.predict(p, x)[:, None] * _design(x))

    def weights(self, losses: Array) -> Array:
        return losses

    def starts(self, x: Array, losses: Array) -> list[Array]:
        return super().starts(x, np.log(losses))

    def report(self, p: Array, means: Array, letters: list[str]) -> Parameters:
        exponents = {f"exponent_{letter}": float(-slope) for letter, slope in zip(letters, p[1:], strict=True)}
        return {"factor": float(np.exp(p[0] - p[1:] @ np.log(means))), **exponents}


class _PowerIrreducible(_Power):
    """L = E + A N^-a + B V^-b + C D^-c, what no size and no data takes away being E; ``p`` is E, A, B, C, a, b, c."""

    name = "power-irreducible"
    formula = "L = irreducible + sum of factor * axis^-exponent"

    def num_parameters(self, axes: int) -> int:
        return 1 + 2 * axes

    def predict(self, p: Array, x: Array) -> Array:
        factors, exponents = np.split(p[1:], 2)
        return np.asarray(p[0] + x**-exponents @ factors)

    def jacobian(self, p: Array, x: Array) -> Array:
        factors, exponents = np.split(p[1:], 2)
        powers = x**-exponents
        return np.column_stack([np.ones(len(x)), powers, -factors * powers * np.log(x)])

    def starts(self, x: Array, losses: Array) -> list[Array]:
        """A grid over E and a common exponent."""
        axes, found = x.shape[1], []
        for rest in (share * float(losses.min()) for share in (0.1, 0.5, 0.9)):
            factor = max(float(np.median(losses)) - rest, 1e-3) / axes
            found += [np.array([rest] + [factor] * axes + [exponent] * axes) for exponent in (0.1, 0.4, 1.0)]
        return found

    def bounds(self, axes: int) -> tuple[Array, Array]:
        return np.zeros(1 + 2 * axes), np.array([np.inf] * (1 + axes) + [LARGEST_EXPONENT] * axes)

    def report(self, p: Array, means: Array, letters: list[str]) -> Parameters:
        named = {"irreducible": float(p[0])}
        for letter, factor, exponent, mean in zip(letters, *np.split(p[1:], 2), means, strict=True):
            named |= {f"factor_{letter}": float(factor * mean**exponent), f"exponent_{letter}": float(exponent)}
        return named


def _design(x: Array) -> Array:
    return np.column_stack([np.ones(len(x)), np.log(x)])


LAWS = {law.name: law for law in (LogLinear(), _Power(), _PowerIrreducible())}
