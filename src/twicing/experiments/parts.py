"""What a part of a job finds: numbers, which images were right, and what was found about gradient masking."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from twicing.experiments.metrics import ACCURACY, TOP5
from twicing.experiments.results import threat_key

# From so many classes on the five best guesses are counted too.
MANY_CLASSES = 20


@dataclass(frozen=True)
class Finding:
    """One number of a part: metric, value, how many images it is over, and its conditions."""

    metric: str
    value: float
    n: int
    conditions: dict[str, Any] = field(default_factory=dict)


@dataclass
class Part:
    """What one part found. correct: threat key -> one boolean per image; verdict: on gradient masking.

    notes: sentences that its reader needs.
    """

    findings: list[Finding] = field(default_factory=list)
    correct: dict[str, list[bool]] = field(default_factory=dict)
    verdict: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)

    def add_accuracy(self, conditions: dict[str, Any], correct: Tensor) -> None:
        """Add an accuracy and the images behind it."""
        self.findings.append(Finding(ACCURACY, correct.double().mean().item(), len(correct), conditions))
        self.correct[threat_key(conditions)] = correct.tolist()

    def judge(self, conditions: dict[str, Any], logits: Tensor, labels: Tensor) -> None:
        """Add which images are right, and of many classes how often the label is among the five best guesses."""
        labels = labels.to(logits.device)
        self.add_accuracy(conditions, logits.argmax(1) == labels)
        if logits.shape[1] > MANY_CLASSES:
            among = (logits.topk(5).indices == labels[:, None]).any(1)
            self.findings.append(Finding(TOP5, among.double().mean().item(), len(labels), conditions))
