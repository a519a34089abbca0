"""Published .pth files to a model directory, and back."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch

from mvar_core.analysis.cost import cost_of
from mvar_core.config import ModelConfig
from mvar_core.errors import ConfigError, WriteError
from mvar_core.io.files import LOCK_FILE, fingerprint, naming, remove, require_new_directory, write_json
from mvar_core.io.resumable import DirectoryLock, as_json
from mvar_core.models import official
from mvar_core.models.directory import CONFIG_FILE, TOKENIZER_FILE, TRANSFORMER_FILE, read_model_config
from mvar_core.pyramid import read_sizes
from mvar_core.results import DryRun, Result
from mvar_core.runtime import DTYPES
from mvar_core.untrusted import read_json

RECORD_FILE, FOLDER = ".convert.json", ".convert.tmp"

logger = logging.getLogger("mvar")


@dataclass(frozen=True, kw_only=True)
class ConvertResult(Result):
    """What was converted: `model` is the directory that was written or read, `outputs` what was written.

    `kind` is whose attention the model has, var or mvar, and `kind_from` what says so: the `mask` in the file, the name
    of its `weights`, the `file`'s name, the `option`, or `nothing`: then VAR is assumed. It is None for a tokenizer
    alone and for published files that are written. `weights` is the name of those that were read, if they have one, and
    `float32_modules` what is in float32 whatever the dtype. `parameters` are the transformer's, 0 without one;
    `configuration` is as config.json holds it, without class names, and `config` the same as an object.
    """

    model: Path
    outputs: tuple[Path, ...]
    kind: str
    kind_from: str | None = None
    weights: str | None = None
    float32_modules: tuple[str, ...] = ()
    parameters: int
    configuration: Mapping[str, Any]
    config: ModelConfig = field(metadata={"hidden": True})


def convert(
    *,
    out: Path | str,
    model: Path | str | None = None,
    tokenizer: Path | str | None = None,
    weights: str | None = None,
    kind: str | None = None,
    pyramid: str | Sequence[int | tuple[int, int]] | None = None,
    windows: str | int | Sequence[int] | None = None,
    scale_prefixes: str | int | None = None,
    to: str = "directory",
    dtype: str | torch.dtype = "float32",
    verify: bool = True,
    overwrite: bool = False,
    dry_run: bool = False,
) -> ConvertResult:
    """Turn published .pth files into a model directory, or a model directory into such files.

    Sizes are read off the file. Attention masks in it only tell the kind: which token sees which follows from kind,
    windows and scale prefixes.

        convert(model="var_d16.pth", tokenizer="vae.pth", out="var-d16")

    Args:
        out: The directory to write.
        model: A published transformer; with `to="official"` a model directory.
        tokenizer: The published VQVAE; None for the one next to the transformer.
        weights: Which set of weights to read from a file that holds several; None for the average (EMA) of the
            weights where there is one, or else the first.
        kind: var or mvar; None as mask, names of weights and name of the file say.
        pyramid: Sizes of the scales, also as text such as "1,2,3x4"; None for a published pyramid.
        windows: Of each scale, one number for the last two, or auto (auto:K) for those where windows pay.
        scale_prefixes: Scales that a token sees, its own included, or all.
        to: What to write.
        dtype: Of the weights in the directory: float32, bfloat16 or float16. Quantizer and head stay in float32.
        verify: With `to="official"`: compare the directory's weights with the hashes recorded when they were saved.
        overwrite: Replace an `out` that exists; an `out` that this very call has written is left as it is.
        dry_run: Only report what would be written.

    Raises:
        CheckpointError: A file cannot be read or does not fit.
        ConfigError: A value that is not known, or does not fit the file.
    """
    out, dtype = Path(out), str(dtype).removeprefix("torch.")
    for name, value, known in (
        ("to", to, ("directory", "official")),
        ("kind", kind, (None, "var", "mvar")),
        ("dtype", dtype, tuple(DTYPES)),
    ):
        if value not in known:
            raise ConfigError(f"--{name} {value!r} is not known.", f"Use {', '.join(filter(None, known))}.")
    if model is None and (tokenizer is None or to == "official"):
        raise ConfigError("There is nothing to convert.", "Pass --model and --tokenizer, or --tokenizer alone.")
    reading = (pyramid, windows, scale_prefixes, tokenizer, weights)
    if to == "official" and (dtype != "float32" or any(value is not None for value in reading)):
        raise ConfigError(
            "--to official writes a model directory as it is, in float32.", "Pass the directory as --model, and --out."
        )
    try:
        sizes = None if pyramid is None else read_sizes(pyramid)
    except ValueError as error:
        raise ConfigError(f"--pyramid {pyramid!r}: {error}.") from None
    if dry_run or not any((out / name).exists() for name in (RECORD_FILE, FOLDER)):
        require_new_directory(out, overwrite)
    source, published = None if model is None else Path(model), None
    chosen = cast("official.Kind | None", kind)
    if to == "official":
        assert source is not None
        config, result, steps = read_model_config(source), source, [f"write published files to {out}"]
        names = (CONFIG_FILE, TOKENIZER_FILE, TRANSFORMER_FILE)
        sources = [source / name for name in names if (source / name).exists()]
        outputs = tuple(out / name for name in official.published_names(config, chosen))
    else:
        vqvae = official.tokenizer_next_to(Path(model or "")) if tokenizer is None else Path(tokenizer)
        sources = [vqvae] if source is None else [source, vqvae]
        result, outputs, steps = out, (out,), [f"read {source or tokenizer}", f"write {out} in {dtype}"]
        attention: dict[str, Any] = {"patch_sizes": sizes, "windows": windows, "scale_prefixes": scale_prefixes}
        published = official.open_official(source, vqvae, kind=chosen, weights=weights, **attention)
        config = published.config
    if not dry_run:
        record = {"to": to, "dtype": dtype, "sources": fingerprint(sources), "config": config.model_dump(mode="json")}
        if weights is not None:
            record["weights"] = weights
        with _output(out, {**record, "kind": kind}, sources, overwrite) as temporary:
            if temporary is not None and published is None:
                official.export_official(result, temporary, kind=chosen, verify=verify)
            elif temporary is not None and published is not None:
                official.import_official(published, temporary, DTYPES[dtype])
    told: dict[str, Any] = {"kind": kind or official.kind_of(config), "kind_from": None, "weights": None}
    if published is not None:
        told["weights"] = published.weights
        if source is not None:
            told |= {"kind": published.kind, "kind_from": published.kind_from}
    cost = cost_of(config)
    values = config.model_dump(mode="json", exclude_none=True, exclude={"class_names"})
    planned = DryRun(configuration=values, steps=tuple(steps), cost=cost, facts={"parameters": cost.parameters, **told})
    return ConvertResult(
        model=result,
        outputs=outputs if not dry_run or to == "directory" else (),
        **told,
        float32_modules=tuple(name.removesuffix(".") for name in official.FLOAT32_MODULES) if published else (),
        parameters=cost.parameters,
        configuration=values,
        config=config,
        dry_run=planned if dry_run else None,
    )


@contextmanager
def _output(out: Path, record: Mapping[str, Any], sources: Sequence[Path], overwrite: bool) -> Iterator[Path | None]:
    """A folder whose files become those of `out` when the block ends well; None where they are there already.

    Until then `out` holds nothing but that folder (with `overwrite`, what it held before), which the next run removes
    if this one is killed. The record, which comes last, says that the output is whole, and what it was made from.
    """
    # Not Path.resolve, for which a loop of links is an error of a kind of its own.
    if any(Path(os.path.realpath(out)) in Path(os.path.realpath(source)).parents for source in sources):
        raise ConfigError(f"--out {out} holds a file that is converted.", "Choose another --out.")
    with DirectoryLock(out):
        folder, path = out / FOLDER, out / RECORD_FILE
        if path.is_file() and not overwrite and read_json(path) == as_json(record):
            logger.info("%s is finished: nothing is left to do.", out)
            remove(folder)
            yield None
            return
        require_new_directory(out, overwrite or folder.exists())
        remove(folder)
        with naming(out):
            try:
                folder.mkdir(parents=True)
            except OSError as error:
                raise WriteError(out, error.errno or errno.EIO) from None
            try:
                yield folder
                write_json(folder / path.name, record)
            except BaseException:
                remove(folder)
                raise
            for old in out.iterdir():
                if old.name not in (folder.name, LOCK_FILE):
                    remove(old)
            for new in sorted(folder.iterdir(), key=lambda file: file.name == path.name):
                new.rename(out / new.name)
            folder.rmdir()
