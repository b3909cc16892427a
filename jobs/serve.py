"""`runner serve`: the engine as an OpenAI endpoint that stays up."""

import os

from omegaconf import DictConfig

from runner.configured import open_llm, plain_options
from runner.errors import UsageError
from runner.lora_options import LoraOptions
from runner.pooling import PoolingParams
from runner.types import Pooling, SamplingParams


def serve(config: DictConfig, *, check_model: bool = True, pooling: Pooling = "mean") -> None:
    """Serves the model until it is told to stop.

    `sampling` has the values of the fields that a request leaves out; `check_model` refuses
    requests that name another model; `pooling` is that of embeddings.
    """
    PoolingParams(pooling=pooling)  # Refuses what it cannot be.
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        what = f"runner serve needs {error.name}: pip install 'mlx-runner[server]'"
        raise UsageError(what) from error
    from runner.answerer import Answerer
    from runner.server.engine_thread import EngineThread
    from runner.server.keys import ApiKeys
    from runner.server.process import run_server
    from runner.server.service import Service
    from runner.server.settings import ServerSettings

    plain = plain_options(config)
    settings = ServerSettings.of(plain["server"])
    keys = ApiKeys.of(os.environ, settings.api_key_file)
    lora = LoraOptions.of(plain["lora"])
    defaults = SamplingParams(**plain["sampling"])
    engine = EngineThread(lambda: open_llm(config))
    engine.llm.check(defaults)
    names = [*settings.served_model_name, engine.llm.loaded.name]
    answerer = Answerer(
        engine.llm,
        defaults,
        names,
        check_model=check_model,
        adapter=lora.default,
        pooling=pooling,
    )
    service = Service(answerer, engine, settings, keys)
    service.adapter_paths |= lora.paths
    try:
        run_server(service)
    finally:
        service.log.close()
