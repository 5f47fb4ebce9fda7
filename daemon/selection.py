"""What a request asks for, in the policy's and the engine's words.

Pure functions of the request; which sub-model it runs on is the governor's business.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from nestd.bundle.errors import BadRequest
from nestd.bundle.manifest import GenerationDefaults, Manifest, Modality
from nestd.daemon.elastic.task import Task
from nestd.daemon.engine.messages import ChatMessage, Content, Sampling
from nestd.daemon.mqtt.contract import Part, Request, RequestMessage

AUTO = "auto"
# The daemon has no tokenizer, the engine has. For the question whether a prompt is short this will
# do: Gemma's tokens are four characters long on average in European languages.
CHARACTERS_PER_TOKEN = 4


def canonical(name: str, manifest: Manifest) -> str:
    """Return `auto` or the bundle's spelling of `name`; ModelNotFound if it has none."""
    return AUTO if name.lower() == AUTO else manifest.submodel(name).name


def task_of(
    request: Request, messages: Sequence[RequestMessage | ChatMessage], submodel: str
) -> Task:
    """Return what `request` says about itself; it runs on `submodel` if that may be."""
    texts = (
        message.content if isinstance(message.content, str) else joined_text(message.content)
        for message in messages
    )
    return Task(
        submodel=submodel,
        effort=request.effort,
        prompt_tokens=sum(map(len, texts)) // CHARACTERS_PER_TOKEN,
        media=bool(modalities_of(messages)),
        video=any(part.type == "video" for part in _parts(messages)),
        json=request.response_format.type != "text" or bool(request.tools),
    )


def modalities_of(messages: Iterable[RequestMessage | ChatMessage]) -> frozenset[Modality]:
    """Return the encoders that `messages` need; a video's frames are images."""
    return frozenset(
        "audio" if part.type == "audio" else "vision"
        for part in _parts(messages)
        if part.type != "text"
    )


def _parts(messages: Iterable[RequestMessage | ChatMessage]) -> Iterator[Content | Part]:
    for message in messages:
        if not isinstance(message.content, str):
            yield from message.content


def joined_text(content: Sequence[Content | Part]) -> str:
    """Return the text of all parts in one piece."""
    return "".join(part.text for part in content if part.type == "text")


def sampling_of(request: Request, defaults: GenerationDefaults, max_tokens: int) -> Sampling:
    """Return the engine's sampling: the request's values over the model's own defaults.

    Raises:
        BadRequest: more tokens are asked for than the node allows.
    """
    if request.max_tokens is not None and request.max_tokens > max_tokens:
        raise BadRequest(f"max_tokens is {request.max_tokens}, this node allows {max_tokens}")
    temperature = defaults.temperature if defaults.do_sample else 0.0
    return Sampling(
        max_tokens=request.max_tokens or min(Sampling().max_tokens, max_tokens),
        temperature=temperature if request.temperature is None else request.temperature,
        top_k=defaults.top_k if request.top_k is None else request.top_k,
        top_p=defaults.top_p if request.top_p is None else request.top_p,
        repetition_penalty=request.repetition_penalty or 1.0,
        seed=request.seed,
        stop=request.stop,
    )
