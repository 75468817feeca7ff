"""Lightning with the fused step: scikit-learn's handwritten digits.

    mpirun -n 2 python examples/lightning_digits.py

Trainer(gradient_clip_val=...) bounds the mean gradient of all ranks; rank 0 alone logs and saves.
Needs: pip install extrapcomm[torch,demo,integrations]
"""

import lightning
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import extrapcomm as xc
from extrapcomm.integrations import FusedStrategy


class Classifier(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def training_step(self, batch, _):
        x, y = batch
        return nn.functional.cross_entropy(self.layers(x), y)

    def validation_step(self, batch, _):
        x, y = batch
        self.log("accuracy", (self.layers(x).argmax(1) == y).float().mean())

    def configure_optimizers(self):
        return xc.ExtrapSGD(self.parameters(), lr=0.2, momentum=0.9, world=self.trainer.strategy.world)


def digits():
    images, labels = load_digits(return_X_y=True)
    images, labels = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    return TensorDataset(images[:1437], labels[:1437]), TensorDataset(images[1437:], labels[1437:])


def main(epochs=10, limit=1.0):
    torch.manual_seed(0)
    train, test = digits()
    with xc.World() as world:
        sampler = DistributedSampler(train, world.size, world.rank)  # Lightning does not shard
        batches = DataLoader(train, 64 // world.size, sampler=sampler)
        trainer = lightning.Trainer(
            strategy=FusedStrategy(world), accelerator="cpu", devices=1, max_epochs=epochs, gradient_clip_val=limit,
            logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(Classifier(), batches, DataLoader(test, 120))
        if world.rank == 0:
            hits = trainer.callback_metrics["accuracy"].item()
            print(f"{100 * hits:.1f} % test accuracy ({world.size} ranks)")


if __name__ == "__main__":
    main()
