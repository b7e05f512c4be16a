import pytest

from dlpkit.patterns import Pattern


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.6", Pattern(0.6)),
        (0.6, Pattern(0.6)),
        ("0", Pattern(0.0)),
        ("0.6@256", Pattern(0.6, block=256)),
        ("2:4", Pattern(0.5, n=2, m=4)),
        ("1:4", Pattern(0.75, n=1, m=4)),
        ("4:4", Pattern(0.0, n=4, m=4)),
        ("6:32", Pattern(0.8125, n=6, m=32)),
    ],
)
def test_parse_and_print_round_trip(text, expected):
    assert Pattern.parse(text) == expected
    assert Pattern.parse(str(expected)) == expected


@pytest.mark.parametrize(
    "text", ["1.5", "1", "-0.1", "nan", "4:2", "0:4", "2:0", "0.5@1", "0.5@", "half", "", "2:4:8", "0.5@x", "50%"]
)
def test_nonsense_is_refused(text):
    with pytest.raises(ValueError, match=r"wants"):
        Pattern.parse(text)


def test_at_keeps_the_kind():
    assert Pattern.parse("0.6@256").at(0.25) == Pattern(0.25, block=256)
    assert Pattern.parse("4:8").at(0.25) == Pattern.parse("6:8")


def test_k_must_be_a_multiple_of_m():
    with pytest.raises(ValueError, match=r"layer.x has 66 inputs, not a multiple of 4"):
        Pattern.parse("2:4").check(66, "layer.x")
