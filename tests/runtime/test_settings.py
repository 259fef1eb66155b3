"""fleet.toml: what a good one becomes, and how each kind of mistake is named."""

import pytest

from edge_runtime.errors import InputError
from edge_runtime.settings import Adapter, Fleet, MethodChoice, Model, Training, load

GOOD = """
[fleet]
name = "home"
rounds = 5
quorum = 2
deadline_s = 90
extensions = 1
seed = 7

[method]
name = "local"

[adapter]
rank = 4
lower = [3, 1]
alpha = 8
roles = ["q", "v"]

[training]
steps = 3
rows_a_step = 2
learning_rate = 5e-4
warmup_steps = 0
weight_decay = 0.01
clip_norm = 0.5
max_tokens = 64
shorter = [32, 8]
slices = "own"
timeout_s = 100
step_deadline_s = 2.5

[[catalog]]
source = "large.gguf"

[[catalog]]
source = "small.gguf"
depth = 10
weights = ["bfloat16"]
"""
SMALLEST = '[fleet]\nname = "home"\n[[catalog]]\nsource = "m"\n'


@pytest.fixture
def read(tmp_path):
    def fleet(text):
        path = tmp_path / "fleet.toml"
        path.write_text(text, encoding="utf-8")
        return load(path)

    return fleet


def test_every_key_is_read(read):
    assert read(GOOD) == Fleet(
        name="home",
        catalog=(Model("large.gguf", None, ("float32", "bfloat16")), Model("small.gguf", 10, ("bfloat16",))),
        rounds=5,
        quorum=2,
        deadline_s=90.0,
        extensions=1,
        seed=7,
        method=MethodChoice("local"),
        adapter=Adapter(4, (3, 1), 8.0, ("q", "v")),
        training=Training(3, 2, 5e-4, 0, 0.01, 0.5, 64, (32, 8), "own", 100.0, 2.5),
    )


def test_a_name_and_a_model_are_enough(read):
    assert read(SMALLEST) == Fleet(name="home", catalog=(Model("m"),))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[fleet]\nquorun = 2", r"\[fleet\] has no key `quorun`; did you mean `quorum`\?"),
        ("[adapter]\nranks = 4", r"\[adapter\] has no key `ranks`; did you mean `rank`\?"),
        (
            "[training]\nlearning-rate = 1e-3",
            r"\[training\] has no key `learning-rate`; did you mean `learning_rate`\?",
        ),
        (
            "[[catalog]]\nsource = 'm'\nweight = ['float32']",
            r"\[\[catalog\]\] has no key `weight`; did you mean `weights`",
        ),
        ("[trainning]\nsteps = 1", "has no key `trainning`; did you mean `training`"),
        (
            "[fleet]\ncatalog = []",
            r"\[fleet\] has no key `catalog`; known keys: deadline_s, extensions, name, ",
        ),
        ("[adapter]\nzzz = 1", r"\[adapter\] has no key `zzz`; known keys: alpha, lower, rank, roles"),
    ],
)
def test_a_wrong_key_is_answered_with_the_nearest_right_one(read, line, message):
    text = SMALLEST.replace("[fleet]\n", line + "\n") if line.startswith("[fleet]") else SMALLEST + line
    with pytest.raises(InputError, match=message):
        read(text)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[fleet]\nrounds = 'three'", "Expected `int`, got `str` - at `$.rounds`"),
        ("[fleet]\nquorum = 1.5", "Expected `int`, got `float` - at `$.quorum`"),
        ("[training]\nlearning_rate = '1e-3'", "Expected `float`, got `str` - at `$.training.learning_rate`"),
        ("[adapter]\nroles = ['query']", "Invalid enum value 'query' - at `$.adapter.roles[0]`"),
        (
            "[[catalog]]\nsource = 'n'\nweights = ['int3']",
            "Invalid enum value 'int3' - at `$.catalog[1].weights[0]`",
        ),
        (
            "[training]\nstep_deadline_s = 'soon'",
            "Expected `float | null`, got `str` - at `$.training.step_deadline_s`",
        ),
        ("[[catalog]]\ndepth = 3", "Object missing required field `source` - at `$.catalog[1]`"),
    ],
)
def test_a_value_of_the_wrong_type_is_named(read, line, message):
    text = SMALLEST.replace("[fleet]\n", line + "\n") if line.startswith("[fleet]") else SMALLEST + line
    with pytest.raises(InputError) as refused:
        read(text)
    assert message in str(refused.value)
    assert "fleet.toml" in str(refused.value)


@pytest.mark.parametrize(
    ("table", "key", "wrong"),
    [
        ("fleet", "rounds", "0"),
        ("fleet", "quorum", "0"),
        ("fleet", "deadline_s", "0"),
        ("fleet", "deadline_s", "inf"),
        ("fleet", "deadline_s", "nan"),
        ("fleet", "extensions", "-1"),
        ("adapter", "rank", "0"),
        ("adapter", "rank", "257"),
        ("adapter", "lower", "[16]"),
        ("adapter", "lower", "[4, 8]"),
        ("adapter", "lower", "[4, 4]"),
        ("adapter", "lower", "[4, 0]"),
        ("adapter", "alpha", "0"),
        ("adapter", "alpha", "inf"),
        ("adapter", "roles", "[]"),
        ("training", "steps", "0"),
        ("training", "rows_a_step", "0"),
        ("training", "learning_rate", "0"),
        ("training", "learning_rate", "1"),
        ("training", "learning_rate", "nan"),
        ("training", "warmup_steps", "-1"),
        ("training", "weight_decay", "-0.1"),
        ("training", "clip_norm", "0"),
        ("training", "clip_norm", "nan"),
        ("training", "max_tokens", "7"),
        ("training", "shorter", "[512]"),
        ("training", "shorter", "[64, 128]"),
        ("training", "shorter", "[64, 64]"),
        ("training", "shorter", "[64, 7]"),
        ("training", "timeout_s", "0"),
        ("training", "step_deadline_s", "0"),
        ("training", "step_deadline_s", "-2"),
        ("training", "step_deadline_s", "inf"),
        ("training", "step_deadline_s", "nan"),
        ("codec", "step", "0"),
        ("codec", "step", "4.1"),
        ("codec", "step", "nan"),
    ],
)
def test_a_value_out_of_range_is_named_with_what_is_needed(read, table, key, wrong):
    line = f"[{table}]\n{key} = {wrong}\n"
    text = SMALLEST.replace("[fleet]\n", line) if table == "fleet" else line + SMALLEST
    with pytest.raises(InputError, match=rf"\[{table}\] {key} is .*, but has to be"):
        read(text)


@pytest.mark.parametrize("name", ["", "a b", "..", "a/b", "a\\u0000", "a\\nb", "x" * 65])
def test_a_name_that_no_topic_can_have_is_refused_in_one_line(read, name):
    with pytest.raises(InputError, match=r"name is .*, but has to be 1-64 characters") as refused:
        read(SMALLEST.replace('name = "home"', f'name = "{name}"'))
    assert len(str(refused.value).splitlines()) == 1


def test_a_path_with_a_nul_character_is_refused(read):
    with pytest.raises(InputError, match=r"source .* has to be text without a NUL"):
        read(SMALLEST.replace('source = "m"', 'source = "m\\u0000"'))
    with pytest.raises(InputError, match=r"file is .* has to be text without a NUL"):
        read(SMALLEST + '[public]\nfile = "a\\u0000"\n')


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "[adapter]\nlower = [8, 16]",
            "[adapter] lower is (8, 16), but has to be ranks that fall, from below rank (16) to 1 or more",
        ),
        (
            "[training]\nmax_tokens = 64\nshorter = [32, 4]",
            "[training] shorter is (32, 4), but has to be lengths that fall, from below max_tokens (64) to 8 or more",
        ),
    ],
)
def test_steps_down_that_do_not_go_down_are_told_from_where(read, line, message):
    with pytest.raises(InputError) as refused:
        read(f"{line}\n{SMALLEST}")
    assert str(refused.value).endswith(message)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("depth = 0", r"\[\[catalog\]\] depth of m is 0, but has to be 1 or more layers"),
        ("weights = []", r"\[\[catalog\]\] weights of m is \(\), but has to be at least one format"),
    ],
)
def test_a_model_that_cannot_be_is_named(read, entry, message):
    with pytest.raises(InputError, match=message):
        read(SMALLEST + entry)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[fleet]\nname = "home"\n', "missing required field `catalog`"),
        ('catalog = []\n[fleet]\nname = "home"\n', r"\[\[catalog\]\] is 0, but has to be at least one model"),
        ('[[catalog]]\nsource = "m"\n', "missing required field `name`"),
        ('catalog = 3\n[fleet]\nname = "home"\n', r"`catalog` is a list of models: write \[\[catalog\]\]"),
        (
            '[fleet]\nname = "home"\n[catalog]\nsource = "m"\n',
            r"`catalog` is a list of models: write \[\[catalog\]\]",
        ),
        ('fleet = "home"\n', r"`fleet` is a table: write \[fleet\]"),
        ("[fleet\n", "is not valid TOML"),
    ],
)
def test_a_file_of_another_form_is_refused(read, text, message):
    with pytest.raises(InputError, match=message):
        read(text)


def test_a_missing_file_and_one_that_is_not_text_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"cannot read the fleet file .*nowhere.toml: No such file"):
        load(tmp_path / "nowhere.toml")
    path = tmp_path / "fleet.toml"
    path.write_bytes(b"\xff\xf0")
    with pytest.raises(InputError, match="is not valid TOML"):
        load(path)


def test_a_file_that_windows_has_marked_as_utf_8_is_read_and_utf_16_is_refused_by_its_name(tmp_path):
    path = tmp_path / "fleet.toml"
    text = '[fleet]\r\nname = "t"\r\n[[catalog]]\r\nsource = "Größe"\r\n'
    path.write_bytes(text.encode("utf-8-sig"))
    assert load(path).catalog[0].source == "Größe"
    for encoding in ("utf-16", "utf-16-be"):
        path.write_bytes(text.encode(encoding))
        with pytest.raises(InputError, match=r"fleet.toml is UTF-16 text .*save it as UTF-8"):
            load(path)
