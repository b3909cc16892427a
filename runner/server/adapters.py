"""`/v1/load_lora_adapter` and `/v1/unload_lora_adapter`, as vLLM has them."""

from pathlib import Path
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from runner.errors import AdapterError, UnknownAdapterError
from runner.openai.errors import ApiError
from runner.server.bodies import read_object
from runner.server.service import Service


def adapter_routes(service: Service) -> APIRouter:
    """The routes that load adapters and let them go, while the engine runs."""
    router = APIRouter()
    llm, most = service.answerer.llm, service.settings.max_body_bytes

    @router.post("/v1/load_lora_adapter")
    async def load(http: Request) -> Response:
        body = await read_object(http, max_bytes=most)
        name, given = _text(body, "lora_name"), _text(body, "lora_path")
        _refuse_others(body, {"lora_name", "lora_path", "load_inplace"})
        path = _confined(given, service.settings.adapter_root)
        in_place = body.get("load_inplace", False)
        if not isinstance(in_place, bool):
            raise _invalid("load_inplace", "is not true or false")
        if name in service.answerer.names or (name in llm.adapters and not in_place):
            raise _invalid("lora_name", f"{name!r} is taken; load_inplace replaces an adapter")
        if not _is_directory(path):
            what = f"'lora_path': there is no directory {given!r}."
            raise ApiError(what, code="adapter_not_found", param="lora_path", status=404)
        try:
            await service.engine.call(lambda it: it.load_adapter(name, path))
        except AdapterError as error:
            raise ApiError(str(error), code="invalid_adapter", param="lora_path") from error
        service.adapter_paths[name] = given
        return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")

    @router.post("/v1/unload_lora_adapter")
    async def unload(http: Request) -> Response:
        body = await read_object(http, max_bytes=most)
        name = _text(body, "lora_name")
        _refuse_others(body, {"lora_name", "lora_int_id"})
        try:
            await service.engine.call(lambda it: it.unload_adapter(name))
        except UnknownAdapterError as error:
            code = "adapter_not_found"
            raise ApiError(str(error), code=code, param="lora_name", status=404) from error
        service.adapter_paths.pop(name, None)
        return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")

    return router


def _confined(given: str, root: str | None) -> Path:
    """A directory below the one that the server may read adapters from."""
    if root is None:
        what = "This server reads no adapters: it was started without server.adapter_root."
        raise ApiError(what, code="forbidden", param="lora_path", status=403)
    place = Path(root).expanduser().resolve()
    try:
        path = (place / given).resolve()
    except (OSError, ValueError) as error:
        raise _invalid("lora_path", "is no path") from error
    if not path.is_relative_to(place):
        what = "'lora_path' leaves the directory that this server reads adapters from."
        raise ApiError(what, code="forbidden", param="lora_path", status=403)
    return path


def _is_directory(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # A name that is too long, a directory that cannot be entered.
        return False


def _text(body: dict[str, Any], name: str) -> str:
    value = body.get(name)
    if not isinstance(value, str) or not value:
        raise _invalid(name, "is not a text with at least one character")
    return value


def _refuse_others(body: dict[str, Any], known: set[str]) -> None:
    for name in sorted(body.keys() - known):
        raise ApiError(f"Unknown parameter: '{name}'.", code="unknown_parameter", param=name)


def _invalid(name: str, why: str) -> ApiError:
    return ApiError(f"Invalid '{name}': it {why}.", code="invalid_value", param=name)
