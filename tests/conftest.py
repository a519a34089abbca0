"""Shape annotations are enforced wherever tests run the tensor rooms; fixtures that several rooms share."""

from pathlib import Path

import pytest
from jaxtyping import install_import_hook

MODELS = Path(__file__).parent.parent / "mvar_core" / "models"
ARITHMETIC = ("footprint", "micro_batches")
"""Modules without tensors, asked thousands of times: the checks would take ten times longer than they do."""
HOOKED = ["mvar_core.kernels", "mvar_core.sampling", "mvar_core.pipeline"]
HOOKED += [f"mvar_core.models.{path.stem}" for path in sorted(MODELS.glob("*.py")) if path.stem not in ARITHMETIC]
_hook = install_import_hook(HOOKED, "typecheck.checked")

import golden_models  # noqa: E402  (the hook must stand before the rooms are imported)
from tiny import classifier, config, images, model, other_tokenizer, preset, tokens  # noqa: E402, F401 (fixtures)

from mvar_core.models.directory import save_model  # noqa: E402
from mvar_core.models.official import convert  # noqa: E402


@pytest.fixture(scope="session", params=golden_models.CASES)
def golden(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> golden_models.GoldenCase:
    """Each golden case, its published files written to a folder."""
    return golden_models.write_case(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="session")
def golden_mvar(tmp_path_factory: pytest.TempPathFactory) -> golden_models.GoldenCase:
    """The golden MVAR."""
    return golden_models.write_case("mvar_small", tmp_path_factory.mktemp("mvar"))


@pytest.fixture(scope="session")
def mvar_directory(golden_mvar: golden_models.GoldenCase, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory: the golden MVAR, converted."""
    path = tmp_path_factory.mktemp("model") / "mvar"
    converted = convert(golden_mvar.model, golden_mvar.tokenizer, **golden_mvar.options)
    save_model(path, converted.config, tokenizer=converted.tokenizer, transformer=converted.transformer)
    return path
