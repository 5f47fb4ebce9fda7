"""One engine of real shapes that sees and hears: latency, and memory before, with and after.

    python benchmarks/engine_media.py TEXT_BUNDLE ENCODER_BUNDLE WORK_DIRECTORY

TEXT_BUNDLE is converted from benchmarks/random_checkpoint.py (E4B, --bits 4), ENCODER_BUNDLE from
benchmarks/random_encoders.py; both are of the same width, so the encoders of one are put beside the
graphs of the other. Writes benchmarks/results/engine_media.json and .md. A first engine prepares
the weights; the second is measured, through its own commands and events.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import shutil
import statistics
import time
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import soundfile
from PIL import Image
from real_shape import RESULTS, machine
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from nestd.bundle.manifest import Bundle, BundleFile, Manifest, sha256_file
from nestd.daemon.engine.messages import (
    ChatMessage,
    EngineOptions,
    Event,
    Failed,
    Finished,
    KeepEncoders,
    LoadFailed,
    MediaContent,
    Ready,
    Retain,
    Sampling,
    Start,
    Stats,
    TextContent,
)
from nestd.daemon.engine.process import EngineProcess

SUBMODEL = "E2B"
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for c in m.content %}{{ {'image': '<image_soft_token>', 'audio': '<audio_soft_token>'}"
    ".get(c.type, c.text) }}{% endfor %}{% endif %}{% endfor %}"
)


def join(text: Bundle, encoders: Bundle, path: Path) -> Bundle:
    """Put the encoders of one bundle beside the text graphs of another."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    for bundle, names in ((text, ("",)), (encoders, ("vision", "audio"))):
        for name in bundle.manifest.files:
            if name.startswith(names):
                shutil.copyfile(
                    bundle.path / name, path / name
                )  # no links: ONNX Runtime refuses them
    (path / "tokenizer.json").unlink()
    tokenizer(encoders.manifest, text.manifest.model.vocab_size).save(str(path / "tokenizer.json"))
    (path / "chat_template.jinja").write_text(TEMPLATE)
    files = encoders.manifest.files | text.manifest.files
    for name in ("tokenizer.json", "chat_template.jinja"):
        file = path / name
        files[name] = BundleFile(bytes=file.stat().st_size, sha256=sha256_file(file))
    update = {
        "name": path.name,
        "modalities": encoders.manifest.modalities,
        "vision": encoders.manifest.vision,
        "audio": encoders.manifest.audio,
        "sections": encoders.manifest.sections | text.manifest.sections,
        "files": {name: files[name] for name in files if (path / name).is_file()},
    }
    manifest = Manifest.model_validate(text.manifest.model_copy(update=update).model_dump())
    (path / "manifest.json").write_text(manifest.model_dump_json())
    return Bundle.open(path)


def tokenizer(manifest: Manifest, size: int) -> Tokenizer:
    """A byte-level tokenizer whose control tokens of media have the ids of the config."""
    assert manifest.vision is not None
    assert manifest.audio is not None
    names = {"image": manifest.vision, "audio": manifest.audio}
    vocabulary = {"<pad>": 0, "<eos>": 1, "<bos>": 2}
    for name, soft in names.items():
        vocabulary |= {
            f"<start_of_{name}>": soft.begin,
            f"<{name}_soft_token>": soft.soft_token,
            f"<end_of_{name}>": soft.end,
        }
    special = [AddedToken(token, special=True) for token in vocabulary]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary |= {token: index for index, token in enumerate(alphabet, start=10)}
    taken = set(vocabulary.values())
    vocabulary |= {f"<unused{index}>": index for index in range(size) if index not in taken}
    result = Tokenizer(models.BPE(vocabulary, merges=[]))
    result.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    result.decoder = decoders.ByteLevel()
    result.add_special_tokens(special)
    return result


class Engine:
    """An engine process, asked one thing after the other."""

    def __init__(self, bundle: Bundle, options: EngineOptions) -> None:
        self.events: SimpleQueue[Event] = SimpleQueue()
        self.process = EngineProcess(bundle.path, options, self.events.put)
        self.process.start()
        loaded = self.until(Ready, LoadFailed)
        if isinstance(loaded, LoadFailed):
            raise RuntimeError(loaded.message)
        self.process.send(Retain(submodel=SUBMODEL))

    def until(self, *kinds: type) -> Any:
        while not isinstance(event := self.events.get(timeout=600), kinds):
            pass
        return event

    def ask(self, *parts: Any) -> dict[str, float]:
        """Return milliseconds of an answer of four tokens."""
        messages = (ChatMessage(role="user", content=parts),)
        start = Start(id="a", messages=messages, submodel=SUBMODEL, sampling=Sampling(max_tokens=4))
        self.process.send(start)
        event = self.until(Finished, Failed)
        if isinstance(event, Failed):
            raise RuntimeError(event.message)
        return event.timings.model_dump()

    def keep(self, *modalities: Any) -> float:
        """Unload all other encoders; return how many milliseconds that took."""
        began = time.monotonic()
        self.process.send(KeepEncoders(keep=modalities))
        while self.until(Stats).encoders != modalities:
            pass
        return 1000 * (time.monotonic() - began)

    def memory(self) -> dict[str, int]:
        """Resident megabytes of the engine: all, anonymous, of files."""
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="ascii")
        fields = dict(line.split(":", 1) for line in status.splitlines())
        names = {"rss": "VmRSS", "anonymous": "RssAnon", "file": "RssFile", "peak": "VmHWM"}
        return {name: int(fields[key].split()[0]) // 1024 for name, key in names.items()}


def picture(seed: int, folder: Path) -> MediaContent:
    pixels = np.random.default_rng(seed).integers(0, 256, (24, 32, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((1600, 1200)).save(file, "JPEG")
    return medium(folder, "image", file.getvalue(), 768)


def clip(seed: int, seconds: int, folder: Path) -> MediaContent:
    sound = np.random.default_rng(seed).normal(0, 0.1, 16000 * seconds).astype(np.float32)
    file = io.BytesIO()
    soundfile.write(file, sound, 16000, format="WAV")
    return medium(folder, "audio", file.getvalue(), None)


def medium(folder: Path, kind: str, data: bytes, size: int | None) -> MediaContent:
    digest = hashlib.sha256(data).hexdigest()
    (folder / digest).write_bytes(data)
    fields = {"type": kind, "path": folder / digest, "sha256": digest, "size": size}
    return MediaContent.model_validate(fields)


def measure(engine: Engine, folder: Path, runs: int) -> dict[str, Any]:
    text = TextContent(text="what is this " * 8)
    # Fill what is kept of ended answers (64 MB), as any use of the engine would.
    for number in range(4):
        engine.ask(TextContent(text=f"{number} what is this " * 25))
    result: dict[str, Any] = {"memory": {"before, running E2B": engine.memory()}, "ms": {}}

    def note(name: str, make: Any) -> None:
        cold, again, steady = [], [], []
        for run in range(runs):
            part = make(run)
            cold.append(engine.ask(part, text)["encode_ms"])
            again.append(engine.ask(part, text)["encode_ms"])
            steady.append(engine.ask(make(1000 + run), text)["encode_ms"])
            result["memory"][f"{name} encoder loaded"] = engine.memory()
            result["ms"].setdefault(f"{name}: unloading", []).append(engine.keep())
        result["ms"][f"{name}: first, encoder loaded for it"] = cold
        result["ms"][f"{name}: the same again"] = again
        result["ms"][f"{name}: another"] = steady
        engine.ask(text)
        result["memory"][f"after unloading {name}"] = engine.memory()

    note("768 px", lambda run: picture(run, folder))
    note("5 s", lambda run: clip(run, 5, folder))
    note("30 s", lambda run: clip(run, 30, folder))
    result["ms"] = {key: round(statistics.median(values)) for key, values in result["ms"].items()}
    before = result["memory"]["before, running E2B"]["rss"]
    last = result["memory"]["after unloading 30 s"]["rss"]
    result["rss_after_percent_of_before"] = round(100 * last / before, 1)
    return result


def table(report: dict[str, Any]) -> str:
    where = report["machine"]
    lines = [
        "# An engine of real shapes that sees and hears",
        "",
        f"E4B at 4 bits running {SUBMODEL}, encoders at 8 bits, weights mapped; random weights.",
        f"{where['cpu']}, {where['threads']} threads, commit {where['commit']}.",
        f"Load average {report['load']} before; medians of {report['runs']}.",
        "",
        "| memory of the engine, MB | resident | anonymous | of files | peak so far |",
        "|---|---|---|---|---|",
    ]
    for name, values in report["memory"].items():
        lines.append(f"| {name} | " + " | ".join(str(value) for value in values.values()) + " |")
    lines += [
        "",
        f"After all encoders are unloaded: {report['rss_after_percent_of_before']} % of before.",
        "",
        "| medium to rows (decoding, loading, encoding) | ms |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in report["ms"].items()),
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", type=Path)
    parser.add_argument("encoders", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    bundle = join(Bundle.open(args.text), Bundle.open(args.encoders), args.work / "joined")
    options = EngineOptions(threads=args.threads, prepared_directory=args.work / "prepared")
    load = round(os.getloadavg()[0], 1)
    first = Engine(bundle, options)
    first.ask(picture(0, args.work), clip(0, 1, args.work))
    first.process.stop(10)
    engine = Engine(bundle, options)
    report = measure(engine, args.work, args.runs)
    engine.process.stop(10)
    report |= {"machine": machine(args.threads), "load": load, "runs": args.runs}
    (RESULTS / "engine_media.json").write_text(json.dumps(report, indent=1) + "\n")
    (RESULTS / "engine_media.md").write_text(table(report))
    print(table(report))


if __name__ == "__main__":
    main()
