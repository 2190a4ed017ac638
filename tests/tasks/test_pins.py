"""The documents that dsa-nano was trained and scored on are the same bytes for ever."""

import hashlib
from random import Random

import pytest

from evalkit.train.config import TrainConfig, refine
from tasks import documents

TASKS = {
    "needle": "2632b62ebec3e5e6",
    "multi_key": "dcb2c9bdba0d84b6",
    "siblings": "6585cf363cb36c1c",
    "variables": "3e4c78f8e1374f4b",
    "walk": "2009f5990629fcef",
    "registers": "6839a0a128395936",
}
TRAINING = {"run": "4dd22aa6cb561315", "refine": "c6fd6fe4039588b5"}


def digest(texts):
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


@pytest.mark.parametrize("task", TASKS)
def test_a_tasks_documents_are_the_recorded_ones(task):
    made = [
        document
        for length in (1024, 2048, 4096)
        for seed in (0, 7)
        for document in documents.generate(task, length=length, count=3, seed=seed)
    ]
    assert digest(d.prompt + d.target for d in made) == TASKS[task]


@pytest.mark.parametrize("run", TRAINING)
def test_a_training_runs_documents_are_the_recorded_ones(run):
    """Seeded and mixed as `evalkit.train.data.make_batch` does."""
    config = TrainConfig() if run == "run" else refine(TrainConfig())
    texts = []
    for stage, length in enumerate((256, 512, 1024, 2432, 4480)):
        rng = Random(f"train/{config.seed}/{stage}/0")
        texts += [documents.training_document(rng, length - 2, dict(config.mixture)).text for _ in range(12)]
    assert digest(texts) == TRAINING[run]
