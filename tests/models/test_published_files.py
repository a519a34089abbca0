"""Published weights as people have them: behind wrappers, in containers, of no known kind, or no weights."""

import argparse
import json
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_models import GoldenCase
from safetensors.torch import load_file, save_file

import mvar_core as mvar
from mvar_core import Pipeline
from mvar_core.errors import CheckpointError
from mvar_core.models import official

LAYERS = {"attn", "ffn", "ada_lin"}


@pytest.fixture(scope="module")
def weights(golden_mvar: GoldenCase) -> dict[str, torch.Tensor]:
    """The golden MVAR's, bare, with the masks that a VAR's file holds."""
    state = dict(torch.load(golden_mvar.model)["mvar_wo_ddp"])
    scales = torch.cat([torch.full((side * side,), scale) for scale, side in enumerate(golden_mvar.spec["patch_nums"])])
    causal = torch.where(scales[:, None] >= scales[None], 0.0, -torch.inf)
    return {**state, "lvl_1L": scales[None], "attn_bias_for_masking": causal[None, None]}


@pytest.fixture(scope="module")
def vqvae(golden_mvar: GoldenCase) -> dict[str, torch.Tensor]:
    return dict(torch.load(golden_mvar.tokenizer))


@pytest.fixture
def convert(golden_mvar: GoldenCase, tmp_path: Path):
    """Convert a content; the result, and a tensor of the model."""

    def run(content, name: str = "x.pth", tokenizer: Path | None = None, legacy: bool = False, **options):
        path = tmp_path / name
        if name.endswith(".safetensors"):
            save_file(content, path, metadata={"format": "pt", "epoch": "3"})
        elif content is not None:
            torch.save(content, path, _use_new_zipfile_serialization=not legacy)
        result = mvar.convert(
            model=path, tokenizer=tokenizer or golden_mvar.tokenizer, pyramid=golden_mvar.spec["patch_nums"],
            out=tmp_path / "out", overwrite=True, **options,
        )  # fmt: skip
        return result, load_file(tmp_path / "out" / "transformer.safetensors")["input_projection.bias"]

    return run


def prefixed(state, prefix: str):
    return {prefix + name: tensor for name, tensor in state.items()}


def each_block_compiled(state):
    return {
        ".".join([*parts[:2], "_orig_mod", *parts[2:]]) if (parts := name.split("."))[0] == "blocks" else name: tensor
        for name, tensor in state.items()
    }


def each_layer_wrapped(state):
    parts = {name: name.split(".") for name in state}
    return {
        ".".join(part + "._fsdp_wrapped_module._orig_mod" if part in LAYERS else part for part in parts[name]): tensor
        for name, tensor in state.items()
    }


WRAPPED = {
    **{
        prefix: lambda state, prefix=prefix: prefixed(state, prefix)
        for prefix in (
            "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "_fsdp_wrapped_module.",
            "module.module.", "_fsdp_wrapped_module._checkpoint_wrapped_module.", "model.", "module.model.",
            "model.module._orig_mod.",
        )
    },
    "AveragedModel": lambda state: {"n_averaged": torch.tensor(7), **prefixed(state, "module.")},
    "decay": lambda state: {"model_ema": {"decay": torch.tensor(0.9), "num_updates": torch.tensor(7), **state}},
    "blocks": each_block_compiled,
    "blocks of a wrapper": lambda state: prefixed(each_block_compiled(state), "module."),
    "layers": each_layer_wrapped,
    "ordered": lambda state: OrderedDict(state),
    **{
        name: lambda state, name=name: {"epoch": 3, name: state}
        for name in ("state_dict", "model", "model_state_dict", "generator", "ema", "model_ema", "net", "var_wo_ddp")
    },
    "nested": lambda state: {"a": {"b": {"state_dict": prefixed(state, "model.module.")}}, "iter": 3},
    "training": lambda state: {
        "trainer": {"mvar_wo_ddp": state}, "args": argparse.Namespace(lr=1e-4, out=Path("x")),
        "optimizer": {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 1}]},
    },
}  # fmt: skip


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("kind", WRAPPED)
def test_wrappers_and_containers_change_nothing(kind, legacy, golden_mvar, weights, tmp_path):
    torch.save(WRAPPED[kind](weights), tmp_path / "x.pth", _use_new_zipfile_serialization=not legacy)
    found = official.read_official(tmp_path / "x.pth")
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in weights.items())


@pytest.mark.parametrize("kind", ["module.", "blocks", "model.module._orig_mod."])
def test_safetensors_too(kind, weights, convert):
    content = WRAPPED[kind]({name: tensor.clone() for name, tensor in weights.items()})
    result, bias = convert(content, "mvar.safetensors")
    assert torch.equal(bias, weights["word_embed.bias"])
    assert result.kind == "mvar"


def test_a_name_that_is_there_twice_is_refused(weights, tmp_path):
    torch.save({**weights, "module.head.bias": weights["head.bias"] + 1}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"x\.pth.*head\.bias.*twice"):
        official.read_official(tmp_path / "x.pth")


def scaled(state, factor):
    return {name: tensor * factor if tensor.is_floating_point() else tensor for name, tensor in state.items()}


@pytest.mark.parametrize(
    ("content", "name", "factor"),
    [
        (lambda w: {"model": w, "model_ema": scaled(w, 2)}, "model_ema", 2),
        (lambda w: {"ema": scaled(w, 2), "model": w}, "ema", 2),
        (lambda w: {"generator": scaled(w, 3), "generator_2": w}, "generator", 3),
        (lambda w: {"trainer": {"var_wo_ddp": w, "var_ema": scaled(w, 2)}}, "trainer.var_ema", 2),
        (lambda w: {"state_dict": {**prefixed(w, "net."), **prefixed(scaled(w, 2), "ema.")}}, "state_dict.ema", 2),
        (lambda w: {"schema": w}, "schema", 1),
        (lambda w: w, None, 1),
    ],
)
def test_of_several_weights_the_average_is_read_and_named(content, name, factor, weights, convert, caplog):
    caplog.set_level("INFO", logger="mvar")
    result, bias = convert(content(weights), kind="mvar")
    assert result.to_dict()["weights"] == name
    assert torch.equal(bias, weights["word_embed.bias"] * factor)
    assert ("--weights" in caplog.text) == (("ema" in str(name) and name != "schema") or name == "generator")


def test_weights_are_chosen_by_name(weights, convert):
    content = {"trainer": {"var_wo_ddp": weights, "var_ema": scaled(weights, 2)}, "other": scaled(weights, 3)}
    for name, full, factor in (
        ("var_wo_ddp", "trainer.var_wo_ddp", 1),
        ("trainer.var_ema", "trainer.var_ema", 2),
        ("other", "other", 3),
    ):
        result, bias = convert(content, weights=name)
        assert result.weights == full
        assert torch.equal(bias, weights["word_embed.bias"] * factor)
    for name in ("ema", "trainer", "", "nothing"):
        with pytest.raises(CheckpointError, match=r"x\.pth holds trainer\.var_wo_ddp, trainer\.var_ema, other"):
            convert(content, weights=name)


def test_a_training_checkpoint_is_its_own_tokenizer(weights, vqvae, golden_mvar, convert, tmp_path):
    content = {"trainer": {"mvar_wo_ddp": weights, "vae_local": scaled(vqvae, 2)}}
    _, bias = convert(content, tokenizer=tmp_path / "x.pth")
    assert torch.equal(bias, weights["word_embed.bias"])
    codebook = load_file(tmp_path / "out" / "tokenizer.safetensors")["quantizer.codebook"]
    assert torch.equal(codebook, 2 * vqvae["quantize.embedding.weight"])
    assert official.tokenizer_next_to(tmp_path / "x.pth") == tmp_path / "x.pth"


def masked(state, sees: int):
    """The mask of a token that sees so many scales."""
    scales = state["lvl_1L"][0]
    hidden = (scales[None] > scales[:, None]) | (scales[None] <= scales[:, None] - sees)
    return {**state, "attn_bias_for_masking": torch.where(hidden, -torch.inf, 0.0)[None, None]}


@pytest.mark.parametrize(
    ("sees", "wrapper", "name", "expected"),
    [
        (1, None, "x.pth", ("mvar", "mask", 1)),
        (2, None, "x.pth", ("mvar", "mask", 2)),
        (1, "model", "mvar.pth", ("mvar", "mask", 1)),
        (4, "mvar_wo_ddp", "x.pth", ("mvar", "weights", 1)),
        (4, "mvar_ema", "x.pth", ("mvar", "weights", 1)),
        (4, "var_wo_ddp", "x.pth", ("var", "weights", "all")),
        (4, None, "mvar-d16.pth", ("mvar", "file", 1)),
        (4, "model", "MVAR_d16.pth", ("mvar", "file", 1)),
        (4, None, "var_d16.pth", ("var", "file", "all")),
        (4, None, "variant.pth", ("var", "nothing", "all")),
        (4, "model", "x.pth", ("var", "nothing", "all")),
        (None, None, "x.pth", ("var", "nothing", "all")),
    ],
)
def test_the_kind_follows_from_the_file(sees, wrapper, name, expected, weights, golden_mvar, convert, caplog, tmp_path):
    state = {n: t for n, t in weights.items() if sees or n != "attn_bias_for_masking"}
    state = state if sees is None else masked(state, sees)
    result, _ = convert({wrapper: state} if wrapper else state, name)
    values = result.to_dict()
    assert (values["kind"], values["kind_from"], result.config.attention.scale_prefixes) == expected
    assert any(result.config.windows) == (expected[0] == "mvar")
    assert ("--kind mvar" in caplog.text) == (expected[1] == "nothing")
    caplog.clear()
    sides = golden_mvar.spec["patch_nums"]
    read = official.convert(tmp_path / name, golden_mvar.tokenizer, patch_sizes=sides)
    assert read.config.patterns == result.config.patterns


def test_a_bare_mvar_is_an_mvar_wherever_it_is_read(weights, golden_mvar, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(official, "PUBLISHED_PYRAMIDS", {256: tuple(golden_mvar.spec["patch_nums"])})
    (tmp_path / "vae.pth").write_bytes(golden_mvar.tokenizer.read_bytes())
    for name, prefixes in (("mvar.pth", 1), ("x.pth", "all")):
        torch.save(weights, tmp_path / name)
        assert Pipeline.from_pretrained(tmp_path / name).config.attention.scale_prefixes == prefixes
        assert ("--kind mvar" in caplog.text) == (name == "x.pth")


@pytest.mark.parametrize(
    ("sees", "wrapper", "name", "kind"),
    [
        (1, None, "var-d16.pth", None),
        (1, "var_wo_ddp", "x.pth", None),
        (4, "var_wo_ddp", "mvar.pth", None),
        (4, "mvar_wo_ddp", "var.pth", None),
        (1, None, "x.pth", "var"),
        (4, "mvar_wo_ddp", "x.pth", "var"),
    ],
)
def test_what_contradicts_itself_is_refused(sees, wrapper, name, kind, weights, convert):
    state = masked(weights, sees)
    with pytest.raises(CheckpointError, match=rf"{name}.*--kind"):
        convert({wrapper: state} if wrapper else state, name, kind=kind)


def test_an_option_decides_between_names(weights, convert):
    for kind, name in (("mvar", "var.pth"), ("var", "mvar.pth")):
        result, _ = convert({"model": weights}, name, kind=kind)
        assert (result.kind, result.kind_from) == (kind, "option")
    result, _ = convert(masked(weights, 1), "x.pth", kind="var", scale_prefixes="all", windows=0)
    assert result.config.attention.scale_prefixes == "all"


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 1241000000\n"
NOT_WEIGHTS = {
    "pointer": (POINTER.encode(), "Git LFS.*git lfs pull"),
    "page": (b"<!doctype html>\n<html><body>Entry not found</body></html>\n", "web page"),
    "upper case page": (b"\n<HTML><HEAD><TITLE>403</TITLE></HEAD></HTML>", "web page"),
    "xml": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "web page"),
    "empty": (b"", "empty"),
    "json": (b'{"weight_map": {"head.weight": "model-00001.safetensors"}}', "JSON"),
    "json with a brace where safetensors have theirs": (b'{"vars":{}}', "JSON"),
    "json list": (b"[1, 2]", "JSON"),
    "text": (b"Invalid username or password.", "text"),
    "gzip": (b"\x1f\x8b\x08\x00" + bytes(60), "archive.*[Uu]npack"),
    "tar": (b"model.pth" + bytes(248) + b"ustar\0" + bytes(300), "archive.*[Uu]npack"),
    "numpy": (b"\x93NUMPY\x01\x00" + bytes(60), "numpy"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(60), "another kind"),
}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("kind", NOT_WEIGHTS)
def test_a_file_that_is_no_checkpoint_is_called_what_it_is(kind, suffix, golden_mvar, tmp_path):
    content, says = NOT_WEIGHTS[kind]
    path = tmp_path / f"model{suffix}"
    path.write_bytes(content)
    for call in (
        lambda: mvar.convert(model=path, tokenizer=golden_mvar.tokenizer, out=tmp_path / "out"),
        lambda: mvar.convert(model=golden_mvar.model, tokenizer=path, out=tmp_path / "out"),
        lambda: Pipeline.from_pretrained(path, tokenizer=golden_mvar.tokenizer),
    ):
        with pytest.raises(CheckpointError, match=rf"model\{suffix}.*{says}") as refused:
            call()
        assert refused.value.hint
    assert not (tmp_path / "out").exists()


def test_a_file_of_a_model_directory_that_was_not_fetched(mvar_directory, tmp_path):
    for file in mvar_directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "transformer.safetensors").write_bytes(POINTER.encode())
    with pytest.raises(CheckpointError, match=r"transformer\.safetensors.*Git LFS"):
        Pipeline.from_pretrained(tmp_path, verify=False)


def test_archives_that_are_no_checkpoints(weights, convert, tmp_path):
    with zipfile.ZipFile(tmp_path / "x.pth", "w") as archive:
        archive.writestr("var_d16.pth", b"weights")
    with pytest.raises(CheckpointError, match=r"x\.pth is a zip archive.*var_d16\.pth.*unpack"):
        convert(None)
    with (tmp_path / "x.pth").open("wb") as file:
        np.savez(file, a=np.ones(3))
    with pytest.raises(CheckpointError, match=r"x\.pth is a zip archive.*a\.npy"):
        convert(None)
    with zipfile.ZipFile(tmp_path / "x.pth", "w") as archive:
        for name in ("x/data.pkl", "x/code/__torch__.py", "x/constants.pkl"):
            archive.writestr(name, b"")
    with pytest.raises(CheckpointError, match=r"x\.pth is a TorchScript program"):
        convert(None)
    torch.save(weights, tmp_path / "x.pth")
    whole = (tmp_path / "x.pth").read_bytes()
    (tmp_path / "x.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"x\.pth is not a whole torch checkpoint"):
        convert(None)


def test_directories(golden_mvar, mvar_directory, convert, tmp_path):
    (tmp_path / "x.pth").mkdir()
    (tmp_path / "x.pth" / "inner.pth").touch()
    with pytest.raises(CheckpointError, match=r"x\.pth is a directory.*inner\.pth"):
        convert(None)
    with pytest.raises(CheckpointError, match=r"is a directory.*--checkpoint"):
        mvar.convert(model=mvar_directory, tokenizer=golden_mvar.tokenizer, out=tmp_path / "out")


def test_transformer_and_tokenizer_in_each_others_place(golden_mvar, tmp_path):
    with pytest.raises(CheckpointError, match=r"vae\.pth holds a tokenizer.*--tokenizer"):
        mvar.convert(model=golden_mvar.tokenizer, tokenizer=golden_mvar.tokenizer, out=tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"model\.pth holds a transformer.*--model"):
        mvar.convert(model=golden_mvar.model, tokenizer=golden_mvar.model, out=tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"model\.pth holds a transformer"):
        mvar.convert(tokenizer=golden_mvar.model, out=tmp_path / "out")


def test_other_networks_and_our_own_files(golden_mvar, mvar_directory, convert, tmp_path):
    for content in ({"fc.weight": torch.ones(2)}, {"state_dict": {"conv1.weight": torch.ones(2)}}):
        with pytest.raises(CheckpointError, match=r"x\.pth holds the weights of another network.*(fc|conv1)\.weight"):
            convert(content)
    for content in ([torch.ones(2)], {"epoch": 3}, torch.ones(2), {}, None):
        (tmp_path / "x.pth").unlink(missing_ok=True)
        torch.save(content, tmp_path / "x.pth")
        with pytest.raises(CheckpointError, match=r"x\.pth holds no state dict"):
            convert(None)
    own = mvar_directory / "transformer.safetensors"
    for tokenizer in (golden_mvar.tokenizer, None):
        with pytest.raises(CheckpointError, match=rf"--checkpoint {mvar_directory}"):
            mvar.convert(model=own, tokenizer=tokenizer, out=tmp_path / "out")


def test_published_files_where_a_model_directory_is_expected(golden_mvar, tmp_path):
    for path in (golden_mvar.tokenizer, golden_mvar.tokenizer.parent):
        with pytest.raises(CheckpointError, match=rf"{path}.*model directory.*\.pth.*mvar convert"):
            mvar.tokenize(tokenizer=path, data="digits", out=tmp_path / "out")


def test_values_that_are_not_finite_are_named_all(weights, vqvae, mvar_directory, convert, tmp_path):
    bad = {**weights, "head.bias": weights["head.bias"] * torch.nan, "pos_1LC": weights["pos_1LC"].clone()}
    bad["pos_1LC"][0, 1, 2] = torch.inf
    with pytest.raises(CheckpointError, match=r"x\.pth.*pos_1LC \(1 of \d+\).*head\.bias|x\.pth.*head\.bias.*pos_1LC"):
        convert(bad)
    torch.save({**vqvae, "post_quant_conv.bias": vqvae["post_quant_conv.bias"] / 0}, tmp_path / "v.pth")
    with pytest.raises(CheckpointError, match=r"v\.pth.*post_quant_conv\.bias"):
        convert(weights, kind="mvar", tokenizer=tmp_path / "v.pth")
    for file in mvar_directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    state = load_file(tmp_path / "transformer.safetensors")
    for name in ("head.bias", "start_position"):
        state[name].fill_(torch.nan)
    save_file(state, tmp_path / "transformer.safetensors")
    with pytest.raises(
        CheckpointError, match=r"transformer\.safetensors.*(head\.bias.*start_pos|start_pos.*head\.bias)"
    ):
        Pipeline.from_pretrained(tmp_path, verify=False)


@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_tensor_is_converted_or_said_to_stay(stored, dtype, weights, vqvae, convert, tmp_path):
    def cast(state):
        return {name: tensor.to(stored) if tensor.is_floating_point() else tensor for name, tensor in state.items()}

    torch.save(cast(vqvae), tmp_path / "v.pth")
    result, _ = convert(cast(weights), kind="mvar", dtype=dtype, tokenizer=tmp_path / "v.pth")
    assert result.to_dict()["float32_modules"] == ["quantizer", "head", "head_modulation"]
    for part in ("transformer", "tokenizer"):
        for name, tensor in load_file(tmp_path / "out" / f"{part}.safetensors").items():
            stays = name.split(".")[0] in result.float32_modules
            assert tensor.dtype == (torch.float32 if stays else getattr(torch, dtype)), name


def test_values_too_large_for_the_dtype_are_refused(weights, mvar_directory, convert, tmp_path):
    large = {**weights, "word_embed.bias": weights["word_embed.bias"] * 0 + 1e6}
    with pytest.raises(CheckpointError, match=r"word_embed\.bias.*float16"):
        convert(large, kind="mvar", dtype="float16")
    convert(large, kind="mvar", dtype="bfloat16")
    with pytest.raises(mvar.ConfigError, match="float32"):
        mvar.convert(model=mvar_directory, to="official", dtype="float16", out=tmp_path / "official")


def test_nothing_in_a_containers_other_entries_runs(weights, convert, tmp_path):
    class Calls:
        def __reduce__(self):
            return json.loads, ("{}",)

    with pytest.raises(CheckpointError, match=r"x\.pth is refused.*json"):
        convert({"model": weights, "args": Calls()})
