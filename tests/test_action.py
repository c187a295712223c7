"""The composite action: its inputs are used, never as text of a script, and its command line is one that the program takes."""

from __future__ import annotations

import re
from pathlib import Path

from qcompile.cli_check import check

TEXT = (Path(__file__).resolve().parents[1] / "action.yml").read_text()


def test_every_input_is_used_and_none_in_a_script() -> None:
    inputs = re.findall(r"^  ([\w-]+):$", TEXT.split("runs:")[0].split("inputs:")[1], flags=re.MULTILINE)
    assert {"float", "quantised", "eval", "options"} <= set(inputs)
    used = re.findall(r"\$\{\{ inputs\.([\w-]+) \}\}", TEXT)
    assert sorted(used) == sorted(inputs)
    script = TEXT.split("run: |")[1]
    assert "${{" not in script


def test_its_options_are_those_of_the_command() -> None:
    known = {name for parameter in check.params for name in parameter.opts}
    assert set(re.findall(r" (--[a-z]+)", TEXT.split("run: |")[1])) <= known
