"""Fine-tune a trained language model with and without twicing put into it, and say what difference that made.

The converted model starts at the trained function (gain 0) and learns, for each layer and head, how much to twice. Both
see the same batches; the one without gets equal steps, and, in a third arm, equal seconds. Paired over seeds.

Run it: python scripts/retrofit.py --model FOLDER --text FILE.txt --out runs/retrofit --seeds 8 --steps 600
FOLDER holds a model of transformers with its tokenizer, or one in llama2.c's format (NAME.bin and tok*.bin).
"""

import copy
import json
import math
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
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
from twicing.experiments.cases.windows import read_text
from twicing.experiments.results import read_rows
from twicing.experiments.statistics import PairedDifference, paired_difference

STANDARD, SECONDS, RETROFIT = "standard, equal steps", "standard, equal seconds", "twicing, gain learned from 0"
ARMS = (RETROFIT, STANDARD, SECONDS)
COLUMNS = ("arm", "steps", "processor seconds", "loss before", "loss after", "twicing - this arm")
GAIN_COLUMNS = ("layer", "gain of each head, mean over seeds (standard deviation)")
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


def command(arguments: Sequence[str] | None = None) -> int | str:
    """What was typed, done. Returns what sys.exit() takes: a code, or what was wrong in one sentence."""
    try:
        main(tyro.cli(Options, args=arguments))
    except KeyboardInterrupt:
        Console(stderr=True).print("\nStopped. Finished fine-tunings are kept; the same command goes on from there.")
        return 130
    except ValueError as error:
        return f"retrofit: {error}"
    except OSError as error:
        where = f" {error.filename}" if error.filename else ""
        return f"retrofit: cannot read or write{where} ({error.strerror or error})."
    return 0


def main(options: Options) -> list[Result]:
    """Fine-tune every arm for every seed, print what came of it, and write it to results.jsonl and results.md.

    Raises ValueError, one sentence, for whatever of the options, the model or the text does not fit.
    """
    check(options)
    torch.set_num_threads(options.threads)
    model, encode = load(options.model)
    longest = getattr(model.config, "max_position_embeddings", options.length)
    if options.length > longest:
        raise ValueError(f"--length is at most {longest}, which the model was made for: got {options.length}.")
    tokens = torch.tensor(encode(read_text(options.text)[0]))
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


def check(options: Options) -> None:
    """Raise ValueError for a number that cannot be one of fine-tunings."""
    for name in ("seeds", "steps", "batch", "length", "held_out", "threads"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is 1 or more: got {getattr(options, name)}.")
    for name in ("learning_rate", "gain_rate"):
        if not 0 < getattr(options, name) < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} is a number above 0: got {getattr(options, name)}.")


def finished(path: Path, options: Options) -> list[Result]:
    """What an earlier run with the same options has made, so that an interrupted one goes on where it stopped.

    Raises ValueError where the file is of something else, or a line is broken.
    """
    results = []
    now = json.loads(json.dumps(asdict(options), default=str))
    keys = {field.name for field in fields(Result)} | {"options", "versions"}
    for where, row in read_rows(path) if path.exists() else []:
        if row.keys() != keys:
            raise ValueError(f"{where}: this is no fine-tuning of ours: name another folder with --out.")
        row.pop("versions")
        was = row.pop("options")
        changed = sorted(name for name in now if name not in FREE and was.get(name) != now[name])
        if changed:
            raise ValueError(
                f"{path} is of another experiment ({changed[0]} was {was.get(changed[0])}, and is {now[changed[0]]}): "
                "name another folder with --out."
            )
        row["gains"] = {int(layer): gains for layer, gains in row["gains"].items()}
        if row["seed"] < options.seeds:
            results.append(Result(**row))
    return results


def load(folder: Path) -> tuple[nn.Module, Callable[[str], list[int]]]:
    """The model in the folder, and what turns text into its tokens. Raises ValueError where it holds none."""
    if not folder.is_dir():
        raise ValueError(f"--model {folder} is no folder: name the one of the trained model.")
    tokenizers = sorted(folder.glob("tok*.bin"))
    if tokenizers:
        weights = [path for path in sorted(folder.glob("*.bin")) if path not in tokenizers]
        if len(weights) != 1 or len(tokenizers) != 1:
            raise ValueError(
                f"{folder} must hold one NAME.bin and one tok*.bin: it holds {len(weights)}, {len(tokenizers)}."
            )
        return read_model(weights[0]), Tokenizer(tokenizers[0]).encode
    if not (folder / "config.json").exists():
        raise ValueError(
            f"{folder} must hold a model of transformers (config.json) or of llama2.c (NAME.bin and tok*.bin): it "
            "holds neither."
        )
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
    # Whatever is wrong with the files makes it stumble anywhere: OSError, KeyError, SafetensorError, ...
    except Exception as error:
        raise ValueError(f"transformers cannot load {folder}: {str(error).strip().partition(chr(10))[0]}") from error
    return model, lambda text: tokenizer(text)["input_ids"]


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
    rows = by_arm(results)
    table = Table(*COLUMNS[:-1], title="Nats per token on held-out text")
    for cells in rows:
        table.add_row(*cells[:-1])
    console.print(table)
    for arm, *_, difference in rows:
        if difference:
            console.print(f"twicing - {arm}: {difference}")
    learned = Table(*GAIN_COLUMNS, title="What was learned")
    for cells in gains_by_layer(results):
        learned.add_row(*cells)
    console.print(learned)


def by_arm(results: list[Result]) -> list[tuple[str, ...]]:
    """The cells of COLUMNS for each arm; twicing has no difference to itself."""
    after = {arm: {r.seed: r.after for r in results if r.arm == arm} for arm in ARMS}
    rows = []
    for arm in ARMS:
        own = [result for result in results if result.arm == arm]
        loss_after = f"{mean(own, 'after'):.4f} ± {spread(row.after for row in own):.4f}"
        difference = "" if arm == RETROFIT else said(paired_difference(after[arm], after[RETROFIT]))
        numbers = (f"{mean(own, 'steps'):.0f}", f"{mean(own, 'seconds'):.0f}", f"{mean(own, 'before'):.4f}")
        rows.append((arm, *numbers, loss_after, difference))
    return rows


def gains_by_layer(results: list[Result]) -> list[tuple[str, str]]:
    """The cells of GAIN_COLUMNS for each layer."""
    gains = [result.gains for result in results if result.arm == RETROFIT]
    heads = {layer: zip(*(one[layer] for one in gains), strict=True) for layer in gains[0]}
    return [
        (str(layer), ", ".join(f"{statistics.mean(one):+.3f} ({spread(one):.3f})" for one in of_layer))
        for layer, of_layer in heads.items()
    ]


def typed_again(options: Options) -> str:
    """The command that gives the options, for a shell."""
    given = {
        field.name.replace("_", "-"): getattr(options, field.name)
        for field in fields(options)
        if field.name in ("seeds", "steps") or getattr(options, field.name) != field.default
    }
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    return shlex.join(["python", "scripts/retrofit.py", *words])


def markdown(results: list[Result], options: Options, model: nn.Module) -> str:
    """The same as a section of docs/results.md, with the command that makes it and what it cannot tell."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return "\n".join(
        [
            f"## {type(model).__name__} of {parameters:,} parameters, fine-tuned with twicing put into it",
            "",
            f"`{typed_again(options)}`",
            "",
            f"{options.seeds} seeds; {options.steps} steps of {options.batch} sequences of {options.length} tokens. "
            "Losses are nats per token on the last tenth of the text, which was never trained on. Every arm starts at "
            "the trained weights; the gain of each head starts at 0, which is the trained function; 1 is the papers'.",
            "",
            *_table(COLUMNS, "| --- | ---: | ---: | ---: | ---: | --- |", by_arm(results)),
            "",
            *_table(GAIN_COLUMNS, "| ---: | --- |", gains_by_layer(results)),
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


def _table(columns: Sequence[str], alignment: str, rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table in Markdown."""
    head, *lines = (f"| {' | '.join(cells)} |" for cells in (columns, *rows))
    return [head, alignment, *lines]


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
    sys.exit(command())
