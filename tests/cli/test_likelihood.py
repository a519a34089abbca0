"""`mvar evaluate likelihood`: a model's own probabilities of held-out images."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from mvar_core import Pipeline
from mvar_core.data.tokens import TokenCache


def evaluate(mvar, model, *options):
    return mvar("evaluate", "likelihood", "--checkpoint", model, "--device", "cpu", *options)


def test_images_and_their_tokens_give_the_same(mvar, model, images, tokens):
    by_tokens = evaluate(mvar, model, "--tokens", tokens, "--json").json
    by_images = evaluate(mvar, model, "--data", images, "--batch-size", 5, "--json").json
    keys = {"num_samples", "bits_per_token", "bits_per_token_by_scale", "bits_per_image", "nll_by_class"}
    assert keys | {"zero_shot_accuracy", "classes_scored"} <= by_tokens.keys()
    for key in keys | {"zero_shot_accuracy"}:
        assert by_images[key] == pytest.approx(by_tokens[key], rel=1e-6), key
    cache = TokenCache.open(tokens)
    found, labels = cache.batch(np.arange(len(cache)))
    scores = Pipeline.from_pretrained(model, device="cpu").log_likelihoods(found, torch.arange(3).expand(12, -1))
    totals = scores.sum(-1)
    assert by_tokens["zero_shot_accuracy"] == pytest.approx((totals.argmax(1) == labels).double().mean().item())
    own = totals[torch.arange(12), labels]
    assert by_tokens["bits_per_image"] == pytest.approx(-own.mean().item() / np.log(2))
    assert by_tokens["nll_by_class"]["dog"] == pytest.approx(-own[labels == 1].mean().item())
    assert (by_tokens["num_samples"], by_tokens["classes_scored"]) == (12, 3)


def test_some_images_and_some_classes(mvar, model, images):
    few = evaluate(mvar, model, "--data", images, "--num-samples", 5, "--json").json
    assert few["num_samples"] == 5
    assert (
        evaluate(mvar, model, "--data", images, "--num-samples", 5, "--json").json["bits_per_image"]
        == (few["bits_per_image"])
    )
    two = evaluate(mvar, model, "--data", images, "--class", "dog,cat", "--json").json
    assert two["samples_by_class"] == {"cat": 4, "dog": 4}
    assert two["classes_scored"] == 2
    plain = evaluate(mvar, model, "--data", images, "--no-zero-shot", "--json").json
    whole = evaluate(mvar, model, "--data", images, "--json").json
    assert plain["zero_shot_accuracy"] is None
    assert plain["nll_by_class"] == pytest.approx(whole["nll_by_class"])
    shown = evaluate(mvar, model, "--data", images).out
    assert "bits per token" in shown
    assert "Zero-shot classification among 3 classes" in shown
    planned = evaluate(mvar, model, "--data", images, "--dry-run", "--json").json
    assert (planned["dry_run"], planned["num_samples"], planned["pairs"]) == (True, 12, 48)


def test_images_without_classes_and_with_others(mvar, model, images, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for number, path in enumerate(sorted(images.rglob("*.png"))):
        (flat / f"{number}.png").write_bytes(path.read_bytes())
    outcome = evaluate(mvar, model, "--data", flat, "--json")
    assert "has no classes" in outcome.err
    whole = evaluate(mvar, model, "--data", images, "--json").json
    assert outcome.json["bits_per_token"] == pytest.approx(whole["bits_per_token_no_class"])
    assert outcome.json["nll_by_class"] is None
    assert "under no class" in evaluate(mvar, model, "--data", flat).out
    # Classes are known by their names: a folder of two of them, in another order.
    for name in ("golden retriever", "dog"):
        folder = tmp_path / "two" / name
        folder.mkdir(parents=True)
        (folder / "0.png").write_bytes((images / name / "0.png").read_bytes())
    both = evaluate(mvar, model, "--data", tmp_path / "two", "--json").json
    assert both["samples_by_class"] == {"dog": 1, "golden retriever": 1}
    (tmp_path / "two" / "wolf").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "two" / "wolf" / "0.png")
    (tmp_path / "two" / "fox").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "two" / "fox" / "0.png")
    error = evaluate(mvar, model, "--data", tmp_path / "two").error
    assert "fox" in error
    assert "golden retriever" in error


def test_classes_are_never_matched_by_a_guess(mvar, model, images, tmp_path):
    """Numbered classes against named ones: refused, unless names or a word for their order are given."""
    expected = evaluate(mvar, model, "--data", images, "--json").json
    for number, name in enumerate(("dog", "golden retriever", "cat")):
        shutil.copytree(images / name, tmp_path / "numbers" / str(number))
    assert "--class-names" in evaluate(mvar, model, "--data", tmp_path / "numbers").error
    named = "dog,golden retriever,cat"
    found = evaluate(mvar, model, "--data", tmp_path / "numbers", "--class-names", named, "--json").json
    assert found["nll_by_class"] == pytest.approx(expected["nll_by_class"])
    assert found["zero_shot_accuracy"] == expected["zero_shot_accuracy"]
    by_number = evaluate(mvar, model, "--data", tmp_path / "numbers", "--class-names", "by-number", "--json").json
    assert by_number["nll_by_class"] != pytest.approx(expected["nll_by_class"])
    assert "2 names" in evaluate(mvar, model, "--data", tmp_path / "numbers", "--class-names", "dog,cat").error
    assert "have names" in evaluate(mvar, model, "--data", images, "--class-names", named).error


def test_contradictions(mvar, model, images, tokens, other_tokenizer, tmp_path):
    assert "--tokens CACHE and --data" in evaluate(mvar, model).error
    assert "--tokens CACHE and --data" in evaluate(mvar, model, "--tokens", tokens, "--data", images).error
    assert "golden retriever" in evaluate(mvar, model, "--data", images, "--class", "golden retreiver").error
    assert "nowhere" in evaluate(mvar, model, "--tokens", tmp_path / "nowhere").error
    assert "without a transformer" in evaluate(mvar, other_tokenizer, "--data", images).error
    moved = mvar("evaluate", "--likelihood", "--checkpoint", model, "--data", images)
    assert (moved.code, moved.out) == (2, "")
    assert "likelihood" in moved.err


@pytest.mark.slow
def test_two_processes_give_the_figures_of_one(model, images, mvar):
    options = ["likelihood", "--checkpoint", str(model), "--data", str(images), "--device", "cpu", "--json"]
    command = [sys.executable, "-m", "mvar_cli", "evaluate", *options, "--nproc", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    two, one = json.loads(done.stdout), mvar("evaluate", *options).json
    assert two.pop("processes") == 2
    for key in two.keys() - {"seconds", "peak_memory_bytes"}:
        assert two[key] == one[key], key
