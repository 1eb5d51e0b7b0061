import random

from worker_connector.eviction import LeastRecentlyUsed
from worker_connector.ledger import Ledger
from worker_connector.pins import Pinned, Pins


def chunk(number: int) -> bytes:
    return bytes([number]) * 16


class Setting:
    def __init__(self, slots: int) -> None:
        self.now = 100.0
        self.ledger = Ledger(LeastRecentlyUsed())
        self.ledger.set_capacity(slots)
        self.pins = Pins(self.ledger, lambda: self.now)

    def store(self, number: int) -> bool:
        slot = self.ledger.reserve(chunk(number))
        if slot is not None:
            self.ledger.commit(slot)
        return slot is not None

    def has(self, number: int) -> bool:
        return self.ledger.lookup(chunk(number)) is not None


def test_a_pinned_chunk_stays_until_its_time() -> None:
    setting = Setting(4)
    setting.store(0)
    assert setting.pins.pin([chunk(0)], 10) == Pinned(1, 0, 0)
    for number in range(1, 9):
        assert setting.store(number)
    assert setting.has(0)
    setting.now += 9.9
    setting.pins.expire()
    ((held, left),) = setting.pins.entries(9)
    assert held == chunk(0)
    assert left is not None
    assert 0.09 < left < 0.11
    setting.now += 0.1
    setting.pins.expire()
    assert len(setting.pins) == 0
    for number in range(9, 14):
        setting.store(number)
    assert not setting.has(0)
    setting.pins.check()


def test_a_pin_outlives_its_slot_and_waits_for_its_chunk() -> None:
    setting = Setting(4)
    assert setting.pins.pin([chunk(1)]) == Pinned(0, 1, 0)
    setting.store(1)
    for number in range(2, 9):
        setting.store(number)
    assert setting.has(1)
    setting.ledger.forget(chunk(1))
    setting.store(1)
    for number in range(2, 9):
        setting.store(number)
    assert setting.has(1)
    assert setting.pins.unpin([chunk(1), chunk(9)]) == 1
    for number in range(2, 9):
        setting.store(number)
    assert not setting.has(1)
    setting.pins.check()


def test_pins_leave_slots_to_others() -> None:
    setting = Setting(8)
    for number in range(8):
        setting.store(number)
    assert setting.pins.pin(map(chunk, range(8))) == Pinned(6, 0, 2)
    assert setting.store(20)
    assert setting.pins.clear() == 6
    assert setting.pins.pin(map(chunk, range(6)), 5, share=0.25).refused == 4


def test_an_end_can_be_set_anew_or_only_put_off() -> None:
    setting = Setting(8)
    setting.pins.pin([chunk(1)], 100)
    setting.pins.pin([chunk(1)], 5, extend=True)
    setting.now += 50
    setting.pins.expire()
    assert len(setting.pins) == 1
    setting.pins.pin([chunk(1)], 5)
    setting.now += 6
    setting.pins.expire()
    assert len(setting.pins) == 0


def test_random_pins_keep_their_books_and_stay_bounded() -> None:
    setting, rng = Setting(16), random.Random(5)
    for _ in range(3000):
        number, action = rng.randrange(40), rng.randrange(6)
        match action:
            case 0:
                setting.pins.pin([chunk(number)], rng.choice([None, 3, 30]), extend=rng.random() < 0.5)
            case 1:
                setting.pins.unpin([chunk(number)])
            case 2:
                setting.ledger.forget(chunk(number))
            case 3:
                setting.now += rng.random()
                setting.pins.expire()
            case _:
                assert setting.store(number) or setting.has(number)
        setting.pins.check()
        setting.ledger.check()
        assert len(setting.pins) <= 12
        assert len(setting.pins._ends) <= 2 * 12 + 65


class Vanishing(list[tuple[float, bytes]]):
    """Ends that another thread takes away as soon as the engine's has seen that there are some."""

    def __init__(self, pins: Pins, ends: list[tuple[float, bytes]]) -> None:
        super().__init__(ends)
        self.pins = pins

    def __bool__(self) -> bool:
        self.pins.clear()
        return True


def test_pins_may_be_ended_while_the_engine_looks_for_what_has_ended() -> None:
    setting = Setting(200)
    for number in range(100):
        setting.store(number)
    setting.pins.pin([chunk(number) for number in range(100)], 10)
    setting.pins._ends = Vanishing(setting.pins, setting.pins._ends)
    setting.pins.expire()
    assert len(setting.pins) == 0
