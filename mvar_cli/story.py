"""What the quickstart leaves to tell: its results, and what to type next."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mvar_core.config import RunConfig
    from mvar_core.evaluation.demo_scores import DemoScores as Measures
    from mvar_core.workflows.train_tokenizer import TrainTokenizerResult


@dataclass
class Results:
    """What the page and the JSON object are made from."""

    tokenizer: TrainTokenizerResult
    measures: Measures
    config: RunConfig
    stage_seconds: dict[str, float]
    parameters: int
    loss: float
    num_samples: int
    report: Path


def next_commands(out: Path) -> str:
    """What to type next: own images, published weights."""
    return f"""# more samples
mvar sample --checkpoint {out / "mvar"} --class 3,7 --num 16 --out digits.png

# your own images: a folder with one sub-folder per class
mvar train-tokenizer --preset digits --data IMAGES --out runs/tokenizer
mvar tokenize --checkpoint runs/tokenizer --preset digits --data IMAGES --out runs/tokens
mvar train --preset digits --tokens runs/tokens --checkpoint runs/tokenizer --out runs/mvar

# published weights
mvar convert --model var_d16.pth --tokenizer vae_ch160v4096z32.pth --out var-d16
mvar sample --checkpoint var-d16 --class 207 --num 4 --out retriever.png"""
