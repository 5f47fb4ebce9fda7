"""The policy, situation by situation."""

import pytest
from support.elastic import MANIFEST, PI5, Run, board, configure

from nestd.bundle.errors import ConfigError, InsufficientMemory, ModelNotFound, PowerSaver
from nestd.daemon.config import Settings
from nestd.daemon.elastic.cost import ModelCost, pareto_front
from nestd.daemon.elastic.plan import Choice, Plan, RequestMix
from nestd.daemon.elastic.policy import PolicyState, check_names, decide
from nestd.daemon.elastic.resources import Snapshot
from nestd.daemon.elastic.task import Task, choose


def first(snapshot: Snapshot, config: Settings = PI5, mix: RequestMix | None = None) -> Plan:
    plan = decide(snapshot, config, MANIFEST, mix or RequestMix(), PolicyState()).plan
    assert plan is not None
    return plan


# The ladder


def test_the_ladder_leaves_out_what_is_larger_and_no_better() -> None:
    names = [item.name for item in pareto_front(MANIFEST.submodels)]
    assert names[:2] == ["E2B", "E1.96B"]
    assert names[-2:] == ["E3.39B", "E3.59B"]
    assert {"E4B", "E3.49B-block", "E3.79B", "E2.73B-block"}.isdisjoint(names)


def test_without_scores_every_submodel_is_a_rung() -> None:
    unknown = [item.model_copy(update={"mmlu_percent": None}) for item in MANIFEST.submodels]
    assert len(pareto_front(unknown)) == 16


def test_the_cost_of_a_stage_is_weights_kv_cache_and_overhead() -> None:
    cost = ModelCost.of(MANIFEST, PI5)
    assert cost.kv_bytes(1) == 20 * 2 * 2 * 256 * 4
    stage = cost.stages[cost.stage_of_rung(0)]
    overhead = PI5.elastic.memory.overhead_bytes
    assert cost.bytes_of(stage) == stage.submodel.decoder_bytes + 4096 * 81920 + overhead
    assert cost.bytes_of(stage, sessions=2) - cost.bytes_of(stage) == 4096 * 81920
    vision = 343_000_000 + PI5.elastic.memory.encoder_overhead_bytes
    assert cost.bytes_of(stage, ("vision",)) - cost.bytes_of(stage) == vision


def test_a_window_for_sliding_layers_and_int8_keys_and_values_cost_less_memory() -> None:
    row = 2 * 2 * 256 * 4
    windowed = ModelCost.of(MANIFEST, configure(engine__kv_window=True, engine__prefill_chunk=64))
    assert windowed.kv_bytes(32768) == row * (4 * 32768 + 16 * (511 + 128))
    assert windowed.kv_bytes(100) == ModelCost.of(MANIFEST, PI5).kv_bytes(100)
    small = ModelCost.of(MANIFEST, configure(engine__kv_window=True, engine__kv_bits=8))
    assert small.kv_bytes(32768) * 4 == windowed.kv_bytes(32768)
    assert small.kv_bytes(32768) < 200e6


def test_resident_weights_cost_the_whole_bundle_at_every_rung() -> None:
    cost = ModelCost.of(MANIFEST, configure(weights="resident"))
    assert cost.bytes_of(cost.stages[-1]) - cost.bytes_of(cost.stages[2]) == 0
    assert cost.resident_bytes == MANIFEST.sections["decoder"] + MANIFEST.sections["embed_tokens"]


# Situations


@pytest.mark.parametrize(
    ("snapshot", "submodel", "reason"),
    [
        (board(), "E3.59B", "nothing stands against the top of the ladder"),
        (board(free_gib=3.8), "E2.69B", "no more fits in memory with the margin for growing"),
        (board(free_gib=3.2), "E2B", "no more fits in memory with the margin for growing"),
        (board(free_gib=None), "E2B", "the board does not tell how much memory is free"),
        (board(battery=80), "E3.59B", "nothing stands against the top of the ladder"),
        (board(battery=45), "E2.69B", "the battery is below 50 %"),
        (board(battery=15), "E2B", "the battery is below 20 %"),
        (board(under_voltage=True), "E2B", "the supply was too weak within the last 60 s"),
        (board(celsius=81), "E2B", "the board is at the temperature that slows it down"),
        (board(celsius=75), "E2B", "within 8 °C of throttling"),
        (board(full=35), "E2B", "the board is out of memory (PSI full, or an OOM kill)"),
        (board(some=12), "E2B", "tasks wait for memory 10 % of the time"),
    ],
)
def test_the_first_plan_is_what_the_situation_allows(
    snapshot: Snapshot, submodel: str, reason: str
) -> None:
    plan = first(snapshot)
    assert (plan.submodel.value, plan.submodel.reason) == (submodel, reason)


def test_with_too_little_memory_the_context_shrinks_before_the_last_submodel_goes() -> None:
    plan = first(board(free_gib=3.2 - 0.12))
    assert (plan.submodel.value, plan.context_length.value) == ("E2B", 1024)
    gone = first(board(free_gib=2.0))
    assert gone.submodel.value is None
    with pytest.raises(InsufficientMemory, match="no more fits in the memory that is free: ask"):
        choose(Task(), gone, MANIFEST, PI5)


def test_a_critical_battery_refuses_with_power_saver() -> None:
    plan = first(board(battery=3))
    assert plan.refusal is not None
    assert (plan.refusal.code, plan.concurrency.value) == ("power_saver", 0)
    with pytest.raises(PowerSaver, match="the battery is below 5 %: ask again later"):
        choose(Task(), plan, MANIFEST, PI5)


def test_a_battery_without_a_gauge_is_saved() -> None:
    config = configure(elastic__battery__supply="battery")
    plan = first(board(), config)
    assert plan.submodel.reason == "the board runs on a battery without a gauge"


def test_a_gauge_of_something_else_can_be_ignored() -> None:
    assert first(board(battery=3), configure(elastic__battery__supply="mains")).refusal is None


def test_weak_supply_and_heat_take_threads_away() -> None:
    assert first(board()).threads.value == 4
    assert first(board(under_voltage=True)).threads.value == 2
    assert first(board(celsius=81)).threads.reason == "less heat"


def test_the_profiles_cap_is_never_exceeded_even_by_name() -> None:
    config = configure("raspberry-pi-4-8gb")
    plan = first(board(), config)
    assert plan.largest.value == "E1.96B"
    choice = choose(Task(submodel="E4B"), plan, MANIFEST, config)
    assert choice.value == "E1.96B"
    assert choice.reason == (
        "the request asks for E4B, but the profile or the configuration allows no larger one"
    )


def test_names_in_the_configuration_must_be_in_the_bundle() -> None:
    check_names(PI5, MANIFEST)
    with pytest.raises(ConfigError, match=r"elastic\.max_submodel: this bundle has no sub-model"):
        check_names(configure(elastic__max_submodel="E9B"), MANIFEST)


def test_max_submodel_caps_by_name() -> None:
    plan = first(board(), configure(elastic__max_submodel="e2.69b"))
    assert plan.largest.value == "E2.69B"


def test_e4b_is_no_rung_but_may_be_asked_for_where_it_fits() -> None:
    plan = first(board())
    assert (plan.submodel.value, plan.largest.value) == ("E3.59B", "E4B")
    assert choose(Task(submodel="E4B"), plan, MANIFEST, PI5).value == "E4B"


# Preference and tasks


def test_the_owners_preference_holds_within_what_the_board_allows() -> None:
    assert first(board(), mix=RequestMix(preference="E2.69B")).submodel.value == "E2.69B"
    assert first(board(), mix=RequestMix(preference="E4B")).submodel.value == "E4B"
    tight = first(board(battery=10), mix=RequestMix(preference="E2.69B")).submodel
    assert tight.value == "E2B"
    assert tight.reason == "E2.69B is preferred, but the battery is below 20 %"
    with pytest.raises(ModelNotFound):
        first(board(), mix=RequestMix(preference="E9B"))


@pytest.mark.parametrize(
    ("task", "submodel"),
    [
        (Task(), "E3.59B"),
        (Task(effort="low"), "E2B"),
        (Task(effort="high"), "E3.59B"),
        (Task(submodel="e2b"), "E2B"),
        (Task(json=True, prompt_tokens=40), "E2.69B"),
        (Task(json=True, prompt_tokens=4000), "E3.59B"),
        (Task(json=True, prompt_tokens=40, media=True), "E3.59B"),
        (Task(json=True), "E3.59B"),
    ],
)
def test_each_request_gets_the_submodel_of_its_task(task: Task, submodel: str) -> None:
    assert choose(task, first(board()), MANIFEST, PI5).value == submodel


def test_a_frugal_profile_keeps_the_top_for_high_effort() -> None:
    config = configure(elastic__power__objective="joules_per_token")
    plan = first(board(), config)
    assert plan.submodel.value == "E2.69B"
    assert choose(Task(effort="high"), plan, MANIFEST, config).value == "E3.59B"


def test_an_unknown_submodel_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ModelNotFound, match="choose auto or one of"):
        choose(Task(submodel="E9B"), first(board()), MANIFEST, PI5)


# Over time


def test_heat_is_met_with_bounded_steps_and_left_with_hysteresis() -> None:
    run = Run()
    assert run(1, board()).submodel.value == "E3.59B"
    assert run(1, board(celsius=75)).submodel.value == "E3.18B"
    assert run(4, board(celsius=75)).submodel.value == "E3.18B"
    assert run(1, board(celsius=75)).submodel.value == "E2.69B"
    held = run(300, board(celsius=70)).submodel
    assert held.value == "E2.69B"
    assert held.reason.startswith("the board has not cooled down yet; before that: within 8 °C")
    assert run(29, board(celsius=60)).submodel.value == "E2.69B"
    assert run(2, board(celsius=60)).submodel.value == "E2.98B"


def test_an_answer_steps_down_at_once_when_memory_goes() -> None:
    run = Run()
    run(1, board())
    plan = run(1, board(free_gib=3.2))
    assert plan.submodel.value == "E1.96B"
    assert plan.submodel.reason == "no more fits in the memory that is free"


def test_growing_waits_longer_each_time_it_proved_wrong() -> None:
    run = Run(configure(elastic__pace__max_step_up=11))
    run(1, board())
    waits = []
    for _ in range(4):
        run(1, board(some=50))
        start = run.time
        while run.state.plan and run.state.plan.submodel.value != "E3.59B":
            run(1, board())
        waits.append(round(run.time - start))
    assert waits == [31, 61, 121, 241]


def test_under_voltage_is_remembered_for_a_while() -> None:
    run = Run()
    run(1, board())
    assert run(1, board(under_voltage=True)).threads.value == 2
    assert run(59, board()).threads.value == 2
    assert run(2, board()).threads.value == 4


def test_an_oom_kill_sends_the_plan_to_the_smallest() -> None:
    run = Run()
    run(1, board(oom_kills=2))
    assert run(1, board(oom_kills=3)).submodel.value == "E2B"


def test_a_battery_that_wavers_around_a_threshold_does_not_move_the_plan() -> None:
    run = Run()
    run(10, board(battery=19.5))
    for _ in range(10):
        run(10, board(battery=20.5))
        assert run(10, board(battery=19.5)).submodel.value == "E2B"
    assert run(40, board(battery=24)).submodel.value != "E2B"


def test_the_watt_cap_is_kept_by_stepping_down() -> None:
    config = configure(elastic__power__watt_cap=10.0)
    run = Run(config)
    run(1, board(watts=8))
    plan = run(1, board(watts=11))
    assert (plan.submodel.value, plan.submodel.reason) == (
        "E3.18B",
        "the board draws more than 10 W",
    )
    assert run(120, board(watts=9.5)).submodel.value == "E3.18B"
    assert run(40, board(watts=8)).submodel.value == "E3.39B"


def test_an_encoder_comes_when_needed_and_goes_after_a_time() -> None:
    run = Run()
    assert run(1, board()).modalities.value == ()
    run.mix = RequestMix(wanted=frozenset({"vision"}))
    plan = run(5, board())
    assert (plan.modalities.value, plan.modalities.reason) == (("vision",), "vision is needed now")
    run.mix = RequestMix()
    assert run(299, board()).modalities.value == ("vision",)
    plan = run(5, board())
    assert plan.modalities.value == ()


def test_an_idle_encoder_makes_room_before_the_decoder_shrinks() -> None:
    run = Run(mix=RequestMix(wanted=frozenset({"vision"})))
    run(1, board())
    run.mix = RequestMix()
    plan = run(1, board(free_gib=4.2))
    assert plan.modalities.value == ()
    assert plan.submodel.value == "E3.59B"


def test_a_needed_encoder_shrinks_the_decoder_and_one_that_cannot_fit_says_so() -> None:
    mix = RequestMix(wanted=frozenset({"vision"}))
    plan = first(board(free_gib=4.2), mix=mix)
    assert plan.modalities.value == ("vision",)
    assert plan.submodel.value == "E2B"
    assert plan.submodel.reason.startswith("no more fits beside vision")
    plan = first(board(free_gib=3.0), mix=mix)
    assert plan.modalities.value == ()
    assert plan.modalities.reason == "vision is needed but does not fit in memory"


def test_an_encoder_that_the_owner_has_switched_off_never_comes() -> None:
    both = frozenset({"vision", "audio"})
    run = Run(mix=RequestMix(wanted=both))
    assert run(1, board()).modalities.value == ("vision", "audio")
    run.mix = RequestMix(wanted=both, disabled=frozenset({"vision"}))
    plan = run(1, board())
    assert plan.modalities.value == ("audio",)
    assert plan.modalities.reason == "the owner has switched vision off; audio is needed now"


def test_more_sessions_run_side_by_side_while_their_cache_fits() -> None:
    config = configure("raspberry-pi-5-16gb")
    assert first(board(free_gib=14), config).concurrency == Choice(4, "as configured")
    assert first(board(free_gib=6.5), config).concurrency == Choice(2, "no more KV cache fits")
    assert first(board(free_gib=5.6), config).concurrency.value == 1
    one = configure("raspberry-pi-5-16gb", engine__parallel_requests=1)
    assert first(board(free_gib=14), one).concurrency == Choice(1, "as configured")


def test_memory_pressure_lets_one_answer_run_at_a_time_until_it_has_gone() -> None:
    run = Run(configure("raspberry-pi-5-16gb"))
    assert run(1, board(free_gib=14)).concurrency.value == 4
    pressed = run(1, board(free_gib=14, some=15)).concurrency
    assert pressed == Choice(1, "tasks wait for memory 10 % of the time")
    fading = run(1, board(free_gib=14, some=6)).concurrency
    assert fading == Choice(1, "memory pressure has not gone yet")
    assert run(1, board(free_gib=14, some=1)).concurrency.value == 4


def test_running_answers_are_counted_before_the_plan_grows_or_may_stay() -> None:
    config = configure("raspberry-pi-5-16gb")
    free = board(free_gib=6.2)
    assert first(free, config).submodel.value == "E3.59B"
    four = first(free, config, RequestMix(running=4))
    assert four.submodel.value != "E3.59B"
    assert "beside 4 running answers" in four.submodel.reason
    run = Run(config)
    run(1, free)
    run.mix = RequestMix(running=4)
    assert run(1, free).submodel.value != "E3.59B"


def test_a_plan_is_plain_data_for_the_state_topic_and_does_not_flicker() -> None:
    run = Run()
    plan = run(1, board(celsius=50))
    assert run(1, board(celsius=53, free_gib=6.9)) == plan
    data = plan.as_dict()
    assert data["submodel"] == {
        "value": "E3.59B",
        "reason": "nothing stands against the top of the ladder",
    }
    assert data["refusal"] is None
