"""When a failed task runs again."""

from __future__ import annotations

import json
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dray.core.errors import ConfigError, DecodeError, EncodeError
from dray.core.retry import Policy, Retry, decide


def delays(policy: Policy, error: BaseException, upto: int = 20) -> list[float | None]:
    return [decide(policy, retries, error, random.Random(1)) for retries in range(upto)]


def test_the_delay_grows_by_the_factor_up_to_the_longest_and_then_it_gives_up() -> None:
    policy = Retry(max=6, delay=1, backoff=3, max_delay=60, jitter=0).policy()
    assert delays(policy, OSError(), 8) == [1, 3, 9, 27, 60, 60, None, None]


@given(st.integers(0, 4), st.floats(0, 1), st.integers())
def test_jitter_only_shortens_and_by_its_share_at_most(retries: int, jitter: float, seed: int) -> None:
    policy = Retry(max=9, delay=10, backoff=2, jitter=jitter).policy()
    delay_s = decide(policy, retries, OSError(), random.Random(seed))
    full = 10 * 2**retries
    assert delay_s is not None
    assert full * (1 - jitter) - 1e-9 <= delay_s <= full


def test_only_the_classes_it_names_are_retried() -> None:
    policy = Retry(on=(OSError, KeyError), jitter=0).policy()
    assert decide(policy, 0, FileNotFoundError(), random.Random()) == 1
    assert decide(policy, 0, KeyError(), random.Random()) == 1
    assert decide(policy, 0, ValueError(), random.Random()) is None


def test_the_end_of_the_program_is_not_an_error_to_retry() -> None:
    assert decide(Retry().policy(), 0, SystemExit(), random.Random()) is None
    assert decide(Retry().policy(), 0, KeyboardInterrupt(), random.Random()) is None


def test_without_a_policy_nothing_is_retried() -> None:
    assert decide(None, 0, OSError(), random.Random()) is None


def test_never_means_never() -> None:
    assert decide(Retry(max=0).policy(), 0, OSError(), random.Random()) is None


def test_raised_it_asks_for_a_retry_whatever_the_policy_names() -> None:
    policy = Retry(on=KeyError, max=2, delay=5, backoff=2, jitter=0).policy()
    assert decide(policy, 1, Retry("busy"), random.Random()) == 10
    assert decide(policy, 0, Retry(delay=30), random.Random()) == 30
    assert decide(policy, 2, Retry("busy"), random.Random()) is None
    assert decide(None, 0, Retry(delay=7, jitter=0), random.Random()) == 7


def test_raised_with_a_delay_it_overrules_the_wait_function_of_the_policy() -> None:
    policy = Retry(wait=lambda _retries, _error: 99).policy()
    assert decide(policy, 0, Retry(delay=4, jitter=0), random.Random()) == 4
    assert decide(policy, 0, Retry("again"), random.Random()) == 99


def test_a_function_may_decide_and_sees_retries_and_error() -> None:
    error = OSError("x")
    seen = []
    policy = Retry(max=5, wait=lambda retries, problem: seen.append((retries, problem)) or 12).policy()
    assert decide(policy, 3, error, random.Random()) == 12
    assert seen == [(3, error)]
    assert decide(Retry(wait=lambda _r, _e: None).policy(), 0, error, random.Random()) is None
    assert decide(Retry(wait=lambda _r, _e: -5).policy(), 0, error, random.Random()) == 0


@pytest.mark.parametrize("wrong", [math.inf, math.nan, 1e15])
def test_a_function_that_would_make_it_wait_for_ever_is_an_error(wrong: float) -> None:
    with pytest.raises(ConfigError, match="wait"):
        decide(Retry(wait=lambda _r, _e: wrong).policy(), 0, OSError(), random.Random())


def test_huge_numbers_of_retries_end_at_the_longest_delay() -> None:
    policy = Retry(max=10**11, backoff=2, max_delay=60, jitter=0).policy()
    assert decide(policy, 999_999_999, OSError(), random.Random()) == 60


@pytest.mark.parametrize(
    "options",
    [
        {"max": -1},
        {"delay": -0.1},
        {"delay": math.nan},
        {"max_delay": math.inf},
        {"backoff": 0.5},
        {"jitter": 1.1},
        {"jitter": -0.1},
        {"max": "3"},
        {"on": [OSError]},
        {"on": "OSError"},
        {"on": (OSError, 3)},
    ],
)
def test_impossible_policies_are_refused_by_name(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=rf"Retry\({next(iter(options))}="):
        Retry(**options)  # type: ignore[arg-type]


def test_its_repr_shows_what_was_given() -> None:
    assert repr(Retry(max=2, delay=1.5)) == "Retry(max=2, delay=1.5)"


# --- as text -----------------------------------------------------------------------------------------------

NUMBERS = st.floats(0, 1e11, allow_nan=False)


@given(st.integers(0, 10**9), NUMBERS, st.floats(1, 1e3), NUMBERS, st.floats(0, 1))
def test_a_policy_travels_as_text(most: int, delay: float, backoff: float, longest: float, jitter: float) -> None:
    policy = Policy((OSError, ValueError), most, delay, backoff, longest, jitter)
    loaded = Policy.loads(policy.dumps())
    assert loaded == policy._replace(on=("builtins.OSError", "builtins.ValueError"))
    assert Policy.loads(loaded.dumps()) == loaded


def test_names_of_classes_match_subclasses_without_an_import() -> None:
    policy = Policy.loads(Retry(on=OSError, jitter=0).policy().dumps())
    assert decide(policy, 0, FileNotFoundError(), random.Random()) == 1
    assert decide(policy, 0, ValueError(), random.Random()) is None


def test_a_function_cannot_travel() -> None:
    with pytest.raises(EncodeError, match=r"@app\.task"):
        Retry(wait=lambda _r, _e: 1).policy().dumps()


BAD = [
    "",
    "[]",
    "5",
    '"text"',
    "null",
    "{}",
    '[["builtins.OSError"], 3, 1, 2]',
    '[["builtins.OSError"], 3, 1, 2, 4, 5, 6]',
    '[["builtins.OSError"], -3, 1, 2, 4, 0.5]',
    '[["builtins.OSError"], 3, NaN, 2, 4, 0.5]',
    '[["builtins.OSError"], 3, Infinity, 2, 4, 0.5]',
    '[["builtins.OSError"], 3, true, 2, 4, 0.5]',
    '[["builtins.OSError"], "3", 1, 2, 4, 0.5]',
    "[[3], 3, 1, 2, 4, 0.5]",
    "[3, 3, 1, 2, 4, 0.5]",
    "[" * 100_000,
    f'[["x"], {"9" * 5000}, 1, 2, 4, 0.5]',
]


@pytest.mark.parametrize("text", BAD, ids=lambda text: text[:40])
def test_a_text_that_is_no_policy_is_refused(text: str) -> None:
    with pytest.raises(DecodeError, match="retry"):
        Policy.loads(text)


@given(st.text() | st.recursive(st.none() | st.floats() | st.integers() | st.text(), st.lists).map(json.dumps))
def test_any_text_gives_a_policy_or_a_decode_error(text: str) -> None:
    try:
        policy = Policy.loads(text)
    except DecodeError:
        return
    assert policy.max >= 0
    assert 0 <= policy.jitter <= 1


def test_a_delay_that_is_raised_is_meant() -> None:
    policy = Retry(max=9, backoff=4, jitter=1).policy()
    assert [decide(policy, n, Retry(delay=30), random.Random(n)) for n in range(4)] == [30.0] * 4
    assert decide(policy, 2, Retry(delay=30, backoff=2), random.Random(1)) == 120.0
