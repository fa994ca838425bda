"""The worked examples of configs/adapt."""

from pathlib import Path

import pytest

from mmscale.adapt.config import METHODS, AdaptConfig
from mmscale.config import load_config

CONFIGS = sorted(Path(__file__).parent.parent.glob("configs/adapt/*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_example_opens_with_its_purpose_hardware_command_and_result(path):
    head = path.read_text().split("\nrun:")[0]
    assert head.startswith("#")
    for word in ("Hardware:", f"mmscale adapt configs/adapt/{path.name}", "Expect:"):
        assert word in head
    assert load_config(path, schema=AdaptConfig).adapt.method in METHODS


def test_every_method_has_an_example():
    assert {load_config(path, schema=AdaptConfig).adapt.method for path in CONFIGS} == set(METHODS)
