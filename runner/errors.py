"""The errors this package raises on purpose; anything else is a bug and propagates.

RunnerError
├── UsageError             what was asked for cannot be done: one line, exit code 2
│   ├── ParameterError     an option has a value that is not allowed
│   ├── DataError          the input rows cannot be read
│   ├── ModelError         the model cannot be loaded, or its kind is not covered
│   ├── AdapterError       an adapter cannot be read, or does not fit the model
│   └── OutputError        the output directory cannot take these results
├── StoppedError           a run cannot go on now: one line, exit code 1, resumable
└── RowError               one row cannot be done: a result row with `error`, the job goes on
    ├── PromptError        no prompt, no tokens, or more tokens than the context holds
    ├── UnknownAdapterError  the row names an adapter that is not loaded
    └── RewardError        the reward function failed on this row
"""


class RunnerError(Exception):
    """Base of every error raised on purpose."""


class UsageError(RunnerError):
    """What was asked for cannot be done; the message is one line and says what to do instead."""


class ParameterError(UsageError, ValueError):
    """An option has a value that is not allowed; the message names it, its value and what is."""


class DataError(UsageError):
    """The input rows cannot be read."""


class ModelError(UsageError):
    """The model cannot be loaded, or needs something that is not covered."""


class AdapterError(UsageError, ValueError):
    """An adapter cannot be read or does not fit the model; the message names the tensor."""


class OutputError(UsageError):
    """The output directory cannot take these results."""


class StoppedError(RunnerError):
    """A run cannot go on now: the disk is full, or too many rows fail.

    What is committed stays, and the same command goes on from there.
    """


class RowError(RunnerError):
    """One row cannot be done; it becomes a result row with `error` set."""


class PromptError(RowError, ValueError):
    """A row has no usable prompt, or one that does not fit the context."""


class UnknownAdapterError(RowError, ValueError):
    """A row names an adapter that is not loaded; the message lists those that are."""


class RewardError(RowError):
    """The reward function failed on a row."""
