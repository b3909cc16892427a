"""How a server behaves, checked before a model is loaded."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.errors import ParameterError


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """The options of the group `server`; `runner.config.ServerConfig` says what each is."""

    host: str = "127.0.0.1"
    port: int = 8000
    served_model_name: tuple[str, ...] = ()
    max_waiting: int = 256
    max_prompt_tokens: int | None = None
    max_n: int = 128
    max_body_bytes: int = 2**23
    request_timeout: float | None = 600.0
    shutdown_timeout: float = 30.0
    adapter_root: str | None = None
    api_key_file: str | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    metrics_need_key: bool = False
    log_file: str | None = None
    log_prompts: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "served_model_name", tuple(self.served_model_name))
        for name, least in (
            ("max_waiting", 0),
            ("max_prompt_tokens", 1),
            ("max_n", 1),
            ("max_body_bytes", 1),
            ("shutdown_timeout", 0),
            ("requests_per_minute", 1),
            ("tokens_per_minute", 1),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise _refused(name, value, f"at least {least}")
        if self.request_timeout is not None and self.request_timeout <= 0:
            raise _refused("request_timeout", self.request_timeout, "above 0, or null for none")
        if not 0 <= self.port <= 65535:
            raise _refused("port", self.port, "0 to 65535, where 0 takes any that is free")
        if self.adapter_root is not None and not Path(self.adapter_root).expanduser().is_dir():
            raise _refused("adapter_root", self.adapter_root, "a directory that is there")
        if self.log_file is not None and not Path(self.log_file).expanduser().parent.is_dir():
            raise _refused("log_file", self.log_file, "a file in a directory that is there")

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "ServerSettings":
        """Takes the plain options of the group."""
        return cls(**config)


def _refused(name: str, value: object, allowed: str) -> ParameterError:
    return ParameterError(f"server.{name}={value} is not allowed: {allowed}")
