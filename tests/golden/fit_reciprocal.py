"""Finds the coefficients of the GPU's reciprocal unit from its reciprocals of all FP32 mantissas.

    python tests/golden/fit_reciprocal.py RCP_NPZ > src/layerbits/data/gpu_reciprocal.csv

``RCP_NPZ`` is what ``make_fp4.py`` measured. For the upper 7 bits ``i`` and the lower 16 bits ``l`` of the mantissa of
``x`` in [1, 2) the unit gives

    2**24 / x ~ floor((c0[i] * 2**13 - c1[i] * l + c2[i] * s(l) + rounding) / 2**15)

with ``s(l)`` the square of ``l`` in units of ``2**17``, summed from the products of its bits without the products that
weigh less than a unit. The widths (26, 16 and 10 bits for ``c0``, ``c1``, ``c2``) are those of Oberman and Siu (ARITH
2005). Ends with an error unless this holds for every mantissa.
"""

import sys

import numpy as np

SEGMENTS, LOW_BITS = 128, 16
UNIT_BIT = 17
SUM_BITS, C0_SHIFT = 15, 13


def measured_reciprocals(path: str) -> np.ndarray:
    """``2**24 / x`` as the GPU has it, ``[2**23]`` integers for ``x`` from 1 to 2."""
    x = np.arange(2**23, 2**24)
    nearest = (2**48 + x) // (2 * x)  # never a tie: x has 24 bits
    with np.load(path) as file:
        return nearest + np.unpackbits(file["plus"]) - np.unpackbits(file["minus"])


def truncated_square(low: np.ndarray) -> np.ndarray:
    """Square of 16-bit numbers in units of ``2**UNIT_BIT``, each small product of two bits dropped."""
    bits = [(low >> i) & 1 for i in range(LOW_BITS)]
    total = np.zeros_like(low)
    for i in range(LOW_BITS):
        for j in range(i, LOW_BITS):
            weight = 2 * i if i == j else i + j + 1
            if weight >= UNIT_BIT:
                total += (bits[i] & bits[j]) << (weight - UNIT_BIT)
    return total


def fit(reciprocals: np.ndarray) -> tuple[np.ndarray, int]:
    """Coefficients ``[SEGMENTS, 3]`` and the rounding constant."""
    low = np.arange(2**LOW_BITS)
    square = truncated_square(low)
    terms = np.stack([np.ones_like(low), -low, square], 1) / 2.0**LOW_BITS
    coefficients, smallest, largest = [], [], []
    for value in reciprocals.reshape(SEGMENTS, -1):
        real = np.linalg.lstsq(terms, value + 0.5, rcond=None)[0] / 2.0**LOW_BITS
        c1, c2 = (int(c) for c in np.rint(real[1:] * 2**SUM_BITS))
        rest = (value << SUM_BITS) + c1 * low - c2 * square
        # floor((constant - c1 l + c2 s) / 2**15) is the value for every constant from rest to rest + 2**15 - 1.
        first, last = int(rest.max()), int(rest.min()) + 2**SUM_BITS - 1
        c0 = last >> C0_SHIFT
        coefficients.append((c0, c1, c2))
        smallest.append(first - (c0 << C0_SHIFT))
        largest.append(last - (c0 << C0_SHIFT))
        if first > last:
            raise SystemExit(f"no coefficients give the reciprocals of segment {len(coefficients) - 1}")
    if max(smallest) > min(largest):
        raise SystemExit("no single rounding constant serves all segments")
    print(f"rounding constant from {max(smallest)} to {min(largest)}", file=sys.stderr)
    return np.array(coefficients), max(smallest)


def main(path: str) -> None:
    """Prints the coefficients as CSV."""
    coefficients, rounding = fit(measured_reciprocals(path))
    print(f"# c0, c1, c2 of tests/golden/fit_reciprocal.py for the upper 7 mantissa bits 0 to 127; rounding {rounding}")
    np.savetxt(sys.stdout, coefficients, fmt="%d", delimiter=",")


if __name__ == "__main__":
    main(sys.argv[1])
