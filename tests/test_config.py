"""Configuration: what does not fit is refused by name."""

import dataclasses
import json
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Any, Literal

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from hyperlatent.config import from_dict, load_config, to_dict
from hyperlatent.errors import ConfigError
from hyperlatent.settings import Config


@dataclass(frozen=True)
class Inner:
    widths: tuple[int, ...] = (1, 2)
    pair: tuple[int, str] = (1, "a")
    rate: float = 0.5
    mode: Literal["slow", "fast", 3] = "slow"


@dataclass(frozen=True)
class Outer:
    name: str
    inner: Inner = field(default_factory=Inner)
    other: Inner = field(default_factory=Inner)
    table: dict[str, float] = field(default_factory=dict)
    steps: list[int] = field(default_factory=list)
    flag: bool = False
    limit: int | None = None
    place: str | tuple[int, ...] = "here"
    anything: Any = None


def refusal(values, cls=Outer):
    with pytest.raises(ConfigError) as e:
        from_dict(cls, values, source="x.json")
    assert str(e.value).startswith("x.json") and "\n" not in str(e.value) and e.value.remedy
    return str(e.value)


@pytest.mark.parametrize(
    ("values", "name", "meant"),
    [
        ({"inner": {"rat": 1}}, "'inner.rat'", "Did you mean inner.rate?"),
        ({"flga": True}, "'flga'", "Did you mean flag?"),
        ({"rate": 1}, "'rate'", "Did you mean inner.rate or other.rate?"),
        ({"inner": {"flag": True}}, "'inner.flag'", "Did you mean flag?"),
        ({"inner": {"qqqqq": 1}}, "'inner.qqqqq'", "Known here: widths, pair, rate, mode"),
        ({"Name": "x"}, "'Name'", "Did you mean name?"),
        ({"__class__": 1}, "'__class__'", "Known here"),
        ({"": 1}, "''", "Known here"),
    ],
)
def test_an_unknown_name_gets_the_nearest_known(values, name, meant):
    message = refusal({"name": "a", **values})
    assert f"unknown setting {name}" in message and message.endswith(meant) or meant == "Known here" in message


@pytest.mark.parametrize(
    ("values", "where", "expected"),
    [
        ({"flag": 1}, "flag = 1", "bool"),
        ({"limit": True}, "limit = True", "int | None"),
        ({"limit": 1.0}, "limit = 1.0", "int | None"),
        ({"limit": "3"}, "limit = '3'", "int | None"),
        ({"name": None}, "name = None", "str"),
        ({"inner": {"rate": "fast"}}, "inner.rate = 'fast'", "float"),
        ({"inner": {"rate": True}}, "inner.rate = True", "float"),
        ({"inner": {"mode": "medium"}}, "inner.mode = 'medium'", "one of 'slow', 'fast', 3"),
        ({"inner": {"mode": 3.0}}, "inner.mode = 3.0", "one of"),
        ({"inner": {"widths": 3}}, "inner.widths = 3", "tuple[int, ...]"),
        ({"inner": {"widths": [1, "2"]}}, "inner.widths[1] = '2'", "int"),
        ({"inner": {"widths": "12"}}, "inner.widths = '12'", "tuple[int, ...]"),
        ({"inner": {"pair": [1]}}, "inner.pair = [1]", "tuple[int, str]"),
        ({"table": {"a": "b"}}, "table.a = 'b'", "float"),
        ({"steps": [1, None]}, "steps[1] = None", "int"),
        ({"place": ["a"]}, "place = ['a']", "str | tuple[int, ...]"),
        ({"inner": 3}, "inner = 3", "an object"),
        ({"inner": None}, "inner = None", "an object"),
        ({"inner": [1]}, "inner = [1]", "an object"),
    ],
)
def test_a_wrong_type_names_field_value_and_type(values, where, expected):
    message = refusal({"name": "a", **values})
    assert f"has {where}, expected {expected}" in message


def test_a_missing_value_and_a_wrong_whole_are_named():
    assert "name = None, expected a value" in refusal({})
    assert "as a whole = [], expected an object" in refusal([])


def test_what_fits_is_converted():
    values = {
        "name": "a",
        "inner": {"widths": [], "rate": 1, "pair": [2, "b"], "mode": 3},
        "table": {"a": 1},
        "place": [1],
    }
    built = from_dict(Outer, values)
    assert built == Outer("a", Inner((), (2, "b"), 1.0, 3), table={"a": 1.0}, place=(1,))
    assert type(built.inner.rate) is float and type(built.table["a"]) is float
    assert from_dict(Outer, json.loads(json.dumps(to_dict(built)))) == built


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda s: st.lists(s, max_size=3) | st.dictionaries(st.text(max_size=5), s, max_size=3), max_leaves=8)  # fmt: skip
paths = [(f.name,) for f in dataclasses.fields(Config)]
paths += [(s, name) for s, section in to_dict(Config()).items() if isinstance(section, dict) for name in section]


@settings(max_examples=200, deadline=None)
@given(path=st.sampled_from(paths), value=json_values)
def test_any_value_in_any_place_is_taken_as_it_is_or_refused(path, value):
    values = value
    for name in reversed(path):
        values = {name: values}
    try:
        built = to_dict(from_dict(Config, values))
    except ConfigError as e:
        assert path[-1] in str(e)
    else:
        for name in path:
            built = built[name]
        assert built == value or value != value or value == {}


def test_a_file(tmp_path):
    path = tmp_path / "x.json"
    refused = {
        "{": "not valid JSON",
        "[" * 100_000: "not valid JSON",
        "\ud800": "not valid JSON",
        '{"seed": NaN}': "NaN is not a number",
        "[]": "as a whole",
        '{"sed": 1}': "Did you mean seed?",
    }
    for text, problem in refused.items():
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        with pytest.raises(ConfigError, match="x.json") as e:
            load_config(path, Config)
        assert problem in str(e.value)
    with pytest.raises(ConfigError, match="cannot read .*absent.json.*No such file"):
        load_config(tmp_path / "absent.json", Config)
    path.write_text(json.dumps(to_dict(Config())))
    assert load_config(path, Config) == Config()


def test_the_configuration_imports_no_torch():
    code = "import sys, hyperlatent.config, hyperlatent.errors; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
