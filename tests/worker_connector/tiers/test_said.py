"""A log that is not filled by what fails again and again."""

from worker_connector.tiers.said import Said


def test_a_cause_is_said_once_in_its_time() -> None:
    said = Said(repeat_seconds=1000)
    assert [said.anew("timeout"), said.anew("timeout"), said.anew("auth")] == [True, False, True]


def test_it_is_said_again_later() -> None:
    said = Said(repeat_seconds=0)
    assert said.anew("timeout")
    assert said.anew("timeout")
