"""Non-local means on photographs, plain and twiced: PSNR against bandwidth and noise, and what many passes leave."""

from dataclasses import dataclass
from statistics import mean

import torch
from torch import Tensor

from twicing.classical.nonlocal_means import NonlocalMeans, psnr
from twicing.experiments.curves import Picture
from twicing.experiments.drawing import Panel, drawing_settings
from twicing.experiments.theory.drawing import guide_line, legend, order_line
from twicing.experiments.theory.experiment import LIMIT, OUR_READING, OWN, TWICING, Claim, Experiment
from twicing.experiments.theory.photographs import crops
from twicing.ops.boost import boost

SIDE = 64
SEARCH = 5
NOISES = (10, 25, 50)
# In units of the noise.
BANDWIDTHS = (0.4, 0.5, 0.6, 0.7, 0.85, 1.0, 1.2, 1.4, 2.0)
ORDERS = (1, 2)
DRAWS = 2
PASSES = 12
# The noise and bandwidth of the repeated filter.
REPEATED_NOISE = 25
REPEATED_BANDWIDTH = 1.0


@dataclass(frozen=True)
class Denoising:
    """Means over photographs and draws of the noise, in dB.

    noises: standard deviations on the scale of 0-255. bandwidths: h in units of the noise.
    noisy: PSNR without filtering, by noise. psnr: by noise and order, along the bandwidths.
    repeated_psnr: by order, after 1, 2, ... passes of one fixed A. kept: what is left of the distance to the mean
    image, |u_n - mean| / |u_0 - mean|, by order.
    """

    noises: tuple[int, ...]
    bandwidths: tuple[float, ...]
    noisy: dict[int, float]
    psnr: dict[int, dict[int, tuple[float, ...]]]
    repeated_psnr: dict[int, tuple[float, ...]]
    kept: dict[int, tuple[float, ...]]

    def best(self, noise: int, order: int) -> tuple[float, float]:
        """The bandwidth that is best, and its PSNR."""
        values = self.psnr[noise][order]
        return self.bandwidths[values.index(max(values))], max(values)


def measure(seed: int) -> Denoising:
    """Denoise crops of scikit-learn's two photographs."""
    draw = torch.Generator().manual_seed(seed)
    noisy: dict[int, list[float]] = {noise: [] for noise in NOISES}
    found: dict[int, dict[int, list[list[float]]]] = {
        noise: {order: [[] for _ in BANDWIDTHS] for order in ORDERS} for noise in NOISES
    }
    repeated: dict[int, list[list[float]]] = {order: [[] for _ in range(PASSES)] for order in ORDERS}
    kept: dict[int, list[list[float]]] = {order: [[] for _ in range(PASSES)] for order in ORDERS}
    for clean in crops(SIDE):
        for noise in NOISES:
            for _ in range(DRAWS):
                sd = noise / 255
                image = clean + sd * torch.randn(clean.shape, generator=draw, dtype=clean.dtype)
                noisy[noise].append(psnr(image, clean))
                filters = NonlocalMeans(image, search=SEARCH)
                for place, h in enumerate(BANDWIDTHS):
                    smooth = filters.smoother(h * sd)
                    for order in ORDERS:
                        found[noise][order][place].append(psnr(boost(smooth, image, order), clean))
                if noise == REPEATED_NOISE:
                    smooth = filters.smoother(REPEATED_BANDWIDTH * sd)
                    for order in ORDERS:
                        once_more = image
                        for n in range(PASSES):
                            once_more = boost(smooth, once_more, order)
                            repeated[order][n].append(psnr(once_more, clean))
                            kept[order][n].append(_spread(once_more) / _spread(image))
    return Denoising(
        NOISES,
        BANDWIDTHS,
        {noise: mean(values) for noise, values in noisy.items()},
        {noise: {order: _means(lists) for order, lists in orders.items()} for noise, orders in found.items()},
        {order: _means(lists) for order, lists in repeated.items()},
        {order: _means(lists) for order, lists in kept.items()},
    )


def claims(numbers: Denoising) -> tuple[Claim, ...]:
    """What the numbers show."""
    best = {noise: {order: numbers.best(noise, order) for order in ORDERS} for noise in numbers.noises}
    gains = {noise: best[noise][2][1] - best[noise][1][1] for noise in numbers.noises}
    wide = {noise: numbers.psnr[noise][2][-1] - numbers.psnr[noise][1][-1] for noise in numbers.noises}
    narrow = {noise: numbers.psnr[noise][2][0] - numbers.psnr[noise][1][0] for noise in numbers.noises}
    kept, repeated = numbers.kept, numbers.repeated_psnr
    return (
        Claim(
            "Where the filter smooths too much, twicing brings back part of the picture.",
            f"{TWICING}, section 3.2",
            OUR_READING,
            f"at the widest bandwidth ({numbers.bandwidths[-1]:g} x noise) twicing is better by {_by_noise(wide)} dB",
            all(value > 0 for value in wide.values()),
        ),
        Claim(
            "Where it smooths too little, twicing brings the noise back too.",
            "our measurement",
            LIMIT,
            f"at the narrowest bandwidth ({numbers.bandwidths[0]:g} x noise) it changes PSNR by {_by_noise(narrow)} dB",
            all(value < 0 for value in narrow.values()),
        ),
        Claim(
            "Each at its own best bandwidth, plain and twiced non-local means differ by less than 1 dB.",
            "our measurement",
            OWN,
            f"twiced minus plain {_by_noise(gains)} dB; best h / noise "
            + "; ".join(f"{best[n][1][0]:g} and {best[n][2][0]:g} at noise {n}" for n in numbers.noises),
            all(abs(value) < 1 for value in gains.values()),
        ),
        Claim(
            "A filter that is repeated wears the picture away, and the twiced one more slowly.",
            f"{TWICING}, section 3.1",
            OUR_READING,
            f"after {PASSES} passes {100 * kept[1][-1]:.1f} % of the distance to the mean is left without twicing and "
            f"{100 * kept[2][-1]:.1f} % with it; PSNR fell from {repeated[1][0]:.2f} to {repeated[1][-1]:.2f} dB "
            "and from "
            f"{repeated[2][0]:.2f} to {repeated[2][-1]:.2f} dB",
            all(b > a for a, b in zip(kept[1], kept[2], strict=True))
            and repeated[1][0] - repeated[1][-1] > repeated[2][0] - repeated[2][-1] > 0,
        ),
    )


@drawing_settings()
def picture(numbers: Denoising) -> Picture:
    """PSNR against bandwidth for each noise, and against the number of passes."""
    panels = []
    for noise in numbers.noises:
        panel = Panel(f"denoising-{noise}", f"Noise of standard deviation {noise}/255")
        guide_line(
            panel.axes, (numbers.bandwidths[0], numbers.bandwidths[-1]), (numbers.noisy[noise],) * 2, "unfiltered"
        )
        for order in ORDERS:
            order_line(panel.axes, order, numbers.bandwidths, numbers.psnr[noise][order])
        panel.axes.set_xscale("log")
        panel.axes.set_xticks((0.4, 0.7, 1, 1.4, 2), ("0.4", "0.7", "1", "1.4", "2"))
        panel.axes.minorticks_off()
        panel.axes.set(xlabel="bandwidth h / noise", ylabel="PSNR [dB]")
        panels.append(panel)
    legend(panels[0].axes)
    times = range(1, PASSES + 1)
    for name, title, label, found in (
        ("psnr", "Repeated filter", "PSNR [dB]", numbers.repeated_psnr),
        ("kept", "What many passes leave", "distance to the mean, left", numbers.kept),
    ):
        panel = Panel(f"denoising-repeated-{name}", title)
        for order in ORDERS:
            order_line(panel.axes, order, times, found[order])
        panel.axes.set(xlabel="passes of one fixed A", ylabel=label)
        panels.append(panel)
    caption = (
        f"Crops of {SIDE} x {SIDE} pixels of scikit-learn's two photographs, {DRAWS} draws of the noise; means. The "
        f"repeated filter has noise {REPEATED_NOISE}/255 and h = {REPEATED_BANDWIDTH:g} x noise."
    )
    return Picture("denoising", panels, caption)


def _means(lists: list[list[float]]) -> tuple[float, ...]:
    return tuple(mean(values) for values in lists)


def _spread(image: Tensor) -> float:
    return float((image - image.mean((1, 2), keepdim=True)).norm())


def _by_noise(values: dict[int, float]) -> str:
    return ", ".join(f"{value:+.2f}" for value in values.values())


ABOUT = (
    "Pixels are averaged with weights that fall with the distance of their patches (5 x 5 pixels, within 5 pixels), "
    "once by A and once by 2 A - A A with the same A. Then one A, made from the noisy picture, is applied again and "
    "again."
)
EXPERIMENT = Experiment("denoising", "Non-local means on photographs", ABOUT, measure, claims, picture)
