"""The report of `nestd bench`: what it holds, how it is put together, and its text."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from importlib.metadata import version

import psutil

from nestd.bundle.manifest import Bundle, Submodel
from nestd.cli.bench_measure import (
    Memory,
    Preparation,
    Run,
    Task,
    cpu_name,
    in_child,
    read_bandwidth,
)
from nestd.cli.bench_operators import Cost, Figures, Phase

PROFILED_STEPS = 16
MOST_OPERATORS = 12


class Spread(Figures):
    """The median of the runs, the least and the most."""

    median: float
    minimum: float
    maximum: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Return the spread of at least one value."""
        found = sorted(values)
        return cls(median=statistics.median(found), minimum=found[0], maximum=found[-1])

    def text(self, digits: int) -> str:
        """Return the median, and least and most in brackets."""
        least, most = f"{self.minimum:.{digits}f}", f"{self.maximum:.{digits}f}"
        return f"{self.median:.{digits}f} ({least} - {most})"


class Speed(Figures):
    """Tokens per second after a prompt of this length.

    Attributes:
        read_bytes_per_second: what decoding reads of the decoder's weights.
        read_share: of the bandwidth that was measured.
    """

    prompt_tokens: int
    prefill: Spread
    decode: Spread
    read_bytes_per_second: float
    read_share: float


class SubmodelReport(Figures):
    """One sub-model; seconds as in `Run`, memory as in `watched`.

    Attributes:
        bytes_per_token: of decoder weights that one token touches, from the manifest.
        steady: of the median run.
        operators: by phase, with --profile-ops.
    """

    name: str
    bytes_per_token: int
    load_seconds: Spread
    first_token_seconds: Spread
    peak: Memory
    steady: Memory
    speeds: tuple[Speed, ...]
    operators: dict[str, Phase] | None = None


class Machine(Figures):
    """What the figures were measured on, and with."""

    cpu: str
    cores: int | None
    threads: int
    memory_bytes: int
    read_bytes_per_second: float
    nestd: str
    onnxruntime: str


class Report(Figures):
    """The whole of `nestd bench --json`."""

    bundle: str
    bits: int
    bundle_bytes: int
    preparation: Preparation
    runs: int
    decode_tokens: int
    machine: Machine
    submodels: tuple[SubmodelReport, ...]


def measure(bundle: Bundle, tasks: Sequence[Task], runs: int, profile_ops: bool) -> Report:
    """Measure `bundle`.

    Args:
        bundle: what is measured.
        tasks: one for each sub-model, of kind `run`, alike but for its name.
        runs: of each task, in turn.
        profile_ops: also measure operators.

    Raises:
        BundleError: a graph does not load, or the disk is too small for prepared weights.
    """
    first, threads = tasks[0], tasks[0].threads
    bandwidth = read_bandwidth(threads)
    preparation, _ = in_child(first.model_copy(update={"kind": "prepare"}))
    found: dict[str, list[tuple[Run, Memory]]] = {task.submodel: [] for task in tasks}
    for _ in range(runs):
        for task in tasks:  # in turn, so that a slow minute is everybody's
            answer, peak = in_child(task)
            found[task.submodel].append((Run.model_validate(answer), peak))
    return Report(
        bundle=bundle.manifest.name,
        bits=bundle.manifest.quantization.bits,
        bundle_bytes=sum(file.bytes for file in bundle.manifest.files.values()),
        preparation=Preparation.model_validate(preparation),
        runs=runs,
        decode_tokens=first.decode,
        machine=Machine(
            cpu=cpu_name(),
            cores=psutil.cpu_count(),
            threads=threads,
            memory_bytes=psutil.virtual_memory().total,
            read_bytes_per_second=bandwidth,
            nestd=version("nestd"),
            onnxruntime=version("onnxruntime"),
        ),
        submodels=tuple(
            summary(
                bundle.manifest.submodel(task.submodel),
                found[task.submodel],
                bandwidth,
                operators(task) if profile_ops else None,
            )
            for task in tasks
        ),
    )


def summary(
    submodel: Submodel,
    runs: Sequence[tuple[Run, Memory]],
    bandwidth: float,
    phases: dict[str, Phase] | None,
) -> SubmodelReport:
    """Return what several runs of one sub-model say together."""
    found, peaks = zip(*runs, strict=True)
    speeds = []
    for rates in zip(*(run.rates for run in found), strict=True):
        decode = Spread.of(rate.decode for rate in rates)
        read = decode.median * submodel.bytes_per_token
        speeds.append(
            Speed(
                prompt_tokens=rates[0].prompt_tokens,
                prefill=Spread.of(rate.prefill for rate in rates),
                decode=decode,
                read_bytes_per_second=read,
                read_share=read / bandwidth,
            )
        )
    return SubmodelReport(
        name=submodel.name,
        bytes_per_token=submodel.bytes_per_token,
        load_seconds=Spread.of(run.load_seconds for run in found),
        first_token_seconds=Spread.of(run.first_token_seconds for run in found),
        peak=_median(peaks),
        steady=_median([run.steady for run in found]),
        speeds=tuple(speeds),
        operators=phases,
    )


def operators(task: Task) -> dict[str, Phase]:
    """Return what the operators take after the shortest prompt, in a process of its own."""
    update = {"kind": "profile", "prompts": (min(task.prompts),), "decode": PROFILED_STEPS}
    answer, _ = in_child(task.model_copy(update=update))
    return {name: Phase.model_validate(phase) for name, phase in answer.items()}


def _median(items: Sequence[Memory]) -> Memory:
    return sorted(items, key=lambda item: item.rss)[len(items) // 2]


def text(report: Report) -> str:
    """Return the report for people."""
    machine, preparation = report.machine, report.preparation
    took = "were there" if preparation.seconds is None else f"made in {preparation.seconds:.1f} s"
    memory, read = machine.memory_bytes / 2**30, machine.read_bytes_per_second / 1e9
    lines = [
        f"{report.bundle}, {report.bits} bits: {_megabytes(report.bundle_bytes)} MB on disk",
        f"prepared weights: {_megabytes(preparation.disk_bytes)} MB, {took}",
        f"{machine.cpu}, {machine.threads} threads of {machine.cores} cores, {memory:.1f} GiB",
        f"this machine reads {read:.1f} GB/s",
        f"nestd {machine.nestd}, onnxruntime {machine.onnxruntime}",
        f"medians of {report.runs} runs (least - most)",
    ]
    for item in report.submodels:
        lines += ["", *_submodel(item, report.decode_tokens)]
    return "\n".join(lines)


def _submodel(item: SubmodelReport, decode: int) -> list[str]:
    lines = [
        f"{item.name}: a token touches {_megabytes(item.bytes_per_token)} MB of the decoder",
        f"  load, s                  {item.load_seconds.text(2)}",
        f"  load and first token, s  {item.first_token_seconds.text(2)}",
        f"  peak memory, MB          {_memory(item.peak)}",
        f"  steady memory, MB        {_memory(item.steady)}",
        _speeds("prompt", "prefill, tokens/s", f"decode of {decode}, tokens/s", "weights, GB/s"),
    ]
    for speed in item.speeds:
        read = f"{speed.read_bytes_per_second / 1e9:.1f} ({100 * speed.read_share:.0f} %)"
        prefill, decoded = speed.prefill.text(1), speed.decode.text(1)
        lines.append(_speeds(str(speed.prompt_tokens), prefill, decoded, read))
    for name, phase in (item.operators or {}).items():
        took = f"{phase.milliseconds:.1f} ms while profiled, mean of {phase.runs}"
        lines += ["", f"  {name}: a run of the decoder, {took}"]
        lines += _costs("operator", phase.operators[:MOST_OPERATORS])
        lines += _costs("part of the model", phase.kinds)
    return lines


def _speeds(prompt: str, prefill: str, decode: str, read: str) -> str:
    return f"  {prompt:>6}   {prefill:<30}{decode:<30}{read}"


def _costs(title: str, costs: Sequence[Cost]) -> list[str]:
    return [f"  {title:<28}{'calls':>7}{'ms':>10}{'share':>9}"] + [
        f"  {cost.name:<28}{cost.calls:>7.0f}{cost.milliseconds:>10.2f}{100 * cost.share:>7.1f} %"
        for cost in costs
    ]


def _memory(memory: Memory) -> str:
    anonymous, file = _megabytes(memory.anonymous), _megabytes(memory.file)
    return f"{_megabytes(memory.rss)} (anonymous {anonymous}, files {file})"


def _megabytes(size: float) -> str:
    return f"{size / 1e6:,.1f}"
