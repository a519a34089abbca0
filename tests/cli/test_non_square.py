"""The commands one after the other on a folder of pictures, for images that are 48 pixels high and 64 wide."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.numpy import load_file

from mvar_core.data.transforms import resize_and_crop
from mvar_core.evaluation.demo import DemoClassifier

SIZES = [1, [2, 3], [3, 4], [6, 8]]
SETTINGS = {
    "description": "for tests",
    "image_size": "48x64",
    "patch_sizes": "1,2x3,3x4,6x8",
    "tokenizer": {
        "codebook_size": 16,
        "latent_channels": 4,
        "base_channels": 8,
        "channel_multipliers": [1, 1, 1, 2],
        "encoder_blocks": 1,
        "decoder_blocks": 1,
        "middle_blocks": 1,
        "norm_groups": 4,
    },
    "transformer": {"depth": 2, "embed_dim": 16, "num_heads": 2, "num_classes": 2},
    "attention": {"scale_prefixes": 1, "windows": [0, 0, 3, 5]},
    "sampling": {"cfg": 1.0, "top_k": 8, "top_p": 0.9},
    "data": {"crop": "random", "flip": True, "crops": 2, "augmented_views": 1},
    "train": {"batch_size": 4, "steps": 3, "epochs": None, "checkpoint_every": 2, "log_every": 1},
    "train_tokenizer": {
        "batch_size": 4,
        "steps": 2,
        "checkpoint_every": 2,
        "kmeans_batches": 1,
        "adversarial": {"weight": 0.1, "channels": 4, "layers": 2, "lecam": 0.1},
    },
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """High, wide and square pictures, larger and smaller than what is trained on, of two classes."""
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for name, base in (("dark", 40), ("light", 200)):
        (folder / name).mkdir()
        for number, (height, width) in enumerate([(60, 90), (90, 60), (64, 64), (30, 100)]):
            coarse = random.normal(base, 40, (4, 4, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(
                folder / name / f"{number}.png"
            )
    return folder


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("wide") / "wide.yaml"
    path.write_text(yaml.safe_dump(SETTINGS))
    return path


@pytest.fixture
def run(mvar, tmp_path):
    """A command's JSON, or with `out` that of one that writes there."""

    def run(*arguments):
        return mvar(*arguments, "--json").json

    return run


def read(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def test_the_whole_path(mvar, run, wide, pictures, tmp_path):
    tokenizer, tokens, model, var = (tmp_path / name for name in ("tokenizer", "tokens", "model", "var"))
    trained = run("train-tokenizer", "--preset", wide, "--data", pictures, "--out", tokenizer)
    assert len(trained["usage_per_scale"]) == 4

    cached = run("tokenize", "--preset", wide, "--checkpoint", tokenizer, "--data", pictures, "--out", tokens)
    assert (cached["images"], cached["views"]) == (8, 5)  # centre and crop, both mirrored, and an augmented view
    manifest = json.loads((tokens / "manifest.json").read_text())
    assert (manifest["image_size"], manifest["patch_sizes"]) == ([48, 64], SIZES)
    assert np.load(tokens / manifest["shards"][0]["tokens"]["file"]).shape == (8, 5, 67)

    common = ["--preset", wide, "--checkpoint", tokenizer, "--tokens", tokens]
    assert run("train", *common, "--out", model)["steps"] == 3
    interleaved = ["--set", "train.curriculum=interleaved", "--set", "train.ratio_k=1"]
    run("train", *common, "--out", var, *interleaved, "--set", "attention.scale_prefixes=all")
    assert "48×64" in (model / "README.md").read_text()

    sampling = ["--checkpoint", model, "--class", "all", "--num", 2]
    grid, archive, folder = tmp_path / "grid.png", tmp_path / "all.npz", tmp_path / "folder"
    run("sample", *sampling, "--out", grid, "--stages")
    run("sample", *sampling, "--out", archive, "--save-tokens", "--memory", "500MB")
    run("sample", *sampling, "--out", folder, "--stages", "--save-tokens", "--batch-size", 1)
    arrays = np.load(archive)
    assert arrays["arr_0"].shape == (4, 48, 64, 3)
    assert arrays["tokens"].shape == (4, 67)
    single = sorted(path for path in folder.rglob("*.png") if "stage" not in path.name)
    assert [read(path).shape for path in single][:4] == [(48, 64, 3)] * 4
    assert (read(single[0]) == arrays["arr_0"][0]).all()
    strips = sorted((tmp_path / "folder-stages").glob("*.png"))
    assert len(strips) == 4
    # A row for each image: four stages side by side, and a gap between rows.
    assert read(grid).shape == (4 * 48 + 3 * 2, read(strips[0]).shape[1], 3)
    assert read(strips[0]).shape[0] == 48
    assert 4 * 64 <= read(strips[0]).shape[1] <= 4 * 64 + 3 * 2
    assert (read(strips[0])[:, -64:] == arrays["arr_0"][0]).all()

    edited = tmp_path / "edited.png"
    source = pictures / "light" / "0.png"  # 60 pixels high and 90 wide, so that all of its height is seen
    run(
        "edit",
        "--checkpoint",
        model,
        "--image",
        source,
        "--box",
        "30,15,60,45",
        "--class",
        1,
        "--paste",
        "--out",
        edited,
    )
    found, given = read(edited).astype(int), np.asarray(resize_and_crop(Image.open(source), (48, 64))).astype(int)
    assert found.shape == (48, 64, 3)
    changed = np.abs(found - given).max(axis=2) > 0
    assert changed[14:34, 20:44].any()  # the box, within the picture as it was resized by 0.8 and cut
    assert not changed[:8].any()
    assert not changed[:, :8].any()
    assert not changed[40:].any()
    assert not changed[:, 56:].any()

    report = run("analyze-attention", "--checkpoint", var, "--data", pictures, "--num", 4, "--out", tmp_path / "a")
    assert np.allclose(np.sum(report["scale_mass"], axis=1), 1)
    assert np.shape(report["scale_mass"]) == (4, 4)

    plan = run("plan", "--checkpoint", model, "--batch-size", 2)
    assert [scale["side"] for scale in plan["scales"]] == SIZES
    assert [scale["window"] for scale in plan["scales"]] == [0, 0, 3, 5]
    assert plan["scales"][1]["keys_per_query"] == 6
    text = mvar("plan", "--checkpoint", model).out
    assert "6×8" in text
    assert "[6, 8]" not in text

    classifier = tmp_path / "classifier.safetensors"
    network = DemoClassifier(2, (48, 64))
    network.initialise(torch.Generator().manual_seed(0))
    network.save(classifier)
    demo = ["--features", classifier]
    run("evaluate", "make-reference", "--data", pictures, "--image-size", "48x64", *demo, "--out", tmp_path / "r.npz")
    scores = [
        run("evaluate", *measured, "--reference", reference, *demo, "--metrics", "fid")["fid"]
        for measured in (["--samples", archive], ["--samples", folder], ["--checkpoint", model, "--num-samples", 4])
        for reference in (pictures, tmp_path / "r.npz")
    ]
    assert scores[0] > 0
    assert scores == pytest.approx([scores[0]] * 4 + [scores[-1]] * 2, rel=1e-6)
    measured = run("evaluate", "reconstruction", "--checkpoint", model, "--reference", pictures, *demo)
    assert measured["psnr"] > 0

    # To the published files and back: the pyramid is spelled as the messages spell it.
    run("convert", "--model", model, "--to", "official", "--out", tmp_path / "published")
    files = {path.name.startswith("vae"): path for path in (tmp_path / "published").glob("*.pth")}
    back = ["--model", files[False], "--tokenizer", files[True], "--pyramid", "1,2x3,3x4,6x8", "--windows", "0,0,3,5"]
    run("convert", *back, "--out", tmp_path / "back")
    for name in ("transformer.safetensors", "tokenizer.safetensors"):
        first, second = load_file(model / name), load_file(tmp_path / "back" / name)
        assert all((first[key] == second[key]).all() for key in first), name
    auto = run("convert", *back[:6], "--kind", "mvar", "--windows", "auto:3", "--out", tmp_path / "auto")
    assert auto["configuration"]["attention"]["windows"] == [0, 0, 0, 3]
    assert (
        "trained with 4 scales and 67 tokens"
        in mvar("convert", *back[:4], "--pyramid", "1,3,4x3,6x8", "--out", "x").error
    )


def test_another_size_by_one_option(mvar, run, wide, pictures, model, tmp_path):
    """From a square model of 16 px to a wide one: tokens, fine-tuning and samples of the size that is asked for."""
    tokens, tuned = tmp_path / "tokens", tmp_path / "tuned"
    size = ["--image-size", "16x24"]
    run("tokenize", "--checkpoint", model, "--data", pictures, "--out", tokens, *size)
    manifest = json.loads((tokens / "manifest.json").read_text())
    pyramid = [1, [1, 2], 2, [2, 3], [3, 4], [3, 5], [4, 6]]
    assert (manifest["image_size"], manifest["patch_sizes"]) == ([16, 24], pyramid)
    options = ["--var-checkpoint", model, "--tokens", tokens, "--steps", 1, "--batch-size", 2, "--out", tuned]
    options += ["--classes", "new"]
    assert run("finetune-from-var", *options)["steps"] == 1
    assert json.loads((tuned / "config.json").read_text())["patch_sizes"] == pyramid
    started = {row["name"]: row for row in json.loads((tuned / "started-from.json").read_text())["parameters"]}
    assert started["position_embedding"]["action"] == "interpolated"
    run("sample", "--checkpoint", tuned, "--class", "0", "--out", tmp_path / "one.png", "--format", "grid")
    assert read(tmp_path / "one.png").shape == (16, 24, 3)
    # Tokens of as many places in another arrangement are refused too.
    swapped = ["--set", "patch_sizes=1,2x1,2,3x2,4x3,5x3,6x4", "--set", "image_size=24x16"]
    refused = mvar("finetune-from-var", *options, *swapped, "--overwrite")
    assert refused.code == 1
    assert "made for another pyramid" in refused.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "--preset", "mvar-d16-256", "--image-size", "250x384"], "nearest size is 256x384"),
        (["plan", "--preset", "mvar-d16-256", "--image-size", "wide"], "'wide'"),
        (["plan", "--preset", "mvar-d16-256", "--set", "patch_sizes=1,2x,16"], "'2x' is not a size"),
        (["convert", "--model", "a.pth", "--pyramid", "1,b", "--out", "c"], "--pyramid '1,b': 'b' is not a size"),
        (["bench", "--preset", "digits", "--what", "attention", "--sides", "8x"], "--sides '8x'"),
    ],
)
def test_sizes_that_are_none(mvar, arguments, message):
    assert message in mvar(*arguments).error


def test_plan_for_another_size(run):
    plan = run("plan", "--preset", "mvar-d16-256", "--image-size", "256x384")
    assert plan["tokens"] == 1030
    assert [scale["window"] for scale in plan["scales"]] == [0] * 7 + [7] * 3
    assert run("plan", "--preset", "mvar-d24-256", "--image-size", 512)["attention_gmacs"] == pytest.approx(
        run("plan", "--preset", "mvar-d24-512")["attention_gmacs"]
    )
