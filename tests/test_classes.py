"""Classes by name, whatever their order; a number is a position only where nothing else has that name."""

import pytest

from mvar_core.classes import Classes, imagenet_names, imagenet_table, read_class_names
from mvar_core.errors import ConfigError, DataError

NUMBERED = Classes.of(["0", "1", "10", "2"])
IMAGENET = Classes.of(imagenet_names())


def test_the_table_of_imagenet_has_wnids_in_their_order():
    wnids = [row[0] for row in imagenet_table()]
    assert len(wnids) == 1000 == len(set(imagenet_names()))
    assert wnids == sorted(wnids)
    assert imagenet_table()[207][:2] == ("n02099601", "golden retriever")


@pytest.mark.parametrize(
    ("classes", "asked", "expected"),
    [
        (Classes.of(["cat", "dog"]), "dog,cat", [1, 0]),
        (Classes.of(["cat", "dog"]), "#1", [1]),
        (Classes.of(["cat", "dog"]), "1", [1]),
        (Classes.of(["cat", "dog"]), ["all", "cat"], [0, 1]),
        (Classes.of(["1", "2", "3"]), "1", [0]),
        (Classes.of(["1", "2", "3"]), "#1", [1]),
        (Classes.of(["1", "2", "3"]), [1, "3"], [1, 2]),
        (NUMBERED, "10", [2]),
        (NUMBERED, "#2,2", [2, 3]),
        (Classes.of(["01", "02"]), "2", [1]),
        (Classes.of(["A", "a"]), "a", [1]),
        (Classes.of(["Gr\u00f6\u00dfe", "two words"]), "gro\u0308sse,two_words", [0, 1]),
        (Classes.of(["all", "none"]), "all", [0]),
        (Classes.of(["tench, Tinca tinca", "hen"]), "tench, Tinca tinca", [0]),
        (Classes.of(["tench, Tinca tinca", "hen"]), "Tinca tinca, hen", [0, 1]),
        (Classes.of(None, 5), ["3,#4", "all"], [3, 4, 0, 1, 2]),
        (Classes.of(list("0123")), "3", [3]),
        (Classes.of(["cat", "#0", "dog"]), "#0", [0]),
        (IMAGENET, "n02099601, crane, 5", [207, 517, 5]),
        (IMAGENET, "Tinca tinca", [0]),
        (Classes.of(["n01443537", "n01440764"]), "tench", [1]),
    ],
)
def test_classes_that_a_user_names(classes, asked, expected):
    assert classes.resolve(asked) == expected


@pytest.mark.parametrize(
    ("classes", "asked", "named"),
    [
        (Classes.of(["1", "2", "3"]), "0", "'#0'"),
        (Classes.of(["1", "2", "3"]), "7", "#0 … #2"),
        (Classes.of(["cat", "dog"]), "#2", "#2"),
        (Classes.of(["cat", "dog"]), -1, "-1"),
        (Classes.of(["cat", "dog"]), "dgo", "dog"),
        (Classes.of(["A", "a"]), "a ,\u00c5", "\u00c5"),
        (Classes.of(["Cat", "CAT"]), "cat", "'#0'"),
        (Classes.of(None, 5), "cat", "cat"),
        (Classes.of(None, 5), " , ", "all"),
    ],
)
def test_what_means_no_class_or_several_is_refused(classes, asked, named):
    with pytest.raises(DataError) as error:
        classes.resolve(asked)
    assert named in str(error.value)


@pytest.mark.parametrize(
    ("ours", "theirs", "expected", "by"),
    [
        (["b", "a", "c"], ["a", "b"], (1, 0, None), "name"),
        (["0", "1", "10"], ["10", "0", "2"], (1, None, 0), "name"),
        (["Cat", "cat"], ["cat", "Cat"], (1, 0), "name"),
        (["Cat", "cat"], ["CAT"], (0, 0), "name"),
        (["cat"], ["Cat", "CAT"], (None,), "name"),
        (["n01443537", "n01440764"], ["tench", "goldfish"], (1, 0), "name"),
        (["Tinca tinca", "n01443537"], imagenet_names(), (0, 1), "name"),
        (imagenet_names()[:2], ["n01443537", "n01440764"], (1, 0), "name"),
        (["crane", "tench, Tinca tinca", "crane"], imagenet_names(), (None, 0, None), "name"),
        (["maillot, tank suit", "maillot"], imagenet_names(), (639, 638), "name"),
        (["0", "1", "2"], None, (0, 1, 2), "number"),
        (["0", "1", "2"], ["cat", "dog"], (None, None, None), "name"),
        (["0", "1", "10", "2"], None, (0, 1, 10, 2), "number"),
        (None, ["0", "1", "10", "2", "3", "4", "5", "6", "7", "8", "9"], (0, 1, 3, 4, 5, 6, 7, 8, 9, 10, 2), "number"),
        (["cat", "dog"], None, (0, 1), "order"),
        (["1", "2", "11"], None, (0, 1, 2), "order"),
    ],
)
def test_the_same_classes_in_two_lists(ours, theirs, expected, by):
    one, two = Classes.of(ours, 11), Classes.of(theirs, 11)
    assert one.match(two) == (expected, by)


def test_names_from_a_user(tmp_path):
    text, listed = tmp_path / "names.txt", tmp_path / "names.json"
    text.write_text("tench, Tinca tinca\nhen\n")
    listed.write_text('["a", "b"]')
    assert read_class_names(str(text)) == ("tench, Tinca tinca", "hen")
    assert read_class_names(str(listed)) == ("a", "b")
    assert read_class_names("cat, dog") == read_class_names(["cat", "dog"]) == ("cat", "dog")
    assert read_class_names("imagenet") == imagenet_names()
    assert read_class_names("by-number") is None
    for wrong in ("cat,,dog", [1, 2]):
        with pytest.raises(ConfigError, match="class-names"):
            read_class_names(wrong)
