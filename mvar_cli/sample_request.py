"""What `mvar sample` was asked for: by which model, what, and where to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mvar_core.sampling.conditions import ChosenConditions as Chosen
from mvar_core.sampling.conditions import choose_conditions as chosen

if TYPE_CHECKING:
    from mvar_cli.parts import Request
    from mvar_core.config import ModelConfig, SamplingConfig
    from mvar_core.pipeline import Pipeline


class Place(NamedTuple):
    """Where to, and whether what is there may go."""

    target: Path
    out: Path
    output_format: str
    overwrite: bool


class NamedModel:
    """The model as the user named it, loaded as late as can be."""

    def __init__(
        self,
        checkpoint: Path,
        tokenizer: Path | None,
        device: str,
        dtype: str,
        attention: str,
        *,
        compiled: bool = False,
    ):
        from mvar_core.runtime import resolve_device, resolve_dtype

        self.checkpoint, self.tokenizer, self.attention = checkpoint, tokenizer, attention
        self.device = resolve_device(device)
        self.dtype = resolve_dtype(dtype, self.device)
        self._options: dict[str, Any] = {"device": device, "dtype": dtype, "attention": attention, "compile": compiled}
        self._pipeline: Pipeline | None = None

    def early_config(self) -> ModelConfig:
        """The configuration, and what can be found wrong before gigabytes of weights are read."""
        from mvar_core.kernels import check_backend
        from mvar_core.models.directory import read_model_config

        # A published file tells its configuration by its tensors alone.
        config = self.load().config if self.checkpoint.is_file() else read_model_config(self.checkpoint)
        check_backend(self.attention, config.patterns, self.device, self.dtype)
        return config

    def load(self) -> Pipeline:
        """The pipeline."""
        from mvar_core.pipeline import Pipeline

        if self._pipeline is None:
            self._pipeline = Pipeline.from_pretrained(self.checkpoint, tokenizer=self.tokenizer, **self._options)
        return self._pipeline

    def fingerprint(self) -> str:
        """What tells these weights from others.

        Raises:
            CheckpointError: A file is missing.
        """
        from mvar_core.errors import CheckpointError
        from mvar_core.io.files import fingerprint
        from mvar_core.models import directory, official

        if self.checkpoint.is_file():
            return fingerprint([self.checkpoint, self.tokenizer or official.tokenizer_next_to(self.checkpoint)])
        files = [
            self.checkpoint / name
            for name in (directory.CONFIG_FILE, directory.TRANSFORMER_FILE, directory.TOKENIZER_FILE)
        ]
        for file in files:
            if not file.is_file():
                raise CheckpointError(
                    f"{self.checkpoint} holds no {file.name}.", "Give a model that `mvar train` made."
                )
        return fingerprint(files)


class Wanted(NamedTuple):
    """What to draw, as the user typed it."""

    classes: list[str]
    num: int
    given: dict[str, Any]
    seed: int
    output_format: str
    save_tokens: bool
    stages: bool
    attention: str
    words: Sequence[str] = ()
    vectors: Path | None = None

    def chosen(self, config: ModelConfig) -> Chosen:
        """What to draw by: classes, each once, or words, or vectors; nothing where none was named.

        Raises:
            MvarError: Not what the model is conditioned on.
        """
        return chosen(config, self.classes, self.words, self.vectors)

    def settings(self, config: ModelConfig) -> SamplingConfig:
        """The model's recommended settings with those typed laid over them."""
        from mvar_core.sampling.sampler import resolve_settings

        return resolve_settings(config, **self.given)

    def request(self, config: ModelConfig, model: NamedModel) -> Request:
        """Everything that the output depends on.

        Raises:
            CheckpointError: The model holds a tokenizer alone.
        """
        from mvar_cli.parts import Request
        from mvar_core import __version__
        from mvar_core.errors import CheckpointError

        if config.transformer is None:
            raise CheckpointError(
                f"{config.name} is a tokenizer without a transformer.", "Train one with `mvar train`."
            )
        settings = self.settings(config)
        picked = self.chosen(config)
        labels, names, vectors = picked.labels, picked.names, picked.vectors
        return Request(
            model=config.name,
            weights=model.fingerprint(),
            classes=labels,
            num=self.num,
            settings={**settings.model_dump(), "seed": self.seed},
            output=self.output_format,
            save_tokens=self.save_tokens,
            stages=self.stages,
            image_shape=config.image_shape,
            scales=config.pyramid.num_scales,
            tokens=config.pyramid.num_tokens,
            device=model.device.type,
            dtype=str(model.dtype).removeprefix("torch."),
            attention=self.attention,
            version=__version__,
            names=names,
            vectors=vectors,
        )
