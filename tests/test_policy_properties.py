"""What holds for the policy over any trace: limits, pace, and the largest plan after calm."""

from hypothesis import given, settings
from hypothesis import strategies as st
from support.elastic import GIB, MANIFEST, PI5, Run, board, configure

from nestd.daemon.config import Settings
from nestd.daemon.elastic.cost import ModelCost, Stage
from nestd.daemon.elastic.plan import Plan, RequestMix
from nestd.daemon.elastic.resources import Snapshot

facts = st.builds(
    board,
    free_gib=st.one_of(st.none(), st.floats(0.5, 8)),
    celsius=st.one_of(st.none(), st.floats(30, 90)),
    battery=st.one_of(st.none(), st.floats(0, 100)),
    under_voltage=st.one_of(st.none(), st.booleans()),
    watts=st.one_of(st.none(), st.floats(2, 20)),
    some=st.one_of(st.none(), st.floats(0, 30)),
    full=st.one_of(st.none(), st.floats(0, 30)),
    throttled=st.one_of(st.none(), st.booleans()),
)
mixes = st.builds(
    RequestMix,
    wanted=st.sets(st.sampled_from(["vision", "audio"])).map(frozenset),
    preference=st.sampled_from(["auto", "E2B", "E2.69B", "E4B"]),
)
traces = st.lists(st.tuples(st.integers(1, 90), facts, mixes), min_size=1, max_size=12)
configs = st.sampled_from(
    [
        PI5,
        configure("raspberry-pi-4-4gb"),
        configure("raspberry-pi-5-16gb", elastic__power__watt_cap=9.0),
        configure("jetson-orin-nano-8gb", weights="resident"),
    ]
)


def hard_limits_hold(snapshot: Snapshot, config: Settings, plan: Plan) -> None:
    elastic = config.elastic
    if plan.largest.value is None:
        assert plan.refusal is not None
        return
    cost = ModelCost.of(MANIFEST, config)
    largest = MANIFEST.submodel(plan.largest.value)
    smallest = cost.ladder[0]
    if snapshot.memory.free_bytes is not None:
        need = cost.bytes_of(
            Stage(largest, plan.context_length.value), plan.modalities.value, plan.concurrency.value
        )
        assert need <= snapshot.memory.free_bytes - elastic.memory.reserve_bytes
    if elastic.max_effective_params is not None:
        assert largest.effective_params <= elastic.max_effective_params
    throttle, celsius = elastic.thermal.throttle_c, snapshot.thermal.celsius
    hot = throttle and celsius and celsius >= throttle - elastic.thermal.hard_margin_c
    if hot or snapshot.power.under_voltage:
        assert largest == smallest
        assert plan.threads.value is not None
        assert plan.threads.value <= elastic.power.constrained_threads
    percent = snapshot.power.battery_percent
    if percent is not None:
        assert percent >= elastic.battery.critical_percent
        assert percent >= elastic.battery.low_percent or largest == smallest
    assert plan.submodel.value is not None
    default = MANIFEST.submodel(plan.submodel.value)
    assert default.effective_params <= largest.effective_params


@settings(deadline=None, max_examples=150)
@given(trace=traces, config=configs)
def test_no_plan_is_ever_above_a_hard_limit(
    trace: list[tuple[int, Snapshot, RequestMix]], config: Settings
) -> None:
    run = Run(config)
    for seconds, snapshot, mix in trace:
        run.mix = mix
        for _ in range(0, seconds, 7):
            hard_limits_hold(snapshot, config, run(1, snapshot))


@settings(deadline=None, max_examples=100)
@given(trace=traces, config=configs)
def test_the_plan_never_flaps(
    trace: list[tuple[int, Snapshot, RequestMix]], config: Settings
) -> None:
    """Nothing grows sooner than the calm time after any move, and soft steps are bounded."""
    run, pace = Run(config), config.elastic.pace
    moved, before = 0.0, None
    for seconds, snapshot, mix in trace:
        run.mix = mix
        for _ in range(seconds):
            run(1, snapshot)
            stage = run.state.pace.stage
            assert stage is not None
            if before is not None and stage != before:
                if stage > before:
                    assert run.time - 1 - moved >= pace.grow_after_s
                moved = run.time - 1
            before = stage


@settings(deadline=None, max_examples=30)
@given(low=facts, high=facts, period=st.integers(1, 40))
def test_an_oscillating_board_moves_the_plan_ever_more_rarely(
    low: Snapshot, high: Snapshot, period: int
) -> None:
    """Two hours of the worst alternation grow the plan a few times, not hundreds of times."""
    run, ups, before = Run(), 0, None
    for turn in range(7200 // (2 * period)):
        for snapshot in (low, high):
            run(period, snapshot)
            stage = run.state.pace.stage
            assert stage is not None
            ups += before is not None and stage > before
            before = stage
        if turn > 400:
            break
    assert ups <= 24


@settings(deadline=None, max_examples=60)
@given(trace=traces, config=configs, free_gib=st.floats(0.5, 8))
def test_after_a_calm_time_the_plan_is_the_largest_affordable(
    trace: list[tuple[int, Snapshot, RequestMix]], config: Settings, free_gib: float
) -> None:
    run = Run(config)
    for seconds, snapshot, mix in trace:
        run.mix = mix
        run(seconds, snapshot, step=5)
    run.mix = RequestMix()
    run(6 * 3600, board(free_gib=free_gib, watts=3.0), step=15)

    cost, memory = ModelCost.of(MANIFEST, config), config.elastic.memory
    free = int(free_gib * GIB) - memory.reserve_bytes
    cap = config.elastic.max_effective_params

    def largest(budget: int) -> int:
        allowed = [
            index
            for index, stage in enumerate(cost.stages)
            if cost.bytes_of(stage) <= budget
            and (cap is None or stage.submodel.effective_params <= cap)
        ]
        return max(allowed, default=-1)

    stage = run.state.pace.stage
    assert stage is not None
    # Where it has not been above, the margin for growing stays free.
    assert largest(free - memory.grow_margin_bytes) <= stage <= largest(free)
