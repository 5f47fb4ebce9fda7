"""Execution providers: the CPU unless others are named, in their order, or one clear sentence."""

from __future__ import annotations

from pathlib import Path
from queue import SimpleQueue

import onnxruntime as ort
import pytest
from support.node import settings_for_tests

from nestd.bundle.errors import BundleError, ConfigError
from nestd.bundle.manifest import Bundle
from nestd.daemon.engine.messages import Event, LoadFailed
from nestd.daemon.engine.process import EngineProcess
from nestd.daemon.engine.sessions import load_graph

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
# One that ONNX Runtime's own x86 wheel has beside the CPU; it takes no operator of ours.
AZURE = "AzureExecutionProvider"

without_cuda = pytest.mark.skipif(
    CUDA in ort.get_available_providers(), reason="this onnxruntime has CUDA"
)


def graph(bundle: Bundle) -> Path:
    return bundle.file("embed_tokens.onnx")


def test_everything_runs_on_the_cpu_where_nothing_is_said(tiny_bundle: Bundle) -> None:
    assert settings_for_tests().engine_options().execution_providers == (CPU,)
    assert load_graph(graph(tiny_bundle), 1).get_providers() == [CPU]


@pytest.mark.skipif(AZURE not in ort.get_available_providers(), reason="only the CPU is there")
@pytest.mark.parametrize("providers", [[AZURE, CPU], [CPU, AZURE]])
def test_providers_keep_their_order(tiny_bundle: Bundle, providers: list[str]) -> None:
    settings = settings_for_tests(engine__execution_providers=providers, weights="resident")
    options = settings.engine_options()
    session = load_graph(graph(tiny_bundle), 1, providers=options.execution_providers)
    assert session.get_providers() == providers


@without_cuda
def test_a_missing_provider_is_a_sentence_that_names_what_is_there(tiny_bundle: Bundle) -> None:
    with pytest.raises(BundleError) as caught:
        load_graph(graph(tiny_bundle), 1, providers=[CUDA, CPU])
    sentence = str(caught.value)
    assert sentence.startswith(f"engine.execution_providers names {CUDA}, but this onnxruntime")
    assert ", ".join(ort.get_available_providers()) in sentence
    assert "install onnxruntime-gpu" in sentence


@without_cuda
def test_the_engine_says_which_provider_is_missing(tiny_bundle: Bundle) -> None:
    options = settings_for_tests(engine__execution_providers=[CUDA, CPU], weights="resident")
    events: SimpleQueue[Event] = SimpleQueue()
    process = EngineProcess(tiny_bundle.path, options.engine_options(), events.put)
    process.start()
    failed = events.get(timeout=60)
    process.stop(10)
    assert isinstance(failed, LoadFailed)
    assert f"engine.execution_providers names {CUDA}" in failed.message


def test_mapped_weights_are_for_the_cpu_only() -> None:
    with pytest.raises(ConfigError, match="weights: must be `resident`"):
        settings_for_tests(engine__execution_providers=[CUDA, CPU], weights="mapped")


@pytest.mark.parametrize("wrong", [[], ["cuda"]])
def test_a_list_that_names_no_provider_is_refused(wrong: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"engine\.execution_providers"):
        settings_for_tests(engine__execution_providers=wrong)
