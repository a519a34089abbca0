"""`mvar evaluate`: the same figures whatever the form of the input, and everything that repeats them."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

FIGURES = ("fid", "inception_score", "precision", "recall", "kid")


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    """Blocky pictures of three classes, in the order of their classes: 16 of each."""
    random = np.random.default_rng(5)
    base = random.integers(0, 256, (3, 1, 4, 4, 3))
    noisy = np.clip(base + random.normal(0, 40, (3, 16, 4, 4, 3)), 0, 255).astype(np.uint8)
    return noisy.reshape(48, 4, 4, 3).repeat(4, 1).repeat(4, 2)


@pytest.fixture(scope="module")
def labels() -> np.ndarray:
    return np.arange(3).repeat(16)


@pytest.fixture
def samples(tmp_path: Path, pixels: np.ndarray, labels: np.ndarray) -> Path:
    np.savez(tmp_path / "samples.npz", arr_0=pixels, labels=labels, class_names=["cat", "dog", "golden retriever"])
    return tmp_path / "samples.npz"


@pytest.fixture
def demo(images: Path, classifier: Path) -> list[Any]:
    """A reference of twelve images and the features of a random network."""
    return ["--reference", images, "--features", classifier, "--json"]


def same(found: dict[str, Any], expected: dict[str, Any], names: tuple[str, ...] = FIGURES) -> None:
    for name in names:
        if expected[name] is None:
            assert found[name] is None, name
            continue
        assert found[name] == pytest.approx(expected[name], rel=1e-6, abs=1e-9), name


def test_figures_do_not_depend_on_the_form_of_the_input_or_the_batch_size(mvar, samples, pixels, demo, tmp_path):
    expected = mvar("evaluate", "--samples", samples, *demo).json
    assert expected["fid"] > 0.01
    for number, image in enumerate(pixels):
        (tmp_path / "folder").mkdir(exist_ok=True)
        Image.fromarray(image).save(tmp_path / "folder" / f"{number:03d}.png")
    same(mvar("evaluate", "--samples", tmp_path / "folder", *demo, "--batch-size", 7).json, expected)
    np.savez_compressed(tmp_path / "other.npz", images=pixels)
    same(mvar("evaluate", "--samples", tmp_path / "other.npz", *demo, "--batch-size", 48).json, expected)


def test_figures_do_not_depend_on_the_order_of_the_images(mvar, samples, pixels, demo, tmp_path):
    """Nor do those of random splits and subsets: they follow the images and the seed."""
    expected = mvar("evaluate", "--samples", samples, *demo).json
    np.savez(tmp_path / "shuffled.npz", arr_0=pixels[np.random.default_rng(0).permutation(48)])
    same(mvar("evaluate", "--samples", tmp_path / "shuffled.npz", *demo).json, expected)
    other_seed = mvar("evaluate", "--samples", samples, "--seed", 1, *demo).json
    assert other_seed["inception_score"] != expected["inception_score"]


def test_samples_of_a_checkpoint_or_of_its_file(mvar, model, demo, tmp_path):
    path = tmp_path / "samples.npz"
    options = ["--checkpoint", model, "--seed", 3]
    measured = mvar("evaluate", *options, "--num-samples", 12, "--batch-size", 5, *demo).json
    assert mvar("sample", *options, "--class", "all", "--num", 4, "--out", path).code == 0
    saved = mvar("evaluate", "--samples", path, "--seed", 3, *demo).json
    assert saved["num_samples"] == measured["num_samples"] == 12
    assert measured["sampling"]["seed"] == 3
    assert measured["sampling"]["top_k"] == 8
    assert measured["sampling"]["dtype"] == "float32"
    same(mvar("evaluate", *options, "--num-samples", 12, *demo).json, measured)


def test_the_result_says_all_that_repeats_it(mvar, samples, demo):
    found = mvar("evaluate", "--samples", samples, "--seed", 4, *demo).json
    assert found["versions"].keys() == {"mvar", "torch", "torch-fidelity"}
    assert (found["shuffle_seed"], found["settings"]["seed"]) == (4, 4)
    assert (found["device"], found["dtype"], found["processes"]) == ("cpu", "float32", 1)
    assert found["image_shape"] == [16, 16]
    assert len(found["weights_hash"]) == 64
    assert found["sampling"] is None
    assert found["seconds"] > 0
    assert any("48 samples are fewer than 64 features" in warning for warning in found["warnings"])
    assert any("12 reference images are fewer" in warning for warning in found["warnings"])


def test_the_cache_gives_the_same_figures_without_measuring(mvar, samples, pixels, demo, tmp_path, monkeypatch):
    from mvar_core.evaluation.demo import DemoExtractor

    options = ["--samples", samples, "--cache", tmp_path / "cache", *demo]
    expected = mvar("evaluate", *options).json
    assert len(list((tmp_path / "cache").iterdir())) == 2
    seen: list[int] = []
    measure = DemoExtractor.__call__
    monkeypatch.setattr(
        DemoExtractor, "__call__", lambda self, batch: (seen.append(len(batch)), measure(self, batch))[1]
    )
    outcome = mvar("evaluate", *options)
    same(outcome.json, expected)
    assert "taken from the cache" in outcome.err
    assert not seen
    changed = pixels.copy()
    changed[0, 0, 0, 0] ^= 1
    np.savez(samples, arr_0=changed)
    mvar("evaluate", *options)
    assert sum(seen) == 48


def test_the_cache_is_not_used_where_it_lacks_features(mvar, samples, demo, tmp_path):
    options = ["--samples", samples, "--cache", tmp_path / "cache", *demo]
    few = mvar("evaluate", *options, "--metrics", "fid").json
    assert few["precision"] is None
    assert mvar("evaluate", *options).json["precision"] is not None


def test_samples_of_a_checkpoint_are_not_cached(mvar, model, demo, tmp_path):
    mvar("evaluate", "--checkpoint", model, "--num-samples", 12, "--cache", tmp_path / "cache", *demo)
    assert len(list((tmp_path / "cache").iterdir())) == 1  # the reference


def test_a_reference_that_was_made_before_gives_the_same_figures(mvar, samples, images, classifier, demo, tmp_path):
    expected = mvar("evaluate", "--samples", samples, *demo).json
    network = ["--features", classifier]
    made = tmp_path / "reference.npz"
    written = mvar("evaluate", "make-reference", "--data", images, *network, "--out", made, "--json").json
    assert written["num_reference"] == 12
    found = mvar("evaluate", "--samples", samples, "--reference", made, *network, "--json").json
    same(found, expected)
    assert found["num_reference"] == 12
    content = made.read_bytes()
    again = mvar("evaluate", "make-reference", "--data", images, *network, "--out", made)
    assert again.code == 0
    assert f"{made} is finished" in again.err
    assert made.read_bytes() == content
    other = mvar("evaluate", "make-reference", "--data", samples, *network, "--out", made)
    assert "--overwrite" in other.error
    assert made.read_bytes() == content


def test_a_reference_of_another_network_is_refused(mvar, samples, images, classifier, tmp_path):
    from mvar_core.evaluation.demo import DemoClassifier

    other = tmp_path / "other.safetensors"
    network = DemoClassifier(3, (16, 16))
    network.initialise(torch.Generator().manual_seed(1))
    network.save(other)
    made = tmp_path / "reference.npz"
    options = ["--features"]
    mvar("evaluate", "make-reference", "--data", images, *options, classifier, "--out", made)
    error = mvar("evaluate", "--samples", samples, "--reference", made, *options, other).error
    assert network.weights_hash[:12] in error
    assert DemoClassifier.load(classifier).weights_hash[:12] in error


def test_classes_are_listed_worst_first(mvar, samples, images, demo, pixels, labels, tmp_path):
    scores = mvar("evaluate", "--samples", samples, "--per-class", *demo).json["per_class"]
    assert [row["num_samples"] for row in scores] == [16] * 3
    assert [row["num_reference"] for row in scores] == [4] * 3
    assert {row["name"] for row in scores} == {"cat", "dog", "golden retriever"}
    found = [row["score"] for row in scores]
    assert found == sorted(found, reverse=True)
    np.savez(tmp_path / "nolabels.npz", arr_0=pixels)
    error = mvar("evaluate", "--samples", tmp_path / "nolabels.npz", "--per-class", *demo).error
    assert "--per-class needs the class of every image" in error
    shown = mvar("evaluate", "--samples", samples, "--per-class", *demo[:-1]).out
    assert "Per class" in shown
    assert "over 10 splits, shuffled with seed 0" in shown


def test_classes_are_matched_by_name(mvar, images, demo, tmp_path):
    """A folder that lacks a class numbers the others differently."""
    shutil.copytree(images, tmp_path / "some")
    shutil.rmtree(tmp_path / "some" / "cat")
    scores = mvar("evaluate", "--samples", tmp_path / "some", "--per-class", *demo).json["per_class"]
    by_name = {row["name"]: row for row in scores}
    assert by_name["dog"]["score"] == pytest.approx(0, abs=1e-6)
    assert by_name["cat"]["num_samples"] == 0
    (tmp_path / "some" / "dog").rename(tmp_path / "some" / "dgo")
    assert "dog" in mvar("evaluate", "--samples", tmp_path / "some", "--per-class", *demo).error


def test_samples_know_their_classes_by_name(mvar, samples, demo, pixels, labels, tmp_path):
    """An npz in another order, one without names, and a folder as `mvar sample` writes it."""

    def scores(path: Path, *options: Any) -> dict[str, Any]:
        return {
            row["name"]: row["score"]
            for row in mvar("evaluate", "--samples", path, "--per-class", *demo, *options).json["per_class"]
        }

    expected = scores(samples)
    names = np.array(["golden retriever", "cat", "dog"])
    turned = tmp_path / "turned.npz"
    np.savez(turned, arr_0=pixels, labels=(labels + 1) % 3, class_names=names)
    assert scores(turned) == pytest.approx(expected)
    np.savez(tmp_path / "numbers.npz", arr_0=pixels, labels=(labels + 1) % 3)
    error = mvar("evaluate", "--samples", tmp_path / "numbers.npz", "--per-class", *demo).error
    assert "--class-names" in error
    (tmp_path / "names.txt").write_text("\n".join(names))
    assert scores(tmp_path / "numbers.npz", "--class-names", tmp_path / "names.txt") == pytest.approx(expected)
    assert scores(tmp_path / "numbers.npz", "--class-names", "by-number") != pytest.approx(expected)
    folder = tmp_path / "folder"
    folder.mkdir()
    for number, (image, label) in enumerate(zip(pixels, (labels + 1) % 3, strict=True)):
        Image.fromarray(image).save(folder / f"{number:05d}_{label}.png")
    assert "class of every image" in mvar("evaluate", "--samples", folder, "--per-class", *demo).error
    (folder / "classes.json").write_text(json.dumps(names.tolist()))
    assert scores(folder) == pytest.approx(expected)
    (folder / "classes.json").write_text("[1, 2]")
    assert "classes.json" in mvar("evaluate", "--samples", folder, "--per-class", *demo).error
    np.savez(tmp_path / "bad.npz", arr_0=pixels, labels=labels, class_names=names[:2])
    assert "bad.npz" in mvar("evaluate", "--samples", tmp_path / "bad.npz", "--per-class", *demo).error


def test_a_tokenizer_is_scored_by_its_reconstructions(mvar, model, images, classifier):
    options = ["reconstruction", "--checkpoint", model, "--reference", images]
    network = ["--features", classifier]
    found = mvar("evaluate", *options, *network, "--json").json
    assert found["rfid"] > 0
    assert 0 < found["psnr"] < 40
    assert -1 <= found["ssim"] <= 1
    assert len(found["usage_per_scale"]) == 3
    assert max(found["usage_per_scale"]) <= found["code_usage"] <= 1
    assert found["num_samples"] == found["num_reference"] == 12
    other = mvar("evaluate", *options, *network, "--batch-size", 5, "--json").json
    same(other, found, ("rfid", "psnr", "ssim", "code_usage"))
    assert mvar("evaluate", *options, *network, "--num-samples", 6, "--json").json["num_reference"] == 6
    assert "PSNR" in mvar("evaluate", *options, *network).out


def test_flags_that_contradict_each_other(mvar, images, model, tmp_path):
    options = ["--reference", images, "--features", "demo"]
    moved = mvar("evaluate", "--samples", images, "--reconstruction", *options)
    assert moved.code == 2
    assert "reconstruction" in moved.err
    assert ".npz" in mvar("evaluate", "make-reference", "--data", images, "--out", tmp_path / "a").error
    (tmp_path / "file").touch()
    assert "--cache" in mvar("evaluate", "--samples", images, "--cache", tmp_path / "file", *options).error
    assert "--data" in mvar("evaluate", "make-reference", "--out", tmp_path / "a.npz").err
    assert "dinov2" in mvar("evaluate", "--samples", images, "--reference", images, "--features", "dinov2").error


def test_two_processes_give_the_figures_of_one(mvar, model, demo):
    """Both the samples, which are generated, and the reference, which is read, are shared among the processes."""
    options = ["--checkpoint", model, "--num-samples", 13]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "mvar_cli", "evaluate", *map(str, [*options, *demo])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["processes"] == 2
    assert found["inception_score"] is not None
    same(found, mvar("evaluate", *options, *demo).json)


def test_inputs_that_cannot_be_measured(mvar, images, demo, tmp_path):
    def error(path: Path) -> str:
        return mvar("evaluate", "--samples", path, *demo[:-1]).error

    (tmp_path / "empty").mkdir()
    assert "holds no images" in error(tmp_path / "empty")
    np.savez(tmp_path / "text.npz", words=np.zeros(3))
    assert "holds no images" in error(tmp_path / "text.npz")
    np.savez(tmp_path / "floats.npz", arr_0=np.zeros((4, 16, 16, 3), np.float32))
    assert "float32" in error(tmp_path / "floats.npz")
    folder = tmp_path / "some"
    shutil.copytree(images / "cat", folder)
    content = (folder / "1.png").read_bytes()
    (folder / "1.png").write_bytes(content[: len(content) // 2])
    assert "1.png" in error(folder)
    (folder / "1.png").unlink()
    Image.new("RGB", (8, 16)).save(folder / "9.png")
    assert "several sizes" in error(folder)
    assert "9.png" in error(folder)


def test_few_images_leave_reasons_and_not_faults(mvar, images, demo, tmp_path):
    for count in (2, 3):
        found = mvar("evaluate", "--samples", images, "--num-samples", count, *demo).json
        assert found["precision"] is None
        assert "at least 4" in found["reasons"]["precision"]
        assert found["inception_score"] is None
        assert found["fid"] is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--metrics", "precision", "--num-samples", 3], "There are 3 samples: precision needs 4"),
        (["--metrics", "inception_score", "--num-samples", 5], "inception_score needs 10"),
        (["--kid-subset", 13], "There are 12 reference images: kid needs 13"),
        (["--kid-subset", 100], "There are 48 samples: kid needs 100"),
    ],
)
def test_too_few_images_for_what_is_asked_by_name(mvar, samples, demo, options, message):
    assert message in mvar("evaluate", "--samples", samples, *demo, *options).error


def test_too_few_images_for_some_of_all_metrics_say_why(mvar, samples, demo):
    found = mvar("evaluate", "--samples", samples, *demo, "--num-samples", 3).json
    assert (found["precision"], found["inception_score"]) == (None, None)
    assert "at least 4 images" in found["reasons"]["precision"]
    subset = mvar("evaluate", "--samples", samples, *demo, "--kid-subset", 6).json
    assert subset["settings"]["kid_subset_size"] == 6
