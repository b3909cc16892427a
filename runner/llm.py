"""`LLM`: text in, text out; joins a model, its tokenizer and the engine."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from runner.models.load import LoadedModel, loaded_model  # First: it loads the BLAS, then mlx.

# isort: split
from runner.batch_size import check_batch_size, settled_batch_size
from runner.device_memory import default_memory_budget, parse_bytes
from runner.embeddings import embeddings
from runner.engine.adapters import SwapMode
from runner.engine.engine import Engine
from runner.engine.invariance import check_batch_invariance
from runner.engine.kv_options import KVOptions
from runner.engine.scheduler import Order
from runner.errors import ParameterError, PromptError
from runner.memory_fit import MemoryFit
from runner.models.adapters import adapter_weights
from runner.models.new_weights import exchange_weights, read_new_weights
from runner.pooling import PoolingParams
from runner.progress import Progress, all_of
from runner.prompt_requests import PromptLike, adapter_names, encoded_requests, prompt_requests
from runner.scores import ScoreInput, Tokens, in_order_of_work, scored_texts
from runner.speculative import SpeculativeOptions
from runner.text_engine import TextEngine
from runner.texts import Texts
from runner.types import (
    Embedding,
    Message,
    Pooling,
    Prompt,
    PromptRequest,
    RequestOutput,
    SamplingParams,
    Score,
)


class LLM:
    """A model that answers prompts, many at once, with the words that vLLM's users know.

    `model` (a `mlx.nn.Module`) and `tokenizer` (a transformers tokenizer in mlx-lm's wrapper) are
    there to be used. One thread may use an `LLM`.
    """

    def __init__(
        self,
        model: str | Path | LoadedModel,
        *,
        revision: str | None = None,
        dtype: str = "auto",
        max_model_len: int | None = None,
        max_batch_size: int | str = 32,
        order: Order = "offline",
        memory_budget: int | str | None = None,
        prefill_step_size: int = 2048,
        prefix_cache_bytes: int = 2**28,
        kv_bits: int | None = None,
        kv_group_size: int = 64,
        quantized_kv_start: int = 0,
        max_kv_size: int | None = None,
        batch_invariant: bool = False,
        speculative: str | Mapping[str, Any] | None = None,
        max_adapters: int = 8,
        seed: int = 0,
        trust_remote_code: bool = False,
    ) -> None:
        """Loads a model; `ModelConfig`, `EngineConfig` and `SpeculativeConfig` say what each is.

        Raises ModelError where the model cannot be loaded or its kind is not covered, and
        ParameterError where an option has a value that is not allowed.
        """
        check_batch_size(max_batch_size)
        drafting = SpeculativeOptions.of(speculative)
        budget = None if memory_budget is None else parse_bytes("memory_budget", memory_budget)
        kv_options = KVOptions(
            kv_bits=kv_bits,
            kv_group_size=kv_group_size,
            quantized_kv_start=quantized_kv_start,
            max_kv_size=max_kv_size,
            num_spare=drafting.num_spare(batch_invariant=batch_invariant),
        )
        shared: dict[str, Any] = {"kv_options": kv_options, "prefill_step_size": prefill_step_size}
        shared["prefix_cache_bytes"] = prefix_cache_bytes
        place: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
        place |= {"dtype": dtype, "max_model_len": max_model_len}
        rows = None if isinstance(max_batch_size, str) else max_batch_size
        asked: dict[str, Any] = {"max_batch_size": rows, "max_model_len": max_model_len}
        fit = MemoryFit(memory_budget=budget, **asked, **shared)
        model = loaded_model(model, **place, check_fit=fit)
        self.loaded, self.model, self.tokenizer = model, model.model, model.tokenizer
        self.seed, self._num_calls = seed, 0
        budget = default_memory_budget() if budget is None else budget
        size, self.batch_size_choice = settled_batch_size(
            max_batch_size, model, budget, kv_options, batch_invariant=batch_invariant
        )
        shared |= {"order": order, "memory_budget": budget, "max_adapters": max_adapters}
        self._make_text_engine = _engine_maker(
            model, drafting, size, seed=seed, batch_invariant=batch_invariant, **shared
        )
        self.text_engine = self._make_text_engine()
        self.engine = self.text_engine.engine

    def get_tokenizer(self) -> Any:
        """The tokenizer, by the name that vLLM gives this."""
        return self.tokenizer

    def generate(
        self,
        prompts: PromptLike | Sequence[PromptLike],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        adapter: str | None | Sequence[str | None] = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Completes each prompt; returns the outputs in the order of the prompts.

        Without `SamplingParams.seed` every call draws anew, and a script draws the same again;
        with it, a call repeated gives the same. `adapter` names a loaded adapter for all prompts,
        or one or None for each in a list.

        Raises:
            PromptError: a prompt is empty or does not fit the context, or its adapter is unknown.
        """
        listed = [prompts] if isinstance(prompts, str | Mapping) else list(prompts)
        return self._run_in_order(self._requests(listed, sampling_params, adapter), use_tqdm)

    def as_completed(
        self,
        prompts: Sequence[PromptLike],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        adapter: str | None | Sequence[str | None] = None,
    ) -> Iterator[RequestOutput]:
        """Completes each prompt; yields outputs as they finish, `request_id` the prompt's place.

        A prompt that cannot be run comes out with `error` set, and the others go on.
        """
        asked = self._requests(prompts, sampling_params, adapter)
        return self.run(encoded_requests(asked, self.tokenizer))

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        adapter: str | None | Sequence[str | None] = None,
        use_tqdm: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[RequestOutput]:
        """Answers one conversation or several, each a list of {role, content}.

        Like `generate` otherwise; `chat_template_kwargs` are further variables of the template, and
        `tools` the JSON schemas of what it may call.
        """
        one = bool(messages) and isinstance(messages[0], Mapping)
        options = dict(chat_template_kwargs or {}) | ({"tools": list(tools)} if tools else {})
        listed: list[Any] = [messages] if one else list(messages)
        prompts = [Prompt(messages=list(m), chat_template_kwargs=options) for m in listed]
        return self._run_in_order(self._requests(prompts, sampling_params, adapter), use_tqdm)

    def score(
        self,
        inputs: Sequence[ScoreInput],
        *,
        top_logprobs: int = 0,
        entropy: bool = False,
        adapter: str | None | Sequence[str | None] = None,
        use_tqdm: bool = True,
    ) -> list[Score]:
        """Log-probabilities of given texts in the model's own distribution, float32.

        An input is a text, a list of token ids, or a tuple (context, continuation) of which the
        continuation alone is scored; a list of continuations gives a score for each. The scores are
        in the order of the inputs. `top_logprobs` alternatives come with each token, 0 to 100;
        `adapter` is as in `generate`.

        Raises:
            PromptError: a text is empty, or does not fit the context.
        """
        scores = self.score_as_completed(
            inputs, top_logprobs=top_logprobs, entropy=entropy, adapter=adapter
        )
        done = all_of(scores, None, enabled=use_tqdm)
        return sorted(done, key=lambda score: (score.index, score.choice))

    def score_as_completed(
        self,
        inputs: Sequence[ScoreInput],
        *,
        top_logprobs: int = 0,
        entropy: bool = False,
        adapter: str | None | Sequence[str | None] = None,
    ) -> Iterator[Score]:
        """Like `score`, but yields each score as it is there, longest texts first.

        `index` and `choice` say whose it is; one that cannot be scored has `error` set.
        """
        if not 0 <= top_logprobs <= 100:
            raise ParameterError(f"top_logprobs={top_logprobs} is not allowed: 0 to 100")
        texts = in_order_of_work(scored_texts(inputs, self.tokenizer))
        by_id = {text.request_id: text for text in texts}
        names = adapter_names(adapter, len(inputs))
        requests = (
            replace(text, adapter=names[text.index]).request(num_top=top_logprobs, entropy=entropy)
            for text in texts
        )
        return (by_id[output.request_id].score(output) for output in self.run(requests))

    def embed(
        self,
        inputs: Sequence[Tokens],
        *,
        pooling: Pooling = "mean",
        normalize: bool = True,
        dimensions: int | None = None,
        adapter: str | None | Sequence[str | None] = None,
        use_tqdm: bool = True,
    ) -> list[Embedding]:
        """Embeddings of texts, or of lists of token ids, in their order.

        The hidden states after the final norm, float32, pooled over the text's tokens as
        `PoolingParams` says; of a text the tokenizer makes the tokens of a prompt. `adapter` is as
        in `generate`.

        Raises:
            PromptError: a text has no tokens, or does not fit the context.
            ModelError: the model gives no embeddings.
        """
        found = self.embed_as_completed(
            inputs, pooling=pooling, normalize=normalize, dimensions=dimensions, adapter=adapter
        )
        count = None if isinstance(inputs, str) else len(inputs)
        return sorted(all_of(found, count, enabled=use_tqdm), key=lambda it: it.index)

    def embed_as_completed(
        self,
        inputs: Sequence[Tokens],
        *,
        pooling: Pooling = "mean",
        normalize: bool = True,
        dimensions: int | None = None,
        adapter: str | None | Sequence[str | None] = None,
    ) -> Iterator[Embedding]:
        """Like `embed`, but yields each embedding as it is there, `index` its text's place.

        A text that cannot be embedded comes out with `error` set, and the others go on.
        """
        params = PoolingParams(pooling=pooling, normalize=normalize, dimensions=dimensions)
        params.check(self.engine.admission.embedding_size)
        return embeddings(self.run, self.tokenizer, inputs, params, adapter)

    def run(
        self,
        requests: Iterable[PromptRequest | RequestOutput],
        *,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> Iterator[RequestOutput]:
        """Runs requests, pulled as they are needed; yields each as its samples have finished.

        A request that cannot be run comes out with `error` set, and the others go on; an output
        among the requests, of a row that failed before it was one, is passed on. `interrupted` is
        asked after every step: once it says so, the run ends and drops what is in flight.
        """
        if self.text_engine.request_ids:
            raise RuntimeError("this LLM is in the middle of another run")
        source, more = iter(requests), True
        try:
            while (more or self.engine.has_unfinished) and not interrupted():
                while more and self.engine.wants_requests:
                    request = next(source, None)
                    more = request is not None
                    if isinstance(request, RequestOutput):
                        yield request
                    elif request is not None and (refused := self.text_engine.add(request)):
                        yield refused
                yield from self.text_engine.step()
        except BaseException:
            # An engine that failed may fail again, and that is not to hide why.
            with suppress(Exception):
                self.text_engine.abort_all()
            raise
        self.text_engine.abort_all()

    @property
    def vocab_size(self) -> int:
        """Token ids that the model knows: 0 up to this, not included."""
        return self.engine.admission.vocab_size

    @property
    def weight_version(self) -> int:
        """Counts the changes of weights: 0 before the first adapter, see `Completion`."""
        return self.engine.adapters.weight_version

    def load_adapter(
        self,
        name: str,
        path: str | Path | None = None,
        *,
        arrays: Mapping[str, Any] | None = None,
        scale: float | None = None,
        mode: SwapMode = "keep",
    ) -> int:
        """Lets `name` stand for an adapter from the next step on; returns the weight version.

        The adapter is a directory as mlx-lm or PEFT write it, or `arrays` by the names that either
        gives them with their `scale` (PEFT: alpha / r). It is read and checked aside. A name that
        is taken gets the new content: rows in flight end with the old one (mode keep) or go on
        under the new one (update), and each says which version gave which tokens.

        Raises:
            AdapterError: it cannot be read or does not fit; what the name stood for serves on.
        """
        return self.engine.load_adapter(name, adapter_weights(path, arrays, scale), mode=mode)

    @property
    def adapters(self) -> dict[str, str]:
        """The adapters that are loaded: the digest of each one's content, by name."""
        return self.engine.adapters.digests

    def unload_adapter(self, name: str) -> None:
        """Forgets an adapter; rows in flight end with it, and requests that wait for it fail."""
        self.engine.unload_adapter(name)

    def update_weights(self, path: str | Path) -> int:
        """Gives the model other weights, the safetensors of a directory, between two steps.

        They are read and checked aside. Rows in flight go on under them; adapters stay loaded.
        Returns the weight version. Raises ModelError; the weights of before serve on.
        """
        exchange_weights(self.model, read_new_weights(self.model, path))
        return self.engine.weights_changed()

    def restart(self) -> None:
        """Makes a new engine, with the same adapters, after one that failed; its rows are gone."""
        before = self.engine.adapters
        self.text_engine = self._make_text_engine()
        self.engine = self.text_engine.engine
        self.engine.adapters.take_over(before)

    def check(self, params: SamplingParams) -> None:
        """Raises ParameterError where no request can be sampled as `params` say."""
        self.text_engine.check(params)

    def _run_in_order(self, requests: list[PromptRequest], use_tqdm: bool) -> list[RequestOutput]:
        outputs: dict[str, RequestOutput] = {}
        with Progress(len(requests), enabled=use_tqdm) as progress:
            for output in self.run(encoded_requests(requests, self.tokenizer)):
                if output.error is not None:
                    raise PromptError(f"prompt {output.request_id}: {output.error.message}")
                outputs[output.request_id] = output
                progress.update(output)
        return [outputs[request.request_id] for request in requests]

    def _requests(
        self,
        prompts: Sequence[PromptLike | Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        adapter: str | None | Sequence[str | None],
    ) -> list[PromptRequest]:
        self._num_calls += 1
        return prompt_requests(prompts, sampling_params, call=self._num_calls, adapter=adapter)


def _engine_maker(
    model: LoadedModel,
    drafting: SpeculativeOptions,
    max_batch_size: int,
    *,
    seed: int,
    batch_invariant: bool,
    **options: Any,
) -> Callable[[], TextEngine]:
    """Makes engines of a model, with the options of `Engine`; tries out what they promise."""
    texts = Texts(model.tokenizer)
    make_engine = partial(
        Engine,
        model.model,
        max_model_len=model.max_model_len,
        eos_token_ids=model.tokenizer.eos_token_ids,
        decode=texts.decode,
        **options,
    )
    if batch_invariant:
        check_batch_invariance(make_engine, max_batch_size=max_batch_size)

    def make_text_engine() -> TextEngine:
        engine = make_engine(max_batch_size=max_batch_size, speculation=drafting.built(model))
        return TextEngine(engine, texts, model.tokenizer, seed=seed)

    return make_text_engine
