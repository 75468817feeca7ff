"""transformers' Trainer with the fused step: scikit-learn's handwritten digits.

    mpirun -n 2 python examples/transformers_digits.py

TrainingArguments(max_grad_norm=...) bounds the mean gradient of all ranks; rank 0 alone logs and saves.
Needs: pip install extrapcomm[torch,demo,integrations]
"""

import tempfile

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from transformers import Trainer, TrainingArguments

import extrapcomm as xc
from extrapcomm.integrations import adapt_trainer


class Classifier(nn.Sequential):
    def forward(self, x, labels):
        logits = super().forward(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def digits():
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images / 16, dtype=torch.float32)
    data = [{"x": x, "labels": int(y)} for x, y in zip(images, labels, strict=True)]
    return data[:1437], data[1437:]


def accuracy(predicted):
    return {"accuracy": float(np.mean(predicted.predictions.argmax(1) == predicted.label_ids))}


def main(epochs=10, limit=1.0):
    torch.manual_seed(0)
    train, test = digits()
    model = Classifier(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    with xc.World() as world, tempfile.TemporaryDirectory() as folder:
        opt = xc.ExtrapSGD(model.parameters(), lr=0.2, momentum=0.9, world=world)
        shards = [train[rank :: world.size][: len(train) // world.size] for rank in range(world.size)]
        quiet = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True}
        shape = {"num_train_epochs": epochs, "per_device_train_batch_size": 64 // world.size}
        arguments = TrainingArguments(folder, max_grad_norm=limit, logging_strategy="epoch", **shape, **quiet)
        # Trainer does not shard.
        data = {"train_dataset": shards[world.rank], "eval_dataset": test, "compute_metrics": accuracy}
        trainer = adapt_trainer(Trainer(model, arguments, optimizers=(opt, None), **data))
        trainer.train()
        hits = trainer.evaluate()["eval_accuracy"]
        if world.rank == 0:
            print(f"{100 * hits:.1f} % test accuracy ({world.size} ranks)")
        opt.close()


if __name__ == "__main__":
    main()
