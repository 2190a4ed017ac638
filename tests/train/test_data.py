"""What a batch scores, and that its worker processes give the batches that the seed says."""

from dataclasses import replace

import numpy as np

from evalkit.train.config import TINY
from evalkit.train.data import COEFFICIENTS, TASKS, Loader, Request, make_batch
from evalkit.train.tokenizer import Encoder, train

TOKENIZER = train()
ENCODER = Encoder(TOKENIZER)
CONFIG = replace(TINY, workers=1)


def test_scored_positions_spell_the_answers():
    batch = make_batch(CONFIG, ENCODER, Request(1, 0))
    for answer in range(len(batch.answer_tasks)):
        here = batch.answers == answer
        text = TOKENIZER.decode(batch.labels[here].tolist())
        assert text.startswith(" ")
        assert text.endswith(".")
        assert (np.diff(batch.scored[here]) == 1).all()
        before = batch.tokens.reshape(-1)[: batch.scored[here][0] + 1]
        assert "\nAnswer:" in TOKENIZER.decode(before[-10:].tolist())


def test_weights_of_a_task_sum_to_its_coefficient():
    batch = make_batch(CONFIG, ENCODER, Request(1, 3))
    answered = batch.answers < len(batch.answer_tasks)
    task = batch.answer_tasks[batch.answers[answered]]
    for index in np.unique(task):
        total = batch.weights[answered][task == index].sum()
        np.testing.assert_allclose(total, COEFFICIENTS.get(TASKS[index], 1.0), rtol=1e-5)
    np.testing.assert_allclose(batch.weights[~answered].sum(), 0.1, rtol=1e-5)


def test_padding_is_never_scored():
    batch = make_batch(CONFIG, ENCODER, Request(1, 2))
    assert (batch.labels != ENCODER.pad).all()


def test_query_rows_lie_in_the_text_and_half_of_them_in_answers():
    batch = make_batch(CONFIG, ENCODER, Request(2, 0))
    answers = set(batch.scored[batch.answers < len(batch.answer_tasks)].tolist())
    length = batch.tokens.shape[1]
    for row, picked in enumerate(batch.rows):
        assert (batch.tokens[row, picked] != ENCODER.pad).all()
        assert {row * length + int(place) for place in picked[CONFIG.query_rows // 2 :]} <= answers


def test_workers_give_the_batches_that_the_seed_says_across_a_change_of_stage():
    with Loader(CONFIG) as loader:
        for stage, index in ((0, 0), (0, 1), (1, 0), (1, 1), (3, 0)):
            got, want = loader.next(stage, index), make_batch(CONFIG, ENCODER, Request(stage, index))
            for name, array in vars(want).items():
                np.testing.assert_array_equal(getattr(got, name), array, err_msg=name)
