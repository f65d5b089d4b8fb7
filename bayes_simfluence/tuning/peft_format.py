"""Adapters on disk, in the format of the ``peft`` library: a JSON and a safetensors file.

``peft.PeftModel.from_pretrained(model, folder)`` reads what is saved here, and what peft saved is
read here. Neither needs peft or PyTorch, and no pickle is read.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from bayes_simfluence.checks import Misuse, of_shape, shorten
from bayes_simfluence.files import PathLike, atomically, new_path, readable
from bayes_simfluence.networks.families import family_of
from bayes_simfluence.networks.tensor_files import Tensors
from bayes_simfluence.tuning.base import Adapting, Tuned
from bayes_simfluence.tuning.layers import HEAD, fans, in_head
from bayes_simfluence.tuning.tunings import IA3, LoRA

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
ROOT = "base_model.model."
"""What peft writes before every name."""

METHODS: dict[str, type[Adapting]] = {method.PEFT_TYPE: method for method in (LoRA, IA3)}
"""peft's name of a method -> the tuning that is the same."""

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
    tuning: Adapting
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
        prefix: what the PyTorch model puts before the checkpoint's tensor names; when omitted,
            the family's prefix, unless the checkpoint's names begin with it already.
        overwrite: replace a folder that exists.

    Raises:
        Misuse: another tuning, other parameters than it trains, a folder that exists.
        WorkFailed: the folder could not be written.
    """
    tuning = tuned.tuning.adapting()
    params = tuned.params if params is None else params
    shapes, wanted = (
        {name: x.shape for name, x in tensors.items()} for tensors in (params, tuned.params)
    )
    if shapes != wanted:
        others = sorted(name for name, _ in set(shapes.items()) ^ set(wanted.items()))
        raise Misuse(
            "params",
            got=f"other tensors than are trained: {shorten(others)}",
            expected="the trained parameters of one run",
            do="pass one run's final parameters",
        )
    if prefix is None:
        prefix = family_of(tuned.family).prefix
        prefix = "" if any(name.startswith(prefix) for name in tuned.frozen) else prefix
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
    do = "copy it again; pickled adapters (adapter_model.bin) are not read"
    with readable(file, SafetensorError, OSError, expected="a whole safetensors file", do=do):
        named = {name: jnp.asarray(x, jnp.float32) for name, x in load_file(file).items()}
    method = METHODS[config["peft_type"]]
    wrong = [
        name
        for name in named
        if not name.startswith(ROOT)
        or not (name.endswith(method.ENDINGS) or in_head(name.removeprefix(ROOT)))
    ]
    if wrong:
        raise Misuse(
            str(file),
            got=f"tensors {shorten(wrong)}",
            expected="adapters of linear layers and a head: "
            f"{ROOT}*{', *'.join(method.ENDINGS)}, {ROOT}{HEAD}.*",
            do="merge the adapter into its checkpoint with peft, and load that",
        )
    params = {name.removeprefix(ROOT): value for name, value in named.items()}
    layers = method.adapted(params)
    missing = {layer + ending for layer in layers for ending in method.ENDINGS} - set(params)
    if missing or not layers:
        raise Misuse(
            str(file),
            got=f"no tensor {shorten(sorted(missing) or method.ENDINGS)}",
            expected=f"tensors {' and '.join(method.ENDINGS)} of each adapted layer",
            do="save the adapter again",
        )
    tuning = method.of_peft(config, params, layers, str(file.with_name(CONFIG)))
    return Adapter(params, tuning, str(config.get("base_model_name_or_path") or ""))


def with_adapter(tensors: Tensors, adapter: Adapter, *, family: str) -> Tuned:
    """A network's tensors with a loaded adapter on them.

    ``tuned.assemble(tuned.params, tuned.frozen)`` are the adapted network's tensors, and training
    can go on from ``tuned.params``. A head of the adapter replaces that of ``tensors``.

    Raises:
        Misuse: layers that the network lacks, or that have another shape.
    """
    layers = adapter.tuning.adapted(adapter.params)
    names = {layer: _own_name(layer, tensors, family) for layer in layers}
    params: Tensors = {}
    for name, value in adapter.params.items():
        layer = adapter.tuning.layer_of(name)
        params[names.get(layer, layer) + name.removeprefix(layer)] = value
    tuning = adapter.tuning.renamed(names)
    do = "load the checkpoint that the adapter was trained on"
    for layer in names.values():
        for name, shape in tuning.shapes(layer, *fans(tensors, layer, family_of(family))).items():
            of_shape(f"adapter tensor {name}", params[name], shape, "which fits the network", do=do)
    return tuning.beside(tensors, params, family)


def _own_name(layer: str, tensors: Tensors, family: str) -> str:
    """The network's own name of a layer; a PyTorch model may put a prefix before it."""
    prefix = family_of(family).prefix
    names = (layer, f"{prefix}{layer}", layer.removeprefix(prefix))
    own = next((name for name in names if f"{name}.weight" in tensors), None)
    if own is None:
        raise Misuse(
            f"adapter layer {layer}",
            got="a network without it",
            expected=f"a network with it; this one has {shorten(tensors)}",
            do="load the checkpoint that the adapter was trained on",
        )
    return own


def _config_of(tuned: Tuned, tuning: Adapting, base_name: str, prefix: str) -> dict[str, Any]:
    family, layers = family_of(tuned.family), tuning.adapted(tuned.params)
    has_head = any(in_head(name) for name in tuned.params)
    return {
        "base_model_name_or_path": base_name,
        "fan_in_fan_out": any(family.transposes(layer) for layer in layers),
        "inference_mode": True,
        "modules_to_save": [HEAD] if has_head else None,
        "peft_type": tuning.PEFT_TYPE,
        "task_type": "SEQ_CLS" if has_head else family.peft_task,
        **tuning.peft_settings(layers, prefix),
    }


def _read_config(file: Path) -> dict[str, Any]:
    with readable(
        file,
        OSError,
        ValueError,
        expected="the settings of an adapter, JSON",
        do="point at the folder that save_adapter or peft's save_pretrained wrote",
    ):
        config = json.loads(file.read_text("utf-8"))
    method = config.get("peft_type") if isinstance(config, dict) else None
    if method not in METHODS:
        raise Misuse(
            f"{file} peft_type",
            got=repr(method),
            expected=f"one of {', '.join(METHODS)}",
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
