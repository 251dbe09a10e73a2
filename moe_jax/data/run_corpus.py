"""What a run is trained on: text, or series."""

from __future__ import annotations

import dataclasses

from moe_jax.config.model import ModelConfig
from moe_jax.config.schema import DataConfig, TrainConfig
from moe_jax.data.corpus import Corpus, load_corpus
from moe_jax.data.series.training import SeriesData, load_series

TrainingCorpus = Corpus | SeriesData


def read_corpus(
    model: ModelConfig, data: DataConfig, train: TrainConfig, tokenizer: str
) -> TrainingCorpus:
    """A forecaster's series, or text by a tokenizer that may be a copy of the one that `data`
    names; says how much it is.
    """
    corpus: TrainingCorpus
    if model.forecasts:
        corpus = load_series(data, model.forecast, train.seed, tell=_say)
    else:
        data = dataclasses.replace(data, tokenizer=tokenizer)
        corpus = load_corpus(data, train.seq_len, train.seed, tell=_say)
    _say(corpus.size_text)
    return corpus


def _say(text: str) -> None:
    print(text, flush=True)
