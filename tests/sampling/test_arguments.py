"""Wrong values, weights and memory from Python: refused by name, or overcome."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from mvar_core import Pipeline
from mvar_core.analysis.random_models import random_tokenizer, random_transformer
from mvar_core.config.presets import load_config
from mvar_core.errors import CheckpointError, ConfigError
from mvar_core.models.meta import meta_device
from mvar_core.models.transformer import Transformer
from mvar_core.models.vqvae import VQVAE

LABELS = [1, 2, 3, 4, 5, 6, 7]


@pytest.fixture
def pipeline() -> Pipeline:
    config = load_config("digits").model
    return Pipeline(config, random_tokenizer(config), random_transformer(config))


def test_wrong_arguments_are_refused_by_name_and_others_are_understood() -> None:
    program = Path(__file__).with_name("wrong_arguments.py")
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:-1] == []
    assert int(lines[-1].split()[1]) > 250


@pytest.mark.parametrize("part", ["head", "block", "codebook", "decoder"])
def test_weights_that_are_not_finite_are_refused(pipeline: Pipeline, part: str) -> None:
    modules = {
        "head": pipeline.transformer.head,
        "block": pipeline.transformer.blocks[1],
        "codebook": pipeline.quantizer,
        "decoder": pipeline.tokenizer.decoder,
    }
    with torch.no_grad():
        for value in (*modules[part].parameters(), *modules[part].buffers()):
            if value.is_floating_point():
                value[..., -1] = torch.nan
    with pytest.raises(CheckpointError, match="decoder" if part == "decoder" else "At scale [0-3] "):
        pipeline.sample(LABELS, cfg=1.0)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(),
                                   RuntimeError("DefaultCPUAllocator: not enough memory: you tried")])  # fmt: skip
@pytest.mark.parametrize("place", ["transformer", "decoder"])
def test_out_of_memory_leads_to_smaller_batches_and_the_same_samples(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, error: Exception, place: str
) -> None:
    whole = pipeline.sample(LABELS, seed=3, stages=True)
    seen: list[tuple[int, int]] = []
    module, name = (
        (pipeline.transformer, "hidden_states") if place == "transformer" else (pipeline._tokenizer, "decode_features")
    )
    original, calls = getattr(module, name), []

    def scarce(*arguments: object, **options: object) -> torch.Tensor:
        rows = arguments[1 if place == "transformer" else 0]
        assert isinstance(rows, torch.Tensor)
        calls.append(len(rows))
        if (place == "transformer" and len(rows) > 2) or len(calls) == 1:
            raise error
        return original(*arguments, **options)

    monkeypatch.setattr(module, name, scarce)
    again = pipeline.sample(LABELS, seed=3, stages=True, progress=lambda done, total: seen.append((done, total)))
    assert torch.equal(again.tokens, whole.tokens)
    assert torch.equal(again.images, whole.images)
    assert again.stages is not None
    assert whole.stages is not None
    assert torch.equal(again.stages, whole.stages)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert seen[-1] == (7, 7)


def test_other_errors_and_too_little_memory_for_one_image_are_reported(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(message: str) -> None:
        def never(*arguments: object, **options: object) -> torch.Tensor:
            raise RuntimeError(message)

        monkeypatch.setattr(pipeline.transformer, "hidden_states", never)

    fails("not enough memory")
    with pytest.raises(ConfigError, match="one image"):
        pipeline.sample(LABELS)
    fails("something else")
    with pytest.raises(RuntimeError, match="something else"):
        pipeline.sample(LABELS)


def test_threads_that_share_a_pipeline_get_the_same_samples(pipeline: Pipeline) -> None:
    expected = [pipeline.sample(LABELS, seed=seed, cfg=1.5, top_k=20) for seed in range(4)]
    found: dict[int, torch.Tensor] = {}

    def sample(seed: int) -> None:
        for _ in range(3):
            found[seed] = pipeline.sample(LABELS, seed=seed, cfg=1.5, top_k=20, batch_size=1 + seed).images

    threads = [threading.Thread(target=sample, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[seed], expected[seed].images) for seed in range(4))


def test_a_model_without_weights_is_refused() -> None:
    config = load_config("digits").model
    with meta_device():
        tokenizer, transformer = VQVAE(config.tokenizer, config.pyramid), Transformer(config)
    with pytest.raises(CheckpointError, match="meta"):
        Pipeline(config, tokenizer, transformer)
