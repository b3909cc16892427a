"""`/tokenize`, `/detokenize` and `/tokenizer_info`, as vLLM has them and lm-eval asks for them."""

from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from runner.errors import PromptError
from runner.openai.errors import ApiError
from runner.openai.fields import DETOKENIZE, TOKENIZE, checked_fields
from runner.openai.messages import chat_prompt
from runner.prompts import encode_prompt
from runner.server.bodies import read_object
from runner.server.service import Service


def tokenizer_routes(service: Service) -> APIRouter:
    """The routes of the tokenizer; their bodies need not name a model."""
    router = APIRouter()
    most = service.settings.max_body_bytes

    @router.post("/tokenize")
    async def tokenize(http: Request) -> Response:
        fields = checked_fields(await read_object(http, max_bytes=most), TOKENIZE)
        service.answerer.check_name(fields.get("model"))
        if ("prompt" in fields) == ("messages" in fields):
            what = "Give 'prompt' or 'messages', one of them."
            raise ApiError(what, code="missing_required_parameter", param="prompt")
        try:
            token_ids = await service.with_tokenizer(lambda it: _encoded(fields, it))
        except (PromptError, UnicodeError) as error:
            raise ApiError(str(error), code="invalid_value", param="messages") from error
        shown = {"tokens": token_ids, "count": len(token_ids)}
        shown["max_model_len"] = service.max_model_len
        if fields.get("return_token_strs", False):
            pieces = [service.token_bytes(token_id) for token_id in token_ids]
            shown["token_strs"] = [piece.decode(errors="replace") for piece in pieces]
        return JSONResponse(shown)

    @router.post("/detokenize")
    async def detokenize(http: Request) -> Response:
        fields = checked_fields(await read_object(http, max_bytes=most), DETOKENIZE)
        service.answerer.check_name(fields.get("model"))
        size = service.answerer.llm.vocab_size
        for token_id in fields["tokens"]:
            if not 0 <= token_id < size:
                what = f"Invalid 'tokens': {token_id} is not in the vocabulary of {size}."
                raise ApiError(what, code="invalid_value", param="tokens")
        text = await service.with_tokenizer(lambda it: it.decode(fields["tokens"]))
        return JSONResponse({"prompt": text})

    @router.get("/tokenizer_info")
    async def tokenizer_info() -> Response:
        """What a client needs to know of the tokenizer, whose files it may not have."""
        it = service.tokenizer
        names = ("bos_token", "eos_token", "pad_token", "unk_token", "chat_template")
        shown: dict[str, Any] = {name: getattr(it, name, None) for name in names}
        shown["vocab_size"] = service.answerer.llm.vocab_size
        shown["model_max_length"] = service.max_model_len
        return JSONResponse(shown)

    return router


def _encoded(fields: Mapping[str, Any], tokenizer: Any) -> list[int]:
    if "messages" in fields:
        return encode_prompt(chat_prompt(fields), tokenizer)[1]
    adds = fields.get("add_special_tokens", True)
    return list(tokenizer.encode(fields["prompt"], add_special_tokens=adds))
