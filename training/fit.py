"""The training loop of every bundled checkpoint: AdamW, one cycle of the rate, resumed after its last epoch."""

import argparse
import math
import time

import numpy as np
import torch
from torch import nn
from tqdm import tqdm


def fit(model, state_file, batches, loss_of, check, *, epochs, steps, rate, decay, seed=0):
    """Trains a model in place.

    Args:
        model: on the device on which it is to be trained.
        state_file: where the state is kept after each epoch; where there is one, the run goes on from it.
        batches: called with a random generator for each epoch, yields its `steps` batches, each a tuple.
        loss_of: loss_of(model, *batch) gives the loss.
        check: called with the model after each epoch; what it returns is printed.
        epochs, steps: how many epochs, and how many steps in one.
        rate, decay: the highest learning rate, reached after a tenth of the steps, and the weight decay on matrices.
        seed: of the batches.

    Returns:
        The seconds that training took, without the checks.

    Raises:
        RuntimeError: the loss is no longer finite.
    """
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}], lr=rate
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, epochs * steps, pct_start=0.1)
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    first, seconds = 0, 0.0
    state_file.parent.mkdir(parents=True, exist_ok=True)
    if state_file.exists():
        state = torch.load(state_file, map_location="cpu", weights_only=True)
        for key, part in parts.items():
            part.load_state_dict(state[key])
        first, seconds = state["epoch"], state["seconds"]
    for epoch in range(first, epochs):
        rng, losses = np.random.default_rng([seed, epoch]), []
        batches_of_epoch = batches(rng)
        start = time.perf_counter()
        model.train()
        for batch in tqdm(batches_of_epoch, total=steps, desc=f"epoch {epoch + 1}/{epochs}", mininterval=10):
            loss = loss_of(model, *batch)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        if not math.isfinite(sum(losses)):
            raise RuntimeError(f"The loss became {losses[-1]} in epoch {epoch + 1}: lower the rate.")
        seconds += time.perf_counter() - start
        state = {key: part.state_dict() for key, part in parts.items()}
        torch.save({**state, "epoch": epoch + 1, "seconds": seconds}, state_file)
        print(f"epoch {epoch + 1}: loss {np.mean(losses):.4f}, {seconds:.0f} s, {check(model)}", flush=True)
    return seconds


def arguments(description, names):
    """The command line of every training: `name`, one of names, `scenes`, and `epochs` (None: the recipe's)."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=names)
    parser.add_argument("--scenes", type=int, default=40_000, help="training scenes (default: %(default)s)")
    parser.add_argument("--epochs", type=int, help="default: the recipe's")
    return parser.parse_args()
