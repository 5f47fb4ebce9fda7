"""Layering, origins, and the sentences that people see when the configuration is wrong."""

from pathlib import Path

import pytest

from nestd.bundle.errors import ConfigError
from nestd.cli.main import main
from nestd.daemon.config import explain_settings, load_settings
from nestd.daemon.units import format_bytes, parse_bytes


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A machine about which nothing is known: the profile is `generic`."""
    return tmp_path


def write(root: Path, text: str) -> Path:
    path = root / "etc/nestd/nestd.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def mistakes(
    root: Path,
    environ: dict[str, str] | None = None,
    config: Path | None = None,
    overrides: dict[str, object] | None = None,
) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_settings(config, None, overrides, environ or {}, root)
    return str(caught.value).replace(f"{root}/", "").splitlines()


def test_without_any_file_the_detected_profile_and_the_defaults_hold(root: Path) -> None:
    explained = explain_settings(environ={}, root=root)
    assert explained.settings.profile == "generic"
    assert explained.settings.mqtt.port == 1883
    assert explained.settings.weights == "mapped"
    assert explained.origins["profile"] == "detected"
    assert explained.origins["mqtt.port"] == "default"
    assert explained.origins["weights"] == "profile generic"


def test_each_layer_overrides_the_one_below_and_is_named_as_the_origin(root: Path) -> None:
    path = write(
        root,
        "profile: raspberry-pi-5-8gb\n"
        "mqtt:\n  host: broker.lan\n  port: 1884\n"
        "elastic:\n  memory:\n    reserve_bytes: 2G\n",
    )
    explained = explain_settings(
        overrides={"mqtt.port": 1886, "node": None},
        environ={"NESTD_MQTT__PORT": "1885", "NESTD_LIMITS__QUEUE": "4", "HOME": "/root"},
        root=root,
    )
    settings = explained.settings
    assert (settings.mqtt.host, settings.mqtt.port, settings.limits.queue) == (
        "broker.lan",
        1886,
        4,
    )
    assert settings.elastic.memory.reserve_bytes == 2 * 2**30
    assert settings.elastic.thermal.throttle_c == 82
    assert not explained.detected
    assert explained.origins["mqtt.host"] == f"{path}:3"
    assert explained.origins["mqtt.port"] == "command line"
    assert explained.origins["limits.queue"] == "environment NESTD_LIMITS__QUEUE"
    assert explained.origins["elastic.thermal.throttle_c"] == "profile raspberry-pi-5-4gb"
    assert explained.origins["elastic.memory.overhead_bytes"] == "profile raspberry-pi-5-4gb"
    assert explained.origins["profile"] == f"{path}:1"


def test_the_command_line_names_the_profile_before_environment_and_file(root: Path) -> None:
    write(root, "profile: raspberry-pi-4-4gb\n")
    environ = {"NESTD_PROFILE": "raspberry-pi-4-8gb"}
    assert load_settings(environ={}, root=root).profile == "raspberry-pi-4-4gb"
    assert load_settings(environ=environ, root=root).profile == "raspberry-pi-4-8gb"
    named = load_settings(profile="jetson-orin-nx-8gb", environ=environ, root=root)
    assert named.profile == "jetson-orin-nx-8gb"


def test_a_profile_of_your_own_extends_a_shipped_one(root: Path) -> None:
    mine = root / "greenhouse.yaml"
    mine.write_text(
        "title: The greenhouse\nextends: raspberry-pi-5-4gb\n"
        "settings: {elastic: {battery: {supply: battery}}}\n"
    )
    settings = load_settings(profile=str(mine), environ={}, root=root)
    assert settings.elastic.battery.supply == "battery"
    assert settings.engine.threads == 4


def test_a_section_whose_keys_are_all_commented_out_changes_nothing(root: Path) -> None:
    write(root, "mqtt:\n#  host: broker.lan\nelastic:\n  memory:\n")
    assert load_settings(environ={}, root=root).mqtt.host == "localhost"


def test_all_mistakes_are_reported_at_once_each_with_its_place(root: Path) -> None:
    write(
        root,
        "mqtt:\n"
        "  hostt: broker.lan\n"
        "  port: 99999\n"
        "weights: swapped\n"
        "limits: 5\n"
        "elastic:\n"
        "  memory: {reserve_bytes: lots}\n",
    )
    assert sorted(mistakes(root, environ={"NESTD_LOG_LEVEL": "loud"})) == sorted(
        [
            "etc/nestd/nestd.yaml:2:3: mqtt.hostt: unknown key; did you mean `host`?",
            (
                "etc/nestd/nestd.yaml:3:9: mqtt.port: should be less than or equal to 65535; "
                "it is 99999"
            ),
            "etc/nestd/nestd.yaml:4:10: weights: should be 'mapped' or 'resident'; it is 'swapped'",
            (
                "etc/nestd/nestd.yaml:5:9: limits: expected a section with the keys "
                "conversation_expiry_s, conversations, default_expiry_s, json_depth, max_expiry_s, "
                "max_prompt_chars, max_tokens, queue"
            ),
            (
                "etc/nestd/nestd.yaml:7:27: elastic.memory.reserve_bytes: write a size as bytes or "
                "with K, M or G, for example 600M or 1.5G; it is 'lots'"
            ),
            (
                "environment NESTD_LOG_LEVEL: log_level: should be 'debug', 'info', 'warning' or "
                "'error'; it is 'loud'"
            ),
        ]
    )


def test_values_that_clash_are_blamed_on_the_layer_that_brought_the_clash(root: Path) -> None:
    write(root, "mqtt:\n  reconnect_min_s: 90\n")
    assert mistakes(root) == [
        (
            "etc/nestd/nestd.yaml:2:20: mqtt.reconnect_min_s: must keep to "
            "reconnect_min_s <= reconnect_max_s"
        ),
    ]


def test_a_misspelt_environment_variable_is_an_error(root: Path) -> None:
    assert mistakes(root, environ={"NESTD_MQTT__HOTS": "x"}) == [
        "environment NESTD_MQTT__HOTS: mqtt.hots: unknown key; did you mean `host`?"
    ]


def test_an_unknown_profile_lists_the_known_ones(root: Path) -> None:
    write(root, "profile: raspberry-pi-3\n")
    (line,) = mistakes(root)
    assert line.startswith(
        "etc/nestd/nestd.yaml:1:10: profile: no device profile is called 'raspberry-pi-3'; "
        "choose one of generic, generic-x86, jetson-agx-orin-32gb"
    )


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("mqtt: [1\n", "etc/nestd/nestd.yaml:2:1: not valid YAML: "),
        ("- a\n", "etc/nestd/nestd.yaml:1:1: expected `key: value` lines"),
        ("node: a\nnode: b\n", "etc/nestd/nestd.yaml:2:1: `node` is set twice"),
        ("1: a\n", "etc/nestd/nestd.yaml:1:1: a key must be a word; put it in quotes"),
    ],
)
def test_a_file_that_is_no_mapping_says_where(root: Path, text: str, line: str) -> None:
    write(root, text)
    assert mistakes(root)[0].startswith(line)


def test_a_configuration_file_that_was_named_must_exist(root: Path) -> None:
    (line,) = mistakes(root, config=root / "none.yaml")
    assert line == "the configuration file none.yaml does not exist"


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("node", "a/b", "may not contain '/': it is one level of an MQTT topic"),
        ("node", "kitchen+", "may not contain '+': it becomes part of an MQTT topic"),
        ("node", "two words", "may not contain ' ': it becomes part of an MQTT topic"),
        ("mqtt.prefix", "$SYS", "may not start with '$': the broker keeps those topics to itself"),
        ("mqtt.prefix", "home/", "may not start or end with '/' nor have an empty level"),
        ("mqtt.ca_file", "ca.pem", "needs `tls: true` beside it"),
        ("mqtt.cert_file", "c.pem", "set cert_file and key_file together"),
    ],
)
def test_what_would_break_mqtt_is_refused(root: Path, key: str, value: str, problem: str) -> None:
    (line,) = mistakes(root, overrides={key: value})
    assert problem in line


def test_secrets_are_hidden_and_never_quoted_in_an_error(root: Path) -> None:
    write(root, "mqtt:\n  username: greta\n  password: hunter2\n  password_file: [hunter3]\n")
    text = "\n".join(mistakes(root))
    assert "did you mean `password_file`?" in text
    assert "hunter" not in text
    overrides = {"mqtt.username": "greta", "mqtt.password_file": "/run/pw"}
    shown = "\n".join(explain_settings(None, None, overrides, {}, root / "none").lines())
    assert "greta" not in shown
    assert "/run/pw" not in shown
    assert "(set, hidden)" in shown


def test_protocol_may_be_written_as_a_number(root: Path) -> None:
    write(root, "mqtt: {protocol: 5}\n")
    assert load_settings(environ={}, root=root).mqtt.protocol == "5"


def test_the_node_is_named_after_the_host_without_what_topics_forbid(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "my host+1")
    assert load_settings(environ={}, root=root).node_name == "my-host-1"
    assert load_settings(overrides={"node": "attic"}, environ={}, root=root).node_name == "attic"


def test_engine_options_carry_the_engine_section(root: Path) -> None:
    options = load_settings(profile="raspberry-pi-4-4gb", environ={}, root=root).engine_options()
    assert (options.threads, options.context_length, options.prefill_chunk) == (4, 2048, 64)


def test_sizes_are_binary_and_readable_both_ways() -> None:
    assert parse_bytes("1.5G") == parse_bytes("1536 MiB") == 1536 * 2**20
    assert format_bytes(1536 * 2**20) == "1.50 GB"
    assert format_bytes(39 * 2**20) == "39 MB"
    with pytest.raises(ValueError, match="for example 600M"):
        parse_bytes("-1")


def test_check_config_prints_each_value_with_its_origin(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check-config", "--root", str(root), "--set", "mqtt.port=1900"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "mqtt.port 1900 command line" in [" ".join(line.split()) for line in lines]


def test_check_config_leaves_with_status_2_and_the_mistakes(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check-config", "--root", str(root), "--set", "mqtt.port=no"]) == 2
    assert "command line: mqtt.port: should be a valid integer" in capsys.readouterr().err
    assert main(["check-config", "--set", "mqtt.port"]) == 2
    assert "write KEY=VALUE" in capsys.readouterr().err


def test_every_key_is_described_in_the_documentation(root: Path) -> None:
    text = (Path(__file__).parents[1] / "docs/configuration.md").read_text()
    missing = [
        key
        for key in explain_settings(environ={}, root=root).origins
        if f"{key.rpartition('.')[2]}`" not in text
    ]
    assert missing == []
