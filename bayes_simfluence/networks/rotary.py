"""Frequencies of rotary position embeddings, from a configuration."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from bayes_simfluence.checks import Misuse, choice_of, positive_number

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def frequencies_of(config: "PretrainedConfig", size: int) -> Float[np.ndarray, " pair"]:
    """Radians per token of each pair of coordinates of a head (Su et al. 2021, arXiv 2104.09864).

    Built are the plain embedding, positions divided by a factor (``linear``), and the scaling of
    Llama 3.1 (``llama3``), which slows only the low frequencies.

    Args:
        size: coordinates of one head; ``partial_rotary_factor`` of them are rotated.

    Raises:
        Misuse: another scaling, or an odd number of coordinates to rotate.
    """
    options: Mapping[str, Any] = config.rope_parameters or {}
    kind = options.get("rope_type", "default")
    choice_of("config.json rope_type", kind, ["default", "linear", "llama3"])
    rotated = int(size * options.get("partial_rotary_factor", 1.0))
    if rotated < 2 or rotated % 2:
        raise Misuse(
            "config.json partial_rotary_factor",
            got=f"{rotated} of a head's {size} coordinates rotated",
            expected="an even number of at least 2",
            do="check that config.json belongs to this checkpoint",
        )
    base = positive_number("config.json rope_theta", options.get("rope_theta"))
    plain = base ** -(np.arange(0, rotated, 2, dtype=np.float32) / np.float32(rotated))
    if kind == "default":
        return plain.astype(np.float32)
    factor = positive_number("config.json rope factor", options.get("factor"))
    slow = plain / factor
    if kind == "llama3":
        share = _fast_share(plain, options, config.max_position_embeddings)
        slow = (1.0 - share) * slow + share * plain
    return slow.astype(np.float32)


def _fast_share(
    plain: Float[np.ndarray, " pair"], options: Mapping[str, Any], positions: int
) -> Float[np.ndarray, " pair"]:
    """How far each frequency keeps its speed: 1 where it turns often in the original context."""
    low, high = (
        positive_number(f"config.json {name}", options.get(name))
        for name in ("low_freq_factor", "high_freq_factor")
    )
    turns = (options.get("original_max_position_embeddings") or positions) * plain / (2 * math.pi)
    return np.clip((turns - low) / (high - low), 0.0, 1.0)
