"""Fine-tune a trained language model with and without twicing put into it, and say what difference that made.

The converted model starts at the trained function (gain 0) and learns, for each layer and head, how much to twice. Both
see the same batches; the one without gets equal steps, and, in a third arm, equal seconds. Paired over seeds.

Run it: python scripts/retrofit.py --model FOLDER --text FILE.txt --seeds 8 --steps 600 --out runs/retrofit
FOLDER holds a model of transformers with its tokenizer, or one in llama2.c's format (NAME.bin and tok*.bin).
"""

import copy
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
import tyro
from llama2c import Tokenizer, read_model
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn

import twicing
import twicing.adapters.transformers
from twicing.experiments.statistics import PairedDifference, paired_difference

STANDARD, SECONDS, RETROFIT = "standard, equal steps", "standard, equal seconds", "twicing, gain learned from 0"
ARMS = (RETROFIT, STANDARD, SECONDS)
# What may change from one start to the next.
FREE = ("out", "seeds", "threads")


@dataclass(frozen=True)
class Options:
    """Fine-tune a trained language model with and without twicing put into it, paired over seeds.

    The converted model starts at the trained function (gain 0) and learns for each head how much to twice; the one
    without gets equal steps, and in a third arm equal seconds.
    """

    model: Path
    """Folder of the trained model."""
    text: Path
    """Plain text in UTF-8; its last tenth is held out and never trained on."""
    out: Path
    """Folder for results.jsonl and results.md; fine-tunings that it has already are not made again."""
    seeds: int = 8
    """How many fine-tunings of each kind; each draws other batches."""
    steps: int = 600
    """Optimiser steps of twicing and of "equal steps"."""
    batch: int = 16
    """Sequences in a batch."""
    length: int = 128
    """Tokens in a sequence."""
    learning_rate: float = 5e-4
    """AdamW's for the weights, after a linear warm-up of a tenth of the steps, falling linearly to zero."""
    gain_rate: float = 1e-2
    """AdamW's for the gains, likewise."""
    layers: str = "all"
    """Which layers to convert, counted from 1."""
    held_out: int = 200
    """At most so many sequences of the held-out text are evaluated."""
    threads: int = 1
    """Threads of torch."""


@dataclass(frozen=True)
class Result:
    """One fine-tuning. loss: mean nats per token on the held-out text, before and after; gains: by layer and head."""

    arm: str
    seed: int
    before: float
    after: float
    steps: int
    seconds: float
    gains: dict[int, list[float]]


def main(options: Options) -> list[Result]:
    """Fine-tune every arm for every seed, print what came of it, and write it to results.jsonl and results.md."""
    torch.set_num_threads(options.threads)
    model, encode = load(options.model)
    tokens = torch.tensor(encode(options.text.read_text(encoding="utf-8")))
    split = len(tokens) * 9 // 10
    training, held_out = tokens[:split], windows(tokens[split:], options)
    if len(training) <= options.length or len(held_out) == 0:
        raise ValueError(
            f"{options.text} must hold at least {10 * (options.length + 1)} tokens, of which a tenth is held out: it "
            f"holds {len(tokens)}."
        )
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "results.jsonl"
    results = finished(path, options)
    # What torch does only once would otherwise count as twicing's seconds.
    warm_up = replace(options, steps=2)
    for arm in (RETROFIT, STANDARD):
        fine_tune(copy.deepcopy(model), arm, 0, training, held_out[:1], warm_up, None)
    versions = {"twicing": twicing.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress, path.open("a", encoding="utf-8") as file:
        task = progress.add_task("fine-tuning", total=options.seeds * len(ARMS))
        for seed in range(options.seeds):
            for arm in ARMS:
                progress.update(task, description=f"seed {seed}, {arm}")
                if not any((result.arm, result.seed) == (arm, seed) for result in results):
                    seconds = next((r.seconds for r in results if (r.arm, r.seed) == (RETROFIT, seed)), None)
                    result = fine_tune(copy.deepcopy(model), arm, seed, training, held_out, options, seconds)
                    results.append(result)
                    row = {**asdict(result), "options": asdict(options), "versions": versions}
                    file.write(json.dumps(row, default=str) + "\n")
                    file.flush()
                progress.advance(task)
    show(results, Console())
    (options.out / "results.md").write_text(markdown(results, options, model), encoding="utf-8")
    return results


def finished(path: Path, options: Options) -> list[Result]:
    """What an earlier run with the same options has made, so that an interrupted one goes on where it stopped."""
    results = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        row = json.loads(line)
        row.pop("versions")
        was, now = row.pop("options"), json.loads(json.dumps(asdict(options), default=str))
        changed = sorted(name for name in now if name not in FREE and was[name] != now[name])
        if changed:
            raise ValueError(
                f"{path} is of another experiment ({changed[0]} was {was[changed[0]]}, and is {now[changed[0]]}): name "
                "another folder with --out."
            )
        row["gains"] = {int(layer): gains for layer, gains in row["gains"].items()}
        if row["seed"] < options.seeds:
            results.append(Result(**row))
    return results


def load(folder: Path) -> tuple[nn.Module, Callable[[str], list[int]]]:
    """The model in the folder, and what turns text into its tokens."""
    tokenizers = sorted(folder.glob("tok*.bin"))
    if tokenizers:
        weights = [path for path in sorted(folder.glob("*.bin")) if path not in tokenizers]
        if len(weights) != 1 or len(tokenizers) != 1:
            raise ValueError(
                f"{folder} must hold one NAME.bin and one tok*.bin: it holds {len(weights)}, {len(tokenizers)}."
            )
        return read_model(weights[0]), Tokenizer(tokenizers[0]).encode
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder).eval(), lambda text: tokenizer(text)["input_ids"]


def fine_tune(
    model: nn.Module,
    arm: str,
    seed: int,
    training: Tensor,
    held_out: Tensor,
    options: Options,
    seconds: float | None,
) -> Result:
    """One fine-tuning; for equal seconds it goes on until the processor has worked as long as for twicing."""
    if arm == RETROFIT:
        twicing.convert(model, "twicing", layers=options.layers, options={"gain": 0.0, "learn_gain": True})
    gains = [parameter for name, parameter in model.named_parameters() if name.endswith("twicing_mechanism.gain")]
    others = [parameter for parameter in model.parameters() if all(parameter is not gain for gain in gains)]
    groups = [{"params": others, "lr": options.learning_rate, "weight_decay": 0.01}]
    if gains:
        groups.append({"params": gains, "lr": options.gain_rate, "weight_decay": 0.0})
    optimizer = torch.optim.AdamW(groups)
    full_rates = [group["lr"] for group in optimizer.param_groups]
    before = loss_on(model, held_out, options.batch)
    draw = torch.Generator().manual_seed(seed)
    model.train()
    # Processor time: what else runs on the machine does not count.
    step, start = 0, time.process_time()
    while True:
        # How far along, in the measure that this arm has to fill.
        spent = time.process_time() - start
        share = spent / seconds if arm == SECONDS and seconds else step / options.steps
        if share >= 1.0:
            break
        for group, rate in zip(optimizer.param_groups, full_rates, strict=True):
            group["lr"] = rate * min(1.0, (share + 1.0 / options.steps) / 0.1) * (1.0 - share)
        at = torch.randint(0, len(training) - options.length, (options.batch,), generator=draw)
        batch = torch.stack([training[i : i + options.length + 1] for i in at.tolist()])
        optimizer.zero_grad()
        loss(model, batch).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
    spent = time.process_time() - start
    model.eval()
    learned = {
        site.layer: [round(gain, 6) for gain in site.attention.twicing_mechanism.gain.tolist()]
        for site in twicing.adapters.surgery.find_sites(model)
        if site.converted
    }
    return Result(arm, seed, before, loss_on(model, held_out, options.batch), step, spent, learned)


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    """Mean nats per token of sequences [B, N + 1]."""
    logits: Tensor = model(batch[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


def loss_on(model: nn.Module, held_out: Tensor, batch: int) -> float:
    """Mean nats per token of the held-out sequences."""
    with torch.no_grad():
        parts = [(float(loss(model, part)), len(part)) for part in held_out.split(batch)]
    return sum(value * count for value, count in parts) / len(held_out)


def windows(tokens: Tensor, options: Options) -> Tensor:
    """The text in sequences side by side, [n, length + 1]; each predicts all tokens but its first."""
    size = options.length + 1
    whole = tokens[: len(tokens) // size * size].reshape(-1, size)
    return whole[: options.held_out]


def show(results: list[Result], console: Console) -> None:
    """The losses by arm, the paired differences with their intervals, and the gains by layer and head."""
    after = {arm: {r.seed: r.after for r in results if r.arm == arm} for arm in ARMS}
    table = Table("arm", "steps", "seconds", "loss before", "loss after", title="Nats per token on held-out text")
    for arm in ARMS:
        rows = [result for result in results if result.arm == arm]
        steps, seconds = (statistics.mean(getattr(row, name) for row in rows) for name in ("steps", "seconds"))
        table.add_row(
            arm, f"{steps:.0f}", f"{seconds:.1f}", f"{mean(rows, 'before'):.4f}", f"{mean(rows, 'after'):.4f}"
        )
    console.print(table)
    for arm in (STANDARD, SECONDS):
        console.print(f"twicing - {arm}: {said(paired_difference(after[arm], after[RETROFIT]))}")
    gains = [result.gains for result in results if result.arm == RETROFIT]
    learned = Table("layer", "gain of each head, mean over seeds (spread)", title="What was learned")
    for layer in gains[0]:
        heads = zip(*(one[layer] for one in gains), strict=True)
        learned.add_row(str(layer), "  ".join(f"{statistics.mean(h):+.3f} ({spread(h):.3f})" for h in heads))
    console.print(learned)


def markdown(results: list[Result], options: Options, model: nn.Module) -> str:
    """The same as a section of docs/results.md, with the command that makes it and what it cannot tell."""
    after = {arm: {r.seed: r.after for r in results if r.arm == arm} for arm in ARMS}
    lines = ["| arm | steps | processor seconds | loss before | loss after | twicing - this arm |"]
    lines.append("| --- | ---: | ---: | ---: | ---: | --- |")
    for arm in ARMS:
        rows = [result for result in results if result.arm == arm]
        steps, seconds = (statistics.mean(getattr(row, name) for row in rows) for name in ("steps", "seconds"))
        loss_after = f"{mean(rows, 'after'):.4f} ± {spread(row.after for row in rows):.4f}"
        difference = "" if arm == RETROFIT else said(paired_difference(after[arm], after[RETROFIT]))
        cells = (arm, f"{steps:.0f}", f"{seconds:.0f}", f"{mean(rows, 'before'):.4f}", loss_after, difference)
        lines.append(f"| {' | '.join(cells)} |")
    gains = [result.gains for result in results if result.arm == RETROFIT]
    learned = ["| layer | gain of each head, mean over seeds (standard deviation) |", "| ---: | --- |"]
    for layer in gains[0]:
        heads = zip(*(one[layer] for one in gains), strict=True)
        learned.append(f"| {layer} | {', '.join(f'{statistics.mean(h):+.3f} ({spread(h):.3f})' for h in heads)} |")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    given = {name: getattr(options, name) for name in ("model", "text", "seeds", "steps", "out")}
    command = " ".join(["python scripts/retrofit.py", *(f"--{name} {value}" for name, value in given.items())])
    return "\n".join(
        [
            f"## {type(model).__name__} of {parameters:,} parameters, fine-tuned with twicing put into it",
            "",
            f"`{command}`",
            "",
            f"{options.seeds} seeds; {options.steps} steps of {options.batch} sequences of {options.length} tokens. "
            "Losses are nats per token on the last tenth of the text, which was never trained on. Every arm starts at "
            "the trained weights; the gain of each head starts at 0, which is the trained function; 1 is the papers'.",
            "",
            *lines,
            "",
            *learned,
            "",
            "- Differences below zero are in favour of twicing. A gain below zero smooths more than standard attention "
            "does.",
            f"- On the processor it was made on, a step with twicing took {_step_ratio(results):.2f} times one without "
            "it: equal seconds are equal only there.",
            "- One small model and one text: what a large model would learn is another question.",
            "- The gains are parameters that the other arms do not have, with a learning rate of their own "
            f"({options.gain_rate:g} instead of {options.learning_rate:g}).",
            "- Seeds draw other batches of the same text, and all start at the same weights.",
            "",
        ]
    )


def _step_ratio(results: list[Result]) -> float:
    """Seconds of a step with twicing, as a multiple of one without."""
    with_it, without = (
        statistics.mean(r.seconds / r.steps for r in results if r.arm == arm) for arm in (RETROFIT, STANDARD)
    )
    return with_it / without


def said(difference: PairedDifference | None) -> str:
    """A paired difference in words; below zero is better for twicing."""
    if difference is None:
        return "no seed in common"
    if difference.half_width is None:
        return f"{difference.mean:+.4f} (one seed, or no spread: no interval)"
    words = f"{difference.mean:+.4f} [{difference.low:+.4f}, {difference.high:+.4f}], n = {len(difference.seeds)} seeds"
    if abs(difference.mean) <= difference.half_width:
        words += f": no difference shown (smallest showable: +-{difference.half_width:.4f})"
    return words


def mean(rows: list[Result], name: str) -> float:
    """The mean of one number over fine-tunings."""
    return statistics.mean(getattr(row, name) for row in rows)


def spread(numbers: Any) -> float:
    """The sample standard deviation; 0 for a single number."""
    listed = list(numbers)
    return statistics.stdev(listed) if len(listed) > 1 else 0.0


if __name__ == "__main__":
    main(tyro.cli(Options))
