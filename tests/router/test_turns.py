import asyncio

from router.turns import Turns


async def flood(turns: Turns, times: int, done: list[str], name: str) -> None:
    for _ in range(times):
        await turns.take(turns.chunks)
        done.append(name)


def test_whoever_has_much_waits_for_the_loop_to_turn() -> None:
    async def scenario() -> None:
        turns, done, looped = Turns(), list[str](), 0
        task = asyncio.create_task(flood(turns, 50, done, "a"))
        while not task.done():
            await asyncio.sleep(0)
            looped += 1
        assert 50 <= looped <= 150

    asyncio.run(scenario())


def test_streams_take_turns() -> None:
    async def scenario() -> None:
        turns, done = Turns(), list[str]()
        await asyncio.gather(*(flood(turns, 20, done, name) for name in "abc"))
        assert sorted(done) == sorted("abc" * 20)
        for at in range(60):
            so_far = [done[:at].count(name) for name in "abc"]
            assert max(so_far) - min(so_far) <= 2

    asyncio.run(scenario())


def test_little_is_taken_at_once_and_many_little_ones_share_a_turn() -> None:
    async def scenario() -> None:
        turns, looped = Turns(chunks=100), 0

        async def little() -> None:
            await turns.take(10)

        work = asyncio.gather(*(little() for _ in range(200)))
        while not work.done():
            await asyncio.sleep(0)
            looped += 1
        assert looped < 60

    asyncio.run(scenario())


def test_one_who_leaves_while_waiting_holds_up_nobody() -> None:
    async def scenario() -> None:
        turns = Turns(chunks=1)
        waiting = [asyncio.create_task(turns.take(1)) for _ in range(20)]
        await asyncio.sleep(0)
        for task in waiting[1::2]:
            task.cancel()
        async with asyncio.timeout(2):
            ends = await asyncio.gather(*waiting, return_exceptions=True)
            await turns.take(1)
        left = [isinstance(end, asyncio.CancelledError) for end in ends]
        assert left == [bool(number % 2) for number in range(20)]

    asyncio.run(scenario())
