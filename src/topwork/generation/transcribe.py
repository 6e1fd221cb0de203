"""Speech to text with Whisper: what stands before the text, windows one after another, second
tries at higher temperatures (arXiv:2212.04356)."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from topwork.errors import ConfigError, nearest
from topwork.generation.align import moments_of
from topwork.generation.config import GenerationConfig
from topwork.generation.generate import generate, resolve_config
from topwork.generation.loop import GenerateOutput
from topwork.generation.times import STEP, Segment, cut, time_rules
from topwork.models.seq2seq import DecoderView
from topwork.models.speech_seq2seq import STRIDE
from topwork.models.stack import Memory
from topwork.text.languages import language_code

# What generation_config.json says beside the options of `generate`; the call's come first.
SPEECH = (
    "alignment_heads", "compression_ratio_threshold", "condition_on_prev_tokens",
    "forced_decoder_ids", "is_multilingual", "lang_to_id", "language", "logprob_threshold",
    "max_initial_timestamp_index", "median_filter_width", "no_speech_threshold",
    "no_timestamps_token_id", "prev_sot_token_id", "prompt_condition_type", "return_timestamps",
    "task", "task_to_id",
)  # fmt: skip
CALL = ("compression_ratio_threshold", "condition_on_prev_tokens", "is_multilingual", "language",
        "logprob_threshold", "no_speech_threshold", "prompt_condition_type", "return_timestamps",
        "task")  # fmt: skip
FORBIDDEN = ("assistant_model", "prompt_lookup_num_tokens", "negative_prompt_ids",
             "decoder_input_ids", "past_key_values")  # fmt: skip


@dataclass
class Transcript:
    """`sequences` [B, T], filled up with the padding id, each row's parts, and what stood before
    its text (start, language, task)."""

    sequences: Tensor
    segments: list[list[Segment]]
    inits: list[list[int]]

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)


@dataclass
class Row:
    """One sound under way: the frame it has come to, and what was said up to there.

    `real`: frames that are sound and no filling, where a mask told.
    """

    features: Tensor
    init: list[int]
    limit: int
    real: int | None = None
    seek: int = 0
    segments: list[Segment] = field(default_factory=list)
    goes_on: bool = False  # whether the next window sees what was said before

    @property
    def frames(self) -> int:
        return self.limit - self.seek


@torch.inference_mode()
def transcribe(
    model: Any,
    input_features: Tensor | None = None,
    generation_config: GenerationConfig | None = None,
    *,
    attention_mask: Tensor | None = None,
    prompt_ids: Tensor | Sequence[int] | None = None,
    temperature: float | Sequence[float] | None = None,
    return_token_timestamps: bool = False,
    return_segments: bool = False,
    **options: Any,
) -> Any:
    """The ids [B, T] of what is said in spectrograms [B, bins, frames], without what stands before.

    `language` (a name, a code, or one for each row; by default it is heard), `task` "transcribe"
    or "translate", `return_timestamps`: with time tokens between parts. Sounds longer than a window
    need them, and the `attention_mask` [B, frames] of a batch; the next window begins where the
    last whole part ended. `temperature`: several are tried in turn, each when the one before gave a
    text that compresses better than `compression_ratio_threshold` or is less likely than
    `logprob_threshold`; a window above `no_speech_threshold` that is unlikely too is skipped.
    `condition_on_prev_tokens` shows each window what was said before, `prompt_ids` what to think of
    as said before (`prompt_condition_type` "first-segment" or "all-segments").
    `return_token_timestamps` tells by the attention to the sound when each id is said, and
    `return_segments` gives a Transcript. Further options are those of `generate`.
    """
    was_training = model.training
    model.eval()
    try:
        call = _Call.of(model, input_features, attention_mask, generation_config, options)
        call.prompt = None if prompt_ids is None else [int(i) for i in prompt_ids]
        call.aligned = return_token_timestamps
        several = isinstance(temperature, (list, tuple))
        call.temperatures = tuple(temperature) if several else (temperature,)  # type: ignore
        rows = call.rows(input_features, attention_mask)
        while waiting := [row for row in rows if row.frames > 0]:
            call.window(waiting)
    finally:
        model.train(was_training)
    said = [[t for part in row.segments for t in part.tokens] for row in rows]
    width = max(map(len, said))
    filled = [ids + [call.config.filler] * (width - len(ids)) for ids in said]
    sequences = torch.tensor(filled, dtype=torch.long, device=model.device).view(len(rows), width)
    if return_segments or return_token_timestamps:
        return Transcript(sequences, [row.segments for row in rows], [row.init for row in rows])
    return sequences


@dataclass
class _Call:
    """One call, resolved."""

    model: Any
    config: GenerationConfig
    plain: dict[str, Any]  # the options of `generate` that the call gave
    speech: dict[str, Any]
    timed: bool
    window_frames: int
    longest: int | None  # `max_length`, counted on from window to window
    prompt: list[int] | None = None
    aligned: bool = False
    temperatures: tuple[float | None, ...] = (None,)
    heard: Memory | None = None  # of the first window, where it was needed before

    @classmethod
    def of(
        cls, model: Any, features: Tensor | None, mask: Tensor | None,
        given: GenerationConfig | None, options: dict[str, Any],
    ) -> _Call:  # fmt: skip
        if features is None or features.dim() != 3:
            shape = None if features is None else list(features.shape)
            raise ConfigError(f"input_features must be [batch, bins, frames], got {shape}")
        for name in FORBIDDEN:
            if options.get(name) is not None:
                raise ConfigError(f"{name} is not offered for speech; use prompt_ids for a prompt")
        file = model.generation_config
        speech = {k: file[k] for k in SPEECH if file.get(k) is not None}
        speech |= {k: options.pop(k) for k in CALL if options.get(k) is not None}
        plain = {k: v for k, v in options.items() if k not in CALL}
        plain.pop("do_sample", None)  # the temperature says it
        view = _View(model, Memory(features[:0]))
        config = resolve_config(view, given, {k: v for k, v in plain.items() if k not in CALLABLE})
        window = STRIDE * model.spec.encoder.context
        long = features.shape[-1] > window
        timed = speech.get("return_timestamps")
        if (long and options.get("return_timestamps") is False) or (long and timed is False):
            raise ConfigError(
                f"{features.shape[-1]} frames are more than a window of {window}: they need "
                "return_timestamps=True"
            )
        if long and len(features) > 1 and mask is None:
            raise ConfigError("a batch of long sounds needs its attention_mask [batch, frames]")
        if (timed or long) and "no_timestamps_token_id" not in speech:
            raise ConfigError(
                "times need no_timestamps_token_id, which generation_config.json does not name"
            )
        made = cls(model, config, plain, speech, bool(timed or long), window, config.max_length)
        made._check()
        return made

    def _check(self) -> None:
        get = self.speech.get
        if get("is_multilingual") is False and (get("language") or get("task")):
            raise ConfigError("language and task: this model knows English alone")
        if get("no_speech_threshold") is not None and get("logprob_threshold") is None:
            raise ConfigError("no_speech_threshold needs logprob_threshold")
        kinds = ("first-segment", "all-segments")
        if get("prompt_condition_type", kinds[0]) not in kinds:
            raise ConfigError(f"prompt_condition_type={get('prompt_condition_type')!r}; {kinds}")
        if get("prompt_condition_type") == kinds[1] and not get("condition_on_prev_tokens"):
            raise ConfigError("prompt_condition_type='all-segments' needs condition_on_prev_tokens")
        if get("task") is not None and "task_to_id" not in self.speech:
            raise ConfigError("task: generation_config.json of this model has no task_to_id")

    # -- what stands before a text ---------------------------------------------------------------

    @property
    def first(self) -> int:
        """The id of the time 0.00; above all ids where the model has no times."""
        return self.speech.get("no_timestamps_token_id", self.model.spec.decoder.vocab) + 1

    @property
    def start(self) -> int:
        return self.model._start({})

    def inits(self, features: Tensor) -> list[list[int]]:
        """Start, language, task, and whether times come, of each row."""
        language, task = self.speech.get("language"), self.speech.get("task")
        fixed: list[int | None] = []
        if language is None and task is None:
            fixed = _forced(self.speech, self.model.config.get("forced_decoder_ids"))
        count = len(features)
        several = isinstance(language, (list, tuple)) or language is None
        languages = language if several else [language] * count
        if languages is not None and len(languages) != count:
            raise ConfigError(f"{len(languages)} languages for {count} sounds")
        known = self.speech.get("lang_to_id")
        ids: list[int] | None = None
        if languages is not None:
            ids = [_language_id(name, known) for name in languages]
        elif known is not None and (not fixed or fixed[0] is None):
            ids = self.detect(features)
        rows = []
        for i in range(count):
            row: list[int | None] = [self.start, *fixed]
            if ids is not None:
                row[1:2] = [ids[i]]
            rows.append(self._with_task([t for t in row if t is not None], task, languages))
        return rows

    def _with_task(self, row: list[int], task: str | None, languages: Any) -> list[int]:
        tasks = self.speech.get("task_to_id") or {}
        if task is not None:
            if task not in tasks:
                raise ConfigError(f"task={task!r}{nearest(task, tasks)}; one of {list(tasks)}")
            row = [*row, tasks[task]]
        elif languages is not None and tasks and not set(tasks.values()) & set(row):
            row = [*row, tasks["transcribe"]]
        silent = self.speech.get("no_timestamps_token_id")
        if silent is not None and not self.timed and row[-1] != silent:
            return [*row, silent]
        return row[:-1] if self.timed and row[-1] == silent else row

    def detect(self, features: Tensor) -> list[int]:
        """The likeliest language of each row's first window, as an id."""
        rows = [Row(f, [], f.shape[-1]) for f in features]
        self.heard = self._listen(rows)
        ids = torch.full((len(rows), 1), self.start, device=self.model.device)
        logits = self.model.head(self.model.decode(self.heard, ids))[:, -1]
        known = torch.tensor(sorted(self.speech["lang_to_id"].values()), device=logits.device)
        return known[logits[:, known].argmax(-1)].tolist()

    # -- windows ---------------------------------------------------------------------------------

    def rows(self, features: Any, mask: Tensor | None) -> list[Row]:
        """Each sound (several times, for several sequences) at its beginning."""
        long = features.shape[-1] > self.window_frames and len(features) > 1
        limits = mask.sum(1).tolist() if long and mask is not None else (
            [features.shape[-1]] * len(features)
        )  # fmt: skip
        reals = [None] * len(features) if mask is None else [int(n) for n in mask.sum(1)]
        copies = self.config.num_return_sequences
        follows = bool(self.speech.get("condition_on_prev_tokens"))
        rows = []
        for sound, init, limit, real in zip(features, self.inits(features), limits, reals):
            rows += [Row(sound, init, int(limit), real, goes_on=follows) for _ in range(copies)]
        if copies > 1:
            self.heard = None
        kind = self.speech.get("prompt_condition_type", "first-segment")
        self.said_before: list[int] = []
        if self.prompt is not None and kind == "first-segment":
            previous = self.speech.get("prev_sot_token_id")
            self.said_before = self.prompt[self.prompt[0] == previous :]
        return rows

    def _listen(self, rows: Sequence[Row]) -> Memory:
        pieces = []
        for row in rows:
            stop = row.seek + min(row.frames, self.window_frames)
            piece = row.features[:, row.seek : stop]
            pieces.append(F.pad(piece, (0, self.window_frames - piece.shape[1])))
        return self.model.listen(torch.stack(pieces).to(self.model.device))

    def before(self, row: Row) -> list[int]:
        """What the decoder is given in front of a window's text."""
        spoken = [*([self.said_before] if self.said_before else [])]
        spoken += [_once(part.tokens, self.first) for part in row.segments]
        if row.goes_on and spoken:
            room = self.model.spec.decoder.context // 2 - 1
            previous = self.speech.get("prev_sot_token_id")
            suppressed = self.config.suppress_tokens or []
            if previous is None and len(suppressed) > 1:
                previous = suppressed[-2]  # where Whisper's own list has it
            mark = [] if previous is None else [previous]
            if self.speech.get("prompt_condition_type") == "all-segments" and self.prompt:
                mark = self.prompt
            return [*mark, *[t for ids in spoken for t in ids][-room:], *row.init]
        return [*(self.prompt or []), *row.init]

    def window(self, rows: list[Row]) -> None:
        """Write down the next window of each row."""
        memory = self.heard or self._listen(rows)
        self.heard = None
        starts = [self.before(row) for row in rows]
        self._lengthen(max(map(len, starts)))
        groups: dict[int, list[int]] = {}
        for i, ids in enumerate(starts):
            groups.setdefault(len(ids), []).append(i)
        for size, group in groups.items():
            ids = torch.tensor([starts[i] for i in group], device=self.model.device)
            where = torch.tensor(group, device=memory.hidden.device)
            self._write([rows[i] for i in group], ids, Memory(memory.hidden[where]), size)

    def _lengthen(self, before: int) -> None:
        """Room for the text: what stands before it is not counted by `max_length`."""
        context, new = self.model.spec.decoder.context, self.config.max_new_tokens
        if (new or 0) + before > context:
            raise ConfigError(
                f"{before} ids before the text and max_new_tokens={new or 0} are more than the "
                f"{context} places of the decoder: shorten the prompt, or ask for fewer"
            )
        if new is None:
            longest = context if self.longest is None else self.longest
            self.longest = min(longest + min(context // 2 - 1, before), context)

    def _write(self, rows: list[Row], ids: Tensor, memory: Memory, size: int) -> None:
        silence = self._silence(rows, ids, memory)
        left = list(range(len(rows)))
        found: dict[int, tuple[list[int], list[float] | None, bool]] = {}
        for temperature in self.temperatures:
            where = torch.tensor(left, device=ids.device)
            part = Memory(memory.hidden[where])
            out = self._run(part, ids[where], temperature)
            again = []
            for place, i in enumerate(left):
                tokens = self._trimmed(out.sequences[place, size:].tolist())
                weak, skipped = self._judge(out, place, tokens, temperature, silence[i])
                rows[i].goes_on = bool(self.speech.get("condition_on_prev_tokens")) and (
                    temperature is None or temperature < 0.5
                )
                moments = None
                if self.aligned:
                    real = rows[i].real
                    frames = self.window_frames if real is None else real - rows[i].seek
                    frames = max(frames, STRIDE)  # what comes after the sound is one state of it
                    whole = out.sequences[place, : size + len(tokens)]  # without what fills it up
                    moments = moments_of(self.model, part, place, whole, size, self.speech, frames)
                ended = tokens and tokens[-1] in self.config.stops
                found[i] = (tokens[:-1] if ended else tokens, moments, skipped)
                again += [i] if weak else []
            left = again
            if not left:
                break
        for i, row in enumerate(rows):
            self._keep(row, *found[i])

    def _keep(self, row: Row, tokens: list[int], moments: list[float] | None, skip: bool) -> None:
        frames = min(row.frames, self.window_frames)
        if skip:
            row.seek += frames
            return
        offset = row.seek * STEP / STRIDE
        parts, step = cut(tokens, self.first, offset, frames, STRIDE, moments)
        row.segments += parts
        row.seek += step if step > 0 else frames  # a text may claim to end where it began

    def _run(self, memory: Memory, ids: Tensor, temperature: float | None) -> GenerateOutput:
        view = _View(self.model, memory)
        warm = temperature is not None and temperature > 0
        options = {
            **self.plain, "do_sample": warm, "temperature": temperature if warm else 1.0,
            "return_dict_in_generate": True, "num_return_sequences": 1,
            "output_scores": self.speech.get("logprob_threshold") is not None,
        }  # fmt: skip
        if warm:
            options["num_beams"] = 1
        if self.config.max_new_tokens is None:
            options["max_length"] = self.longest
        if self.timed:
            rules = time_rules(
                ids.shape[1], (self.config.stops or [self.first - 1])[0], self.first,
                self.speech.get("max_initial_timestamp_index"),
            )  # fmt: skip
            options["logits_processor"] = [rules, *options.get("logits_processor", ())]
        return generate(view, ids, generation_config=self.config, **options)

    # -- second tries ----------------------------------------------------------------------------

    def _trimmed(self, tokens: list[int]) -> list[int]:
        """Without filling at the end, up to one end token."""
        filler, stops = self.config.filler, self.config.stops
        while tokens and tokens[-1] == filler and (
            filler not in stops or (len(tokens) > 1 and tokens[-2] == filler)
        ):  # fmt: skip
            tokens = tokens[:-1]
        return tokens

    def _silence(self, rows: list[Row], ids: Tensor, memory: Memory) -> list[float]:
        """How likely each window is without speech, by the token that says so, after the start."""
        if self.speech.get("no_speech_threshold") is None:
            return [0.0] * len(rows)
        hidden = self.model.decode(memory, ids)
        logits = self.model.head(hidden[:, ids.shape[1] - len(rows[0].init)])
        return logits.float().softmax(-1)[:, self.first - 2].tolist()

    def _judge(
        self, out: GenerateOutput, place: int, tokens: list[int], temperature: float | None,
        silence: float,
    ) -> tuple[bool, bool]:  # fmt: skip
        """Whether a text should be tried again, and whether it is of silence."""
        get, weak = self.speech.get, False
        ratio = get("compression_ratio_threshold")
        if ratio is not None and tokens:
            weak = compression(tokens, self.model.spec.decoder.vocab) > ratio
        least = get("logprob_threshold")
        if least is None:
            return weak, False
        mean = likelihood(out, place, tokens, temperature)
        quiet = get("no_speech_threshold")
        if quiet is not None and mean < least and silence > quiet:
            return False, True
        return weak or mean < least, False


CALLABLE = ("streamer", "logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn",
            "tokenizer")  # fmt: skip


class _View(DecoderView):
    """The decoder over a memory of sound, with the options that text has too."""

    def __init__(self, model: Any, memory: Memory) -> None:
        super().__init__(model, memory)
        self.generation_config = {
            k: v for k, v in model.generation_config.items() if k not in SPEECH
        }


def compression(tokens: list[int], vocab: int) -> float:
    """How many times smaller zlib makes the ids: high for a text that says one thing on and on."""
    size = int(math.log2(vocab) / 8) + 1
    raw = b"".join(t.to_bytes(size, "little") for t in tokens)
    return len(raw) / len(zlib.compress(raw))


def likelihood(
    out: GenerateOutput, place: int, tokens: list[int], temperature: float | None
) -> float:
    """Mean log-probability of one row's ids, its end counted, at temperature one."""
    assert out.scores is not None
    beams = out.beam_indices
    steps = out.scores[: len(tokens)]
    rows = [place] * len(steps) if beams is None else beams[place, : len(steps)].tolist()
    scores = torch.stack([step[row] for step, row in zip(steps, rows)])
    logs = (scores * (temperature or 1)).float().log_softmax(-1)
    chosen = torch.tensor(tokens, device=logs.device)[-len(logs) :]
    return (logs.gather(1, chosen[:, None]).sum() / len(chosen)).item()


def _once(tokens: list[int], first: int) -> list[int]:
    """A part's ids with one time at its end instead of a pair."""
    return tokens[:-1] if len(tokens) > 2 and tokens[-2] >= first else tokens


def _forced(speech: Mapping[str, Any], old: Any) -> list[int | None]:
    """What older files force behind the start token, in order; None: the language is heard."""
    forced = speech.get("forced_decoder_ids") or old or []
    if not forced or forced[0][0] != 1:
        return []
    if [place for place, _ in forced] != list(range(1, len(forced) + 1)):
        raise ConfigError(f"forced_decoder_ids={forced} leave a place out")
    return [token for _, token in forced]


def _language_id(language: Any, known: Mapping[str, int] | None) -> int:
    if not isinstance(language, str):
        raise ConfigError(f"language={language!r} is no name of a language")
    if known is None:
        raise ConfigError("language: generation_config.json of this model has no lang_to_id")
    token = language.lower() if language.lower() in known else f"<|{language_code(language)}|>"
    if token not in known:
        raise ConfigError(f"language={language!r}: this model does not know {token}")
    return known[token]
