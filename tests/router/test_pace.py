import random

from router.pace import DEFAULT_SPEED, ENOUGH, Pace


def taught(speed: float, fixed: float, count: int = 200, seed: int = 1, pace: Pace | None = None) -> Pace:
    rng, pace = random.Random(seed), pace or Pace()
    for _ in range(count):
        tokens = rng.choice((100, 500, 5_000, 30_000))
        pace.observe(tokens, fixed + tokens / speed)
    return pace


def test_nothing_is_believed_before_there_is_enough() -> None:
    pace = Pace()
    assert pace.speed(0.0) == DEFAULT_SPEED
    for _ in range(ENOUGH - 1):
        pace.observe(10_000, 1.0)
    assert pace.speed(20_000.0) == 20_000.0
    pace.observe(10_000, 1.0)
    assert pace.speed(20_000.0) == 10_000.0, "what was observed wins over what is reported"


def test_speed_and_fixed_part_are_told_apart() -> None:
    pace = taught(speed=20_000, fixed=0.1)
    assert abs(pace.learned_speed / 20_000 - 1) < 0.1
    assert abs(pace.fixed - 0.1) < 0.02


def test_outliers_move_nothing() -> None:
    pace, rng = Pace(), random.Random(2)
    for _ in range(300):
        tokens = rng.randint(2048, 30_000)
        stalled = rng.random() < 0.3
        pace.observe(tokens, 60.0 if stalled else tokens / 10_000)
    assert abs(pace.learned_speed / 10_000 - 1) < 0.01


def test_a_worker_that_became_quicker_shows() -> None:
    pace = taught(speed=2_000, fixed=0.5)
    taught(speed=40_000, fixed=0.0, pace=pace, count=400)
    assert abs(pace.learned_speed / 40_000 - 1) < 0.1


def test_an_answer_in_no_time_is_no_division_by_zero() -> None:
    pace = Pace()
    for _ in range(20):
        pace.observe(5000, 0.0)
        pace.observe(0, 0.0)
    assert pace.learned_speed > 0
    assert pace.fixed == 0.0
