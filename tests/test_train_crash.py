"""The bounded version of the crash test; `python tests/crash.py --kills 50` is the long one."""

import pytest
from crash import SAME, SHAPES, crash, make_data, verify

pytestmark = pytest.mark.slow

STEPS = 36


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    make_data(folder)
    crash(folder, STEPS, 0, shapes=SAME)
    return folder


@pytest.mark.parametrize("shapes", [SAME, SHAPES], ids=["same_shape", "any_shape"])
def test_a_run_that_is_killed_over_and_over_ends_like_one_left_alone(undisturbed, tmp_path, shapes):
    make_data(tmp_path)
    attempts = crash(tmp_path, STEPS, 4, seed=1, shapes=shapes)
    assert any(attempt.killed for attempt in attempts)
    verify(tmp_path, undisturbed, STEPS, attempts, exact=shapes is SAME)
    # One dead rank ends the others within seconds.
    assert max(attempt.others_ended_s for attempt in attempts) < 10
