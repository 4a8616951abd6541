"""What can be set of a classifier: one class for the scorer and for the model behind it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from omegaconf import MISSING

from heretic_ds.scoring.base import Scorer
from heretic_ds.settings import within

SEQUENCE, CAUSAL = "sequence", "causal"
KINDS = (SEQUENCE, CAUSAL)
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass
class ClassifierOptions(Scorer.Options):
    """Which model, what it is shown, and what counts."""

    model: str = MISSING
    """Hub id or local folder of the classifier."""
    revision: Optional[str] = None  # noqa: UP045 (for the structured config)
    """Branch, tag or commit of a hub model."""
    kind: Optional[str] = within(None, choices=KINDS)  # noqa: UP045
    """``sequence`` (a sequence-classification model) or ``causal`` (a language model that is asked); null: what its
    config.json says."""
    label: Optional[str] = None  # noqa: UP045
    """Of a sequence classifier: name or number of the label that counts; null: the one whose name speaks of
    refusing, where there is one."""
    template: Optional[str] = None  # noqa: UP045
    """What the classifier is shown, with ``{prompt}`` and ``{answer}`` in it; null: the answer alone for a sequence
    classifier, a question about both for a causal model, put by its chat template where it has one."""
    yes: str = "Yes"
    """Of a causal model: the reply that counts. Its first token is looked at."""
    no: str = "No"
    """The other reply."""
    threshold: float = within(0.5, gt=0, lt=1)
    """Probability from which on an answer counts."""
    count: bool = True
    """The score is how many answers count; false: the mean probability."""
    device: str = "auto"
    """``auto`` (CUDA where there is one, else the CPU), ``cpu``, ``cuda`` or ``cuda:N``."""
    dtype: str = within("auto", choices=DTYPES)
    """Of its weights; ``auto``: the checkpoint's own, float32 on a CPU."""
    batch_size: int = within(16, ge=1)
    """Answers that it reads at a time; halved where memory runs out."""
    keep: Optional[bool] = None  # noqa: UP045
    """Whether it stays on its accelerator while answers are made; null: where it takes at most an eighth of the
    memory that is free there before the first pass."""
