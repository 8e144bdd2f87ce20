"""Every tolerance of the tests, once, with its reason. Nothing here is widened to make a test pass."""

from typing import TypedDict


class Tolerance(TypedDict):
    """What ``torch.testing.assert_close`` takes."""

    rtol: float
    atol: float


EXACT: Tolerance = {"rtol": 0.0, "atol": 0.0}
"""The same operations in the same order, or copies: bit for bit."""

FP32_SUMS: Tolerance = {"rtol": 1e-5, "atol": 1e-6}
"""fp32 reductions of up to some hundred terms of size 1 against float64 loops: some hundred times 6e-8."""

STANDARD_DEVIATIONS = 4.5
"""A frequency may be this far from its probability: false alarm below 1 in 100,000 for each one looked at."""

P_VALUE = 1e-5
"""A chi-square test of frequencies rejects below this: false alarm 1 in 100,000."""

RUN_LOSS: Tolerance = {"rtol": 1e-6, "atol": 0.0}
"""Losses of seven updates in fp32 that sum in another order; 1.2e-7 measured."""

RUN_NORM: Tolerance = {"rtol": 5e-5, "atol": 0.0}
"""Norms of gradients in those updates: torch adds up 500,000 squares in fp32, 2e-5 off, and cut otherwise less."""

GROWN_LOSS: Tolerance = {"rtol": 5e-5, "atol": 0.0}
"""Losses of a dozen steps in which single weights go and come by magnitude and gradient, summed in another order: of
some hundred thousand comparisons some are closer than rounding and change places, 4e-6 measured."""

RUN_LOSS_BF16: Tolerance = {"rtol": 2e-3, "atol": 0.0}
"""Losses of three updates in bf16 (8 bits of mantissa) against fp32."""

RUN_WEIGHTS: Tolerance = {"rtol": 0.0, "atol": 1e-4}
"""Weights after four updates of Adam at rate 1e-2, gradients summed in another order: where one is nearly zero Adam
divides rounding by rounding, 2e-5 measured; a neuron that was chosen otherwise is off by the rate."""
