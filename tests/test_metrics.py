"""What Prometheus scrapes from a node."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from urllib.request import urlopen

import pytest
from prometheus_client.parser import text_string_to_metric_families
from support.node import Node, settings_for_tests

from nestd.bundle.errors import ConfigError
from nestd.daemon.elastic.power import Power

Samples = dict[tuple[str, ...], float]


@contextmanager
def free_port() -> Iterator[int]:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    yield port


@contextmanager
def scraped_node() -> Iterator[Node]:
    with free_port() as port:
        node = Node(metrics__enabled=True, metrics__listen=f"127.0.0.1:{port}")
        node.start()
        try:
            yield node
        finally:
            node.transport.disconnect()  # else it would wait for answers, with a clock that stands
            node.settle()
            node.daemon.shutdown()


def scrape(node: Node) -> Samples:
    """Return name and label values -> value, of all samples."""
    node.pass_time(1.1)
    listen = node.settings.metrics.listen
    with urlopen(f"http://{listen}/metrics") as answer:
        text = answer.read().decode()
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_a_scrape_tells_the_node_and_the_queue() -> None:
    with scraped_node() as node:
        node.ask(id="a")
        node.ask(id="b")
        samples = scrape(node)
    assert any(name[0] == "nestd_info" for name in samples)
    assert samples["nestd_ready",] == 1
    assert samples["nestd_requests_running",] == 1
    assert samples["nestd_requests_waiting",] == 1
    assert samples["nestd_queue_limit",] == 3
    assert samples["nestd_requests_accepted_total",] == 2
    assert samples["nestd_mqtt_connections_total",] == 1


def test_answers_are_counted_with_tokens_time_and_submodel() -> None:
    with scraped_node() as node:
        node.ask()
        node.now += 0.2
        node.engine.delta("he")
        node.engine.delta("llo", 2)
        node.engine.finish("hello", switches=((0, "full"), (1, "small")))
        node.settle()
        node.engine.stats()
        samples = scrape(node)
    assert samples["nestd_requests_done_total",] == 1
    assert samples["nestd_tokens_total", "prompt"] == 3
    assert samples["nestd_tokens_total", "completion"] == 2
    assert samples["nestd_tokens_total", "guessed"] == 0
    assert samples["nestd_time_to_first_token_seconds_count",] == 1
    assert samples["nestd_time_to_first_token_seconds_sum",] == pytest.approx(0.2)
    assert samples["nestd_submodel_switches_total",] == 1
    # 1 ms of prompt and 1 of 2 tokens, in 2 ms, on the first; the other token on the second.
    assert samples["nestd_submodel_seconds_total", "full"] == pytest.approx(0.002)
    assert samples["nestd_submodel_seconds_total", "small"] == pytest.approx(0.001)


def test_errors_are_counted_by_code() -> None:
    with scraped_node() as node:
        node.ask(submodel="nonsense")
        node.ask(id="c")
        node.control("cancel", id="c")
        samples = scrape(node)
    assert samples["nestd_errors_total", "model_not_found"] == 1
    assert samples["nestd_errors_total", "cancelled"] == 1


def test_what_a_board_cannot_tell_has_no_sample() -> None:
    with scraped_node() as node:
        assert ("nestd_power_watts",) not in scrape(node)
        node.board.facts = replace(node.board.facts, power=Power(watts=7.5, watts_scope="board"))
        assert scrape(node)["nestd_power_watts",] == 7.5
        assert ("nestd_resident_memory_bytes", "engine") not in scrape(node)
        node.engine.stats()
        node.settle()
        assert scrape(node)["nestd_resident_memory_bytes", "engine"] == 1


def test_two_nodes_in_one_process_do_not_mix() -> None:
    with scraped_node() as one, scraped_node() as other:
        one.ask()
        assert scrape(one)["nestd_requests_accepted_total",] == 1
        assert scrape(other)["nestd_requests_accepted_total",] == 0


def test_a_port_that_is_taken_is_said_at_the_start() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        node = Node(metrics__enabled=True, metrics__listen=f"127.0.0.1:{port}")
        with pytest.raises(ConfigError, match=r"metrics\.listen: cannot listen on"):
            node.daemon.startup()


def test_nothing_listens_unless_told_to() -> None:
    assert not settings_for_tests().metrics.enabled
    assert settings_for_tests().metrics.address == ("127.0.0.1", 9464)


def test_an_address_is_host_and_port() -> None:
    assert settings_for_tests(metrics__listen="[::1]:80").metrics.address == ("::1", 80)
    for wrong in ("9464", "host:", ":9464", "host:99999"):
        with pytest.raises(ConfigError, match=r"write HOST:PORT"):
            settings_for_tests(metrics__listen=wrong)


def test_every_metric_is_documented() -> None:
    text = (Path(__file__).parents[1] / "docs" / "observability.md").read_text(encoding="utf-8")
    with scraped_node() as node:
        a_whole_board = Power(watts=1.0, battery_percent=1.0)
        node.board.facts = replace(node.board.facts, power=a_whole_board)
        names = {name[0] for name in scrape(node) if name[0].startswith("nestd")}
    for name in names:
        base = name.removesuffix("_bucket").removesuffix("_sum").removesuffix("_count")
        assert f"`{base.removesuffix('_created')}" in text, name
