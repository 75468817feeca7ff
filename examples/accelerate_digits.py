"""Accelerate with the fused step: scikit-learn's handwritten digits.

    mpirun -n 2 python examples/accelerate_digits.py

Start it by mpirun, not by `accelerate launch`: Accelerate sees one process, the optimizer sees all ranks.
Needs: pip install extrapcomm[torch,demo,integrations]
"""

import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import extrapcomm as xc
from extrapcomm.integrations import adapt_accelerator


def digits():
    images, labels = load_digits(return_X_y=True)
    images, labels = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    return TensorDataset(images[:1437], labels[:1437]), (images[1437:], labels[1437:])


def main(epochs=10, limit=1.0):
    torch.manual_seed(0)
    train, (images, labels) = digits()
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    with xc.World() as world:
        opt = xc.ExtrapSGD(model.parameters(), lr=0.2, momentum=0.9, world=world)
        sampler = DistributedSampler(train, world.size, world.rank)  # Accelerate does not shard
        accelerator = Accelerator()
        batches = DataLoader(train, 64 // world.size, sampler=sampler)
        model, opt_step, batches = accelerator.prepare(model, adapt_accelerator(accelerator, opt), batches)
        for epoch in range(epochs):
            sampler.set_epoch(epoch)
            for x, y in batches:
                accelerator.backward(nn.functional.cross_entropy(model(x), y))
                norm = accelerator.clip_grad_norm_(model.parameters(), limit)
                opt_step.step()  # clips the mean of all ranks' gradients; norm is that mean's, from here on
                opt_step.zero_grad()
            accelerator.print(f"epoch {epoch + 1}/{epochs}  gradient norm {norm.item():.2f}")
        if accelerator.is_main_process:
            with torch.no_grad(), opt.master_weights():
                hits = (model(images).argmax(1) == labels).float().mean().item()
            print(f"{100 * hits:.1f} % test accuracy ({world.size} ranks)")
        opt.close()


if __name__ == "__main__":
    main()
