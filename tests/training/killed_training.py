"""Trainings in processes of their own: to be killed in earnest, or to share their batches with another process."""

import multiprocessing
import os
import signal
import socket
import warnings

import torch

from twicing.adapters.surgery import convert
from twicing.training.classification import build_model, train_classifier
from twicing.training.hardware import Hardware
from twicing.training.split import load_split

# The recipe of DeiT with nothing left out, but small.
TINY_DEIT = [
    "image_size=32",
    "patch_size=16",
    "depth=2",
    "width=24",
    "epochs=3",
    "batch_size=8",
    "ema_decay=0.9",
    "cosine.warmup_epochs=1",
    "cosine.cooldown_epochs=1",
    "drop_path=0.3",
    "augmentation.erasing=0.5",
]


def train_here(recipe, data_dir, folder, *, kill_at=2.0, mechanism=None, hardware=None, dropout=0.1, seed=3):
    """Train and return (weights, curve); a SIGKILL comes as soon as more than that share is done."""
    model = build_model(recipe, seed)
    # Dropout draws from the global generator at every step: a resume has to meet the same draws.
    for block in model.network.blocks:
        block.mlp.drop1.p = dropout
    if mechanism:
        convert(model, mechanism)
    folder.mkdir(exist_ok=True)

    def killing(share):
        if share > kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    split = load_split(recipe, 0, data_dir)
    curve = train_classifier(model, recipe, split, seed, folder, killing, hardware or Hardware())
    return model.state_dict(), curve


def start(recipe, data_dir, folder, environment=None, **options):
    """The same in a new process, which leaves what it returns in result-RANK.pt beside the checkpoint."""
    context = multiprocessing.get_context("forkserver")
    # Imported once, in the server that the processes are forked from.
    context.set_forkserver_preload(["twicing.training.classification", "twicing.adapters.timm", "killed_training"])
    process = context.Process(target=_child, args=(recipe, data_dir, folder, environment or {}, options))
    process.start()
    return process


def _child(recipe, data_dir, folder, environment, options):
    os.environ.update(environment)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
    weights, curve = train_here(recipe, data_dir, folder, **options)
    rows = [(row.epoch, row.loss, row.held_out_accuracy) for row in curve]
    torch.save({"weights": weights, "curve": rows}, folder / f"result-{os.environ.get('RANK', '0')}.pt")


def torchrun_environment(processes):
    """One environment for each process, as torchrun sets them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "GROUP_RANK": "0",
        "TORCHELASTIC_RUN_ID": "test",
    }
    return [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
