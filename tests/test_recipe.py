import pytest
import yaml

from dlpkit import recipe


def test_yaml_round_trip(tmp_path):
    made = recipe.make(model="m", sparsity="0.6@256", options={"alpha": 0.1}, eval_windows=3)
    (tmp_path / "recipe.yaml").write_text(made.to_yaml())
    assert recipe.make(**recipe.read(tmp_path / "recipe.yaml")) == made


def test_numbers_are_patterns_too(tmp_path):
    (tmp_path / "r.yaml").write_text("model: m\nsparsity: 0.6\n")
    assert recipe.make(**recipe.read(tmp_path / "r.yaml")).sparsity == "0.6"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sparsity": 1.5}, "sparsity: sparsity is the fraction removed"),
        ({"criterion": "magic"}, "criterion: unknown name 'magic': choose one of magnitude, ria, sparsegpt, wanda"),
        ({"allocation": "magic"}, "allocation: unknown name"),
        ({"nsamples": 0}, "nsamples: .*greater than or equal to 1"),
        ({"seqlen": "long"}, "seqlen: .*integer"),
        ({"dtype": "int4"}, "dtype: unknown name"),
        ({"colour": "red"}, "colour: Extra inputs are not permitted"),
        ({"allocation": "owl", "options": {"alpha": 1}}, "allocation owl does not take alpha: it takes lam, times"),
        ({"sparsity": 2, "seed": "x"}, "sparsity: .*; seed: "),
    ],
)
def test_wrong_values_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        recipe.make(**{"model": "m", **values})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"structure": "magic", "remove": 1}, "choose one of blockpruner"),
        ({"structure": "sleb"}, "how much is to be removed"),
        ({"structure": "sleb", "remove": 1.5}, "a share of all parameters such as 0.2"),
        ({"structure": "sleb", "remove": True}, "remove"),
        ({"structure": "sleb", "remove": 2, "structure_options": {"mode": "attn"}}, "sleb does not take mode"),
        ({"remove": 0.2}, "needs a structure"),
        ({"structure": "nowhere.json"}, "is not a plan"),
        ({"width": "saap", "width_remove": 0.2}, "give it as the structure"),
        ({"structure": "sleb", "remove": 1, "width": "saap"}, "wants a width_remove"),
        (
            {"structure": "sleb", "remove": 1, "width": "saap", "width_remove": 2.0},
            "a share of all parameters such as 0.2",
        ),
        (
            {"structure": "sleb", "remove": 1, "width": "saap", "width_remove": 0.1, "width_options": {"mode": 1}},
            "saap does not take mode",
        ),
        ({"structure": "sleb", "remove": 1, "width_remove": 0.1}, "needs a width"),
    ],
)
def test_wrong_structures_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        recipe.make(**{"model": "m", **values})


def test_a_structure_leaves_weights_alone_unless_asked():
    assert not recipe.make(model="m", structure="sleb", remove=2).prunes_weights
    assert recipe.make(model="m", structure="sleb", remove=0.2, sparsity="2:4").prunes_weights
    assert recipe.make(model="m").sparsity == "0.5"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("criterion: [", "cannot read"),
        ("- a\n- b", "should be a YAML mapping"),
        ("sparsty: 0.5", "unknown keys sparsty: a recipe has model, structure"),
    ],
)
def test_wrong_files(text, message, tmp_path):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        recipe.read(tmp_path / "r.yaml")


def test_wandas_names_set_both_halves():
    assert recipe.split_method({"criterion": "wanda_dlp"}) == {"criterion": "wanda", "allocation": "dlp"}
    assert recipe.split_method({"criterion": "sparsegpt", "seed": 1}) == {"criterion": "sparsegpt", "seed": 1}
    assert recipe.split_method({"seed": 1}) == {"seed": 1}


def test_options_are_name_value_pairs():
    assert recipe.options(["alpha=0.1", "strategy=mean"]) == {"alpha": 0.1, "strategy": "mean"}
    with pytest.raises(ValueError, match="name=value"):
        recipe.options(["alpha"])


def test_the_yaml_is_plain():
    assert yaml.safe_load(recipe.make(model="m").to_yaml())["allocation"] == "dlp"
