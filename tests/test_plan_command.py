"""`nestd plan` explains a decision in words that somebody can act on."""

from pathlib import Path

import pytest

from nestd.cli.main import main

BUNDLE = str(Path(__file__).parent / "recorded/e4b-int4")


def lines(capsys: pytest.CaptureFixture[str], *options: str) -> list[str]:
    assert main(["plan", *options, BUNDLE]) == 0
    return [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]


def test_a_low_battery_and_little_memory_are_explained(capsys: pytest.CaptureFixture[str]) -> None:
    out = lines(capsys, "--profile", "raspberry-pi-5-8gb", "--memory", "3.8G", "--battery", "18")
    assert "board 3.80 GB free, battery 18 % (discharging)" in out
    assert "budget 2.80 GB after 1.00 GB for other programs" in out
    assert "* E2B 1.91 B 50.9 % 4096 1.85 GB" in out
    assert "E3.59B 3.59 B 63.4 % 4096 2.69 GB fits, without the margin for growing" in out
    assert any(line.startswith("left out, larger and no better") for line in out)
    assert "submodel E2B the battery is below 20 %" in out
    assert "this request E2B the battery is below 20 %" in out


def test_what_does_not_fit_is_marked(capsys: pytest.CaptureFixture[str]) -> None:
    out = lines(capsys, "--profile", "raspberry-pi-5-8gb", "--memory", "3.6G")
    assert "E3.59B 3.59 B 63.4 % 4096 2.69 GB does not fit" in out
    assert "E2.98B 2.98 B 59.5 % 4096 2.38 GB fits, without the margin for growing" in out
    assert "* E2.69B 2.69 B 57.7 % 4096 2.24 GB" in out


def test_the_request_is_explained_beside_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    out = lines(capsys, "--profile", "raspberry-pi-5-8gb", "--memory", "7G", "--effort", "low")
    assert "submodel E3.59B nothing stands against the top of the ladder" in out
    assert "this request E2B the request asks for low effort" in out


def test_a_refusal_is_an_explanation_too(capsys: pytest.CaptureFixture[str]) -> None:
    out = lines(capsys, "--profile", "raspberry-pi-5-8gb", "--memory", "7G", "--battery", "2")
    assert "this request refused the battery is below 5 %: ask again later" in out


def test_heat_and_under_voltage_can_be_supposed(capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--profile", "raspberry-pi-5-8gb", "--memory", "7G")
    out = lines(capsys, *options, "--temperature", "81")
    assert "threads 2 less heat" in out
    out = lines(capsys, *options, "--under-voltage", "--need", "vision")
    assert "modalities vision vision is needed now" in out
    assert "threads 2 less peak current" in out


def test_without_a_profile_this_machine_is_looked_at(capsys: pytest.CaptureFixture[str]) -> None:
    assert any(line.startswith("this request") for line in lines(capsys))


def test_a_size_that_is_none_says_how_to_write_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--memory", "much", BUNDLE]) == 2
    assert "--memory much: write a size as bytes or with K, M or G" in capsys.readouterr().err
