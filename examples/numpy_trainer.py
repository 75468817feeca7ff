"""Multinomial logistic regression on handwritten digits with the bare engine: NumPy, no torch.

    python examples/numpy_trainer.py
    mpirun -n 4 python examples/numpy_trainer.py

Every worker writes its gradient into the engine's own arrays; one call of `step` averages them over all
workers, updates the weights with Nesterov momentum and publishes every worker's next point.
"""

import sys

import numpy as np
from mpi4py import MPI

import extrapcomm as xc

try:
    from sklearn.datasets import load_digits
except ImportError:
    sys.exit("numpy_trainer: scikit-learn is not installed; the examples need: pip install extrapcomm[demo]")

EPOCHS, BATCH, LR, SEED = 30, 16, 0.5, 0  # BATCH is each worker's


def digits():
    data = load_digits()
    order = np.random.RandomState(12345).permutation(len(data.target))
    x, y = (data.data[order] / 16 - 0.3).astype("float32"), data.target[order]
    return (x[:1437], y[:1437]), (x[1437:], y[1437:])


def softmax(scores):
    e = np.exp(scores - scores.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def gradient(weights, x, y):
    """Of the mean cross-entropy at `weights`."""
    error = softmax(x @ weights["matrix"] + weights["bias"])
    error[np.arange(len(y)), y] -= 1
    error /= len(y)
    return {"matrix": x.T @ error, "bias": error.sum(axis=0)}


def train(engine, world, x, y):
    first = world.rank * world.workers
    size = world.K * BATCH
    for epoch in range(EPOCHS):
        order = np.random.default_rng((SEED, epoch)).permutation(len(y))
        for batch in order[: len(y) // size * size].reshape(-1, world.K, BATCH):
            for v, worker in enumerate(engine.workers):
                samples = batch[first + v]
                for name, g in gradient(worker.weights, x[samples], y[samples]).items():
                    worker.grads[name][...] = g
            engine.step(lr=LR * (1 - epoch / EPOCHS))


def main():
    (x, y), (x_test, y_test) = digits()
    weights = {"matrix": np.zeros((64, 10), "float32"), "bias": np.zeros(10, "float32")}
    with xc.World(workers=max(1, 4 // MPI.COMM_WORLD.size)) as world:
        engine = xc.Engine(world, weights, rule="sgd", extrapolation="local", momentum=0.9, nesterov=True)
        train(engine, world, x, y)
        w = engine.master()
        if world.rank == 0:
            right = (x_test @ w["matrix"] + w["bias"]).argmax(axis=1) == y_test
            print(f"numpy_trainer: {100 * right.mean():.1f} % test accuracy ({world.K} workers)")
        engine.close()


if __name__ == "__main__":
    main()
