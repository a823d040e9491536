"""adapter_config.json, strictly read: what vLLM would overlook or read otherwise than peft is refused."""

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .base import Base
from .errors import RefusedError
from .files import CONFIG, parse_object, show

# How strongly an adapter may be mixed in, alpha/r or alpha/sqrt(r). Those that people train lie between 0.1
# and 20; outside of this its answers are noise, or the base's own.
_SCALINGS = (0.001, 100.0)
_MAX_RANK = 512  # vLLM has no kernel for more
_MAX_ALPHA = 51_200  # what these two leave

_LINEAR = "all-linear"  # peft's word for every module
_EXPRESSION_LENGTH = 1_000
_EXPRESSION_SECONDS = 1.0  # for all modules together

_AGAIN = "train without it, with a plain LoraConfig"

# Of these any value is refused but an empty one and those named: vLLM does not do what they ask for, and most
# of them it does not even mention.
_REFUSED: dict[str, tuple[tuple[object, ...], str]] = {
    "use_dora": ((), "vLLM does not serve DoRA"),
    "bias": (("none",), "vLLM does not serve biases"),
    "lora_bias": ((), "vLLM does not serve biases"),
    "modules_to_save": ((), "vLLM serves only LoRA tensors, no whole modules"),
    "fan_in_fan_out": ((), "vLLM would not transpose the weights"),
    "layers_to_transform": ((), "vLLM applies an adapter to every layer"),
    "layers_pattern": ((), "vLLM applies an adapter to every layer"),
    "layer_replication": ((), "vLLM does not replicate layers"),
    "trainable_token_indices": ((), "vLLM would leave out the trained tokens"),
    "target_parameters": ((), "vLLM serves only whole modules"),
    "exclude_modules": ((), "vLLM does not read it: name in target_modules only what was trained"),
    "rank_pattern": ((), "vLLM ignores it and reads one rank for all"),
    "alpha_pattern": ((), "vLLM ignores it and takes one alpha for all"),
    "alora_invocation_tokens": ((), "vLLM would apply the adapter to every token"),
}

# These change nothing once the adapter is trained: any value of their type.
_HARMLESS: dict[str, tuple[type, ...]] = {
    "auto_mapping": (dict,),
    "ensure_weight_tying": (bool,),
    "eva_config": (dict,),
    "inference_mode": (bool,),
    "lora_dropout": (int, float),
    "megatron_core": (str,),
    "peft_version": (str,),
    "qalora_group_size": (int,),
    "revision": (str,),
    "runtime_config": (dict,),
}

# The ways to begin that leave the base as it is; the others train against a base that was changed.
_INITS = (True, False, "gaussian", "eva", "orthogonal")

_READ = {"peft_type", "task_type", "r", "lora_alpha", "use_rslora", "init_lora_weights"} | {
    "base_model_name_or_path",
    "target_modules",
}


@dataclass(frozen=True)
class Config:
    """What an adapter's config says."""

    rank: int
    alpha: float
    scaling: float  # what lora_B is multiplied with
    base: str  # the model that it was trained on
    targets: tuple[str, ...] | str  # names or ends of names, or an expression


def parse(content: bytes) -> Config:
    """Read the file's content by all rules that need no base."""
    data = parse_object(content, CONFIG)
    _check_kind(data)
    for key, value in data.items():
        _check_key(key, value)
    rank, alpha = _rank(data), _alpha(data)
    scaling = alpha / (math.sqrt(rank) if _flag(data, "use_rslora") else rank)
    low, high = _SCALINGS
    if not low <= scaling <= high:
        raise _refusal(
            f"lora_alpha {show(alpha)} with r {rank} is a scaling of {scaling:.3g}",
            f"{low:g} to {high:g}",
            "train again with lora_alpha between r and 2 r",
        )
    return Config(rank, alpha, scaling, _base(data), _targets(data))


def check_base(config: Config, base: Base) -> None:
    """Refuse an adapter of another base model, or of a rank that the server has no room for."""
    if config.base not in base.names:
        raise _refusal(
            f"base_model_name_or_path is {show(config.base)}",
            " or ".join(base.names),
            "train on the served base; where this is another name of it, add it to SERVER_MODEL_ALIASES in "
            "server/entrypoint.env (server_model_aliases in the inventory)",
        )
    if config.rank > base.max_rank:
        raise _refusal(
            f"r is {config.rank}",
            f"at most {base.max_rank}",
            "train with a smaller one, or raise SERVER_MAX_LORA_RANK in server/entrypoint.env "
            "(server_max_lora_rank in the inventory)",
        )


def targeted(config: Config, modules: Iterable[str]) -> set[str]:
    """Return those of the base's `modules` (full names) that target_modules means, by peft's rules."""
    names = list(modules)
    if config.targets == _LINEAR:
        return set(names)
    if isinstance(config.targets, str):
        found = _matches(config.targets, names)
        if not found:
            raise _refusal(
                f"target_modules {show(config.targets)} matches no module", "one of the base's", _RETARGET
            )
        return found
    by_end: dict[str, list[str]] = {}
    for name in names:
        end = name
        while end:
            by_end.setdefault(end, []).append(name)
            end = end.partition(".")[2]
    for target in config.targets:
        if target not in by_end:
            raise _refusal(
                f"target_modules names {show(target)}", f"modules of the base, like {names[0]}", _RETARGET
            )
    return {name for target in config.targets for name in by_end[target]}


_RETARGET = "correct target_modules to exactly what was trained"


def _refusal(found: str, expected: str, mend: str) -> RefusedError:
    return RefusedError(f"{CONFIG}: {found}, expected {expected}: {mend}")


def _is_empty(value: object) -> bool:
    return value is None or value is False or value in ({}, [], "")


def _check_kind(data: dict[str, Any]) -> None:
    kind = data.get("peft_type")
    if kind != "LORA":
        raise _refusal(f"peft_type is {show(kind)}", "'LORA'", "vLLM serves LoRA only: train with LoraConfig")
    task = data.get("task_type")
    if task not in (None, "CAUSAL_LM"):
        raise _refusal(
            f"task_type is {show(task)}", "'CAUSAL_LM'", "the server generates text: train for that task"
        )


def _check_key(key: str, value: object) -> None:
    if key in _READ or _is_empty(value):
        return
    if key in _REFUSED:
        allowed, reason = _REFUSED[key]
        if value not in allowed:
            raise _refusal(f"{key} is {show(value)}", "it empty", f"{reason}; {_AGAIN}")
    elif key in _HARMLESS:
        types = _HARMLESS[key]
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise _refusal(
                f"{key} is {show(value)}",
                " or ".join(one.__name__ for one in types),
                "save the adapter again",
            )
    else:
        raise _refusal(
            f"{show(key)} is {show(value)}",
            "no key that may change what the adapter does",
            f"{_AGAIN}, or remove the key where it changes nothing",
        )


def _rank(data: dict[str, Any]) -> int:
    rank = data.get("r")
    if type(rank) is not int or not 1 <= rank <= _MAX_RANK:
        raise _refusal(
            f"r is {show(rank)}",
            f"a whole number, 1 to {_MAX_RANK}",
            "write the rank that it was trained with",
        )
    return rank


def _alpha(data: dict[str, Any]) -> float:
    alpha = data.get("lora_alpha")
    if isinstance(alpha, int | float) and not isinstance(alpha, bool) and 0 < alpha <= _MAX_ALPHA:
        return float(alpha)
    raise _refusal(
        f"lora_alpha is {show(alpha)}",
        f"a number above 0, at most {_MAX_ALPHA}",
        "write the alpha that it was trained with",
    )


def _flag(data: dict[str, Any], key: str) -> bool:
    value = data.get(key)
    if value is not None and not isinstance(value, bool):
        raise _refusal(f"{key} is {show(value)}", "true or false", "save the adapter again")
    return bool(value)


def _base(data: dict[str, Any]) -> str:
    init = data.get("init_lora_weights", True)
    if not any(init is one or (isinstance(init, str) and init == one) for one in (*_INITS, None)):
        raise _refusal(
            f"init_lora_weights is {show(init)}",
            "a way to begin that leaves the base as it is",
            "save it as a plain LoRA with save_pretrained(path_initial_model_for_weight_conversion=…)",
        )
    base = data.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise _refusal(
            f"base_model_name_or_path is {show(base)}",
            "a model's name",
            "write the model that it was trained on",
        )
    return base


def _targets(data: dict[str, Any]) -> tuple[str, ...] | str:
    targets = data.get("target_modules")
    if isinstance(targets, str) and targets:
        if len(targets) > _EXPRESSION_LENGTH:
            raise _refusal(
                f"target_modules has {len(targets)} characters",
                f"at most {_EXPRESSION_LENGTH}",
                "write it as a list of names",
            )
        return _LINEAR if targets.lower() == _LINEAR else targets
    if isinstance(targets, list) and targets and all(isinstance(one, str) and one for one in targets):
        return tuple(targets)
    raise _refusal(
        f"target_modules is {show(targets)}", "names of modules, or an expression for them", _RETARGET
    )


def _matches(expression: str, names: list[str]) -> set[str]:
    # Not re: it cannot be interrupted, and a stranger's expression may take longer than anybody lives.
    import regex  # noqa: PLC0415 (only adapters with an expression need it)

    mend = "write target_modules as a list of names"
    try:
        pattern = regex.compile(expression)
    except (regex.error, RecursionError, OverflowError, MemoryError) as error:
        raise _refusal(
            f"target_modules {show(expression)} does not compile ({show(str(error))})", "an expression", mend
        ) from error
    end = time.monotonic() + _EXPRESSION_SECONDS
    try:
        return {name for name in names if pattern.fullmatch(name, timeout=max(end - time.monotonic(), 0.001))}
    except TimeoutError as error:
        raise _refusal(
            f"target_modules {show(expression)} takes longer than {_EXPRESSION_SECONDS:g} s to match",
            "an expression without nested repeats",
            mend,
        ) from error
