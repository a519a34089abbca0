"""What was asked of `mvar ablate`, and whether it is what its directory holds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mvar_core.analysis.ablation import Ablation, Setting, settings_of
from mvar_core.config import RunConfig
from mvar_core.data.tokens import MANIFEST
from mvar_core.data.vectors import ENCODER
from mvar_core.errors import CheckpointError, ConfigError, DataError
from mvar_core.io.files import read_json, require_new_directory, sha256_of_file
from mvar_core.io.resumable import flattened

EXPERIMENT, SCORING, ROW = "experiment.json", "scoring.json", "row.json"
TOKENIZER, TOKENS, HELD_OUT_TOKENS = "tokenizer", "tokens", "tokens-held-out"
HELD_OUT = 0.1
"""Part of the images that is held out where no others are."""
_FREE_SETTINGS = {
    "accumulate", "micro_batch", "max_skipped", "log_every", "checkpoint_every", "keep", "sample_every", "tensorboard",
    "wandb", "activation_checkpointing", "compile",
}  # fmt: skip
"""Training settings that may differ from row to row: they change no result beyond rounding."""


@dataclass(frozen=True)
class Row:
    """One setting on one seed.

    Attributes:
        setting: What is attended to.
        seed: Of first weights, order, everything dropped, and the samples.
        directory: Where the run lies.
    """

    setting: Setting
    seed: int
    directory: Path

    @property
    def done(self) -> bool:
        """Whether it has been trained and scored."""
        return (self.directory / ROW).is_file()


@dataclass(frozen=True)
class Scoring:
    """How samples are judged; the fields are options.

    Attributes:
        reference: Names the images that they are compared with.
        features: As `mvar evaluate --features`.
        inception_weights: File of the Inception network.
        demo_classifier: File of the classifier behind demo features.
        num: Samples of each class.
    """

    reference: str | None
    features: str
    inception_weights: Path | None
    demo_classifier: Path | None
    num: int


@dataclass(frozen=True)
class AblationRequest:
    """What was asked for; the fields are options.

    Attributes:
        config: Preset, settings and flags, merged; its attention says which scales are windowed.
        ablations: The tables.
        seeds: The seeds.
        checkpoint: Model directory with the tokenizer; None trains one.
        bench_batch: Images together where sampling is timed.
    """

    config: RunConfig
    ablations: tuple[Ablation, ...]
    seeds: tuple[int, ...]
    out: Path
    tokens: Path | None
    data: str | None
    checkpoint: Path | None
    validation: Path | None
    scoring: Scoring
    bench_batch: int
    overwrite: bool
    device: str
    dtype: str
    attention: str

    @property
    def rows(self) -> list[Row]:
        """All rows, seed by seed, so that whole tables are there as early as can be."""
        settings = settings_of(self.ablations)
        return [self.row(setting, seed) for seed in self.seeds for setting in settings]

    def row(self, setting: Setting, seed: int) -> Row:
        """The row of a setting and a seed."""
        return Row(setting, seed, self.out / "rows" / setting.name / f"seed-{seed}")

    def check(self) -> None:
        """Find contradictions before anything is read.

        Raises:
            ConfigError: Options that contradict each other, or a model that cannot be ablated.
            MvarError: Images, tokens or a tokenizer that are not there.
        """
        if (self.tokens is None) == (self.data is None):
            raise ConfigError("An ablation needs tokens or images.", "Give --tokens CACHE or --data IMAGES, not both.")
        if self.tokens is not None and self.checkpoint is None:
            raise ConfigError("--tokens needs the tokenizer that made them.", "Add --checkpoint TOKENIZER.")
        if self.config.transformer is None:
            raise ConfigError(f"{self.config.name} is a tokenizer's preset; an ablation needs a transformer section.")
        if self.config.conditioning.dim is not None and self.config.conditioning.encoder != ENCODER:
            raise ConfigError(
                "An ablation draws samples of classes, and knows no vectors of theirs.",
                f"Only those of conditioning.encoder={ENCODER} follow from the classes' names.",
            )
        if self.checkpoint is not None and self.out.resolve() == self.checkpoint.resolve():
            raise DataError(f"--out {self.out} is the tokenizer's directory.", "Choose another --out.")
        from mvar_core.data.images import open_images
        from mvar_core.data.tokens import TokenCache
        from mvar_core.models.directory import read_model_config

        if self.checkpoint is not None:
            read_model_config(self.checkpoint)
        if self.data is not None:
            open_images(self.data)
        for cache in (self.tokens, self.validation):
            if cache is not None:
                TokenCache.open(cache)

    def preparations(self) -> list[str]:
        """What comes before the rows, in words."""
        plan = []
        if self.checkpoint is None:
            plan.append(f"train a tokenizer for {self.config.train_tokenizer.steps} steps")
        if self.tokens is None:
            plan.append(f"encode the images of {self.data}")
        return plan

    def record(self) -> dict[str, Any]:
        """All that the rows share and that must be the same when more are made."""
        config = self.config
        sections = {"image_size", "patch_sizes", "tokenizer", "transformer", "sampling", "data", "seed"}
        values = config.model_dump(mode="json", include=sections)
        values["train"] = config.train.model_dump(mode="json", exclude=_FREE_SETTINGS)
        if self.checkpoint is None:
            values["train_tokenizer"] = config.train_tokenizer.model_dump(mode="json", exclude=_FREE_SETTINGS)
        else:
            from mvar_core.models.directory import tokenizer_hash

            values["checkpoint"] = tokenizer_hash(self.checkpoint)[:16]
        for name, path in (("tokens", self.tokens), ("validation", self.validation)):
            values[name] = None if path is None else sha256_of_file(path / MANIFEST)[:16]
        return {
            **values,
            "images": self.data,
            "reference": self.scoring.reference,
            "features": self.scoring.features,
            "num": self.scoring.num,
            "bench_batch": self.bench_batch,
            "device": self.device,
            "dtype": self.dtype,
            "attention": self.attention,
        }

    def difference(self) -> str:
        """Why the experiment that is in `out` cannot be gone on with, in words; empty where it can."""
        path = self.out / EXPERIMENT
        if not path.is_file() or self.overwrite:
            return ""
        return difference(path, read_json(path), self.record())

    def require(self) -> None:
        """Refuse a directory that holds another experiment, or something else.

        Raises:
            CheckpointError: Another experiment; names what differs.
            DataError: Something else.
        """
        if not (self.out / EXPERIMENT).is_file():
            require_new_directory(self.out, self.overwrite)
        elif found := self.difference():
            raise CheckpointError(
                found, "Go back to those settings to go on, or choose another --out, or start anew with --overwrite."
            )


def difference(path: Path, found: dict[str, Any], wanted: dict[str, Any]) -> str:
    """How two records differ, key by key with both values; empty where they do not."""
    before, now = flattened(found), flattened(wanted)
    differing = [
        f"{key} is {before.get(key)} there, {now.get(key)} asked"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]
    if not differing:
        return ""
    more = f" and {len(differing) - 8} more" if len(differing) > 8 else ""
    return f"{path} belongs to another experiment: {'; '.join(differing[:8])}{more}."
