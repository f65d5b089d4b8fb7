"""Adapters on disk, in the format of the ``peft`` library: a JSON and a safetensors file.

``peft.PeftModel.from_pretrained(model, folder)`` reads what is saved here, and what peft saved is
read here. Neither needs peft or PyTorch, and no pickle is read.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from bayes_simfluence.checks import Misuse, shorten
from bayes_simfluence.files import PathLike, atomically, first_line, new_path
from bayes_simfluence.networks.tensor_files import Tensors
from bayes_simfluence.tuning.adapters import (
    DOWN,
    HEAD,
    UP,
    VECTOR,
    adapted_modules,
    fans,
    in_head,
    matched,
    transposed,
)
from bayes_simfluence.tuning.tunings import IA3, LoRA, Tuned

__all__ = ["Adapter", "load_adapter", "save_adapter", "with_adapter"]

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
ROOT = "base_model.model."
"""What peft writes before every name."""

PREFIX = {
    "bert": "bert.",
    "roberta": "roberta.",
    "distilbert": "distilbert.",
    "gpt2": "transformer.",
    "gpt_neox": "gpt_neox.",
    "llama": "model.",
}
"""Family -> what a PyTorch model with a head says before the names of the network beneath it."""

TASKS = {"t5": "SEQ_2_SEQ_LM", "gpt2": "CAUSAL_LM", "gpt_neox": "CAUSAL_LM", "llama": "CAUSAL_LM"}
"""Family -> peft's word for its task; with a classification head it is ``SEQ_CLS``."""

NOT_BUILT = (
    "use_dora",
    "use_rslora",
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "rank_pattern",
    "alpha_pattern",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "monteclora_config",
    "velora_config",
    "arrow_config",
    "kasa_config",
)
"""Variants of peft's LoRA that change what an adapter computes: refused unless off."""

PLAIN_STARTS = (True, False, "gaussian", "orthogonal")
"""Starts of LoRA that leave the network's own weights as they are."""


@dataclass(frozen=True)
class Adapter:
    """An adapter as a folder holds it.

    Attributes:
        params: its tensors and the head's, float32, under the names of the PyTorch model.
        tuning: its settings; targets are the full names of the adapted layers.
        base_name: the checkpoint it was trained on, as far as the folder says.
    """

    params: Tensors
    tuning: LoRA | IA3
    base_name: str


def save_adapter(
    tuned: Tuned,
    folder: PathLike,
    *,
    base_name: str,
    params: Tensors | None = None,
    prefix: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write an adapter, and the head if there is one, in peft's format; all or nothing.

    The head is saved as one of peft's ``modules_to_save`` under its name here, ``classifier``.
    Transformers' classifiers of BERT have a layer of this name and shape (their pooling is
    ``pooler``); those of other families differ, and read only the rest.

    Args:
        tuned: what ``LoRA`` or ``IA3`` began.
        folder: where to; made anew.
        base_name: folder or hub name of the checkpoint; peft loads it from there.
        params: the trained parameters; ``tuned.params``, the start, when omitted.
        prefix: what the PyTorch model says before the checkpoint's tensor names; when omitted,
            what its family's models with a head say, unless the checkpoint says it already.
        overwrite: replace a folder that exists.

    Raises:
        Misuse: another tuning, other parameters than it trains, a folder that exists.
        WorkFailed: the folder could not be written.
    """
    tuning, params = tuned.tuning, tuned.params if params is None else params
    if not isinstance(tuning, LoRA | IA3):
        raise Misuse(
            "tuning",
            got=type(tuning).__name__,
            expected="LoRA or IA3",
            do="save the whole checkpoint instead",
        )
    shapes, wanted = (
        {name: one.shape for name, one in some.items()} for some in (params, tuned.params)
    )
    if shapes != wanted:
        other = sorted(name for name, _ in set(shapes.items()) ^ set(wanted.items()))
        raise Misuse(
            "params",
            got=f"other tensors than are trained: {shorten(other)}",
            expected="the trained parameters of one run",
            do="pass one run's final parameters",
        )
    prefix = _prefix_of(tuned) if prefix is None else prefix
    path = new_path(folder, overwrite=overwrite)
    config = _config_of(tuned, tuning, base_name, prefix)
    named = {
        f"{ROOT}{'' if in_head(name) else prefix}{name}": np.asarray(value, np.float32)
        for name, value in params.items()
    }
    with atomically(path) as partial:
        partial.mkdir()
        (partial / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")
        save_file(named, partial / TENSORS, metadata={"format": "pt"})
    return path


def load_adapter(folder: PathLike) -> Adapter:
    """Read a folder that ``save_adapter`` or peft's ``save_pretrained`` wrote.

    Raises:
        Misuse: files missing, truncated or malformed; a method, a variant of it, or tensors that
            are not built here.
    """
    config = _read_config(Path(folder) / CONFIG)
    file = Path(folder) / TENSORS
    named = _read_tensors(file)
    wrong = [name for name in named if not name.startswith(ROOT)]
    if wrong:
        raise _unknown_tensors(file, wrong)
    params = {name.removeprefix(ROOT): value for name, value in named.items()}
    lora = config["peft_type"] == "LORA"
    endings = (DOWN, UP) if lora else (VECTOR,)
    wrong = [name for name in params if not (name.endswith(endings) or in_head(name))]
    if wrong:
        raise _unknown_tensors(file, wrong)
    modules = adapted_modules(params)
    missing = {one + end for one in modules for end in endings} - set(params)
    if missing or not modules:
        raise Misuse(
            str(file),
            got=f"no tensor {shorten(sorted(missing) or endings)}",
            expected=f"tensors {' and '.join(endings)} of each adapted layer",
            do="save the adapter again",
        )
    tuning = _lora_of(config, params, modules, file) if lora else _ia3_of(params, modules)
    return Adapter(params, tuning, str(config.get("base_model_name_or_path") or ""))


def with_adapter(tensors: Tensors, adapter: Adapter, *, family: str) -> Tuned:
    """A network's tensors with a loaded adapter on them.

    ``tuned.assemble(tuned.params, tuned.frozen)`` are the adapted network's tensors, and training
    can go on from ``tuned.params``. A head of the adapter replaces that of ``tensors``.

    Raises:
        Misuse: layers that the network lacks, or that have another shape.
    """
    places = {module: _place(module, tensors, family) for module in adapter.tuning.targets or ()}
    params: Tensors = {name: value for name, value in tensors.items() if in_head(name)}
    for name, value in adapter.params.items():
        module = name if in_head(name) else _module_of(name)
        params[places.get(module, module) + name.removeprefix(module)] = value
    frozen = {name: value for name, value in tensors.items() if not in_head(name)}
    tuning: LoRA | IA3 = replace(adapter.tuning, targets=tuple(places.values()))
    if isinstance(tuning, IA3):
        inner = tuple(places[module] for module in tuning.feedforward or ())
        tuning = replace(tuning, feedforward=inner)
    _check_shapes(params, frozen, tuning, family)
    return Tuned(params, frozen, tuning.merging(family), tuning, family)


def _check_shapes(params: Tensors, frozen: Tensors, tuning: LoRA | IA3, family: str) -> None:
    expected: dict[str, tuple[int, ...]] = {}
    for module in tuning.targets or ():
        inward, outward = fans(frozen, module, family)
        if isinstance(tuning, LoRA):
            expected[module + DOWN] = (tuning.rank, inward)
            expected[module + UP] = (outward, tuning.rank)
        else:
            is_inner = module in (tuning.feedforward or ())
            expected[module + VECTOR] = (1, inward) if is_inner else (outward, 1)
    for name, shape in expected.items():
        if params[name].shape != shape:
            raise Misuse(
                f"adapter tensor {name}",
                got=f"shape {params[name].shape}",
                expected=f"shape {shape}, which fits the network",
                do="load the checkpoint that the adapter was trained on",
            )


def _place(module: str, tensors: Tensors, family: str) -> str:
    """The network's own name of a layer that a PyTorch model may call with a prefix or without."""
    prefix = PREFIX.get(family, "")
    names = (module, f"{prefix}{module}", module.removeprefix(prefix))
    found = [one for one in names if f"{one}.weight" in tensors]
    if not found:
        raise Misuse(
            f"adapter layer {module}",
            got="a network without it",
            expected=f"a network with it; this one has {shorten(tensors)}",
            do="load the checkpoint that the adapter was trained on",
        )
    return found[0]


def _prefix_of(tuned: Tuned) -> str:
    prefix = PREFIX.get(tuned.family, "")
    said = any(name.startswith(prefix) for name in tuned.frozen)
    return "" if said else prefix


def _config_of(tuned: Tuned, tuning: LoRA | IA3, base_name: str, prefix: str) -> dict[str, Any]:
    modules = adapted_modules(tuned.params)
    head = any(in_head(name) for name in tuned.params)
    shared = {
        "base_model_name_or_path": base_name,
        "fan_in_fan_out": any(transposed(one, tuned.family) for one in modules),
        "inference_mode": True,
        "modules_to_save": [HEAD] if head else None,
        "task_type": "SEQ_CLS" if head else TASKS.get(tuned.family),
    }
    if isinstance(tuning, LoRA):
        alpha = int(tuning.alpha) if float(tuning.alpha).is_integer() else tuning.alpha
        own = {"peft_type": "LORA", "r": tuning.rank, "lora_alpha": alpha, "lora_dropout": 0.0}
        plain = not _has_wildcards(tuning.targets or ())
        targets = list(tuning.targets or ()) if plain else [f"{prefix}{one}" for one in modules]
        return {**shared, **own, "bias": "none", "target_modules": targets}
    targets, feedforward = list(tuning.targets or ()), list(tuning.feedforward or ())
    # peft wants the second among the first, and compares the ends of names, dots or not.
    inner = {name for one in feedforward for name in matched(modules, one)}
    theirs = {name for one in feedforward for name in modules if name.endswith(one)}
    if _has_wildcards(targets + feedforward) or not set(feedforward) <= set(targets):
        theirs = set()
    if inner != theirs:
        targets = [f"{prefix}{one}" for one in modules]
        feedforward = [f"{prefix}{one}" for one in sorted(inner)]
    own = {"peft_type": "IA3", "target_modules": targets, "feedforward_modules": feedforward}
    return {**shared, **own, "init_ia3_weights": True}


def _has_wildcards(patterns: Sequence[str]) -> bool:
    return any(mark in one for one in patterns for mark in "*?[")


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise Misuse(
            str(file),
            got=f"a file that cannot be read ({first_line(error)})",
            expected="the settings of an adapter, JSON",
            do="point at the folder that save_adapter or peft's save_pretrained wrote",
        ) from error
    method = config.get("peft_type") if isinstance(config, dict) else None
    if method not in ("LORA", "IA3"):
        raise Misuse(
            f"{file} peft_type",
            got=repr(method),
            expected="one of LORA, IA3",
            do="merge the adapter into its checkpoint with peft, and load that",
        )
    variants = [name for name in NOT_BUILT if config.get(name)]
    variants += ["bias"] if config.get("bias", "none") != "none" else []
    if config.get("init_lora_weights", True) not in PLAIN_STARTS:
        variants.append("init_lora_weights")
    if variants:
        raise Misuse(
            f"{file} {variants[0]}",
            got=repr(config[variants[0]]),
            expected="plain LoRA, without this variant",
            do="merge the adapter into its checkpoint with peft, and load that",
        )
    return config


def _read_tensors(file: Path) -> Tensors:
    try:
        return {name: jnp.asarray(one, jnp.float32) for name, one in load_file(file).items()}
    except (SafetensorError, OSError) as error:
        raise Misuse(
            str(file),
            got=f"a file that cannot be read ({first_line(error)})",
            expected="a whole safetensors file",
            do="copy it again; pickled adapters (adapter_model.bin) are not read",
        ) from error


def _lora_of(config: dict[str, Any], params: Tensors, modules: Sequence[str], file: Path) -> LoRA:
    rank, alpha = config.get("r"), config.get("lora_alpha")
    other = [one for one in modules if params[one + DOWN].shape[0] != rank]
    if not isinstance(alpha, int | float) or other:
        raise Misuse(
            str(file.with_name(CONFIG)),
            got=f"r {rank!r} and lora_alpha {alpha!r}"
            + (f", and tensors of another rank ({shorten(other, 1)})" if other else ""),
            expected="the rank and scale of its tensors",
            do="copy both files of the adapter again",
        )
    return LoRA(int(params[modules[0] + DOWN].shape[0]), float(alpha), tuple(modules))


def _ia3_of(params: Tensors, modules: Sequence[str]) -> IA3:
    inner = tuple(one for one in modules if params[one + VECTOR].shape[0] == 1)
    return IA3(tuple(modules), inner)


def _unknown_tensors(file: Path, names: Sequence[str]) -> Misuse:
    return Misuse(
        str(file),
        got=f"tensors {shorten(names)}",
        expected=f"adapters of linear layers and a head: {ROOT}*.lora_A.weight, *.lora_B.weight, "
        f"*.ia3_l, {HEAD}.*",
        do="merge the adapter into its checkpoint with peft, and load that",
    )


def _module_of(name: str) -> str:
    return next(name.removesuffix(one) for one in (DOWN, UP, VECTOR) if name.endswith(one))
