"""Published files become a model directory and back; what was published is reproduced by the directory."""

import numpy as np
import pytest
import torch

import mvar_core as mvar
from mvar_core.errors import ConfigError


def test_there_and_back(golden_mvar, tmp_path):
    converted = mvar.convert(
        model=golden_mvar.model,
        tokenizer=str(golden_mvar.tokenizer),
        kind="mvar",
        pyramid=golden_mvar.spec["patch_nums"],
        windows=golden_mvar.options["windows"],
        out=tmp_path / "model",
    )
    assert converted.model == tmp_path / "model"
    weights = torch.load(golden_mvar.model, weights_only=True)
    weights = weights.get("mvar_wo_ddp", weights)
    assert 0 < converted.parameters <= sum(tensor.numel() for tensor in weights.values())
    official = mvar.convert(model=converted.model, to="official", out=tmp_path / "official")
    for path, original in zip(official.outputs, (golden_mvar.tokenizer, golden_mvar.model), strict=True):
        back, before = (torch.load(file, weights_only=True) for file in (path, original))
        back, before = back.get("mvar_wo_ddp", back), before.get("mvar_wo_ddp", before)
        for name, tensor in before.items():
            assert torch.equal(back[name], tensor), name


def test_the_directory_reproduces_the_published_system(golden, tmp_path):
    kind = {"kind": "mvar", "windows": str(golden.spec["k"])} if golden.is_mvar else {"kind": "var"}
    sides = ",".join(map(str, golden.spec["patch_nums"]))
    mvar.convert(model=golden.model, tokenizer=golden.tokenizer, pyramid=sides, out=tmp_path / "model", **kind)
    pipe = mvar.Pipeline.from_pretrained(tmp_path / "model", device="cpu", dtype="float32")
    labels = golden.tensors["labels"].tolist()
    # MVAR's published code takes exactly cfg 1.0 for no guidance, which is cfg 0 here.
    for published, cfg in {"1.5": 1.5, "1.0": 0}.items() if golden.is_mvar else {"1.5": 1.5}.items():
        images = pipe.sample(labels=labels, cfg=cfg, top_k=1, seed=0).images
        expected = (golden.tensors[f"greedy_image_cfg{published}"] * 255).astype(np.uint8).transpose(0, 2, 3, 1)
        assert np.abs(np.asarray(images).astype(int) - expected.astype(int)).max() <= 1


def test_a_dry_run_writes_nothing(golden_mvar, tmp_path):
    result = mvar.convert(
        model=golden_mvar.model,
        tokenizer=golden_mvar.tokenizer,
        pyramid=golden_mvar.spec["patch_nums"],
        out=tmp_path / "model",
        dry_run=True,
    )
    assert result.to_dict()["parameters"] > 0
    assert result.dry_run
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    "values",
    [
        {"to": "somewhere", "model": "a.pth"},
        {"kind": "xar", "model": "a.pth"},
        {"dtype": "int8", "model": "a.pth"},
        {},
        {"to": "official", "tokenizer": "vae.pth"},
        {"to": "official", "model": "m", "windows": 7},
        {"model": "a.pth", "pyramid": "1,b"},
    ],
)
def test_values_that_are_not_known(values, tmp_path):
    with pytest.raises(ConfigError):
        mvar.convert(out=tmp_path / "out", **values)


@pytest.mark.parametrize("values", [{"windows": "x"}, {"windows": "3,"}, {"scale_prefixes": "x"}, {"windows": "4"}])
def test_attention_that_cannot_be(values, golden_mvar, tmp_path):
    files = {"model": golden_mvar.model, "tokenizer": golden_mvar.tokenizer}
    with pytest.raises(ConfigError, match=next(iter(values.values())).strip(",")):
        mvar.convert(out=tmp_path / "out", pyramid=golden_mvar.spec["patch_nums"], **files, **values)
    assert not list(tmp_path.iterdir())
