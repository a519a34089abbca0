"""Published files become a model directory and back; what was published is reproduced by the directory."""

import errno

import numpy as np
import pytest
import torch

import mvar_core as mvar
from mvar_core.errors import ConfigError, DataError, WriteError
from mvar_core.io.resumable import DirectoryLock


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


@pytest.fixture(scope="module")
def published(golden_mvar):
    return {"model": golden_mvar.model, "tokenizer": golden_mvar.tokenizer, "pyramid": golden_mvar.spec["patch_nums"]}


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_same_call_again_is_done_and_an_export_has_the_same_bytes(published, tmp_path):
    for out in ("a", "b"):
        mvar.convert(out=tmp_path / out, **published)
        mvar.convert(model=tmp_path / out, to="official", out=tmp_path / f"{out}.pth")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert contents(tmp_path / "a.pth").keys() == {"vae.pth", "mvar_d2.pth", ".convert.json"}
    assert contents(tmp_path / "a.pth") == contents(tmp_path / "b.pth")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    mvar.convert(out=tmp_path / "a", **published)
    again = mvar.convert(model=tmp_path / "a", to="official", out=tmp_path / "a.pth")
    assert all(path.is_file() for path in again.outputs)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == {
        path: time for path, time in before.items() if path.is_file()
    }
    with pytest.raises(DataError, match="not empty"):
        mvar.convert(out=tmp_path / "a", dtype="bfloat16", **published)


def test_what_a_killed_convert_leaves_is_removed_by_the_next(published, tmp_path):
    mvar.convert(out=tmp_path / "whole", **published)
    out = tmp_path / "killed"
    (out / ".convert.tmp").mkdir(parents=True)
    (out / ".convert.tmp" / "tokenizer.safetensors").write_bytes(b"half")
    (out / "transformer.safetensors").write_bytes(b"moved already")
    mvar.convert(out=out, **published)
    assert contents(out) == contents(tmp_path / "whole")
    (out / ".convert.tmp").mkdir()  # killed just before its end
    mvar.convert(out=out, **published)
    assert contents(out) == contents(tmp_path / "whole")


def test_one_writer_at_a_time_and_nothing_stays_of_one_that_fails(published, tmp_path, monkeypatch):
    with DirectoryLock(tmp_path / "out"), pytest.raises(DataError, match="is at work"):
        mvar.convert(out=tmp_path / "out", **published)

    def full(path, *_arguments, **_named):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr("mvar_core.models.official.save_official", full)
    mvar.convert(out=tmp_path / "whole", **published)
    before = contents(tmp_path / "whole")
    with pytest.raises((DataError, OSError), match="[Nn]o space"):
        mvar.convert(model=tmp_path / "whole", to="official", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert contents(tmp_path / "whole") == before


def test_an_output_that_cannot_be_made_is_named(published):
    with pytest.raises(WriteError, match="/proc/nowhere/out"):
        mvar.convert(out="/proc/nowhere/out", **published)


def test_what_is_converted_is_not_overwritten(published, tmp_path):
    mvar.convert(out=tmp_path / "model", **published)
    for out in ("model", "."):
        with pytest.raises(ConfigError, match="--out"):
            mvar.convert(model=tmp_path / "model", to="official", out=tmp_path / out, overwrite=True)
    assert len(contents(tmp_path / "model")) == 5
