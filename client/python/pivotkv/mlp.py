"""Small multilayer perceptrons with SiLU between the layers, their gradients, and Adam: what `hash` needs of a framework.

All of it is float32 matrix products, so numpy's BLAS does what a framework on the CPU would do; an MLP of HashAttention has
37,000 parameters. Weights are [out, in], as files keep them.
"""
from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass
class MLP:
    weights: list[np.ndarray]  # [out, in] each
    biases: list[np.ndarray]  # [out] each

    @staticmethod
    def fresh(widths: list[int], random: np.random.Generator) -> MLP:
        """Uniform within 1 / sqrt(in), biases too."""
        weights, biases = [], []
        for n_in, n_out in zip(widths, widths[1:]):
            bound = 1 / np.sqrt(n_in)
            weights.append(random.uniform(-bound, bound, (n_out, n_in)).astype(np.float32))
            biases.append(random.uniform(-bound, bound, n_out).astype(np.float32))
        return MLP(weights, biases)

    def parameters(self) -> list[np.ndarray]:
        return self.weights + self.biases

    def forward(self, x: np.ndarray) -> np.ndarray:
        """[rows, in] -> [rows, out]."""
        return self.forward_kept(x)[0]

    def forward_kept(self, x: np.ndarray) -> tuple[np.ndarray, list[tuple[np.ndarray, np.ndarray]]]:
        """And what the gradient needs: each layer's input, and the sigmoid of what went into it."""
        kept = [(x, np.empty(0, np.float32))]
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases)):
            y = kept[-1][0] @ weight.T
            y += bias
            if i + 1 < len(self.weights):
                gate = sigmoid(y)
                kept.append((y * gate, gate))
        return y, kept

    def backward(self, kept: list[tuple[np.ndarray, np.ndarray]], dy: np.ndarray) -> list[np.ndarray]:
        """Gradients in the order of parameters(), from the gradient of the output."""
        dw, db = [], []
        for i in reversed(range(len(self.weights))):
            x, gate = kept[i]
            dw.insert(0, dy.T @ x)
            db.insert(0, dy.sum(axis=0))
            if i:
                # SiLU(y) = y s, so its derivative is s + y s (1 - s) = s + SiLU(y) (1 - s).
                dy = dy @ self.weights[i]
                dy *= gate + x * (1 - gate)
        return dw + db

    def scaled_input(self, mean: np.ndarray, deviation: np.ndarray) -> MLP:
        """The MLP that does to x what this one does to (x - mean) / deviation."""
        first = self.weights[0] / deviation
        return MLP([first.astype(np.float32), *self.weights[1:]],
                   [(self.biases[0] - first @ mean).astype(np.float32), *self.biases[1:]])


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + e^-x), by the one function numpy has vectorised that never overflows."""
    y = np.tanh(x * np.float32(0.5))
    y *= np.float32(0.5)
    y += np.float32(0.5)
    return y


@dataclass
class Adam:
    """Kingma and Ba 2015, with the usual decay of .9 and .999."""

    step_count: int = 0
    first: list[np.ndarray] = field(default_factory=list)
    second: list[np.ndarray] = field(default_factory=list)

    def step(self, parameters: list[np.ndarray], gradients: list[np.ndarray], rate: float) -> None:
        if not self.first:
            self.first = [np.zeros_like(p) for p in parameters]
            self.second = [np.zeros_like(p) for p in parameters]
        self.step_count += 1
        unbias = np.sqrt(1 - 0.999 ** self.step_count) / (1 - 0.9 ** self.step_count)
        size = np.float32(rate * unbias)
        for p, g, m, v in zip(parameters, gradients, self.first, self.second):
            m += np.float32(0.1) * (g - m)
            v += np.float32(0.001) * (g * g - v)
            p -= size * m / (np.sqrt(v) + np.float32(1e-8))
