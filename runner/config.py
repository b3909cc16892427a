"""The typed configuration: the fixed parts field by field, the swappable parts as `_target_` nodes.

Standard library only, so that composing a configuration never imports mlx. A string under a field
says what it does; `???` is Hydra's mark for a value that has to be given.
"""

from dataclasses import dataclass, field
from typing import Any

MISSING = "???"


@dataclass
class ModelConfig:
    """Which weights and tokenizer (`model=`)."""

    path: str = MISSING
    """A local directory, a `.gguf` file, `pkg://package/file.gguf`, or a Hugging Face id, also
    written id@revision or id:file.gguf."""
    revision: str | None = None
    """Branch, tag or commit of a Hugging Face id."""
    dtype: str = "auto"
    """auto (float32 on CPU, the model's own elsewhere and in convert), float32, bfloat16 or
    float16."""
    max_model_len: int | None = None
    """Prompt and completion together, in tokens; null takes what the model states."""
    trust_remote_code: bool = False
    """Runs Python code that the model's files bring along, for the model and its tokenizer."""


@dataclass
class EngineConfig:
    """How the batch is run (`engine=`).

    The options about keys and values, `kv_bits` and what follows it, change results, so that they
    cannot be changed when a run is resumed; the others do not change what a row gets.
    """

    # Any: Hydra has no type for a number or one word; `LLM` checks it.
    max_batch_size: Any = 32
    """Rows decoded together; auto measures once per model and device what pays."""
    order: str = "offline"
    """In which requests are taken: offline chooses what keeps the batch full and shares most, fcfs
    takes them as they came, which is what many clients of a server want."""
    memory_budget: str | None = None
    """Bytes that weights, caches and forwards may take together, also written 8GiB or 500MB; fewer
    rows run at once where they are long. null takes a share of what the device has."""
    prefill_step_size: int = 2048
    """Prompt tokens, pads included, forwarded at once; prompts prefilled together have no more
    of them, or 512 where that is more."""
    prefix_cache_bytes: int = 268435456
    """Keys and values kept for prompts that begin like an earlier one; 0 keeps none."""
    kv_bits: int | None = None
    """Stores keys and values in 2, 3, 4, 5, 6 or 8 bits; null as they are. Changes results."""
    kv_group_size: int = 64
    """Entries that share a scale, 32, 64 or 128; it has to divide the size of an attention head."""
    quantized_kv_start: int = 0
    """First tokens of each row that are not quantised, however long the row grows. (mlx-lm, by this
    name, quantises all tokens of a row as soon as there are more.)"""
    max_kv_size: int | None = None
    """Columns kept of a row in each attention layer, 5 or more: of its first 4 tokens and of the
    latest, all that is attended to. null keeps all. max_model_len still holds. Changes results."""
    batch_invariant: bool = False
    """Gives a row the same bits whatever the batch size, its neighbours, the order, the prefill
    steps and where a run is resumed; tried out at start and refused where it is not so."""


@dataclass
class SpeculativeConfig:
    """What is drafted ahead of the model (`speculative=`); results are the same with and without.

    Options may be changed when a run is resumed.
    """

    proposers: list[str] = field(default_factory=list)
    """Where drafts come from, in order, of ngram, previous and draft_model; a row takes the first
    that has one. Empty drafts nothing."""
    num_draft_tokens: int = 15
    """Tokens drafted for a row at once at most, 1 to 32; the gate takes 1, 3, 7, 15, 31 or all."""
    gate: bool = True
    """Drafts only where it is measured to be faster than plain decoding; false always drafts."""
    ngram_min: int = 1
    """Fewest last tokens of a row that are looked up in what came before, 1 to 16."""
    ngram_max: int = 4
    """Most of them; the longest run that came before counts."""
    ngram_scope: str = "row"
    """Where they are looked up: row (its prompt and completion), group (the other completions of
    the prompt too), or job (all other rows as well)."""
    # Not `from`, which no Python field can be named; the command line takes that as well.
    previous: str | None = None
    """Results of an earlier run, a directory or a merged file, of whose rows the same rows here are
    drafted; speculative.from says the same."""
    draft_model: str | None = None
    """A model that drafts, named as in `model.path`; its vocabulary has to be the same."""


@dataclass
class LoraConfig:
    """Adapters (`lora=`), as mlx-lm or PEFT write them: LoRA and DoRA. Changes results."""

    path: str | None = None
    """Directory of the adapter that all rows use; its name is the directory's."""
    # Any: Hydra adds no key to a typed mapping.
    adapters: Any = None
    """Directories by name, as in {a: path, b: path}: rows of one batch use different ones."""
    column: str | None = None
    """Column with the name of each row's adapter; null there takes the model as it is."""
    sweep: bool = False
    """Runs every row with each of the adapters and with none, in one mixed batch."""
    watch: str | None = None
    """Directory that is an adapter or gets adapters, of which all rows use the newest: each new one
    is taken in while the job runs. Rows record what they used; generate and rollout only."""
    swap: str = "keep"
    """With watch: keep lets rows in flight end with the adapter they began with; update lets them
    go on under the new one."""
    max_adapters: int = 8
    """Adapters that rows of one batch use together, each with a copy in memory; more of them take
    turns, and the one used least recently gives up its copy. Does not change what a row gets."""


@dataclass
class SamplingConfig:
    """How tokens are drawn (`sampling=`); see `runner.SamplingParams`."""

    n: int = 1
    """Completions per prompt; the group size of a rollout."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the most likely token."""
    top_p: float = 1.0
    """Keeps the smallest set of most likely tokens with at least this mass."""
    top_k: int = 0
    """Keeps the k most likely tokens; 0 keeps all."""
    min_p: float = 0.0
    """Drops tokens less likely than this fraction of the most likely one."""
    max_tokens: int | None = 256
    """Tokens per completion at most; null fills the context, 0 only scores the prompt."""
    seed: int = 0
    """Same seed, same draws, whatever the batch size, the order or the machine's load."""
    stop: list[str] = field(default_factory=list)
    """Strings that end a completion."""
    stop_token_ids: list[int] = field(default_factory=list)
    """Token ids that end a completion, besides the model's own."""
    ignore_eos: bool = False
    """Goes on past the model's end-of-sequence tokens."""
    include_stop_str_in_output: bool = False
    """Leaves the stop string at the end of the text."""
    skip_special_tokens: bool = True
    """Leaves special tokens out of the text."""
    repetition_penalty: float = 1.0
    """Makes tokens of the prompt and the completion so far less likely where above 1."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens that the completion holds; -2 to 2."""
    frequency_penalty: float = 0.0
    """Subtracted once for each time that the completion holds the token; -2 to 2."""
    # Any: Hydra adds no key to a typed mapping, and the ids may be written as text.
    logit_bias: Any = None
    """Token id -> what is added to its logit, -100 to 100, as in {5: 1.5}."""
    min_tokens: int = 0
    """Tokens before the first that may end a completion."""
    bad_words: list[str] = field(default_factory=list)
    """Words that a completion never holds."""
    allowed_token_ids: list[int] | None = None
    """The only token ids that a completion may hold; null allows all."""
    prompt_logprobs: int | None = None
    """0 writes the model's own logprob of every prompt token; null writes none."""
    echo: bool = False
    """Puts the prompt before the completion in `text`, writes the prompt's logprobs, and in the
    column `text_offsets` where in the text each token begins."""


@dataclass
class DataConfig:
    """Which rows, and how a row becomes a prompt (`data=`)."""

    _target_: str = "runner.data.Dataset"
    _convert_: str = "all"
    path: str = MISSING
    """A .parquet, .jsonl, .jsonl.gz, .arrow or .txt file, a directory or glob of them, a Hugging
    Face dataset id, or `pkg://package/file.jsonl`."""
    name: str | None = None
    """Configuration of a Hugging Face dataset."""
    split: str | None = None
    """Split of a Hugging Face dataset; null means train."""
    id_column: str | None = None
    """Column with a name for each row; null names a row by its prompt's digest."""
    prompt_column: str | None = None
    """Column with the prompt's text, or with the text that is scored."""
    messages_column: str | None = None
    """Column with chat messages, a list of {role, content}."""
    token_ids_column: str | None = None
    """Column with prompts that are tokenised already, a list of int."""
    prompt_template: str | None = None
    """Jinja template over the row's columns; its text is the prompt."""
    chat: bool = False
    """Sends the prompt's text as a user message through the model's chat template."""
    system_prompt: str | None = None
    """System message before the others; needs `chat` or `messages_column`."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Further variables for the chat template, such as enable_thinking."""
    tools_column: str | None = None
    """Column with the tools that a chat may call, a list of JSON schemas or its text; null in a row
    gives it none."""
    limit: int | None = None
    """Rows to take at most."""
    offset: int = 0
    """Rows to skip first."""
    shuffle_seed: int | None = None
    """Shuffles the rows with this seed, before offset and limit."""
    text_lines: bool = False
    """Makes each line of a .txt file a row, blank ones left out; else a file is one."""


@dataclass
class OutputConfig:
    """Where results go (`output=`)."""

    _target_: str = "runner.data.ResultWriter"
    _partial_: bool = True
    dir: str = MISSING
    """Directory of the results; one that holds other results is refused."""
    overwrite: bool = False
    """Removes the results that the directory holds, and starts again."""
    shard_rows: int = 4096
    """Result rows in one part file."""
    commit_seconds: float = 60.0
    """A finished row waits this long at most until it is on disk for good."""
    max_error_rate: float = 0.01
    """Stops the run where more of its rows than this fail, from the 100th on; 1 never stops it."""
    merge: bool = False
    """Merges the results of a finished job in the order of its input, as `runner merge` does."""
    merge_format: str = "arrow"
    """Of the merged files: arrow, parquet or jsonl."""
    merge_rows: int | None = None
    """Result rows in one merged file; null makes one file."""


@dataclass
class ServerConfig:
    """How `runner serve` listens, and what it takes from whom (`server=`)."""

    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 lets other machines in."""
    port: int = 8000
    """0 takes any that is free."""
    served_model_name: list[str] = field(default_factory=list)
    """Further names of the model; answers say the first."""
    max_waiting: int = 256
    """Prompts that may wait while the batch is full; a request beyond it is answered 429."""
    max_prompt_tokens: int | None = None
    """Tokens of a prompt at most; null for what the context holds."""
    max_n: int = 128
    """Completions of one prompt at most."""
    max_body_bytes: int = 8388608
    """Bytes of a request's body at most; one beyond it is answered 413."""
    request_timeout: float | None = 600.0
    """Seconds until a request that is not done is answered 504; null waits for ever."""
    shutdown_timeout: float = 30.0
    """Seconds that requests in flight have to end once the server is told to stop."""
    adapter_root: str | None = None
    """Directory below which /v1/load_lora_adapter may read; null refuses to load any."""
    api_key_file: str | None = None
    """File with API keys, one a line; the environment variable RUNNER_API_KEYS may hold more, a
    comma between two. With neither, requests need no key."""
    requests_per_minute: int | None = None
    """Requests that a key may make, or an address where no key is needed; one beyond it is answered
    429 and told when to come again. null sets no limit."""
    tokens_per_minute: int | None = None
    """Tokens of prompts and completions together that a key or an address may use; those of a
    completion count once it has ended. null sets no limit."""
    metrics_need_key: bool = False
    """Asks for a key at /metrics too, which is open like /health otherwise."""
    log_file: str | None = None
    """File that gets a line of JSON for each request; null writes them on stderr."""
    log_prompts: bool = False
    """Puts the prompts into those lines."""


@dataclass
class Config:
    """The root: one node per group."""

    job: Any = MISSING
    model: ModelConfig = field(default_factory=ModelConfig)
    data: Any = MISSING
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    speculative: SpeculativeConfig = field(default_factory=SpeculativeConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    server: ServerConfig = field(default_factory=ServerConfig)
    output: Any = MISSING
    reward: Any = None
    tracker: Any = None
