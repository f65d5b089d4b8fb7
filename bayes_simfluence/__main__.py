"""``python -m bayes_simfluence`` is the command ``bayes-simfluence``."""

from bayes_simfluence.cli import main

main()
