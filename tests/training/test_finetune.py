from __future__ import annotations

import json

import pytest
import torch

from mvar_core.classes import Classes, imagenet_names
from mvar_core.errors import CheckpointError, ConfigError
from mvar_core.pyramid import ScalePyramid
from mvar_core.training.finetune import (
    check_start,
    describe_reports,
    interpolate_positions,
    load_pretrained,
    match_classes,
    matching_scale,
)


@pytest.fixture
def transformers(make_config, make_models):
    """A VAR and, with settings, another model whose weights differ everywhere."""

    def make(*settings: str):
        source_config = make_config("attention.scale_prefixes=all", "attention.windows=[0,0,0]")
        source, _ = make_models(source_config)
        target, _ = make_models(make_config(*settings))
        with torch.no_grad():
            for parameter in source.parameters():
                parameter.add_(1.0)
        return source.state_dict(), source_config.pyramid, target

    return make


def test_weights_of_var_start_an_mvar_with_its_own_pattern(transformers, make_config):
    weights, pyramid, target = transformers()
    reports = load_pretrained(target, weights, pyramid)
    assert {report.action for report in reports} == {"loaded"}
    assert [report.name for report in reports] == list(target.state_dict())
    for name, value in target.state_dict().items():
        assert value.equal(weights[name])
    assert target.patterns == make_config().patterns


def test_another_number_of_classes_keeps_only_no_class(transformers):
    weights, pyramid, target = transformers("transformer.num_classes=5")
    before = target.class_embedding.weight.detach().clone()
    reports = {report.name: report for report in load_pretrained(target, weights, pyramid)}
    assert reports["class_embedding.weight"].action == "initialised"
    table = target.class_embedding.weight
    assert table[:5].equal(before[:5])
    assert table[5].equal(weights["class_embedding.weight"][3])


def test_another_pyramid_interpolates_positions(transformers):
    weights, pyramid, target = transformers("patch_sizes=[1,2,3,4]", "attention.windows=[0,0,0,3]")
    reports = {report.name: report for report in load_pretrained(target, weights, pyramid)}
    assert reports["position_embedding"].action == "interpolated"
    assert reports["start_position"].action == "loaded"
    assert reports["scale_embedding.weight"].action == "resized"
    found, expected = target.position_embedding, weights["position_embedding"]
    assert found[:, 0].equal(expected[:, 0])
    assert found[:, -16:].equal(expected[:, -16:])  # the last scale has the same grid
    chosen = [0, 1, 1, 2]
    assert target.scale_embedding.weight.equal(weights["scale_embedding.weight"][chosen])


def test_matching_scales_run_from_first_to_last():
    ten, four = ScalePyramid.from_patch_sizes(range(1, 11)), ScalePyramid.from_patch_sizes([1, 2, 4, 8])
    assert [matching_scale(scale, four, ten) for scale in range(4)] == [0, 3, 6, 9]
    assert [matching_scale(scale, ten, ten) for scale in range(10)] == list(range(10))


def test_interpolated_positions_keep_a_gradient_in_its_place():
    small, large = ScalePyramid.from_patch_sizes([4]), ScalePyramid.from_patch_sizes([(8, 6)])
    rows = torch.arange(4.0).repeat_interleave(4).view(1, 16, 1)
    resized = interpolate_positions(rows, small, large).view(8, 6)
    assert (resized - resized[:, :1]).abs().max() < 1e-5  # nothing leaks across columns
    assert (resized[1:, 0] > resized[:-1, 0]).all()
    assert resized[2:6, 0].tolist() == pytest.approx([0.75, 1.25, 1.75, 2.25], abs=0.1)


def directly_resized(table: torch.Tensor, source: list[tuple[int, int]], target: list[tuple[int, int]], origins):
    """The table scale by scale, by PyTorch's own interpolation of maps that are cut out by hand."""
    parts = []
    for (height, width), origin in zip(target, origins, strict=True):
        start = sum(h * w for h, w in source[:origin])
        h, w = source[origin]
        maps = table[0, start : start + h * w].T.reshape(1, -1, h, w)
        resized = torch.nn.functional.interpolate(maps, size=(height, width), mode="bicubic", align_corners=False)
        parts.append(resized.reshape(table.shape[2], height * width).T)
    return torch.cat(parts).unsqueeze(0)


@pytest.mark.parametrize(
    ("height", "width", "origins"),
    [
        (512, 512, list(range(10))),
        (256, 384, list(range(10))),
        (384, 256, list(range(10))),
        (1024, 1024, [0, 1, 1, 2, 3, 3, 4, 5, 6, 6, 7, 8, 8, 9]),
        (384, 384, [0, 1, 2, 3, 4, 6, 7, 8, 9]),
    ],
)
def test_positions_of_the_256_px_pyramid_start_every_other(height, width, origins):
    source, target = ScalePyramid.for_image(256, 256), ScalePyramid.for_image(height, width)
    table = torch.randn(1, source.num_tokens, 6, generator=torch.Generator().manual_seed(0))
    assert [matching_scale(scale, target, source) for scale in range(target.num_scales)] == origins
    found = interpolate_positions(table, source, target)
    expected = directly_resized(table, list(source), list(target), origins)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    for scale, origin in enumerate(origins):
        if target.grids[scale] == source.grids[origin]:
            assert found[:, target.spans[scale]].equal(table[:, source.spans[origin]])


def test_a_square_model_starts_a_wide_one_of_more_scales(transformers):
    sizes = ["image_size=16x24", "patch_sizes=1,2x3,3x4,4x6", "attention.windows=[0,0,0,3]"]
    weights, pyramid, target = transformers(*sizes)
    reports = {report.name: report for report in load_pretrained(target, weights, pyramid)}
    assert reports["position_embedding"].note == "1 2 4 → 1 2×3 3×4 4×6"
    table = weights["position_embedding"]
    wanted = directly_resized(table, [(1, 1), (2, 2), (4, 4)], [(1, 1), (2, 3), (3, 4), (4, 6)], [0, 1, 1, 2])
    torch.testing.assert_close(target.position_embedding.detach(), wanted, rtol=0, atol=1e-6)
    assert target.scale_embedding.weight.equal(weights["scale_embedding.weight"][[0, 1, 1, 2]])
    changed = {name for name, report in reports.items() if report.action != "loaded"}
    assert changed == {"position_embedding", "scale_embedding.weight"}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("transformer.depth=3", "the file lacks blocks.2.attention.log_head_scale"),
        ("transformer.embed_dim=48", "head.weight is (16, 32), expected (16, 48)"),
        ("transformer.num_heads=4", "blocks.0.attention.log_head_scale is"),
        ("tokenizer.codebook_size=8", "head.weight is (16, 32), expected (8, 32)"),
        ("tokenizer.latent_channels=8", "input_projection.weight is (32, 4), expected (32, 8)"),
        ("transformer.shared_adaln=true", "shared_modulation"),
        ("transformer.l2_attention=false", "the model has no blocks.0.attention.log_head_scale"),
        ("transformer.mlp_ratio=2", "blocks.0.mlp.up.weight is (128, 32), expected (64, 32)"),
    ],
)
def test_sizes_that_do_not_add_up_are_refused_and_nothing_changes(transformers, setting, message):
    weights, pyramid, target = transformers(setting)
    before = {name: value.clone() for name, value in target.state_dict().items()}
    with pytest.raises(CheckpointError) as error:
        load_pretrained(target, weights, pyramid)
    assert message in str(error.value)
    assert all(value.equal(before[name]) for name, value in target.state_dict().items())


def test_missing_and_unknown_parameters_are_named(transformers):
    weights, pyramid, target = transformers()
    del weights["head.bias"]
    weights["attention_mask"] = torch.zeros(1)
    with pytest.raises(CheckpointError, match=r"lacks head\.bias.*the model has no attention_mask"):
        load_pretrained(target, weights, pyramid)


def test_a_pyramid_that_is_not_the_weights_own_is_refused(transformers):
    weights, _, target = transformers()
    with pytest.raises(CheckpointError, match="position_embedding"):
        load_pretrained(target, weights, ScalePyramid.from_patch_sizes([1, 3, 4]))


def rows_of(source, target, choice="auto"):
    """Rows, and what they were matched by."""
    found = match_classes(Classes.of(source, 3, "weights"), Classes.of(target, 5, "data"), choice)
    assert found.counts()["matched"] + found.counts()["new"] == len(found.rows)
    return list(found.rows), found.by


@pytest.mark.parametrize(
    ("source", "target", "choice", "rows", "by"),
    [
        (["cat", "dog", "cow"], ["dog", "owl", "cat"], "auto", [1, None, 0], "name"),
        (["cat", "dog", "cow"], ["dog", "owl", "cat"], "by-number", [0, 1, 2], "number"),
        (["cat", "dog", "cow"], ["dog", "owl", "cat"], "new", [None] * 3, None),
        (["cat", "dog", "cow"], ["dog", "owl", "cat"], "keep", [1, None, 0], "name"),
        (["cat", "dog", "cow"], ["a", "b", "c", "d"], "by-number", [0, 1, 2, None], "number"),
        (["cat", "dog", "cow"], ["holiday"], "auto", [None], None),
        (None, ["dog", "owl", "cat"], "auto", [0, 1, 2], "number"),
        (None, ["dog", "owl"], "auto", [None, None], None),
        (None, ["0", "2"], "auto", [0, 2], "number"),
        (None, None, "auto", [None] * 5, None),
        (imagenet_names(), ["n02099601", "n01440764", "my dog"], "auto", [207, 0, None], "name"),
        (imagenet_names(), ["goldfish", "Tinca_tinca"], "auto", [1, 0], "name"),
    ],
)
def test_classes_start_from_the_row_of_the_same_class(source, target, choice, rows, by):
    assert rows_of(source, target, choice) == (rows, by)


@pytest.mark.parametrize("target", [["a", "b"], ["0", "1", "2"]])
def test_classes_of_which_no_name_agrees_are_refused(target):
    with pytest.raises(ConfigError, match=r"data.*weights.*--classes new.*--classes by-number"):
        rows_of(["cat", "dog", "cow"], target)
    assert rows_of(["cat", "dog", "cow"], target, "new")[1] is None


def test_what_is_reported_of_classes():
    found = match_classes(Classes.of(["cat", "dog", "cow"]), Classes.of(["dog", "owl", "ant", "cat"]))
    assert found.counts() == {"matched": 2, "new": 2, "dropped": 1}
    with pytest.raises(ConfigError, match="by-number"):
        match_classes(Classes.of(["cat"]), Classes.of(["cat"]), "by-numbr")


def test_rows_of_the_class_table_are_copied(transformers):
    weights, pyramid, target = transformers("transformer.num_classes=5")
    source = weights["class_embedding.weight"]
    rows = match_classes(Classes.of(["cat", "dog", "cow"]), Classes.of(["dog", "owl", "cat", "fox", "ant"]))
    reports = load_pretrained(target, weights, pyramid, rows)
    assert next(r for r in reports if r.name == "class_embedding.weight").action == "resized"
    assert target.class_embedding.weight.equal(source[[1, 3, 0, 3, 3, 3]])


def test_classes_start_from_scratch_where_asked_although_their_number_agrees(transformers):
    weights, pyramid, target = transformers()
    before = target.class_embedding.weight.detach().clone()
    load_pretrained(target, weights, pyramid, match_classes(Classes.of(None, 3), Classes.of(None, 3), "new"))
    assert target.class_embedding.weight[:-1].equal(before[:-1])
    assert target.class_embedding.weight[-1].equal(weights["class_embedding.weight"][-1])


def test_the_full_list_names_what_was_ignored(transformers):
    weights, pyramid, target = transformers()
    listed = describe_reports("file.pth", load_pretrained(target, weights, pyramid), ["attn_bias_for_masking"])
    assert listed["counts"] == {"loaded": len(weights), "ignored": 1}
    assert [row["name"] for row in listed["parameters"]] == [*target.state_dict(), "attn_bias_for_masking"]
    json.dumps(listed)


def test_check_start_names_every_size_that_differs(make_config):
    other = make_config("transformer.depth=3", "transformer.shared_adaln=true").model
    with pytest.raises(
        CheckpointError,
        match=r"depth is 3 there and 2 here; transformer\.shared_adaln is True there",
    ):
        check_start(make_config().model, other, "file.pth")
    check_start(
        make_config("attention.windows=[0,0,0]").model,
        make_config("patch_sizes=[1,4]", "attention.windows=[]").model,
        "x",
    )
    with pytest.raises(CheckpointError, match="tokenizer alone"):
        check_start(make_config().model, make_config().model.model_copy(update={"transformer": None}), "x")


VECTOR = ("conditioning.kind=vector", "conditioning.dim=6")


def test_classes_start_a_model_of_vectors(transformers):
    """The projection starts anew and says so; what stands for no class stands for no vector."""
    weights, pyramid, target = transformers(*VECTOR)
    before = {name: value.clone() for name, value in target.state_dict().items()}
    reports = {report.name: report for report in load_pretrained(target, weights, pyramid)}
    assert list(reports) == list(before)
    for name in ("vector_embedding.projection.weight", "vector_embedding.projection.bias"):
        assert reports[name].action == "initialised"
        assert "class_embedding.weight" in reports[name].note
        assert target.state_dict()[name].equal(before[name])
    assert reports["vector_embedding.no_vector"].action == "initialised"
    assert "null condition" in reports["vector_embedding.no_vector"].note
    assert target.conditioner.no_vector.equal(weights["class_embedding.weight"][-1])
    others = [report for name, report in reports.items() if not name.startswith("vector_embedding.")]
    assert {report.action for report in others} == {"loaded"}


def test_vectors_start_a_model_of_classes(make_config, make_models):
    source, _ = make_models(make_config(*VECTOR))
    target, _ = make_models(make_config())
    with torch.no_grad():
        source.conditioner.no_vector.fill_(3.0)
    before = target.class_embedding.weight.detach().clone()
    reports = {r.name: r for r in load_pretrained(target, source.state_dict(), target.pyramid)}
    assert reports["class_embedding.weight"].action == "initialised"
    assert (target.class_embedding.weight[-1] == 3).all()
    assert target.class_embedding.weight[:-1].equal(before[:-1])


def test_vectors_start_vectors_of_the_same_length(make_config, make_models):
    source, _ = make_models(make_config(*VECTOR))
    target, _ = make_models(make_config(*VECTOR))
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(1.0)
    reports = load_pretrained(target, source.state_dict(), target.pyramid)
    assert {report.action for report in reports} == {"loaded"}
    longer, _ = make_models(make_config("conditioning.kind=vector", "conditioning.dim=7"))
    with pytest.raises(CheckpointError, match=r"vector_embedding.projection.weight is \(32, 6\), expected \(32, 7\)"):
        load_pretrained(longer, source.state_dict(), longer.pyramid)
    with pytest.raises(CheckpointError, match=r"conditioning.dim is 6 there and 7 here"):
        check_start(
            make_config("conditioning.kind=vector", "conditioning.dim=7"), make_config(*VECTOR).model, "weights"
        )
