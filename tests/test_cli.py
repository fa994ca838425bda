"""The command line: help, exit codes, and one clear line for bad input."""

import os
import subprocess
import sys

import pytest

from mmscale.cli import _VERBS, _build_parser, main

VERBS = list(_build_parser()._subparsers._group_actions[0].choices)


def run(*arguments: str, capsys) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    captured = capsys.readouterr()
    return ended.value.code or 0, captured.out, captured.err


def test_every_verb_of_the_design_is_there():
    assert len(VERBS) == len(_VERBS)
    of_the_design = "toy pack index inspect tokenizer train eval caption search export adapt demo report plan"
    assert set(VERBS) == set(of_the_design.split())


@pytest.mark.parametrize("verb", VERBS)
def test_help_shows_an_example(verb, capsys):
    code, out, _ = run(verb, "--help", capsys=capsys)
    assert code == 0
    assert "example: " in out and f" {verb} " in out.split("example: ")[1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "VERB"),
        (["trian", "x.yaml"], "trian"),
        (["train"], "config"),
        (["train", "none.yaml"], "none.yaml: no such config file"),
        (["toy", "out", "--samples", "many"], "--samples"),
    ],
)
def test_bad_arguments_are_answered_in_one_line_with_exit_code_2(arguments, words, capsys):
    code, out, err = run(*arguments, capsys=capsys)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert words in err


def test_the_launchers_local_rank_is_accepted_before_the_verb(capsys, monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    code, _, err = run("--local_rank=3", "train", "none.yaml", capsys=capsys)
    assert (code, os.environ.pop("LOCAL_RANK")) == (2, "3")
    assert "none.yaml" in err


@pytest.mark.slow
def test_a_reader_that_has_seen_enough_ends_a_command_quietly():
    command = f"{sys.executable} -m mmscale --help | true"
    ended = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, timeout=60)
    assert "Traceback" not in ended.stderr
