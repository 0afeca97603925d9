"""What a study's file may say, and what is said of what it may not."""

from __future__ import annotations

from pathlib import Path

import pytest

from bsc.errors import UserError
from bsc.study.commands import arguments
from bsc.study.config import StudyStep, read_study
from bsc.study.study import open_study

ROOT = Path(__file__).parents[2]


def test_a_users_own_study_is_at_most_thirty_lines(study_file: Path) -> None:
    assert len(study_file.read_text().strip().splitlines()) <= 30
    opened = open_study(study_file)
    assert list(opened.nodes) == ["acts", "sweep", "figures"]
    assert opened.folder.path == Path("lr")


@pytest.mark.parametrize("scale", ["demo", "tiny", "small", "paper"])
def test_the_study_of_the_paper_is_one_at_each_scale(scale: str) -> None:
    opened = open_study(ROOT / "studies" / "binary.toml", scale)
    assert {c.id for c in opened.study.claims} >= {f"C{i}" for i in range(1, 10)}
    assert opened.folder.path == Path(f"binary-{scale}")


MISTAKES = [
    ('model = "demo"', 'modle = "demo"', r"\[cache.acts\]: model: missing"),
    ("held_out_tokens = 8192", "held_out_token = 8192",
     r"unknown key 'held_out_token' \(did you mean 'held_out_tokens'"),
    ('tokens = "20k"', 'tokens = "20q"', r"\[cache.acts\]: tokens: "),
    ('store = "acts"', 'store = "act"', r"no step of cache is called so \(did you mean 'acts'"),
    ('store = "acts"', 'store = "figures"', r"no step of cache is called so"),
    ('store = "acts"', "store = [1]", r"store: is the name of one step, got \[1\]"),
    ('store = "acts"', 'store = "acts"\nname = "x"', r"name: the study gives it"),
    ("k = 4", "k = 0", r"\[train.sweep\].*k: should be at least 1, got 0"),
    ("k = 4", 'codes = "binary"', r"\[train.sweep\].*unknown key 'codes'"),
    ("ce_tokens = 1024", "ce_tokens = 0", r"ce_tokens: should be at least 1, got 0"),
    ('run = "sweep"', 'run = "acts"', r"no step of train or finetune is called so"),
    ("[eval.figures]", "[eval.sweep]", r"two steps are called sweep"),
    ("[eval.figures]", '[eval."a/b"]', r"letters, digits"),
    ("[eval.figures]", "[evil.figures]", r"unknown key 'evil' \(did you mean 'eval'"),
    ('figure = "fvu"', 'figure = "fvuu"', r"no figure 'fvuu' \(did you mean 'fvu'"),
    ('figure = "fvu"', 'figure = "judge"', r"judge needs a word, such as 'judge:fuzzing'"),
    ('figure = "fvu"', 'figure = "fvu"\nweighted = true', r"weighted: is for scores of latents"),
    ('figure = "fvu"', 'figure = "overlap"\nranks = [0, 0.5]', r"ranks: is for predictability"),
    ('figure = "fvu"', 'figure = "predictability"\nranks = [0.5, 0.1]', r"two shares from 0 to 1"),
    ("below = 0", "below = 0\nabove = 1", r"above and below exclude each other"),
    ("below = 0", "bellow = 0", r"unknown key 'bellow' \(did you mean 'below'"),
    ("coders = { lr = 1e-2 }", 'coders = { lr = 1e-2, run = "x" }', r"run = 'x': no step of train"),
    ('id = "lr"', 'id = "l r"', r"letters, digits"),
    ('title = "', 'tilte = "', r"unknown key 'tilte'"),
    ('run = "sweep"', 'run = ["sweep"]', r"run: is the name of one step"),
    ("below = 0", "below = inf", r"below"),
    ("coders = { lr = 1e-2 }", "coders = { run = [[1]] }", r"run: the name of a step, or a list"),
    ("[cache.acts]", '[scales."../x"]\n[cache.acts]', r"letters, digits"),
    ('store = "acts"', 'store = "acts"\nscales = [["demo"]]', r"scales: should be a list of none"),
    ("no_probe = true", 'no_probe = "yes"', r"no_probe: should be true or false, got 'yes'"),
    ("[cache.acts]", "[cache]\nx = 1\n[cache.acts]", r"cache"),
    ('tokens = "20k"', 'tokens = "$n"', r"\$n: no such value in \[scales\]"),
    ('store = "acts"', 'store = "acts"\nscales = ["big"]', r"scales: should be a list of none"),
]  # fmt: skip


@pytest.mark.parametrize(("was", "now", "words"), MISTAKES)
def test_a_mistake_is_named_before_anything_runs(
    study_file: Path, was: str, now: str, words: str
) -> None:
    text = study_file.read_text()
    assert was in text
    study_file.write_text(text.replace(was, now, 1))
    with pytest.raises(UserError, match=words) as raised:
        open_study(study_file)
    assert "\n" not in str(raised.value)
    assert str(study_file) in str(raised.value)


def test_scales_fill_in_values_and_leave_out_steps(tmp_path: Path) -> None:
    path = tmp_path / "s.toml"
    path.write_text(
        'title = "t"\n[scales.small]\nn = 5\n[scales.large]\nn = 7\n'
        '[cache.a]\nmodel = "demo"\ntokens = "$n"\n'
        '[cache.b]\nscales = ["large"]\nmodel = "demo"\n'
    )
    small, large = read_study(path), read_study(path, "large")
    assert [s.name for s in small.steps] == ["a"]
    assert small.steps[0].fields["tokens"] == 5
    assert [s.name for s in large.steps] == ["a", "b"]
    assert large.steps[0].fields["tokens"] == 7
    with pytest.raises(UserError, match=r"--scale lage.*did you mean 'large'"):
        read_study(path, "lage")


def test_a_scale_has_its_own_hardware(tmp_path: Path) -> None:
    path = tmp_path / "s.toml"
    path.write_text(
        'title = "t"\n[hardware]\ndevices = 2\nprice_in = 1\n[scales.a]\n[scales.b]\n'
        '[scales.b.hardware]\ndevices = 8\n[cache.a]\nmodel = "demo"\n'
    )
    assert read_study(path, "a").hardware.devices == 2
    both = read_study(path, "b").hardware
    assert (both.devices, both.price_in) == (8, 1)


def test_flags_of_every_form() -> None:
    step = StudyStep(
        name="x",
        command="finetune",
        fields={"run": "r", "coders": ["*a*", "*b*"], "together": False, "keep_checkpoint": True,
                "tokens": "1M", "tensorboard": True},
    )  # fmt: skip
    assert arguments(step, {"": "runs/r", "--name": "x-1"}) == [
        "finetune", "runs/r", "--coders", "*a*", "--coders", "*b*", "--apart", "--keep-checkpoint",
        "--tokens", "1M", "--tensorboard", "--name", "x-1",
    ]  # fmt: skip
