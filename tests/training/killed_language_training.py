"""Trainings of a small language model, here or in processes of their own: to be killed, or to share their batches."""

import multiprocessing
import os
import signal
import warnings
from dataclasses import replace

import torch

from twicing.adapters.surgery import convert
from twicing.data.text import Corpus
from twicing.data.text_vocabulary import build_listed
from twicing.training.hardware import Hardware
from twicing.training.language import build_language_model, train_language_model
from twicing.training.language_recipes import text_demo

WORDS = 50


def small_recipe(**changes):
    sizes = {"depth": 2, "width": 16, "heads": 2, "inner": 24, "length": 8, "cutoffs": (10, 30), "norm": "post"}
    steps = {"epochs": 3, "steps_per_epoch": 6, "batch_size": 4, "warmup_steps": 5, "learning_rate": 1e-2}
    return replace(text_demo(), **(sizes | steps | {"dropout": 0.2} | changes))


def small_corpus(train=400):
    """A text in which every word tells much about the next one."""
    generator = torch.Generator().manual_seed(0)

    def text(n):
        steps = torch.randint(1, 4, (n,), generator=generator)
        return (steps.cumsum(0) % (WORDS - 1)).int()

    vocabulary = build_listed("words", [" ".join(f"w{i}" for i in range(WORDS - 1)) + "\n"])
    return Corpus("made up", vocabulary, text(train), text(90), text(90))


def train_here(recipe, folder, *, kill_at=2.0, mechanism=None, hardware=None, seed=3, progress=None):
    """Train and return (weights, curve); a SIGKILL comes as soon as more than that share is done."""
    corpus = small_corpus()
    model = build_language_model(recipe, seed, len(corpus.vocabulary))
    if mechanism:
        convert(model, mechanism)
    folder.mkdir(exist_ok=True)

    def killing(share):
        if progress is not None:
            progress(share)
        if share > kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    curve = train_language_model(model, recipe, corpus, seed, folder, killing, hardware or Hardware())
    return model.state_dict(), curve


def rows(curve):
    """All of a curve but the seconds."""
    return [(row.epoch, row.step, row.loss, row.valid_perplexity) for row in curve]


def start(recipe, folder, environment=None, **options):
    """The same in a new process, which leaves what it returns in result-RANK.pt beside the checkpoint."""
    context = multiprocessing.get_context("forkserver")
    # Imported once, in the server that the processes are forked from.
    context.set_forkserver_preload(["killed_language_training"])
    process = context.Process(target=_child, args=(recipe, folder, environment or {}, options))
    process.start()
    return process


def _child(recipe, folder, environment, options):
    os.environ.update(environment)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
    weights, curve = train_here(recipe, folder, **options)
    torch.save({"weights": weights, "curve": rows(curve)}, folder / f"result-{os.environ.get('RANK', '0')}.pt")
