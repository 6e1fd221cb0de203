"""Continuous batching: requests of any length join and leave at every step (arXiv:2309.06180).

    engine = Engine(model)
    handles = [engine.submit(ids, config, adapter=name) for ids, name in ...]
    for event in engine.run(): ...                  # or handle.ids once handle.done
    async for token in engine.stream(ids, config): ...

Each request may use another adapter, or none. What a request gets does not depend on its company:
its draws come from its own generator, and its prompt is read in pieces of fixed size.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from topwork.errors import ConfigError, TopworkError, nearest
from topwork.generation import draw
from topwork.generation.config import GenerationConfig
from topwork.generation.generate import budget, resolve_config
from topwork.generation.loop import Criterion
from topwork.generation.processors import Processor
from topwork.generation.request import ACTIVE, Event, Request
from topwork.generation.runner import NativeRunner, Next, Piece, Runner, StateRunner, is_recurrent
from topwork.generation.stopping import StopStrings
from topwork.nn.paged import PagePool
from topwork.peft.acting import Acting, acting

Work = list[tuple[Request, Piece]]


def chosen(model: Any, name: str | None) -> str | None:
    """The adapter that `name` means; ConfigError where there is none, or no single active one."""
    known = getattr(model, "peft_config", None) or {}
    if name == ACTIVE:
        active = list(getattr(model, "active_adapters", ())) if known else []
        if len(active) > 1:
            raise ConfigError(f"adapters {active} are active: name one, or None")
        name = active[0] if active else None
    if name is not None and name not in known:
        raise ConfigError(f"there is no adapter {name!r}{nearest(name, known)}")
    return name


def room_of(model: Any, name: str | None) -> tuple[int, int]:
    """How many virtual tokens adapter `name` puts before a text, and how often texts are cached."""
    name = chosen(model, name)
    config = None if name is None else model.peft_config[name]
    lead = config.num_virtual_tokens if config is not None and config.is_prompt_learning else 0
    return lead, 1 if config is None else config.passes


class Engine:
    """Decodes many requests at once over a pool of `cache_tokens` cached tokens, or, of a recurrent
    model, a state for each of `max_rows`.

    `max_rows` requests run at a time, of which a step computes at most `step_tokens` new tokens;
    `piece` is how much of a prompt is read at once.
    """

    def __init__(
        self,
        model: Any,
        *,
        max_rows: int = 64,
        step_tokens: int = 256,
        piece: int = 128,
        cache_tokens: int = 32768,
        page_size: int = 16,
        runner: Runner | None = None,
    ) -> None:
        if piece > step_tokens or min(max_rows, piece, page_size) < 1:
            raise ConfigError(f"piece={piece} must be within step_tokens={step_tokens}")
        self.max_rows = max_rows
        self.step_tokens = step_tokens
        self.piece = piece
        self._size = (-(-cache_tokens // page_size), page_size)
        self._take(model, runner)
        self._waiting: list[Request] = []
        self._running: list[Request] = []
        self._arrived: deque[Request] = deque()  # appended to by any thread
        self._lock = threading.RLock()
        self._driver: asyncio.Task[None] | None = None
        self._queues: dict[Request, asyncio.Queue[Event]] = {}
        self._thread = ThreadPoolExecutor(1, "topwork-engine")

    def _take(self, model: Any, runner: Runner | None = None) -> None:
        self.model = model
        if runner is None and is_recurrent(model):
            runner = StateRunner(model, self.max_rows)
        if runner is None:
            runner = NativeRunner(model, PagePool(model.layer_count, *self._size))
        self.runner, self.pool = runner, runner.pool
        self._weights = self._versions()

    def swap(self, model: Any) -> None:
        """Go on with `model`, such as the same one with its first adapter around it; what runs is
        read again."""
        with self._lock:
            while self._running:
                request = self._running.pop()
                request.stop(self.pool)
                self._waiting.insert(0, request)
            self._take(model)

    # -- requests --------------------------------------------------------------------------------

    def submit(
        self,
        ids: Sequence[int] | Tensor,
        config: GenerationConfig | None = None,
        *,
        adapter: str | None = ACTIVE,
        task_id: int | None = None,
        tokenizer: Any = None,
        logits_processor: Sequence[Processor] = (),
        stopping_criteria: Sequence[Criterion] = (),
        top_logprobs: int | None = None,
        **options: Any,
    ) -> Request:
        """Queue one prompt [T]. `adapter`: a name, None for none, by default the active one;
        `task_id`: of an adapter that knows several; `stop_strings` needs the `tokenizer`; with
        `top_logprobs`, `request.told` has what the model said of each token, and of so many
        likeliest ones.

        Raises ConfigError for what cannot be meant; the other requests are not touched.
        """
        settled = resolve_config(self.model, config, options)
        prompt = torch.as_tensor(ids, dtype=torch.long).reshape(1, -1)
        new = budget(self.model, prompt, None, settled)
        refused = {
            "num_beams": settled.num_beams > 1,
            "num_return_sequences": settled.num_return_sequences > 1,
            "penalty_alpha": settled.contrastive,
            "guidance_scale": settled.guidance_scale not in (None, 1),
            "prompt_lookup_num_tokens": bool(settled.prompt_lookup_num_tokens),
        }
        for name, given in refused.items():
            if given:
                raise ConfigError(f"the engine does not offer {name}; submit plain requests")
        acts = acting(self.model, chosen(self.model, adapter), prompt[0].tolist(), task_id)
        self._fits(acts, prompt.shape[1] + new)
        if top_logprobs is not None and not 0 <= top_logprobs <= self.model.config.vocab_size:
            raise ConfigError(
                f"top_logprobs={top_logprobs} must be from 0 to the vocabulary's size"
            )
        if settled.stop_strings:
            stopping_criteria = [*stopping_criteria, StopStrings(tokenizer, settled.stop_strings)]
        request = Request(
            prompt[0].tolist(), settled, new, acts,
            self.model.config.vocab_size, logits_processor, stopping_criteria, top_logprobs,
        )  # fmt: skip
        self._arrived.append(request)
        return request

    def _fits(self, acts: Acting, tokens: int) -> None:
        """ConfigError where so many tokens, acted on so, cannot be cached."""
        if isinstance(self.runner, StateRunner):
            if acts.lead and self.model.prompt_encoder[acts.adapter].is_prefix:
                raise ConfigError(f"a recurrent model has no place for {acts.adapter!r}, a prefix")
            if acts.twice and self.max_rows < 2:
                raise ConfigError(f"{acts.adapter!r} reads twice: it needs max_rows=2 or more")
            return  # a state has one size
        room, tokens = self.pool.pages * self.pool.size, tokens + acts.lead
        if -(-tokens // self.pool.size) * (1 + acts.twice) > self.pool.pages:
            twice = "twice " * acts.twice
            raise ConfigError(f"{twice}{tokens} tokens do not fit into cache_tokens={room}")

    @property
    def busy(self) -> bool:
        return bool(self._arrived or self._waiting or self._running)

    # -- the synchronous face --------------------------------------------------------------------

    def run(self) -> Iterator[Event]:
        """Step until every request has ended; those submitted meanwhile too."""
        while self.busy:
            yield from self.step()

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Compute one round and return what it brought."""
        with self._lock:
            while self._arrived:
                self._waiting.append(self._arrived.popleft())
            events = self._swept()
            self._admit()
            work = self._work()
            if not work:
                if self._waiting and not self._running:
                    raise TopworkError("no request can start: the pool has too few pages")
                return events
            done, following, failed = self._computed(work)
            ready = []
            for i, (request, piece) in enumerate(done):
                request.held += len(piece.ids)
                request.name_pages(self.pool)
                if request.held == len(request.text):
                    ready.append((i, request))
            events += failed
            return events if following is None else events + self._choose(ready, following)

    def _computed(self, work: Work) -> tuple[Work, Next | None, list[Event]]:
        """Run the pieces of `work` together or, where that fails, one by one, and end the requests
        that fail alone. Returns what was computed, what follows it, and the events of the ends."""
        try:
            return work, self.runner.run([piece for _, piece in work]), []
        except Exception as error:
            if len(work) == 1:
                return [], None, [self._end(work[0][0], "error", error)]
        done, found, events = [], [], []
        for request, piece in work:
            try:
                found.append(self.runner.run([piece]))
                done.append((request, piece))
            except Exception as error:
                events.append(self._end(request, "error", error))
        return done, Next.joined(found) if found else None, events

    def _swept(self) -> list[Event]:
        """End what was cancelled or is overdue."""
        events = []
        for request in [*self._running, *self._waiting]:
            if request.cancelled:
                events.append(self._end(request, "cancelled"))
            elif request.overdue:
                events.append(self._end(request, "time"))
            elif not request.new:
                events.append(self._end(request, "length"))
        return events

    def _admit(self) -> None:
        """Let waiting requests in while there are rows and pages, in order."""
        if not self._waiting or len(self._running) >= self.max_rows:
            return
        if not self._unchanged():
            self.pool.forget()
            self.runner.refresh()
            self._weights = self._versions()
        promised = {name for request in self._running for name in request.promised(self.pool)}
        for request in list(self._waiting):
            # Where another request is about to write the same beginning, wait and share it.
            if promised and not promised.isdisjoint(request.names_of_prompt(self.pool)):
                continue
            if len(self._running) >= self.max_rows or not request.start(self.pool):
                return
            promised.update(request.promised(self.pool))
            self._waiting.remove(request)
            self._running.append(request)

    def _parameters(self) -> list[Tensor]:
        return [p for p in self.model.parameters() if not p.is_inference()]

    def _versions(self) -> list[tuple[ref[Tensor], int]]:
        return [(ref(p), p._version) for p in self._parameters()]

    def _unchanged(self) -> bool:
        """Whether the weights are those of the last look: the same tensors, not written to."""
        now = self._parameters()
        return len(now) == len(self._weights) and all(
            held() is p and version == p._version for p, (held, version) in zip(now, self._weights)
        )

    def _work(self) -> Work:
        """The pieces of this round: every row that decodes, then prompts as far as they fit."""
        work: Work = []
        left = self.step_tokens
        order = sorted(self._running, key=lambda r: r.made == 0)
        for request in order:
            if request not in self._running:  # put back meanwhile
                continue
            count = request.next_count(self.piece)
            if count > left:
                continue
            if not self._room(request, count):
                continue
            left -= count
            work.append((request, request.piece(count)))
        return [(r, p) for r, p in work if r in self._running]

    def _room(self, request: Request, count: int) -> bool:
        """Give `request` pages for `count` more tokens; the youngest others make way."""
        wanted = request.pages_for(request.held + count, self.pool.size)
        while wanted > self.pool.spare:
            youngest = self._running[-1]
            youngest.stop(self.pool)
            self._running.remove(youngest)
            self._waiting.insert(0, youngest)
            if youngest is request:
                return False
        request.grow(request.held + count, self.pool)
        return True

    # -- choosing --------------------------------------------------------------------------------

    def _choose(self, ready: list[tuple[int, Request]], following: Next) -> list[Event]:
        """The next token of each request, which stands at its place in `following`."""
        events: list[Event] = []
        together: list[tuple[Request, Tensor]] = []
        broken, best = following.peak.isnan().tolist(), following.best.tolist()
        for i, request in ready:
            try:
                if broken[i]:
                    raise TopworkError(
                        f"the logits are not numbers at token {request.held}: "
                        "the weights (or the adapter's) are damaged"
                    )
                if request.takes_best:
                    events.append(self._give(request, best[i]))
                    continue
                scores = request.shaped(following.logits[i : i + 1].float())
                if request.config.do_sample and draw.is_plain(request.config):
                    together.append((request, scores))
                    continue
                chosen = request.choose(scores)
            except Exception as error:
                events.append(self._end(request, "error", error))
                continue
            events.append(self._give(request, *chosen))
        if together:
            rows = [request for request, _ in together]
            found = draw.draw(
                torch.cat([scores for _, scores in together]),
                [r.config for r in rows],
                [r.generator for r in rows],
            )
            drawn = zip(rows, found.ids.tolist(), found.logprobs.tolist())
            events += [self._give(*one) for one in drawn]
        return events

    def _give(self, request: Request, token: int, logprob: float | None = None) -> Event:
        try:
            reason = request.give(token, logprob)
        except Exception as error:  # of a stopping criterion
            return self._end(request, "error", error, token)
        if reason is not None:
            return self._end(request, reason, None, token)
        return Event(request, token, False)

    def _end(
        self,
        request: Request,
        reason: str,
        error: Exception | None = None,
        token: int | None = None,
    ) -> Event:
        request.stop(self.pool)
        request.finish_reason, request.error = reason, error
        for home in (self._running, self._waiting):
            if request in home:
                home.remove(request)
        return Event(request, token, True)

    # -- the asynchronous face -------------------------------------------------------------------

    async def stream(
        self, ids: Sequence[int] | Tensor, config: GenerationConfig | None = None, **options: Any
    ) -> AsyncIterator[int]:
        """The tokens of one request as they come; leaving the loop early cancels it.

        All streams of one event loop share the steps, which run in a thread of their own.
        """
        request = self.submit(ids, config, **options)
        async for event in self.follow(request):
            if event.token is not None:
                yield event.token

    def follow(self, request: Request) -> AsyncIterator[Event]:
        """The events of a request that was just submitted, as `stream` has its tokens."""
        self._queues[request] = asyncio.Queue()
        if self._driver is None or self._driver.done():
            self._driver = asyncio.get_running_loop().create_task(self._drive())
        return self._events(request)

    async def _events(self, request: Request) -> AsyncIterator[Event]:
        queue = self._queues[request]
        try:
            while True:
                event = await queue.get()
                yield event
                if event.done:
                    if request.error is not None:
                        raise request.error
                    return
        finally:
            self.leave(request)

    def leave(self, request: Request) -> None:
        """Follow it no more, and end it if it runs."""
        self._queues.pop(request, None)
        request.cancel()

    async def apart(self, call: Callable[[], Any]) -> Any:
        """What `call` returns, which runs between two steps: it may change the model's adapters."""

        def run() -> Any:
            with self._lock:
                return call()

        return await asyncio.get_running_loop().run_in_executor(self._thread, run)

    async def _drive(self) -> None:
        loop = asyncio.get_running_loop()
        while self.busy:
            try:
                events = await loop.run_in_executor(self._thread, self.step)
            except Exception as error:  # nothing can go on: every stream is told
                events = [self._end(request, "error", error) for request in self._queues]
            for event in events:
                if event.request in self._queues:
                    self._queues[event.request].put_nowait(event)
