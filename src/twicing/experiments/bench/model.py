"""`twicing bench model`: what twicing some layers of a vision transformer costs, as the papers tabulate it.

arXiv 2503.00687, cost table: DeiT-tiny, mean ms per image at batch 1 in fp32. Here the models take turns.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twicing.adapters.surgery import convert, spec, undo
from twicing.experiments.bench.cases import parse_device, parse_dtype
from twicing.experiments.bench.gate import first_line
from twicing.experiments.bench.multiply_adds import multiply_adds
from twicing.experiments.bench.options import ModelOptions
from twicing.experiments.bench.rows import MEASURED, ModelRow, Row, Timed, timed
from twicing.experiments.bench.run import check_effort, record, record_name, threads
from twicing.experiments.bench.screen import Screen
from twicing.experiments.bench.timing import interleaved
from twicing.names import listed, nearest
from twicing.ops.attention import BACKENDS
from twicing.testing import relative_rms
from twicing.torchvision_import import mend_torchvision_import

STANDARD = "none (standard)"
SINGLE, BATCHED, STEP = "one image", "a batch of images", "training step"
# Images that a model's output is checked on, in fp64 too.
CHECKED_IMAGES = 2


@dataclass(frozen=True)
class Entrant:
    """One model of the table: which layers are twiced, and by which backend."""

    layers: str
    backend: str
    model: nn.Module

    @property
    def name(self) -> str:
        """Layers and backend, as the contender's name."""
        return f"{self.layers}, {self.backend}"


def bench_model(options: ModelOptions, screen: Screen) -> bool:
    """Measure, show tables, and write options.out/model-....csv; returns whether it came to the end.

    Raises ValueError for options that mean nothing, and an error that names timm where it is missing.
    """
    check_effort(options.repeats, options.seconds)
    for backend in options.backends:
        if backend not in ("auto", *BACKENDS):
            raise ValueError(f"Unknown backend {backend!r}: {listed(backend, ['auto', *BACKENDS])}")
    if options.batch < 1:
        raise ValueError(f"--batch must be 1 or larger: got {options.batch}.")
    if not options.layers:
        raise ValueError("--layers must name one choice at least, as in --layers 10-12 all.")
    if not options.backends:
        raise ValueError("--backends must name one at least, as in --backends auto sdpa.")
    device, dtype = parse_device(options.device), parse_dtype(options.dtype)
    if dtype == torch.float64:
        raise ValueError("--dtype of a model is float32, or bfloat16 or float16 by autocast: got float64.")
    entrants = _entrants(options, device)
    with threads(options.threads):
        parts = [options.model] if dtype == torch.float32 else [options.model, options.dtype]
        path = options.out / f"{record_name('model', device, *parts)}.csv"
        with screen.progress(4) as step, _autocast(device, dtype):
            _, finished = record(_measured(entrants, options, device, step), path, device, screen)
    screen.say(
        f"Each model ran {options.repeats} times or for {options.seconds:g} s a job, after a tenth of that to warm up; "
        "the papers' protocol is one image at a time, the mean of 1,000 runs after as many to warm up."
    )
    return finished


def _entrants(options: ModelOptions, device: torch.device) -> list[Entrant]:
    """The standard model, one for each choice of layers, and the last of these by every other backend."""
    mend_torchvision_import()
    import timm

    if not timm.is_model(options.model):
        near = nearest(options.model, timm.list_models())
        hint = f"did you mean {near!r}?" if near else "see timm.list_models('*vit*')."
        raise ValueError(f"timm knows no model {options.model!r}: {hint}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        standard = timm.create_model(options.model, pretrained=False).eval()
    entrants = [Entrant(STANDARD, "sdpa", standard)]
    first, *others = options.backends
    choices = [(layers, first) for layers in options.layers]
    choices += [(layers, backend) for layers in options.layers[-1:] for backend in others]
    for layers, backend in choices:
        model = copy.deepcopy(standard)
        try:
            convert(model, "twicing", layers=layers, options={"backend": backend})
        except ValueError as error:
            raise ValueError(f"{options.model} cannot be twiced in --layers {layers}: {error}") from error
        entrants.append(Entrant(layers, backend, model))
    for entrant in entrants:
        entrant.model.to(device)
    return entrants


def _measured(
    entrants: list[Entrant], options: ModelOptions, device: torch.device, step: Callable[[str], None]
) -> Iterator[list[Row]]:
    step("correctness, multiply-adds")
    images = _images(entrants[0].model, max(options.batch, CHECKED_IMAGES), device)
    status = {one.name: complaint(one.model, images[:CHECKED_IMAGES]) or MEASURED for one in entrants}
    adds = {one.name: multiply_adds(one.model, images[:1]) for one in entrants}
    for job, batch in ((SINGLE, 1), (BATCHED, options.batch), (STEP, options.batch)):
        step(job)
        sound = [one for one in entrants if status[one.name] == MEASURED]
        calls = {one.name: (_training if job == STEP else _inference)(one.model, images[:batch]) for one in sound}
        spreads = interleaved(calls, device, repeats=options.repeats, seconds=options.seconds)
        standard = spreads.get(entrants[0].name)
        rows: list[Row] = []
        for one in entrants:
            spread = spreads.get(one.name)
            per = 1 if job == STEP else batch
            rows.append(
                ModelRow(
                    **vars(Timed(status[one.name]) if spread is None else timed(spread, per=per)),
                    model=options.model,
                    dtype=options.dtype,
                    layers=one.layers,
                    backend=one.backend,
                    job=job,
                    batch=batch,
                    ratio=None if spread is None or standard is None else spread.median / standard.median,
                    multiply_adds=adds[one.name],
                    parameters=sum(parameter.numel() for parameter in one.model.parameters()),
                )
            )
        yield rows


def _autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def _images(model: nn.Module, count: int, device: torch.device) -> Tensor:
    """Normal images of the size that the model takes, [count, C, height, width]."""
    size: tuple[int, int, int] = vars(model)["default_cfg"]["input_size"]
    return torch.randn(count, *size, generator=torch.Generator().manual_seed(0)).to(device)


def _inference(model: nn.Module, images: Tensor) -> Callable[[], object]:
    def forward() -> Tensor:
        with torch.no_grad():
            return model(images)

    return forward


def _training(model: nn.Module, images: Tensor) -> Callable[[], object]:
    """A whole step on a copy of the model: cross-entropy, backward, AdamW (1e-3, as in the papers' recipe)."""
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    labels = torch.zeros(len(images), dtype=torch.int64, device=images.device)

    def step() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        return loss

    return step


def complaint(model: nn.Module, images: Tensor) -> str | None:
    """Why the model gets no time, or None where its logits are right: twice as far from fp64 as the dense form's."""
    request = spec(model)
    for entry in request:
        entry["options"] = {**entry["options"], "backend": "reference"}
    try:
        with torch.no_grad():
            found = model(images)
            honest, exact = (_with_reference(model, request) for _ in range(2))
            with torch.autocast(images.device.type, enabled=False):
                expected = exact.double()(images.double())
            off, budget = relative_rms(found, expected), 2.0 * relative_rms(honest(images), expected)
    except RuntimeError as error:  # memory that does not suffice, on a GPU
        return f"failed: {first_line(error)}"
    # Not `off > budget`, which NaN would pass.
    return None if off <= budget else f"wrong: logits off by {off:.1e} (relative RMS), the budget is {budget:.1e}"


def _with_reference(model: nn.Module, request: list[dict[str, object]]) -> nn.Module:
    """A copy whose twiced layers run the dense reference."""
    model = copy.deepcopy(model)
    if request:
        undo(model)
        convert(model, spec=request)
    return model
