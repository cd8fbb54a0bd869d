"""From the command line to a model that is served."""

from tokenizers import Tokenizer

from dsv3_jax.convert.opening import OpenedModel, open_model
from dsv3_jax.data.errors import DataError
from dsv3_jax.data.tokenizer import special_tokens
from dsv3_jax.inference.arguments import InferArguments
from dsv3_jax.inference.chat import ChatError, ChatTemplate, chat_template
from dsv3_jax.inference.engine import Engine
from dsv3_jax.inference.server.protocol import MOST_PROMPTS
from dsv3_jax.inference.server.running import bound, run
from dsv3_jax.inference.server.scoring import Scorer
from dsv3_jax.inference.server.service import Service
from dsv3_jax.inference.stopping import stop_ids
from dsv3_jax.inference.weights import ready_to_decode
from dsv3_jax.layout import mesh_to_run
from dsv3_jax.loading import load_opened
from dsv3_jax.model_config import ModelConfig
from dsv3_jax.runtime import use_one_thread
from dsv3_jax.training.progress import note

PAGE_SIZE = 64
LOOPBACK = ("127.0.0.1", "::1", "localhost")


def serve(arguments: InferArguments) -> None:
    """Load a model and serve it until SIGINT or SIGTERM.

    Raises:
        UserError: no such model, one that this cannot serve, or an address that cannot be had.
    """
    # Before the model, which may take minutes.
    listening = bound(arguments.host, arguments.port)
    if arguments.host not in LOOPBACK and not arguments.api_key:
        note(f"anybody who reaches {arguments.host} can use this server: --api_key=KEY asks for a key")
    service, engine = load_service(arguments)
    run(service, engine, listening)


def load_service(arguments: InferArguments) -> tuple[Service, Engine]:
    opened = open_model(arguments.checkpoint)
    use_one_thread(opened.config.model)
    model, config, tokenizer = load_opened(opened, mesh=mesh_to_run(arguments.mesh), weights=arguments.weights)
    if tokenizer is None:
        raise DataError(f"{opened.path} has no tokenizer.json: text cannot be read or written without one")
    model = ready_to_decode(model)  # here already, so that the engine and the scores share its arrays
    engine = Engine(
        model,
        tokenizer,
        slots=arguments.slots,
        cache_tokens=arguments.cache_tokens,
        speculative=arguments.speculative,
        page_size=PAGE_SIZE,
        most_waiting=MOST_PROMPTS,
    )
    service = Service(
        engine,
        tokenizer,
        arguments.checkpoint.resolve().name,
        min(config.model.maximum_positions, engine.most_positions),
        stop_ids((opened.hugging_face or {}).get("files"), tokenizer),
        share=cache_positions(engine) // arguments.slots,
        chat=_chat_template(opened, tokenizer),
        score=Scorer(model, tokenizer),
        api_keys=arguments.api_key,
        special_texts=special_texts(tokenizer),
        routing=routing(config.model),
    )
    return service, engine


def routing(model: ModelConfig) -> dict[str, int]:
    """What a reader of `routed_experts` has to know. Layers count from 0, and the dense ones come first."""
    return {
        "first_layer": model.dense_layers,
        "layers": model.moe_layers,
        "experts": model.experts,
        "groups": model.expert_groups,
        "experts_per_token": model.experts_per_token,
    }


def cache_positions(engine: Engine) -> int:
    now = engine.statistics()
    return (now.pages_used + now.pages_free + now.pages_cached) * PAGE_SIZE


def special_texts(tokenizer: Tokenizer) -> dict[str, str]:
    special = special_tokens(tokenizer)
    named = {"bos_token": special.beginning, "eos_token": special.end, "pad_token": special.padding}
    texts = {name: None if index is None else tokenizer.id_to_token(index) for name, index in named.items()}
    return {name: text for name, text in texts.items() if text is not None}


def _chat_template(opened: OpenedModel, tokenizer: Tokenizer) -> ChatTemplate | None:
    try:
        return chat_template((opened.hugging_face or {}).get("files"), tokenizer)
    except ChatError as error:
        note(f"no chat: {error}")
        return None
