"""Zig-zagging, measured: probes of a training run that never change it.

Notation: step t takes the latent weights from w_t to w_{t+1} with the gradient g_t; u_t = w_{t+1} - w_t.

    gradient cosine         cos(g_t, g_{t-1})
    zig-zag rate            share of steps with cos(u_t, u_{t-1}) < 0
    path efficiency         norm(w_T - w_0) / sum_t norm(u_t); 1 is a straight line
    flip rate               share of weights whose code changed in the step
    oscillation frequency   a weight's exponential average, rate 0.01 a step, of "its code changed, in the direction opposite
                            to its last change" (Nagel et al., ICML 2022)
    gradient error          norm(G - g) / norm(g), g at the latent weights, G at the quantized ones, same mini-batch
    trial agreement         cos(g_t, g*_t), g*_t at the trial point

With ``every=k`` every k-th step is probed, and the steps between are estimated: in the path they count with the mean length
of the probed steps before and after (the first step is always measured); codes are looked at before and after a probed
step, which enters the oscillation with the rate 1 - 0.99^k. With ``every=1`` nothing is estimated.
"""

from blaq.zigzag.measures import TOTAL, Measures, cosines, gradient_error
from blaq.zigzag.probe import ZigZag

__all__ = ["TOTAL", "Measures", "ZigZag", "cosines", "gradient_error"]
