"""Generation as a loop over one step: the prompt is read once, then the same step runs for every token.

All that a step reads and writes has a fixed place: keys and values of every block, the token, its slot and position, the tokens drawn so
far. So on a GPU the step is captured in a CUDA graph and replayed, and the host only asks for the next replay before it looks at the
last token. Inside the graph the blocks are compiled by torch.compile, one compilation for all blocks of a kind, which fuses norms,
rotary embedding, cache update and activations. Elsewhere the same step runs eagerly, and `Decoder.reason` says why.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from transformers import (
    LogitsProcessorList,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TextStreamer,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.cache_utils import Cache
from transformers.utils import logging

from dlpkit import archs
from dlpkit.static_cache import Slots, compiled

ALIGN = 16  # slots of a cache are a multiple, so that rows of the attention mask are aligned
PIECES = 128  # of a row of logits
COMPILE_FROM = 1024  # tokens of one call from which compiling, some seconds, pays
WARM = 2  # steps before capture: Triton compiles, cuBLAS allocates

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn: the likeliest at temperature 0, else from the top_k likeliest (0: all) and the top_p of probability."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"sampling wants temperature >= 0, top_k >= 0 and 0 < top_p <= 1, got {self.temperature}, {self.top_k} and {self.top_p}"
            )
        if not self.temperature and (self.top_k or self.top_p < 1):
            raise ValueError("top_k and top_p choose among tokens that are drawn: give a temperature above 0 with them")

    def warpers(self) -> LogitsProcessorList:
        found = LogitsProcessorList()
        if self.temperature not in (0, 1):
            found.append(TemperatureLogitsWarper(self.temperature))
        if self.top_k:
            found.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            found.append(TopPLogitsWarper(self.top_p))
        return found


GREEDY = Sampling()


class Decoder:
    """A model with room to go on from `batch` prompts at a time, for prompt and new tokens of at most `length`; used as often as wanted.

    graph: capture the step in a CUDA graph. compile: with the blocks compiled inside it. Where either fails, the next simpler way
    runs; `how` says which does once a token was made, and `reason` why it is not the fastest. A graph reads the weights where they were:
    a model that is packed or moved afterwards wants a new Decoder.
    """

    def __init__(
        self, model: PreTrainedModel, batch: int, length: int, sampling: Sampling = GREEDY,
        eos: Sequence[int] | None = None, graph: bool = True, compile: bool = True,
    ):  # fmt: skip
        longest = getattr(model.config, "max_position_embeddings", length)
        if length > longest:
            raise ValueError(f"this model reads and writes at most {longest} tokens, prompt included, not {length}")
        self.model, self.device = model, model.get_input_embeddings().weight.device
        self.sampling, self.warpers = sampling, sampling.warpers()
        ends = model.generation_config.eos_token_id if eos is None else list(eos)
        ends = [ends] if isinstance(ends, int) else ends or []
        pad = model.generation_config.pad_token_id
        self.pad = pad if pad is not None else next(iter(ends), 0)
        self.ends = torch.tensor(ends, dtype=torch.int64, device=self.device)
        length = -(-length // ALIGN) * ALIGN

        def zeros(*shape: int, dtype=torch.int64) -> torch.Tensor:
            return torch.zeros(*shape, dtype=dtype, device=self.device)

        self.at, self.count = zeros(1), zeros(1)  # slot of the token that is read next; tokens drawn
        self.token, self.position = zeros(batch, 1), zeros(batch, 1)
        self.done = zeros(batch, dtype=torch.bool)  # rows that have ended
        self.real = zeros(batch, length, dtype=torch.bool)  # slots that hold no padding
        self.drawn = zeros(batch, length)
        self.cache = Cache(layers=[Slots(length, self.at) for _ in archs.blocks(model, archs.of(model))])
        self.takes_where = "cache_position" in inspect.signature(model.forward).parameters  # before transformers 5
        self.random = torch.Generator(self.device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.ways = [True, False] if compile else [False]  # of capturing that are left to try
        self.how, self.reason = "eager", None
        if self.device.type != "cuda":
            self.ways, self.reason = [], f"CUDA graphs want an NVIDIA GPU, the model is on {self.device.type}"
        elif {p.device for p in model.parameters()} != {self.device}:
            self.ways, self.reason = [], "a CUDA graph wants the whole model on one GPU"
        elif not graph:
            self.ways, self.reason = [], "asked for"

    @torch.no_grad()
    def stream(self, ids: torch.Tensor, mask: torch.Tensor | None = None, tokens: int = 64) -> Iterator[torch.Tensor]:
        """[B, T] token ids and their mask, 0 for padding on the left -> for every new token a [B] tensor on the host.

        Ends after `tokens`, or when every row has ended; a row that has goes on as padding. Raises ValueError for another batch, for
        padding on the right, and when prompt and new tokens do not fit.
        """
        self._check(ids, mask, tokens)
        self._read(ids.to(self.device), None if mask is None else mask.to(self.device))
        ends, done = self.ends.cpu(), torch.zeros(len(ids), dtype=torch.bool)
        for i in range(tokens):
            arrives = self._fetch(i)
            if i + 1 < tokens:
                self._advance()  # before the host waits for the token before: the GPU never does
            token = arrives()
            yield token
            done |= torch.isin(token, ends)
            if done.all():
                return

    def _check(self, ids: torch.Tensor, mask: torch.Tensor | None, tokens: int) -> None:
        batch, length = self.real.shape
        if ids.ndim != 2 or ids.shape[0] != batch or not ids.shape[1] or ids.dtype != torch.int64:
            raise ValueError(f"this decoder wants int64 ids [{batch}, T], got {tuple(ids.shape)} of {ids.dtype}")
        if tokens < 1 or ids.shape[1] + tokens > length:
            raise ValueError(f"{ids.shape[1]} prompt and {tokens} new tokens do not fit this decoder's {length} slots")
        if mask is not None and (
            mask.shape != ids.shape or not bool((mask[:, -1] != 0).all() & (mask.diff() >= 0).all())
        ):
            raise ValueError(f"the mask wants ids' shape {tuple(ids.shape)}, zeros for padding on the left, then ones")

    def _read(self, ids: torch.Tensor, mask: torch.Tensor | None) -> None:
        """Read the prompt, fill the cache and draw the first token."""
        mask = torch.ones_like(ids) if mask is None else mask.long()
        T = ids.shape[1]
        self.real.fill_(True)[:, :T] = mask.bool()
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        self.random.manual_seed(self.sampling.seed)
        self._prompt(T)
        try:
            where = torch.arange(T, device=self.device)
            logits = self._logits(ids, mask, positions, where)
        finally:
            self._prompt(0)
        self.at.fill_(T - 1)
        self.position.copy_(positions[:, -1:])
        self.count.zero_()
        self.done.zero_()
        self._move(self._draw(logits))

    def _prompt(self, tokens: int) -> None:
        for layer in self.cache.layers:
            layer.prompt = tokens

    def _step(self, part: Callable[[Callable], Callable] = lambda part: part) -> None:
        """Read the last token and draw the next. All of it in fixed places, none of it waits for the host. `part` wraps what it calls."""
        logits = self._logits(self.token, part(self._masks)(), self.position, self.at)
        draw = self._draw if self.sampling.temperature else part(self._draw)  # no compiler takes a torch.Generator
        part(self._move)(draw(logits))

    def _logits(self, ids, mask, positions, where) -> torch.Tensor:
        """[B, vocabulary], of the last of the ids."""
        more = {"cache_position": where} if self.takes_where else {}
        out = self.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=self.cache, use_cache=True,
            logits_to_keep=1, **more,
        )  # fmt: skip
        return out.logits[:, -1]

    def _masks(self) -> torch.Tensor | dict[str, torch.Tensor]:
        """What one query adds to its attention scores [B, 1, 1, length], by type of block where a model has several."""
        config = self.model.config
        slot = torch.arange(self.real.shape[1], device=self.device)
        seen = self.real & (slot <= self.at)
        kinds = getattr(config, "layer_types", None)
        window = getattr(config, "sliding_window", None)
        near = seen & (slot > self.at - window) if window else seen
        if not kinds:
            return self._bias(near)
        return {kind: self._bias(near if kind == "sliding_attention" else seen) for kind in set(kinds)}

    def _bias(self, seen: torch.Tensor) -> torch.Tensor:
        dtype = self.model.dtype
        lowest = torch.full((), torch.finfo(dtype).min, dtype=dtype, device=self.device)
        return torch.where(seen, lowest.new_zeros(()), lowest)[:, None, None]

    def _draw(self, logits: torch.Tensor) -> torch.Tensor:
        """[B, vocabulary] -> [B] token ids. Gumbel's trick, the largest of softmax / exponential, is a draw that needs no sync."""
        if self.sampling.temperature:
            shares = self.warpers(self.drawn, logits.float()).softmax(-1)
            logits = shares / torch.empty_like(shares).exponential_(generator=self.random)
        return largest(logits)

    def _move(self, token: torch.Tensor) -> None:
        """Take the tokens that were drawn, padding where a row has ended, and go on to the next slot."""
        token = torch.where(self.done, self.pad, token)
        self.done |= torch.isin(token, self.ends)
        self.token.copy_(token[:, None])
        self.drawn.index_copy_(1, self.count, self.token)
        self.at += 1
        self.position += 1
        self.count += 1

    def _advance(self) -> None:
        while self.graph is None and self.ways:
            self._capture(self.ways.pop(0))
        if self.graph:
            self.graph.replay()
        else:
            self._step()

    def _capture(self, compile: bool) -> None:
        """Put the step into a CUDA graph; the state is as before. What cannot be captured is said in `reason`."""
        state = self.at, self.count, self.token, self.position, self.done, self.drawn
        before, seed = [tensor.clone() for tensor in state], self.random.get_state()
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(self.device)
        way = compiled(self.model, self.cache) if compile else nullcontext(lambda part: part)
        try:
            with torch.cuda.device(self.device), way as part:
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    for _ in range(WARM):
                        self._step(part)
                torch.cuda.current_stream().wait_stream(stream)
                graph.register_generator_state(self.random)
                with torch.cuda.graph(graph, stream=stream):
                    self._step(part)
            self.graph, self.how = graph, "CUDA graph, blocks compiled" if compile else "CUDA graph"
        except Exception as error:  # of Dynamo, Inductor, Triton or CUDA, which share no class
            self.reason = f"{'torch.compile' if compile else 'the CUDA graph'} failed: {str(error).splitlines()[0]}"
            logger.warning(f"dlpkit: {self.reason}")
        for tensor, saved in zip(state, before, strict=True):
            tensor.copy_(saved)
        self.random.set_state(seed)

    def _fetch(self, i: int) -> Callable[[], torch.Tensor]:
        """Start copying the token drawn i-th to the host -> a call that waits for it."""
        if self.device.type != "cuda":
            return self.drawn[:, i].clone
        host = torch.empty(len(self.drawn), dtype=torch.int64, pin_memory=True)
        host.copy_(self.drawn[:, i], non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()

        def arrives() -> torch.Tensor:
            copied.synchronize()
            return host

        return arrives


def largest(scores: torch.Tensor) -> torch.Tensor:
    """argmax over the last of two dimensions in two stages: torch gives a whole row, 128 thousand logits, to one multiprocessor."""
    V = scores.shape[1]
    width = -(-V // PIECES)
    pieces = torch.nn.functional.pad(scores, (0, PIECES * width - V), value=float("-inf")).unflatten(1, (PIECES, width))
    best, where = pieces.max(2)
    piece = best.argmax(1)
    return piece * width + where.gather(1, piece[:, None])[:, 0]


def generate_text(
    model: PreTrainedModel, tokenizer, prompts: list[str], tokens: int = 64, sampling: Sampling = GREEDY,
    compile: bool | None = None, streamer: TextStreamer | None = None, notice: Callable[[str], None] | None = None,
) -> list[str]:  # fmt: skip
    """Prompts -> each with what comes after it, read in one batch with padding on the left.

    compile: the blocks, on a GPU; None does it for COMPILE_FROM tokens or more. streamer: prints the text of a single prompt as it comes.
    notice: hears why decoding is not as fast as it could be.
    """
    if not prompts or not all(prompts):
        raise ValueError("the prompt is empty: give some text to go on from")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    inputs = tokenizer(prompts, return_tensors="pt", padding=len(prompts) > 1, padding_side="left")
    ids = inputs["input_ids"]
    compile = tokens >= COMPILE_FROM if compile is None else compile
    decoder = Decoder(model, len(ids), ids.shape[1] + tokens, sampling, compile=compile)
    if streamer:
        streamer.put(ids[0])
    new = []
    for token in decoder.stream(ids, inputs["attention_mask"], tokens):
        new.append(token)
        if streamer:
            streamer.put(token)
    if streamer:
        streamer.end()
    if notice and decoder.reason:
        notice(f"decoded {decoder.how}: {decoder.reason}")
    return tokenizer.batch_decode(torch.cat([ids, torch.stack(new, 1)], 1), skip_special_tokens=True)


def generate(
    model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor | None = None, tokens: int = 64,
    sampling: Sampling = GREEDY, eos: Sequence[int] | None = None,
) -> torch.Tensor:  # fmt: skip
    """[B, T] token ids and mask, as `Decoder.stream` takes them -> [B, at most `tokens`] new ones, on the host.

    Compiled from COMPILE_FROM tokens on; a Decoder serves many prompts with one compilation.
    """
    decoder = Decoder(model, len(ids), ids.shape[1] + tokens, sampling, eos, compile=tokens >= COMPILE_FROM)
    return torch.stack(list(decoder.stream(ids, mask, tokens)), 1)
