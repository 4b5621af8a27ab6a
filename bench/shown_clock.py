"""The clock by which pytest-benchmark shows seconds that were measured elsewhere."""


class ShownClock:
    """pytest-benchmark's timer: stands still but for the seconds that were measured and are to be shown."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def show(self, benchmark, seconds: list[float]) -> None:
        rounds = iter(seconds)

        def advance():
            self.now += next(rounds)

        benchmark.pedantic(advance, rounds=len(seconds))


CLOCK = ShownClock()
