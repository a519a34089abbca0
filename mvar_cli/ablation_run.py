"""From a request to tables: tokenizer, tokens, rows, costs, report; what is there already is not made again."""

from __future__ import annotations

import shlex
import shutil
import sys
import time
from typing import Any

from mvar_cli import old_options as options
from mvar_cli.ablation import Experiment
from mvar_cli.ablation_judge import Judge
from mvar_cli.ablation_report import JSON_FILE, MARKDOWN_FILE, PICTURES, Report
from mvar_cli.ablation_request import (
    EXPERIMENT,
    HELD_OUT,
    HELD_OUT_TOKENS,
    SCORING,
    TOKENIZER,
    TOKENS,
    AblationRequest,
    difference,
)
from mvar_cli.old_console import Console, format_seconds
from mvar_cli.tokenization import tokenize_run
from mvar_cli.training import fit_to_tokens, held_out, train_tokenizer_run
from mvar_core.analysis.ablation import settings_of
from mvar_core.config import RunConfig
from mvar_core.config.training import DataConfig
from mvar_core.data.images import open_images, split_name
from mvar_core.data.tokens import TokenCache, split_off
from mvar_core.errors import CheckpointError
from mvar_core.evaluation.demo import CLASSIFIER_FILE as CLASSIFIER
from mvar_core.io.files import read_json, write_json
from mvar_core.kernels import check_backend
from mvar_core.models.directory import read_model_config
from mvar_core.runtime import describe_machine, resolve_device, resolve_dtype
from mvar_core.training.curriculum import scales_alone
from mvar_core.training.order import planned_steps

_OWN = (
    EXPERIMENT, SCORING, TOKENIZER, TOKENS, HELD_OUT_TOKENS, CLASSIFIER, JSON_FILE, MARKDOWN_FILE, *PICTURES, "rows",
    "costs",
)  # fmt: skip
"""What an experiment's directory holds, and `--overwrite` removes."""


def execute(console: Console, request: AblationRequest) -> None:
    """Do what is asked for and not done yet, and report.

    Raises:
        MvarError: Something that the user named cannot be used.
    """
    start = time.monotonic()
    request.require()
    device = resolve_device(request.device)
    settings = settings_of(request.ablations)
    for setting in settings:
        patterns = setting.apply(request.config, 0).patterns
        check_backend(request.attention, patterns, device, resolve_dtype(request.dtype, device), needs_grad=True)
    record = request.record()
    request.out.mkdir(parents=True, exist_ok=True)
    if request.overwrite:
        _clear(request)
    write_json(request.out / EXPERIMENT, record)
    experiment = _prepare(console, request)
    steps = planned_steps(experiment.config.train, len(experiment.tokens))
    rows = request.rows
    if experiment.train(rows, steps):
        raise options.interrupted(console)
    costs = experiment.measure(settings, [request.row(setting, request.seeds[0]) for setting in settings])
    facts = {
        "model": experiment.config.name,
        "command": _command(),
        "steps": steps,
        "batch_size": experiment.config.train.batch_size,
        "data": experiment.tokens.manifest.source,
        "images": experiment.tokens.num_images,
        "held_out": len(experiment.validation),
        "num_samples": request.scoring.num * len(experiment.tokens.class_names),
        **experiment.judge.identity(),
        "machine": describe_machine(),
    }
    report = Report.of(experiment.config, request.ablations, rows, costs, facts)
    report.show(console)
    written = report.write(request.out)
    seconds = time.monotonic() - start
    console.say(f"Written: {', '.join(written.values())}; {format_seconds(seconds)}.")
    console.finish({**report.to_dict(), "outputs": written, "seconds": seconds})


def _prepare(console: Console, request: AblationRequest) -> Experiment:
    """Tokenizer, tokens and judge: named, there already, or made now."""
    config, out = request.config, request.out
    machine: dict[str, Any] = {"device": request.device}
    checkpoint = request.checkpoint
    if checkpoint is None:
        assert request.data is not None
        checkpoint = out / TOKENIZER
        if not (checkpoint / "config.json").is_file():
            console.note("tokenizer …")
            trained = train_tokenizer_run(
                console, config, request.data, checkpoint, resume=True, dtype=request.dtype, **machine
            )
            if trained.interrupted:
                raise options.interrupted(console)
    tokenizer = read_model_config(checkpoint)
    cache = request.tokens
    if cache is None:
        assert request.data is not None
        cache = out / TOKENS
        fitted = fit_to_tokens(config, tokenizer, open_images(request.data).class_names)
        given: dict[str, Any] = {"seed": config.seed, "dtype": "auto", **machine}
        tokenize_run(console, checkpoint, fitted, request.data, cache, views=config.data, **given)
        if request.validation is None and held_out(request.data) is not None:
            test = f"{split_name(request.data)[0]}:test"
            tokenize_run(console, checkpoint, fitted, test, out / HELD_OUT_TOKENS, views=DataConfig(), **given)
    tokens: TokenCache = TokenCache.open(cache)
    if request.validation is not None:
        validation: TokenCache = TokenCache.open(request.validation)
    elif (out / HELD_OUT_TOKENS).is_dir():
        validation = TokenCache.open(out / HELD_OUT_TOKENS)
    else:
        tokens, validation = split_off(tokens, HELD_OUT, config.seed)
        console.note(f"Held out: {validation.num_images:,} of {tokens.num_images + validation.num_images:,} images.")
    fitted = _same_turns(fit_to_tokens(config, tokenizer, tokens.class_names))
    return Experiment(
        console=console,
        config=fitted,
        tokens=tokens,
        validation=validation,
        checkpoint=checkpoint,
        out=out,
        judge=_judge(console, request, fitted, tokens),
        num=request.scoring.num,
        bench_batch=request.bench_batch,
        device=request.device,
        dtype=request.dtype,
        attention=request.attention,
    )


def _same_turns(config: RunConfig) -> RunConfig:
    """The run with the interleaved curriculum's turns written down, which would otherwise follow each row's windows."""
    train = config.train
    if train.curriculum != "interleaved" or train.scales_alone is not None:
        return config
    alone = min(scales_alone(config.patterns), config.pyramid.num_scales - 1)
    return config.model_copy(update={"train": train.model_copy(update={"scales_alone": alone})})


def _judge(console: Console, request: AblationRequest, config: RunConfig, tokens: TokenCache) -> Judge:
    """What scores the samples; refused where the rows that are there were scored by something else."""
    reference = request.data or tokens.manifest.source
    nearby = [request.checkpoint, request.checkpoint.parent] if request.checkpoint is not None else []
    judge = Judge.open(
        console, request.scoring, reference, config.image_shape, request.device, out=request.out, nearby=nearby
    )
    path, identity = request.out / SCORING, judge.identity()
    if path.is_file() and (found := difference(path, read_json(path), identity)):
        raise CheckpointError(found, "Use what the rows were scored with, choose another --out, or add --overwrite.")
    write_json(path, identity)
    if judge.why_not is not None:
        console.note(f"No FID: {judge.why_not}")
    return judge


def _clear(request: AblationRequest) -> None:
    for name in _OWN:
        path = request.out / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _command() -> str:
    """What was typed."""
    return shlex.join(["mvar", *sys.argv[1:]]) if sys.argv[1:2] == ["ablate"] else "mvar ablate"
