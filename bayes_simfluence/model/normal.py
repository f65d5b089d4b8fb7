"""Normal effects: the plainest law, and what others are put on top of."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Array, Float

from bayes_simfluence.model.effects import Prior, Shape, standard
from bayes_simfluence.model.hyper import Values


@dataclass(frozen=True)
class Normal(Prior):
    """Normal effects with learned scales: most examples matter, none much more than the others."""

    name: ClassVar[str] = "normal"
    gaussian: ClassVar[bool] = True

    def law(
        self, name: str, part: str, shape: Shape, values: Values
    ) -> Float[Array, "query train knot"]:
        """Standard normal."""
        return standard(f"{name}_own", shape)
