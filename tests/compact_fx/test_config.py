"""The configuration: each wrong setting is refused with its name, its value and what is allowed."""

import dataclasses
import math
import re

import pytest
import torch

from compact_fx import CompactConfig, compact_backend
from compact_fx.config import config_from, resolve_rank
from compact_fx.projections import KINDS

RANK = r"a float in \(0, 1\] .* or an int ≥ 1"

WRONG = [
    ("rank", 0, ValueError, RANK),
    ("rank", -1, ValueError, RANK),
    ("rank", 0.0, ValueError, RANK),
    ("rank", -0.5, ValueError, RANK),
    ("rank", 1.5, ValueError, RANK),
    ("rank", math.nan, ValueError, RANK),
    ("rank", math.inf, ValueError, RANK),
    ("rank", True, TypeError, RANK),
    ("rank", "x", TypeError, RANK),
    ("rank", None, TypeError, RANK),
    ("gradients", "sparse", ValueError, "'dense'"),
    ("gradients", None, ValueError, "'dense'"),
    ("projection", "cauchy", ValueError, ", ".join(map(repr, KINDS))),
    ("projection", ["gaussian"], ValueError, "'gaussian'"),
    ("saved", "int4", ValueError, "'keep', 'int8', 'fp8'"),
    ("memory_budget", 1.5, ValueError, "fraction of torch.compile's"),
    ("memory_budget", "half", TypeError, "bytes"),
    ("place", "middle", ValueError, "'auto', 'early', 'late'"),
    ("inner", "eager", ValueError, "'inductor', 'aot_eager'"),
    ("update_interval", 0, ValueError, "≥ 1"),
    ("update_interval", -200, ValueError, "≥ 1"),
    ("update_interval", 2.0, TypeError, "an int"),
    ("update_interval", True, TypeError, "an int"),
    ("update_interval", "40", TypeError, "an int"),
    ("track_every", 0, ValueError, "≥ 1"),
    ("track_every", 8.0, TypeError, "an int"),
    ("follow", 1.5, ValueError, "from 0 to 1"),
    ("follow", math.nan, ValueError, "from 0 to 1"),
    ("follow", True, TypeError, "a number"),
    ("seed", -1, ValueError, "≥ 0"),
    ("seed", "0", TypeError, "an int"),
    ("seed", True, TypeError, "an int"),
    ("min_features", 0, ValueError, "≥ 1"),
    ("min_features", 0.5, TypeError, "an int"),
    ("include", "*.mlp.*", TypeError, "a tuple of name patterns"),
    ("include", None, TypeError, "a tuple of name patterns"),
    ("exclude", "lm_head*", TypeError, "a tuple of name patterns"),
    ("exclude", {"lm_head"}, TypeError, "a tuple of name patterns"),
    ("recompute", 1, TypeError, "a bool"),
    ("sketch_heads", "lm_head", TypeError, "a bool"),
    ("strict", "yes", TypeError, "a bool"),
    ("keep_graphs", 1, TypeError, "a bool"),
    ("mode", 3, TypeError, "a str"),
    ("options", None, TypeError, "a Mapping"),
    ("options", [("shape_padding", True)], TypeError, "a Mapping"),
]


@pytest.mark.parametrize(("name", "value", "error", "allowed"), WRONG)
@pytest.mark.parametrize("make", [CompactConfig, compact_backend])
def test_a_wrong_value_is_refused(make, name, value, error, allowed):
    with pytest.raises(error, match=rf"^{name}={re.escape(repr(value))} must be .*{allowed}"):
        make(**{name: value})


def test_every_field_is_tried_with_a_wrong_value():
    assert {name for name, *_ in WRONG} == {f.name for f in dataclasses.fields(CompactConfig)}


@pytest.mark.parametrize(
    ("value", "error"),
    [(0, ValueError), (1.5, ValueError), (math.nan, ValueError), (True, TypeError)],
)
def test_a_wrong_rank_in_a_mapping_is_refused_with_its_pattern(value, error):
    wrong = rf"^rank\['\*\.fc'\]={re.escape(repr(value))} must be {RANK}"
    with pytest.raises(error, match=wrong):
        CompactConfig(rank={"*.proj": 8, "*.fc": value})


def test_a_rank_pattern_must_be_text():
    with pytest.raises(TypeError, match=r"^rank pattern=3 must be a str"):
        CompactConfig(rank={3: 8})


@pytest.mark.parametrize("name", ["include", "exclude"])
def test_a_name_pattern_must_be_text(name):
    with pytest.raises(TypeError, match=f"^{name} pattern=3 must be a str"):
        CompactConfig(**{name: ("*", 3)})


def test_gradients_are_dense_or_sketched():
    assert CompactConfig().gradients == "sketched"
    assert CompactConfig(gradients="dense").gradients == "dense"
    with pytest.raises(ValueError, match=r"^gradients='small' must be one of 'dense', 'sketched'"):
        CompactConfig(gradients="small")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gradients", ["dense", "sketched"])
def test_a_projection_that_is_asked_for_is_taken(gradients, kind):
    assert CompactConfig(gradients=gradients, projection=kind).kind == kind


def test_without_a_projection_gradients_decide():
    assert CompactConfig().projection is None
    assert CompactConfig().kind == "tracked"
    assert CompactConfig(gradients="sketched", projection=None).kind == "tracked"
    assert CompactConfig(gradients="dense").kind == "countsketch"


@pytest.mark.parametrize(
    ("settings", "interval"),
    [
        ({}, 40),
        ({"gradients": "dense"}, 200),
        ({"projection": "tracked"}, 40),
        ({"gradients": "dense", "projection": "tracked"}, 40),
        *(({"projection": kind}, 200) for kind in KINDS if kind != "tracked"),
    ],
)
def test_without_an_interval_the_kind_decides(settings, interval):
    assert CompactConfig(**settings).interval == interval
    assert CompactConfig(**settings, update_interval=7).interval == 7


@pytest.mark.parametrize("make", [config_from, lambda settings: compact_backend(**settings)])
def test_an_unknown_setting_is_refused_with_the_known_ones(make):
    known = ", ".join(f.name for f in dataclasses.fields(CompactConfig))
    with pytest.raises(TypeError, match=f"^'ranks' is not a setting .*{known}"):
        make({"ranks": 0.25})


def test_an_unknown_mode_is_refused_when_the_backend_is_made():
    with pytest.raises(ValueError, match=r"^mode='fastest' must be one of .*'reduce-overhead'"):
        compact_backend(mode="fastest")


def test_an_unknown_inductor_option_is_refused_when_the_backend_is_made():
    with pytest.raises(ValueError, match=r"^options\['shape_pading'\] is not an option of Induct"):
        compact_backend(options={"shape_pading": True})


def test_the_partitioner_cannot_be_taken():
    with pytest.raises(ValueError, match=r"custom_partitioner_fn.* taken by the compact backend"):
        compact_backend(options={"custom_partitioner_fn": lambda *a, **k: None})


def test_known_modes_and_options_are_accepted():
    backend = compact_backend(mode="reduce-overhead", options={"shape_padding": True})
    assert backend.config.mode == "reduce-overhead"
    assert backend.config.options == {"shape_padding": True}


def test_config_from_gives_what_the_constructor_does():
    settings = {"rank": {"*.fc*": 0.5}, "exclude": ["lm_head*"], "seed": 3}
    assert config_from(settings) == CompactConfig(**settings)
    assert config_from({}) == CompactConfig()
    assert config_from(settings) != CompactConfig()


def test_it_is_frozen():
    config = CompactConfig()
    for field in dataclasses.fields(config):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(config, field.name, getattr(config, field.name))


def test_it_keeps_no_reference_to_what_it_was_given():
    rank, options, include = {"a*": 8}, {"shape_padding": True}, ["a*"]
    config = CompactConfig(rank=rank, options=options, include=include)
    rank["b*"] = 4
    options.clear()
    include.append("b*")
    assert config.rank == {"a*": 8}
    assert config.options == {"shape_padding": True}
    assert config.include == ("a*",)


def test_settings_are_keyword_only():
    with pytest.raises(TypeError, match="positional"):
        CompactConfig(0.25)
    with pytest.raises(TypeError, match="positional"):
        compact_backend(0.25)


def test_positional_settings_are_refused_with_an_example():
    """Also those that torch.compile gives where someone forgot to call the factory."""
    example = r"backend=compact_backend\(rank=0\.25\)"
    with pytest.raises(TypeError, match=example):
        compact_backend(0.25)
    forgotten = torch.compile(torch.nn.Linear(4, 4), backend=compact_backend)
    with pytest.raises(Exception, match=example):  # Dynamo wraps it
        forgotten(torch.zeros(2, 4))


# ---------------------------------------------------------------------------------------------
# Ranks and patterns
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 8, 10_000, 0.001, 0.25, 1.0])
def test_one_rank_is_that_of_every_weight(rank):
    assert CompactConfig(rank=rank).rank_of("layers.0.fc.weight") == rank


def test_the_first_pattern_that_matches_gives_the_rank():
    config = CompactConfig(rank={"layers.0.*": 4, "*.fc.weight": 0.5, "*": 16})
    assert config.rank_of("layers.0.fc.weight") == 4
    assert config.rank_of("layers.1.fc.weight") == 0.5
    assert config.rank_of("layers.1.proj.weight") == 16


def test_a_weight_that_no_pattern_names_has_no_rank():
    config = CompactConfig(rank={"*.fc.weight": 0.5, "proj": 2})
    assert config.rank_of("layers.1.proj.weight") is None
    assert config.rank_of("layers.1.FC.weight") is None
    assert CompactConfig(rank={}).rank_of("layers.1.fc.weight") is None


@pytest.mark.parametrize(
    ("rank", "in_features", "columns"),
    [
        (0.25, 1024, 256),
        (0.25, 123, 31),
        (1.0, 77, 77),
        (1, 77, 1),
        (0.001, 64, 1),
        (100, 64, 100),
    ],
)
def test_a_float_is_a_fraction_and_an_int_a_number_of_columns(rank, in_features, columns):
    assert resolve_rank(rank, in_features) == columns
    assert isinstance(resolve_rank(rank, in_features), int)


def test_patterns_without_a_weight_are_those_a_person_wrote():
    assert CompactConfig().unmatched(()) == []
    config = CompactConfig(rank={"a.*": 8, "b.*": 0.5}, include=("a*", "*"), exclude=("*.head",))
    texts = config.unmatched({"a.weight"})
    assert [text.split("'")[1] for text in texts] == ["b.*", "*.head"]
    assert all("the nearest: a.weight" in text for text in texts)


def test_names_that_hold_the_pattern_are_the_nearest():
    names = {f"layers.{i}.{part}_proj.weight" for i in range(2) for part in ("o", "up", "gate")}
    (text,) = CompactConfig(exclude=("o_proj",)).unmatched(names)
    assert text.endswith("the nearest: layers.0.o_proj.weight, layers.1.o_proj.weight")


@pytest.mark.parametrize("rank", [1, {"*.q": 0.5, "*": 1}])
def test_one_column_is_said_to_be_one(rank):
    with pytest.warns(
        UserWarning, match=r"=1 is one column of each weight; .*=1\.0 is all"
    ) as found:
        CompactConfig(rank=rank)
    assert [warning.filename for warning in found] == [__file__]


def test_one_byte_is_said_to_be_one():
    with pytest.warns(UserWarning, match=r"memory_budget=1 is one byte; .*=1\.0 is all") as found:
        CompactConfig(memory_budget=1)
    assert [warning.filename for warning in found] == [__file__]


@pytest.mark.parametrize("setting", [{"saved": "int8"}, {"saved": "fp8"}, {"recompute": False}])
def test_a_budget_chooses_alone(setting):
    """What it would not keep to is no setting beside it."""
    ((name, value),) = setting.items()
    with pytest.raises(ValueError, match=f"memory_budget=0.5 and {name}={value!r} cannot both be"):
        CompactConfig(memory_budget=0.5, **setting)
    CompactConfig(memory_budget=0.5, saved="keep", recompute=True)
